"""Evaluation tasks of a config, and their metrics.

`build_tasks` opens every source and checks every name before a device is touched; `run_tasks` does the work.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax

from clipjax.config import Config, TaskConfig, TaskKind
from clipjax.data.eval_batches import eval_batches
from clipjax.data.images import make_eval_transform
from clipjax.data.sample import Source
from clipjax.data.sources import build_source
from clipjax.evals.encoder import Encoder
from clipjax.evals.prompts import load_classes, load_templates
from clipjax.evals.retrieval import image_retrieval, retrieval
from clipjax.evals.zero_shot import zero_shot

Task = Callable[[Encoder], dict[str, float]]
Results = dict[str, dict[str, float]]


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
    def open_batches(spec: str) -> Callable[[], Iterator[dict]]:
        source = open_source(spec, data=config.data, label_key=task.tfds_label_key)
        if not len(source):
            raise ValueError(f"source {spec!r} holds no sample; name one that does, or leave the task out")
        return lambda: eval_batches(
            source,
            view=make_eval_transform(config),
            batch_size=config.eval.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            max_examples=task.max_examples,
            max_image_pixels=config.data.max_image_pixels,
            num_threads=config.data.num_threads,
        )

    if config.loss.contrastive_weight == 0 and task.kind is not TaskKind.ZERO_SHOT:
        raise ValueError(f"kind={task.kind.value} needs embeddings, which loss.contrastive_weight=0 does not train")
    batches = open_batches(task.source)
    match task.kind:
        case TaskKind.ZERO_SHOT:
            names, templates = load_classes(task.classes or ""), load_templates(task.templates or "")
            return _counting(lambda encoder, read: zero_shot(encoder, read(batches()), names, templates))
        case TaskKind.RETRIEVAL:
            return _counting(lambda encoder, read: retrieval(encoder, read(batches())))
        case TaskKind.IMAGE_RETRIEVAL:
            gallery = open_batches(task.gallery or "")
            return _counting(lambda encoder, read: image_retrieval(encoder, read(batches()), read(gallery())))


def _counting(task: Callable[[Encoder, Callable[[Iterator[dict]], Iterator[dict]]], dict[str, float]]) -> Task:
    """Return the task with `num_skipped` among its metrics: the number of unusable samples, which are left out."""

    def run(encoder: Encoder) -> dict[str, float]:
        skipped = 0

        def read(batches: Iterator[dict]) -> Iterator[dict]:
            nonlocal skipped
            for batch in batches:
                skipped += int((encoder.gather(batch["skip_reason"]) >= 0).sum())
                yield batch

        return {**task(encoder, read), "num_skipped": float(skipped)}

    return run


def run_tasks(tasks: Mapping[str, Task], encoder: Encoder) -> Results:
    """Return the metrics of every task."""
    return {name: task(encoder) for name, task in tasks.items()}


def write_results(path: pathlib.Path, checkpoint: pathlib.Path, results: Results) -> None:
    """Write `{"checkpoint": ..., "tasks": {NAME: {METRIC: value}}}`; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"checkpoint": str(checkpoint), "tasks": results}, indent=2, allow_nan=False)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content + "\n", encoding="utf-8")
    temporary.replace(path)
