"""Results in the columns of CLIP_benchmark (LAION-AI/CLIP_benchmark, `clip_benchmark/cli.py`), to compare line by line.

A row is a task; today's names of metrics stay in the results of `clipjax eval --output`.
"""

import csv
import io
from collections.abc import Mapping
from typing import Any

from clipjax.config import TaskConfig, TaskKind
from clipjax.evals.retrieval import DEPTHS

_HEAD = ("dataset", "model", "pretrained", "task", "language", "model_fullname")
COMPARABLE = {
    TaskKind.ZERO_SHOT: "zeroshot_classification",
    TaskKind.MULTI_LABEL: "zeroshot_classification",
    TaskKind.RETRIEVAL: "zeroshot_retrieval",
}
"""Kinds of tasks that CLIP_benchmark has, with its names."""

_METRICS = {
    "top1": "acc1",
    "top5": "acc5",
    "per_class": "mean_per_class_recall",
    "map": "mean_average_precision",
    **{f"text_to_image_r{depth}": f"image_retrieval_recall@{depth}" for depth in DEPTHS},
    **{f"image_to_text_r{depth}": f"text_retrieval_recall@{depth}" for depth in DEPTHS},
}
MODEL = "clipjax"
"""What stands in the column `model`; `pretrained` is the checkpoint."""


def to_rows(
    results: Mapping[str, Mapping[str, float]], tasks: Mapping[str, TaskConfig], checkpoint: str
) -> list[dict[str, Any]]:
    """Return a row for each task of a kind that CLIP_benchmark has; the language of all is `en`, as it is there.

    Args:
        results: metrics by task.
        tasks: by name.
        checkpoint: where it lies.
    """
    rows = []
    for name, metrics in results.items():
        if (task := COMPARABLE.get(tasks[name].kind)) is None:
            continue
        row: dict[str, Any] = {
            "dataset": name,
            "model": MODEL,
            "pretrained": checkpoint,
            "task": task,
            "language": "en",
        }
        row["model_fullname"] = f"{MODEL} {checkpoint}"
        rows.append(row | {_METRICS[each]: value for each, value in metrics.items() if each in _METRICS})
    return rows


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Return rows as CSV with a header; what a row does not have stays empty."""
    metrics = [name for name in _METRICS.values() if any(name in row for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*metrics, *_HEAD], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
