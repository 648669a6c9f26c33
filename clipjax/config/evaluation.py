"""Evaluation: the tasks of a run, and when they are done."""

import enum
from dataclasses import dataclass, field, replace

from clipjax.config.data import TFDS_PREFIX, DataConfig, reads_fields
from clipjax.config.ranges import POSITIVE, bounded


class TaskKind(enum.Enum):
    """Measurement of an evaluation task."""

    ZERO_SHOT = "zero_shot"
    MULTI_LABEL = "multi_label"
    RETRIEVAL = "retrieval"
    IMAGE_RETRIEVAL = "image_retrieval"
    WORD_ORDER = "word_order"
    CAPTION_CHOICE = "caption_choice"
    PAIR_CHOICE = "pair_choice"
    LINEAR_PROBE = "linear_probe"
    FEW_SHOT = "few_shot"
    NEAREST_NEIGHBOURS = "nearest_neighbours"


class FeatureKind(enum.Enum):
    """Features of an image that a probe gets."""

    EMBEDDING = "embedding"
    BEFORE_PROJECTION = "before_projection"
    PIXELS = "pixels"


CLASSIFIERS = (TaskKind.ZERO_SHOT, TaskKind.MULTI_LABEL)
"""Kinds that need class names and templates."""

BY_LINE = (TaskKind.RETRIEVAL, TaskKind.WORD_ORDER, TaskKind.CAPTION_CHOICE)
"""Kinds that may read each line of a caption as a text."""

PROBES = (TaskKind.LINEAR_PROBE, TaskKind.FEW_SHOT, TaskKind.NEAREST_NEIGHBOURS)
"""Kinds that learn from the labelled images of a second source."""

_ALIKE = ("kind", "train_source", "features", "neighbours")
"""Fields in which a shifted task is like its reference."""

_READ = ("source", "tfds_dir", "image_field")
"""Fields that tell which images a task reads."""

_SHIFTED = (TaskKind.ZERO_SHOT, TaskKind.LINEAR_PROBE, TaskKind.NEAREST_NEIGHBOURS)
"""Kinds with one accuracy, which can be compared with that on another set."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """One evaluation task.

    `retrieval` finds captions for pictures and pictures for captions. `image_retrieval` finds, for the pictures of
    `source`, those of `gallery` with the same caption, for instance the same thing in another style, and the reverse.
    `zero_shot` needs `classes` and `templates`: a name in `clipjax/evals/prompts.py` or a file, JSON with a list of
    strings or `.txt` with one a line. The class of a sample is its integer `label`; samples without one (-1) are left
    out. `multi_label` is for images that have several classes each: their label is a list of class numbers, the metric
    mean average precision.

    `compare_prompts` also measures the class names alone and one template. `paraphrases` tells how much the right
    class's probability depends on its words: `templates`, or a JSON file with a list of texts for class names.
    `overlap` also measures the samples apart that training data has too: the file of `clipjax data dedup --overlap`.

    `word_order` compares captions with the same words in another order. `caption_choice` asks for the first caption of
    an image among all of its captions, `pair_choice` which caption belongs to which of two images with one label.

    With `captions_by_line` each line of a caption is a text of its own, as CLIP_benchmark writes them, in tasks that
    read captions.

    `linear_probe`, `few_shot` and `nearest_neighbours` learn from labelled images of `train_source` and are measured on
    `source`, by the `features` of images: the unit-norm embedding, what the image tower projects to it (None: this),
    or raw pixels. `few_shot` averages over `seeds` draws (None: 3), and compares with zero-shot if `classes` and
    `templates` are given; `neighbours` vote in `nearest_neighbours` (None: 20). `max_examples` holds for each source.

    `shift_of` names the task, of the same `eval.tasks`, on the set that `source` is a shift of: what is lost from there
    to here is told. `shift_points` lays the accuracies of other models beside: a name in `clipjax/evals/shift_points`,
    or a JSON file.

    `frames` are those of a video whose embeddings are averaged, from the middles of so many equal parts (1: the middle
    one); the image feature of the TFDS data is then the video.

    `image_field` and `caption_field` name features of TFDS data and columns of Parquet and tables, and `tfds_dir` the
    folder of TFDS data, for this task alone; None: as `data` says. `every_examples` is its interval in the loop, also
    where the others have none; None: as `eval.every_examples` says.
    """

    kind: TaskKind = TaskKind.ZERO_SHOT
    source: str = ""
    classes: str | None = None
    templates: str | None = None
    compare_prompts: bool = False
    paraphrases: str | None = None
    overlap: str | None = None
    gallery: str | None = None
    captions_by_line: bool = False
    train_source: str | None = None
    features: FeatureKind | None = None
    seeds: int | None = bounded(None, POSITIVE)
    neighbours: int | None = bounded(None, POSITIVE)
    shift_of: str | None = None
    shift_points: str | None = None
    frames: int | None = bounded(None, POSITIVE)
    image_field: str | None = None
    caption_field: str | None = None
    tfds_dir: str | None = None
    tfds_label_key: str = "label"
    max_examples: int | None = bounded(None, POSITIVE)
    every_examples: int | None = bounded(None, POSITIVE)

    def errors(self, path: str) -> list[str]:
        """Return what is wrong between the fields, a line each."""
        errors = [] if self.source else [f"{path}.source='' must name a source"]
        prompts = (self.classes, self.templates)
        if self.kind in CLASSIFIERS and None in prompts:
            errors.append(f"{path}: {self.kind.value} needs classes and templates; got {prompts}")
        errors += self._probe_errors(path)
        if self.kind not in (*CLASSIFIERS, TaskKind.FEW_SHOT) and prompts != (None, None):
            errors.append(f"{path}: {self.kind.value} would ignore classes and templates; leave both None")
        for name in ("compare_prompts", "paraphrases", "overlap"):
            if (value := getattr(self, name)) and self.kind is not TaskKind.ZERO_SHOT:
                errors.append(f"{path}.{name}={value!r}: {self.kind.value} would ignore it; leave it out")
        if self.captions_by_line and self.kind not in BY_LINE:
            errors.append(f"{path}.captions_by_line=True: {self.kind.value} would ignore it; leave it out")
        if (self.kind is TaskKind.IMAGE_RETRIEVAL) != (self.gallery is not None):
            errors.append(f"{path}.gallery={self.gallery!r}: image_retrieval needs a second source, others none")
        for name in ("image_field", "caption_field"):
            if (value := getattr(self, name)) is not None and not any(map(reads_fields, self.sources)):
                errors.append(
                    f"{path}.{name}={value!r} would be ignored: {self.source!r} is neither TFDS data nor Parquet nor a "
                    "table; leave it out"
                )
        if self.shift_of is not None and self.kind not in _SHIFTED:
            kinds = ", ".join(kind.value for kind in _SHIFTED)
            errors.append(f"{path}.shift_of={self.shift_of!r}: only {kinds} have one accuracy to compare; leave it out")
        if self.shift_points is not None and self.shift_of is None:
            errors.append(f"{path}.shift_points={self.shift_points!r} would be ignored without shift_of; give both")
        if self.frames is not None and not all(source.startswith(TFDS_PREFIX) for source in self.sources):
            errors.append(f"{path}.frames={self.frames}: videos are read from TFDS data alone; leave it out")
        if self.frames is not None and self.features is FeatureKind.PIXELS:
            errors.append(f"{path}.features=pixels: of frames={self.frames} only embeddings have a mean; take others")
        if self.tfds_dir is not None and not any(source.startswith(TFDS_PREFIX) for source in self.sources):
            errors.append(f"{path}.tfds_dir={self.tfds_dir!r} would be ignored: no source is TFDS data; leave it out")
        return errors

    def _probe_errors(self, path: str) -> list[str]:
        errors = []
        if (self.kind in PROBES) != bool(self.train_source):
            kinds = ", ".join(kind.value for kind in PROBES)
            errors.append(f"{path}.train_source={self.train_source!r}: {kinds} need a source to learn, others none")
        users = {"features": PROBES, "seeds": (TaskKind.FEW_SHOT,), "neighbours": (TaskKind.NEAREST_NEIGHBOURS,)}
        for name, kinds in users.items():
            if (value := getattr(self, name)) is not None and self.kind not in kinds:
                shown = value.value if isinstance(value, FeatureKind) else value
                errors.append(f"{path}.{name}={shown}: {self.kind.value} would ignore it; leave it out")
        if self.kind is TaskKind.FEW_SHOT and (self.classes is None) != (self.templates is None):
            errors.append(f"{path}: few_shot compares with zero-shot by both classes and templates; give both or none")
        return errors

    @property
    def reads_texts(self) -> bool:
        """True if the work needs a tokenizer."""
        if self.kind in PROBES:
            return self.classes is not None
        return self.kind is not TaskKind.IMAGE_RETRIEVAL

    @property
    def sources(self) -> list[str]:
        """The strings that name its sources."""
        return [source for source in (self.source, self.gallery, self.train_source) if source]

    def reads(self, data: DataConfig) -> DataConfig:
        """Return how its sources are read: as `data` says, but for the fields that it names itself."""
        return replace(
            data,
            tfds_dir=self.tfds_dir or data.tfds_dir,
            tfds_image_key=self.image_field or data.tfds_image_key,
            tfds_caption_key=self.caption_field or data.tfds_caption_key,
            image_field=self.image_field or data.image_field,
            caption_field=self.caption_field or data.caption_field,
        )


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation in the loop and at its end."""

    every_examples: int | None = bounded(None, POSITIVE)  # of tasks without their own; None: only after the last step
    batch_size: int = bounded(256, POSITIVE)  # images or texts per forward pass, over all devices
    tasks: dict[str, TaskConfig] = field(default_factory=dict)

    def interval_of(self, name: str) -> int | None:
        """Return the examples between two evaluations of a task in the loop, None if it has none before the end."""
        own = self.tasks[name].every_examples if name in self.tasks else None
        return self.every_examples if own is None else own

    def interval_errors(self) -> list[str]:
        """Return what is wrong between the interval of all tasks and their own, a line each."""
        if self.every_examples is None or not self.tasks:
            return []
        if any(task.every_examples is None for task in self.tasks.values()):
            return []
        return [
            f"eval.every_examples={self.every_examples} would be ignored: each task has its own every_examples; leave "
            "it out"
        ]

    def shift_errors(self) -> list[str]:
        """Return what is wrong between shifted tasks and their references, a line each."""
        errors = []
        for name, task in self.tasks.items():
            if task.shift_of is None:
                continue
            field, reference = f"eval.tasks.{name}.shift_of={task.shift_of!r}", self.tasks.get(task.shift_of)
            if reference is None:
                others = ", ".join(other for other in self.tasks if other != name)
                errors.append(f"{field} must be the name of another task; there are {others or 'none'}")
            elif reference is task or reference.shift_of is not None:
                errors.append(f"{field} is itself a shift of {reference.shift_of!r}; name a task that is none")
            else:
                unlike = [each for each in _ALIKE if getattr(task, each) != getattr(reference, each)]
                if unlike:
                    errors.append(f"{field} differs in {', '.join(unlike)} too, so that not the set alone is compared")
                if all(getattr(task, each) == getattr(reference, each) for each in _READ):
                    errors.append(f"{field} reads the same source, which is no shift of itself; give another source")
        return errors
