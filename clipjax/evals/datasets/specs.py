"""Datasets of evaluations as small records, out of `specs.toml`: what is measured on each, and where it comes from."""

import functools
import pathlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field

_FILE = pathlib.Path(__file__).with_name("specs.toml")

TOP1, PER_CLASS, RECALL, MAP_11_POINTS = "top1", "per_class", "recall", "map_11_points"

NOT_MEASURED = {
    "mean_of_top1_and_top5": "the mean of top-1 and top-5, which is not measured yet",
    "roc_auc": "ROC AUC, which is not measured yet",
    "macro_f1": "the mean of the classes' F1, which is not measured yet",
    "worst_group": "that of the worst group, and groups are not read",
    "jaccard": "the Jaccard index of chosen pictures, which is not measured",
}
"""Metrics that no task measures, in words."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A dataset.

    Attributes:
        name: of it here, and of its task.
        title: for people.
        home: page of its authors.
        metric: that which is reported of it: `top1`, `per_class`, `recall`, `map_11_points`, or one of `NOT_MEASURED`.
        kind: of its task.
        classes: number of them; None for captions.
        examples: of the set for tests, as those publish it who have it as tars; None: they do not say.
        paper_examples: the same in the paper's table 9; None: the paper has no such set.
        tfds: NAME/SPLIT there; None: TFDS lacks it, or what it has cannot be used.
        image: feature of the image in TFDS.
        label: feature of the class in TFDS.
        captions: feature of the captions in TFDS.
        names_in_tfds: class names here by those of TFDS, where they differ by more than case, spaces and marks.
        by_hand: what TFDS asks a person to do before it can prepare it.
        webdataset: its name as tars in CLIP_benchmark's layout; None: there is no such thing.
        in_datacomp: the same in DataComp, if it differs.
        publisher: of the tars on Hugging Face: CLIP_benchmark's, or DataComp's `djghosh`.
        prompts: name of its class names and templates in `prompts.py`; None: the tars bring their own.
        templates: name of its templates; None: those of `prompts`.
        frames: number of frames of a video whose embeddings are averaged; None: it is of pictures.
        absent: why nobody publishes it in a form that is read here; None: somebody does.
        licence: of the images, as far as it is short.
    """

    name: str
    title: str
    home: str
    metric: str
    kind: str = "zero_shot"
    classes: int | None = None
    examples: int | None = None
    paper_examples: int | None = None
    tfds: str | None = None
    image: str = "image"
    label: str = "label"
    captions: str | None = None
    names_in_tfds: Mapping[str, str] = field(default_factory=dict)
    by_hand: str | None = None
    webdataset: str | None = None
    in_datacomp: str | None = None
    publisher: str = "clip-benchmark"
    prompts: str | None = None
    templates: str | None = None
    frames: int | None = None
    absent: str | None = None
    licence: str = "see home"

    @property
    def left_out(self) -> str | None:
        """Why no task can measure it, in words; None: one can."""
        if self.metric in NOT_MEASURED:
            return f"its metric is {NOT_MEASURED[self.metric]}"
        return None

    @property
    def folders(self) -> tuple[str, ...]:
        """Names of its folder of tars: as CLIP_benchmark writes it, and as DataComp does; none if there is no such."""
        if self.webdataset is None:
            return ()
        return f"wds_{_plain(self.webdataset)}", f"wds_{_plain(self.in_datacomp or self.webdataset)}_test"

    @property
    def address(self) -> str | None:
        """Web page of the published tars; None: nobody publishes any."""
        if self.webdataset is None or self.absent is not None:
            return None
        folder = self.folders[0 if self.publisher == "clip-benchmark" else 1]
        return f"https://huggingface.co/datasets/{self.publisher}/{folder}"


def _plain(name: str) -> str:
    return name.replace("/", "-")


@functools.cache
def specs() -> dict[str, Spec]:
    """Return all datasets by name."""
    from clipjax.evals import datasets

    content = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    own = datasets.names()
    return {
        name: Spec(name=name, **{"prompts": name if name in own else None, **table}) for name, table in content.items()
    }
