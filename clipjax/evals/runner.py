"""Evaluation tasks of a config, and their metrics.

`build_tasks` opens every source and checks every name before a device is touched; `run_tasks` does the work.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax

from clipjax.config import Config, TaskConfig, TaskKind
from clipjax.data.eval_batches import eval_batches
from clipjax.data.images import make_eval_transform
from clipjax.data.sample import Source
from clipjax.data.sources import build_source
from clipjax.evals.encoder import Encoder
from clipjax.evals.prompts import load_classes, load_templates
from clipjax.evals.retrieval import ImageRetrieval, Retrieval
from clipjax.evals.zero_shot import ZeroShot
from clipjax.runtime.files import write_atomic

Results = dict[str, dict[str, float]]
Measure = ZeroShot | Retrieval | ImageRetrieval
"""The work of a task: from an encoder and the batches of each source to metrics; `metrics` names those that rank a
model, the larger the better."""


@dataclass(frozen=True)
class Task:
    """A task whose data is open.

    Attributes:
        measure: the work.
        config: of the run.
        sources: the data, one or two.
        max_examples: of each source; None: all.
    """

    measure: Measure
    config: Config
    sources: Sequence[Source]
    max_examples: int | None

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """Return the metrics, and as `num_skipped` the number of samples that were unusable and left out."""
        skipped = [0] * len(self.sources)

        def read(number: int) -> Iterator[dict]:
            for batch in self._batches(self.sources[number]):
                skipped[number] += int((encoder.gather(batch["skip_reason"]) >= 0).sum())
                yield batch

        metrics = self.measure(encoder, *map(read, range(len(self.sources))))
        return {**metrics, "num_skipped": float(sum(skipped))}

    def _batches(self, source: Source) -> Iterator[dict]:
        return eval_batches(
            source,
            view=make_eval_transform(self.config),
            batch_size=self.config.eval.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            max_examples=self.max_examples,
            max_image_pixels=self.config.data.max_image_pixels,
            num_threads=self.config.data.num_threads,
        )


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
    specs = [task.source] if task.gallery is None else [task.source, task.gallery]
    sources = [open_source(spec, data=config.data, label_key=task.tfds_label_key) for spec in specs]
    for spec, source in zip(specs, sources, strict=True):
        if not len(source):
            raise ValueError(f"source {spec!r} holds no sample; name one that does, or leave the task out")
    return Task(_build_measure(task), config, sources, task.max_examples)


def _build_measure(task: TaskConfig) -> Measure:
    match task.kind:
        case TaskKind.ZERO_SHOT:
            return ZeroShot(load_classes(task.classes or ""), load_templates(task.templates or ""))
        case TaskKind.RETRIEVAL:
            return Retrieval()
        case TaskKind.IMAGE_RETRIEVAL:
            return ImageRetrieval()


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


def run_tasks(tasks: Mapping[str, Task], encoder: Encoder) -> Results:
    """Return the metrics of every task."""
    return {name: task(encoder) for name, task in tasks.items()}


def write_results(path: pathlib.Path, checkpoint: pathlib.Path, results: Results) -> None:
    """Write `{"checkpoint": ..., "tasks": {NAME: {METRIC: value}}}`; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"checkpoint": str(checkpoint), "tasks": results}, indent=2, allow_nan=False)
    write_atomic(path, content + "\n")
