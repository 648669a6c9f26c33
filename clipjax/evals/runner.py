"""Evaluation tasks of a config, and their metrics.

`build_tasks` opens every source and checks every name before a device is touched, `check_samples` looks into the data;
`run_tasks` does the work. A task that fails never costs the others, or the run: all processes leave it out together.
"""

import contextlib
import itertools
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from clipjax.config import Config, DataConfig, FeatureKind, TaskConfig, TaskKind
from clipjax.data.digests import spread
from clipjax.data.eval_batches import eval_batches
from clipjax.data.patches import make_view
from clipjax.data.sample import BadSample, Sample, Source
from clipjax.data.sources import build_source
from clipjax.data.training_stream import per_process
from clipjax.evals.choice import CaptionChoice, Choice, PairChoice
from clipjax.evals.encoder import Encoder, NotFiniteEmbeddings
from clipjax.evals.multi_label import MultiLabel
from clipjax.evals.overlap import load_overlap
from clipjax.evals.probe_tasks import FewShot, LinearProbe, NearestNeighbours
from clipjax.evals.prompts import load_classes_for, load_paraphrases, load_templates
from clipjax.evals.relabelled import class_names_of, number_as_listed
from clipjax.evals.retrieval import ImageRetrieval, Retrieval
from clipjax.evals.robustness import Shift, describe_shifts
from clipjax.evals.shift_points import load_shift_points
from clipjax.evals.word_order import WordOrder
from clipjax.evals.zero_shot import ZeroShot
from clipjax.runtime import process_log, processes

Results = dict[str, dict[str, float]]
Measure = (
    ZeroShot | MultiLabel | Retrieval | ImageRetrieval | WordOrder | Choice | LinearProbe | FewShot | NearestNeighbours
)
"""The work of a task: from an encoder and the batches of each source to metrics, and JSON under `DETAILS` if there is
more to tell; `metrics` names those that rank a model, the larger the better."""

DETAILS = "details"


RESULTS_FILE = "results.json"
AGREE_SECONDS = 30.0
"""Time for the other processes to tell that their devices lack memory, too."""

_evaluations = itertools.count()
_FAILED = -2  # in place of skip reasons: this process could not read its part
_LOOKED_AT = 16  # samples of a source that are read before the work


class ReadFailed(ValueError):
    """A task's data that some process cannot read."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome of tasks, by name.

    Attributes:
        results: metrics of those that worked.
        failures: reasons of those that did not.
        details: JSON values about those that worked, for instance of each class.
        shifts: JSON values about those that are shifts of others; see `describe_shifts`.
    """

    results: Results
    failures: dict[str, str]
    details: dict[str, Any] = field(default_factory=dict)
    shifts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task whose data is open.

    Attributes:
        measure: the work.
        config: of the run.
        sources: the data, one or two.
        max_examples: of each source; None: all.
        shift: what it is a shift of; None: of nothing.
        frames: of each sample, which is a video; None: it is a picture.
    """

    measure: Measure
    config: Config
    sources: Sequence[Source]
    max_examples: int | None
    shift: Shift | None = None
    frames: int | None = None

    def __call__(self, encoder: Encoder) -> tuple[dict[str, float], Any]:
        """Return the metrics, among them as `num_skipped` how many samples were unusable and left out; and details.

        Raises:
            ReadFailed: a process cannot read its part; on all processes, after the same batch.
        """
        skipped = [0] * len(self.sources)

        def read(number: int) -> Iterator[dict]:
            for batch, reasons in self.read_together(encoder, number):
                skipped[number] += int((reasons >= 0).sum())
                yield batch

        metrics = dict(self.measure(encoder, *map(read, range(len(self.sources)))))
        details = metrics.pop(DETAILS, None)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NotFiniteEmbeddings(f"its metric {name} is {value}")
        return {**metrics, "num_skipped": float(sum(skipped))}, details

    def check_samples(self) -> None:
        """Refuse a task that cannot work, as far as a few samples tell.

        Raises:
            ValueError: what is wrong with its data.
        """
        for source in self.sources:
            size = min(len(source), self.max_examples or len(source))
            places, samples = spread(size, _LOOKED_AT), list[Sample]()
            for index in places:
                with contextlib.suppress(BadSample):
                    samples.append(source[index])
            self.measure.check_samples(samples, is_all=len(places) == size)

    def read_together(self, encoder: Encoder, number: int) -> Iterator[tuple[dict, np.ndarray]]:
        """Yield this process's part of each batch of a source, and the skip reasons of the whole batch.

        A process that fails to read tells so in place of its skip reasons; otherwise the others would wait for it.

        Raises:
            ReadFailed: a process cannot read its part.
        """
        local_size = per_process("eval.batch_size", self.config.eval.batch_size, jax.process_count())
        batches = self._batches(self.sources[number])
        while True:
            batch, error = None, None
            try:
                batch = next(batches, None)
            except Exception as failure:
                error = failure
            if batch is None and error is None:
                return
            reasons = encoder.gather(np.full(local_size, _FAILED, np.int32) if batch is None else batch["skip_reason"])
            if (reasons == _FAILED).any():
                raise ReadFailed(_join(encoder.gather_json(_describe(error)))) from error
            assert batch is not None
            yield batch, reasons

    def _batches(self, source: Source) -> Iterator[dict]:
        return eval_batches(
            source,
            view=make_view(self.config),
            batch_size=self.config.eval.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            max_examples=self.max_examples,
            max_image_pixels=self.config.data.max_image_pixels,
            background=self.config.data.background,
            exif_orientation=self.config.data.exif_orientation,
            frames=self.frames,
            num_threads=self.config.data.num_threads,
        )


def task_sources(config: Config) -> list[tuple[str, DataConfig]]:
    """Return the strings that name the sources of the tasks, and how each is read."""
    return [(source, task.reads(config.data)) for task in config.eval.tasks.values() for source in task.sources]


def tfds_dirs(config: Config) -> set[str | None]:
    """Return the folders of TFDS data of a config and of its tasks; None is the usual one."""
    return {config.data.tfds_dir, *(task.reads(config.data).tfds_dir for task in config.eval.tasks.values())}


def build_tasks(config: Config, open_source: Callable[..., Source] = build_source) -> dict[str, Task]:
    """Open the tasks of `config.eval.tasks`, by name; `open_source` opens their data.

    Raises:
        ValueError: missing data, unknown classes or templates; the task is named.
    """
    tasks = {}
    for name, task in config.eval.tasks.items():
        try:
            tasks[name] = _build_task(config, task, open_source)
        except ValueError as error:
            raise ValueError(f"eval.tasks.{name}: {error}") from error
    return tasks


def _build_task(config: Config, task: TaskConfig, open_source: Callable[..., Source]) -> Task:
    if config.loss.contrastive_weight == 0 and task.kind is not TaskKind.ZERO_SHOT:
        raise ValueError(f"kind={task.kind.value} needs embeddings, which loss.contrastive_weight=0 does not train")
    if config.loss.contrastive_weight == 0 and (task.compare_prompts or task.paraphrases is not None):
        raise ValueError(
            "compare_prompts and paraphrases need embeddings, which loss.contrastive_weight=0 does not train"
        )
    if config.loss.contrastive_weight == 0 and task.frames is not None:
        raise ValueError("frames have a mean of embeddings, which loss.contrastive_weight=0 does not train")
    if getattr(config.model.image, "max_patches", None) is not None:
        if task.features is FeatureKind.PIXELS:
            raise ValueError("features=pixels: images of variable aspect (model.image.max_patches) differ in size")
        if task.frames is not None:
            raise ValueError("frames: a model of variable aspect (model.image.max_patches) reads no videos here")
    data = task.reads(config.data)
    frames = {} if task.frames is None else {"frames": task.frames}
    sources = [open_source(spec, data=data, label_key=task.tfds_label_key, **frames) for spec in task.sources]
    for spec, source in zip(task.sources, sources, strict=True):
        if not len(source):
            raise ValueError(f"source {spec!r} holds no sample; name one that does, or leave the task out")
    sources = [number_as_listed(task.classes, source) for source in sources]
    points = None if task.shift_points is None else load_shift_points(task.shift_points)
    shift = None if task.shift_of is None else Shift(task.shift_of, points)
    return Task(_build_measure(task, sources), config, sources, task.max_examples, shift, task.frames)


def _build_measure(task: TaskConfig, sources: Sequence[Source]) -> Measure:
    match task.kind:
        case TaskKind.ZERO_SHOT:
            names, templates = _load_prompts(task, sources)
            given = task.paraphrases
            paraphrases = None if given is None else load_paraphrases(given, names, templates)
            overlap = None if task.overlap is None else load_overlap(task.overlap, sources[0])
            return ZeroShot(names, templates, task.compare_prompts, paraphrases, overlap)
        case TaskKind.MULTI_LABEL:
            return MultiLabel(*_load_prompts(task, sources))
        case TaskKind.RETRIEVAL:
            return Retrieval(task.captions_by_line)
        case TaskKind.IMAGE_RETRIEVAL:
            return ImageRetrieval()
        case TaskKind.WORD_ORDER:
            return WordOrder(task.captions_by_line)
        case TaskKind.CAPTION_CHOICE:
            return CaptionChoice(task.captions_by_line)
        case TaskKind.PAIR_CHOICE:
            return PairChoice()
        case _:
            return _build_probe(task, sources)


def _load_prompts(task: TaskConfig, sources: Sequence[Source]) -> tuple[Sequence[str], Sequence[str]]:
    """Return class names in the order of the data's labels, and templates."""
    return load_classes_for(task.classes or "", class_names_of(sources[0])), load_templates(task.templates or "")


def _build_probe(task: TaskConfig, sources: Sequence[Source]) -> LinearProbe | FewShot | NearestNeighbours:
    features = task.features or FeatureKind.BEFORE_PROJECTION
    if task.kind is TaskKind.LINEAR_PROBE:
        return LinearProbe(features)
    if task.kind is TaskKind.NEAREST_NEIGHBOURS:
        return NearestNeighbours(features, task.neighbours or 20)
    prompts = _load_prompts(task, sources) if task.classes and task.templates else None
    return FewShot(features, task.seeds or 3, prompts)


def check_metric(best: str, tasks: Mapping[str, Task]) -> None:
    """Refuse a `checkpoint.best_metric` that none of the tasks will give.

    Raises:
        ValueError: it is one; with all that the tasks will give.
    """
    known = [f"{name}:{metric}" for name, task in tasks.items() for metric in task.measure.metrics]
    if best not in known:
        raise ValueError(
            f"checkpoint.best_metric={best!r} must be TASK:METRIC, one of {', '.join(known) or 'none: no tasks'}"
        )


def check_samples(tasks: Mapping[str, Task]) -> None:
    """Look at a few samples of each task, and refuse those that show that it cannot work.

    Raises:
        ValueError: labels beyond the class names, or nothing that the task needs; the task is named.
    """
    for name, task in tasks.items():
        try:
            task.check_samples()
        except (ValueError, OSError) as error:
            raise ValueError(f"eval.tasks.{name}: {error}") from error


def run_tasks(
    tasks: Mapping[str, Task],
    encoder: Encoder,
    *,
    done: Mapping[str, dict[str, float]] | None = None,
    keep: Callable[[str, dict[str, float], Any], None] = lambda *_: None,
) -> Evaluation:
    """Run every task; one that fails is left out, on all processes alike, and the others go on.

    The traceback of a failure goes to the log of its process alone.

    Args:
        tasks: by name.
        encoder: of the model.
        done: metrics of tasks that are not run again, the same on all processes.
        keep: takes name, metrics and details of each task that is done, on each process.

    Raises:
        JaxRuntimeError: of several processes, one has lost its devices or its peers; the others may wait for it.
    """
    evaluation, key = Evaluation({}, {}), f"evaluation/{next(_evaluations)}"
    for number, (name, task) in enumerate(tasks.items()):
        if done and name in done:
            evaluation.results[name] = done[name]
            continue
        metrics: dict[str, float] = {}
        details, error = None, None
        try:
            metrics, details = task(encoder)
        except Exception as failure:
            if isinstance(failure, jax.errors.JaxRuntimeError) and not _nobody_waits(failure, f"{key}/{number}"):
                raise
            error = failure
            process_log.info(f"evaluation task {name} failed:\n{traceback.format_exc()}")
        if text := _join(encoder.gather_json(_describe(error))):
            evaluation.failures[name] = text
        else:
            evaluation.results[name] = metrics
            if details is not None:
                evaluation.details[name] = details
            keep(name, metrics, details)
    shifts = {name: task.shift for name, task in tasks.items() if task.shift is not None}
    evaluation.shifts.update(describe_shifts(evaluation.results, shifts))
    return evaluation


def _nobody_waits(failure: Exception, key: str) -> bool:
    """Return True if no other process waits for this one: there is none, or the devices of all lack memory for a task.

    The processes tell each other without their devices, in which one that has no such error may wait.
    """
    if jax.process_count() == 1:
        return True
    if "RESOURCE_EXHAUSTED" not in str(failure):
        return False
    processes.kv_set(f"{key}/{jax.process_index()}", str(failure))
    try:
        for rank in range(jax.process_count()):
            processes.kv_get(f"{key}/{rank}", timeout_seconds=AGREE_SECONDS)
    except TimeoutError:
        return False
    return True


def _describe(error: Exception | None) -> str:
    """Return an error in words; empty if there is none."""
    if error is None:
        return ""
    expected = isinstance(error, ValueError | OSError) and not isinstance(error, UnicodeError)
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    return text or type(error).__name__


def _join(texts: Sequence[str]) -> str:
    """Return the error of all processes; if it is not that of all, with their numbers."""
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"process {rank}: {text}" for rank, text in enumerate(texts) if text)
