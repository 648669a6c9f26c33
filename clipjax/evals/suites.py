"""Suites of datasets, and the tasks of those that are there.

`plan_suite` looks for each dataset of a suite: first as a folder of tars in CLIP_benchmark's layout, else as prepared
TFDS data. What is absent, or cannot be measured, is told in one line each. A config file takes the tasks of a suite by
`suite_tasks`. It lies here and not in `config`, because it looks at data, which nothing there does.

Source of the layout: clip_benchmark/datasets/builder.py and webdataset_builder.py of LAION-AI/CLIP_benchmark.
"""

import logging
import pathlib
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from clipjax.config import TaskConfig, TaskKind
from clipjax.config.data import TFDS_PREFIX
from clipjax.config.paths import STORES, expand
from clipjax.data.tfds import is_prepared
from clipjax.evals import datasets, shift_points
from clipjax.evals.datasets.specs import Spec, specs
from clipjax.evals.prompts import read_lines
from clipjax.runtime import objects
from clipjax.runtime.storage import is_address, read_small
from clipjax.runtime.terminal import printable

SHIFTS_OF_IMAGENET = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet")
"""Datasets of a suite that are told as shifts of ImageNet, if that is measured too."""

_IMAGENET = "imagenet"
_MAX_LIST_BYTES = 2**20
_CLASSES, _TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suite:
    """Some datasets.

    Attributes:
        title: for people.
        names: of the datasets.
        is_paper: templates and numbers of examples are the paper's, and not those that come with the tars.
    """

    title: str
    names: tuple[str, ...]
    is_paper: bool = False

    def examples(self, name: str) -> int | None:
        """Return how many examples a dataset of the suite should have; None: nobody says."""
        spec = specs()[name]
        return spec.paper_examples if self.is_paper else spec.examples


SUITES = {
    "clip_paper": Suite(
        "the 27 datasets of CLIP's paper (arXiv 2103.00020, table 9)",
        tuple(name for name, spec in specs().items() if spec.paper_examples is not None),
        is_paper=True,
    ),
    "datacomp": Suite(
        "DataComp's 40 tasks (mlfoundations/datacomp, tasklist.yml at commit 4a8df19)",
        (
            *("caltech101", "cifar10", "cifar100", "clevr_counts", "clevr_distance", "country211", "dtd", "eurosat"),
            *("fgvc_aircraft", "food101", "gtsrb", "imagenet", "imagenet_sketch", "imagenet_v2", "imagenet_a"),
            *("imagenet_o", "imagenet_r", "kitti", "mnist", "objectnet", "flowers102", "oxford_pets"),
            *("voc2007_objects", "pcam", "rendered_sst2", "resisc45", "stanford_cars", "stl10", "sun397", "svhn"),
            *("flickr30k", "coco", "winogavil", "iwildcam", "camelyon17", "fmow", "dollar_street", "geode"),
            *("fairface", "utkface"),
        ),
    ),
    "clip_benchmark": Suite(
        "CLIP_benchmark's 41 sets of tars (LAION-AI/CLIP_benchmark, benchmark/webdatasets.txt at commit 48de38c)",
        (
            *("coco", "flickr8k", "flickr30k", "imagenet", "imagenet_v2", "imagenet_sketch", "imagenet_a"),
            *("imagenet_r", "imagenet_o", "objectnet", "fer2013", "voc2007_objects", "voc2007", "sun397"),
            *("stanford_cars", "fgvc_aircraft", "mnist", "stl10", "gtsrb", "country211", "rendered_sst2"),
            *("caltech101", "cifar10", "cifar100", "clevr_counts", "clevr_distance", "diabetic_retinopathy", "dmlab"),
            *("dsprites_orientation", "dsprites_x_position", "dsprites_y_position", "dtd", "eurosat", "kitti"),
            *("flowers102", "oxford_pets", "pcam", "resisc45", "smallnorb_azimuth", "smallnorb_elevation", "svhn"),
        ),
    ),
    "robustness": Suite(
        "ImageNet and its shifts",
        ("imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet"),
    ),
    "retrieval": Suite("captions and pictures, Karpathy's test splits", ("flickr30k", "coco")),
    "quick": Suite("small sets", ("scenes_val", "scenes_unseen", "scenes_captions", "mnist", "cifar10")),
}


@dataclass(frozen=True)
class Plan:
    """The datasets of a suite, by name.

    Attributes:
        tasks: of those that are there.
        missing: of the others the reason, and what to do, in one line each.
    """

    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


class _Unusable(ValueError):
    """The error of a folder of tars that is there, but not as it should be."""


def suite_tasks(
    name: str,
    *,
    folder: str | None = None,
    tfds_dir: str | None = None,
    only: Collection[str] | None = None,
    max_examples: int | None = None,
) -> dict[str, TaskConfig]:
    """Return the tasks of a suite for a config's `eval.tasks`; what is not there is left out with a warning.

    Args:
        name: of the suite.
        folder: holds folders of tars, as `wds_imagenetv2`, or is the address of such a one in a store.
        tfds_dir: of prepared TFDS data; None: TFDS's own default.
        only: names of datasets; None: all of the suite. None of these may be missing.
        max_examples: of each task.

    Raises:
        ValueError: there is no such suite or dataset; nothing is there, or not all of `only`.
        OSError: a store does not tell.
    """
    plan = plan_suite(name, folder=folder, tfds_dir=tfds_dir, only=only)
    require_tasks(name, plan, all_of_them=only is not None)
    for each, why in plan.missing.items():
        _log.warning("suite %s: %s is left out: %s", name, each, printable(why))
    for task in plan.tasks.values():
        task.max_examples = max_examples
        if task.source.startswith(TFDS_PREFIX):
            task.tfds_dir = tfds_dir
    return plan.tasks


def require_tasks(name: str, plan: Plan, *, all_of_them: bool) -> None:
    """Refuse a plan without tasks or, where all are wanted by name, with anything missing.

    Raises:
        ValueError: what is missing, a line each.
    """
    if plan.missing and (all_of_them or not plan.tasks):
        head = "not all of these datasets can be measured" if plan.tasks else "none of its datasets can be measured"
        lines = [f"  {each}: {why}" for each, why in plan.missing.items()]
        raise ValueError("\n".join([f"suite {name}: {head}", *lines]))


def plan_suite(
    name: str, *, folder: str | None = None, tfds_dir: str | None = None, only: Collection[str] | None = None
) -> Plan:
    """Return the tasks of a suite, as far as its data is there, and why the others are not.

    Nothing but names and lists is read: that a set's samples are well is seen when its task is built. Tasks on TFDS
    data do not name `tfds_dir`.

    Args:
        name: of the suite.
        folder: see `suite_tasks`.
        tfds_dir: see `suite_tasks`.
        only: names of datasets; None: all of the suite.

    Raises:
        ValueError: there is no such suite, dataset or folder.
        OSError: a store does not tell.
    """
    if name not in SUITES:
        raise ValueError(f"suite={name!r} must be one of {', '.join(SUITES)}")
    suite, plan = SUITES[name], Plan()
    for each in suite.names if only is None else only:
        if each not in suite.names:
            raise ValueError(f"{each!r} is no dataset of the suite {name}; they are {', '.join(suite.names)}")
    place = None if folder is None else _check_folder(folder)
    prepared = None if tfds_dir is None else expand(tfds_dir, "tfds_dir", schemes=STORES)
    for each in suite.names:
        if only is not None and each not in only:
            continue
        spec = specs()[each]
        try:
            task = None if spec.left_out else _find(spec, suite, place, prepared)
            why = spec.left_out or _advice(spec, place)
        except _Unusable as error:
            task, why = None, str(error)
        if task is None:
            plan.missing[each] = why
        else:
            plan.tasks[each] = task
    _tell_shifts(plan.tasks)
    return plan


def _tell_shifts(tasks: dict[str, TaskConfig]) -> None:
    """Set which tasks are shifts of ImageNet, if that is among them, and the published models to lay beside."""
    for name in SHIFTS_OF_IMAGENET:
        if name in tasks and _IMAGENET in tasks:
            tasks[name].shift_of = _IMAGENET
            tasks[name].shift_points = name if name in shift_points.names() else None


def _check_folder(folder: str) -> str:
    """Return the folder of all tars, with `~` expanded.

    Raises:
        ValueError: there is none, or a pattern would be read out of its name.
    """
    place = expand(folder, "folder", schemes=STORES).rstrip("/") or "/"
    if re.search(r"[*?\[\]{}]", place):
        raise ValueError(f"folder={folder!r} must not hold any of * ? [ ] {{ }}, which would make a pattern of it")
    if not is_address(place) and not pathlib.Path(place).is_dir():
        raise ValueError(f"folder={folder!r} is no folder; it must hold folders of tars, as wds_imagenetv2")
    return place


def _find(spec: Spec, suite: Suite, place: str | None, tfds_dir: str | None) -> TaskConfig | None:
    """Return the task of a dataset, None if it is not there."""
    for name in spec.folders if place is not None else ():
        if tars := _list_tars(f"{place}/{name}/test"):
            return _task_on_tars(spec, suite, f"{place}/{name}", tars)
    if spec.tfds is None or not is_prepared(spec.tfds.rpartition("/")[0], tfds_dir):
        return None
    return TaskConfig(
        kind=TaskKind(spec.kind),
        source=f"{TFDS_PREFIX}{spec.tfds}",
        classes=spec.prompts,
        templates=spec.templates or spec.prompts,
        image_field=spec.image,
        frames=spec.frames,
        caption_field=spec.captions,
        tfds_label_key=spec.label,
    )


def _list_tars(folder: str) -> list[str]:
    """Return the names of the tars in a folder; none if it is absent."""
    if is_address(folder):
        return [path.rpartition("/")[2] for path in objects.list_files(f"{folder}/*.tar")]
    return sorted(path.name for path in pathlib.Path(folder).glob("*.tar"))


def _task_on_tars(spec: Spec, suite: Suite, folder: str, tars: list[str]) -> TaskConfig:
    """Return the task of a folder of tars.

    Raises:
        _Unusable: something of it is missing or does not fit.
    """
    kind = TaskKind(spec.kind)
    given = "".join(_read_list(f"{folder}/dataset_type.txt") or []).lower() or "classification"
    wanted = "retrieval" if kind is TaskKind.RETRIEVAL else "classification"
    if given != wanted:
        raise _Unusable(f"{folder}/dataset_type.txt says {given!r}, and the suite measures it as {wanted}")
    task = TaskConfig(kind=kind, source=_tars_source(folder, tars), captions_by_line=kind is TaskKind.RETRIEVAL)
    if kind is TaskKind.ZERO_SHOT:
        task.classes, task.templates = _classes_of(spec, folder), _templates_of(spec, suite, folder)
    return task


def _tars_source(folder: str, tars: list[str]) -> str:
    """Return the string that names the tars, all of those that `nshards.txt` tells.

    Raises:
        _Unusable: some are missing.
    """
    if (lines := _read_list(f"{folder}/test/nshards.txt")) is None:
        return f"{folder}/test/*.tar"
    number = int(lines[0]) if len(lines) == 1 and lines[0].isdecimal() else 0
    missing = [name for name in (f"{shard}.tar" for shard in range(number)) if name not in tars]
    if missing or not number:
        told = f"tells of {number} tars, and {missing[0]} is missing" if missing else "does not tell how many tars"
        raise _Unusable(f"{folder}/test/nshards.txt {told}; download the folder again")
    return f"{folder}/test/{{0..{number - 1}}}.tar" if number > 1 else f"{folder}/test/0.tar"


def _classes_of(spec: Spec, folder: str) -> str:
    """Return the name of a list that is that of a folder, or else the folder's file.

    Raises:
        _Unusable: the file is absent, or its number of names is not that of the dataset.
    """
    place = f"{folder}/{_CLASSES}"
    if (lines := _read_list(place)) is None:
        raise _Unusable(f"{place} is missing, and without it nobody knows what its labels mean; put it there")
    if spec.classes is not None and len(lines) != spec.classes:
        raise _Unusable(f"{place} holds {len(lines)} names, and {spec.title} has {spec.classes} classes")
    # The published lists of ImageNet and of CLEVR's distances hold names twice or blank, which files may not.
    known = spec.prompts is not None and list(datasets.prompts_of(spec.prompts).classes) == lines
    return spec.prompts if known and spec.prompts else place


def _templates_of(spec: Spec, suite: Suite, folder: str) -> str:
    """Return the name of the templates, or the folder's file.

    Raises:
        _Unusable: there are none.
    """
    own, place = spec.templates or spec.prompts, f"{folder}/{_TEMPLATES}"
    if own and (suite.is_paper or not _read_list(place)):
        return own
    if not _read_list(place):
        raise _Unusable(f"{place} is missing; put it there, with one template a line")
    return place


def _read_list(place: str) -> list[str] | None:
    """Return the lines of a small text, None if there is none.

    Raises:
        _Unusable: it is no such text.
    """
    try:
        return read_lines(read_small(place, _MAX_LIST_BYTES), place)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _Unusable(str(error)) from error


def _advice(spec: Spec, place: str | None) -> str:
    """Return why a dataset is missing, and what to do."""
    if spec.name.startswith("scenes"):
        return "not there; `clipjax data scenes` draws it"
    ways = []
    if spec.tfds is not None:
        by_hand = f" ({spec.by_hand})" if spec.by_hand else ""
        ways.append(f"`clipjax suites --prepare={spec.name} --tfds_dir=DIR` makes it by TFDS{by_hand}")
    if spec.folders:
        target = f"{place or 'SUITE_DIR'}/{spec.folders[0]}"
        if spec.address is not None:
            name = spec.address.rpartition("/")[2]
            ways.append(f"download {spec.address} to {place or 'SUITE_DIR'}/{name} (--suite_dir)")
        else:
            ways.append(f"{spec.absent}; put tars and {_CLASSES} into {target} (--suite_dir)")
    return f"not there; {', or '.join(ways)}"
