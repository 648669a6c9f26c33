"""Comparisons between tasks of an evaluation: zero-shot against probes, and sets against those they are shifts of."""

from collections.abc import Mapping
from typing import Any

from clipjax.config import FeatureKind, TaskConfig, TaskKind
from clipjax.evals.runner import Evaluation
from clipjax.evals.shift_points import ShiftPoints, load_shift_points
from clipjax.reports.figures import Shown, difference_plot, shift_plot

_SAME_IMAGES = ("source", "tfds_dir", "image_field", "tfds_label_key")
"""Fields of a task that tell which labelled images it is measured on. `max_examples`, which holds for the training
source too, tells less than the number of images that were measured."""


def against_probes(evaluation: Evaluation, tasks: Mapping[str, TaskConfig]) -> dict[str, Any] | None:
    """Return zero-shot beside linear probes on the same images, the weakest zero-shot first; None without such pairs.

    Args:
        evaluation: with the results.
        tasks: by name, as the config has them.

    Source: figure 5 of arXiv 2103.00020.
    """
    by_kind = {
        kind: [name for name in evaluation.results if tasks[name].kind is kind]
        for kind in (TaskKind.ZERO_SHOT, TaskKind.LINEAR_PROBE)
    }
    rows = []
    for name in by_kind[TaskKind.ZERO_SHOT]:
        for probe in by_kind[TaskKind.LINEAR_PROBE]:
            counts = {evaluation.results[each]["num_examples"] for each in (name, probe)}
            if _images(tasks[name]) == _images(tasks[probe]) and len(counts) == 1:
                zero_shot, learnt = evaluation.results[name]["top1"], evaluation.results[probe]["top1"]
                features = (tasks[probe].features or FeatureKind.BEFORE_PROJECTION).value.replace("_", " ")
                row = {"name": name, "probe": probe, "features": features, "zero_shot": zero_shot, "learnt": learnt}
                rows.append(row | {"lost": learnt - zero_shot})
    if not rows:
        return None
    rows.sort(key=lambda row: (-row["lost"], row["name"], row["probe"]))
    names = [row["name"] if row["features"] != "pixels" else f"{row['name']}, pixels" for row in rows]
    return {"rows": rows, "plot": difference_plot(names, [-row["lost"] for row in rows])}


def _images(task: TaskConfig) -> tuple[Any, ...]:
    return tuple(getattr(task, field) for field in _SAME_IMAGES)


def shifts(evaluation: Evaluation) -> dict[str, Any] | None:
    """Return what shifted tasks lose, and a plot for each reference and points beside it; None if there is none.

    Args:
        evaluation: with the results, and what its tasks are shifts of.
    """
    if not evaluation.shifts:
        return None
    rows = [{"name": name, **found} for name, found in evaluation.shifts.items() if "gap" in found]
    rows.sort(key=lambda row: (row["gap"], row["name"]))
    lost = [{"name": name, **found} for name, found in evaluation.shifts.items() if "gap" not in found]
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["reference"], row.get("points")), []).append(row)
    plots = [
        {
            "label": ", ".join(row["name"] for row in group),
            "beside": points,
            "svg": shift_plot(
                [Shown(row["name"], row["reference_top1"], row["top1"]) for row in group], reference, _load(points)
            ),
        }
        for (reference, points), group in groups.items()
    ]
    return {"rows": rows, "lost": lost, "plots": plots, "has_points": any("points" in row for row in rows)}


def _load(points: str | None) -> ShiftPoints | None:
    return None if points is None else load_shift_points(points)
