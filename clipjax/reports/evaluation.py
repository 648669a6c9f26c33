"""The page of an evaluation: what each task gave, which classes are taken for which, and how samples are ranked.

Reading order: `render`, `_task`, `_classes`; `comparisons` has what is between tasks, `figures` the plots.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from clipjax.config import TaskConfig, TaskKind
from clipjax.evals.examples import Examples
from clipjax.evals.few_shot import SHOTS
from clipjax.evals.results import compare
from clipjax.evals.runner import Evaluation, Results
from clipjax.monitoring.run_logger import metric_text
from clipjax.reports.comparisons import against_probes, shifts
from clipjax.reports.figures import confusion_plot, few_shot_plot, sweep_plot
from clipjax.runtime.terminal import printable

_MOST_CLASSES = 200  # of which the confusion matrix is drawn
_MOST_ROWS = 100  # of a table of classes
_MOST_WORDINGS = 12
_SHOTS = {f"top1_{shots}_shot": shots for shots in SHOTS}
_HEADLINES = (
    "top1",
    "image_to_text_r1",
    "source_to_gallery_r1",
    "caption_preferred",
    "group_score",
    "text_score",
    *reversed(_SHOTS),
)
_LABELS = {
    "top1": "top-1",
    "top5": "top-5",
    "per_class": "mean per class",
    "top1_names": "top-1, class names alone",
    "top1_one_template": "top-1, one template",
    "wording_std": "spread of the right class's probability over wordings",
    "wording_range": "its range over wordings",
    "caption_preferred": "captions preferred to their shuffled words",
    "shuffled_similarity": "cosine of captions with their shuffled words",
    "shuffled_text_to_image_r1": "shuffled words to image, R@1",
    "num_examples": "examples",
    "num_texts": "texts",
    "num_skipped": "unusable samples",
    "num_unlabelled": "images without a label",
    "num_of_unseen_classes": "images of classes that training lacks",
    "top1_zero_shot": "top-1, zero-shot",
    "best_c": "C",
    **{metric: f"top-1, {shots} of each class" for metric, shots in _SHOTS.items()},
    **{f"{metric}_std": "its standard deviation over draws" for metric in _SHOTS},
    "num_ties": "ties",
    "num_left_out": "samples left out",
    "num_unchanged": "captions that no other order changes",
    "num_cut": "captions longer than the context",
}
_WAYS = {"top1_names": "class names alone", "top1_one_template": "one template", "top1": "ensemble of templates"}


def render(
    evaluation: Evaluation,
    tasks: Mapping[str, TaskConfig],
    examples: Mapping[str, Examples],
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    models: Sequence[tuple[str, str, Results]] = (),
) -> str:
    """Return the page as HTML.

    Args:
        evaluation: results, details and failures.
        tasks: by name, as the config has them.
        examples: of some tasks.
        title: of the page.
        facts: what was evaluated and how, a name and a value each.
        models: of several that are compared the name, the file beside this one that is its page, and the results.
    """
    shown = [
        {"number": number, **_task(name, tasks[name], metrics, evaluation.details.get(name) or {}, examples.get(name))}
        for number, (name, metrics) in enumerate(evaluation.results.items(), 1)
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clipjax.reports"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}"
    environment.filters["plain"] = printable
    page = environment.get_template("evaluation.html")
    failures = [(name, printable(reason)) for name, reason in evaluation.failures.items()]
    numbers = {task["name"]: task["number"] for task in shown}
    compared = [
        (task, _label(metric), values) for task, metric, values in compare([(name, found) for name, _, found in models])
    ]
    between = {
        "models": models,
        "compared": compared,
        "numbers": numbers,
        "against": against_probes(evaluation, tasks),
        "shifts": shifts(evaluation),
    }
    return page.render(title=title, facts=facts, tasks=shown, failures=failures, **between)


def _task(
    name: str,
    task: TaskConfig,
    metrics: Mapping[str, float],
    details: Mapping[str, Any],
    examples: Examples | None,
) -> dict[str, Any]:
    headline = next((metric for metric in _HEADLINES if metric in metrics), None)
    wordings = [
        {"name": each["name"], "wordings": each["wordings"][:_MOST_WORDINGS]} for each in details.get("wordings", ())
    ]
    return {
        "name": name,
        "kind": task.kind.value.replace("_", " "),
        "source": ", ".join(task.sources),
        "headline": None if headline is None else (_label(headline), metrics[headline]),
        "metrics": [(_label(metric), metric_text(metric, value)) for metric, value in metrics.items()],
        "prompts": [(label, metrics[metric]) for metric, label in _WAYS.items() if metric in metrics]
        if "top1_names" in metrics
        else [],
        "curves": _curves(task.kind, metrics, details),
        **_classes(details),
        "wordings": wordings[:_MOST_ROWS],
        "examples": [] if examples is None else [_example(each) for each in examples.examples],
        "matrix": None if examples is None or examples.similarity is None else _matrix(examples.similarity),
    }


def _label(metric: str) -> str:
    if metric in _LABELS:
        return _LABELS[metric]
    way, _, depth = metric.rpartition("_r")
    return f"{way.replace('_', ' ')}, R@{depth}" if depth.isdigit() else metric.replace("_", " ")


def _curves(kind: TaskKind, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return headings and plots of a probe: the few-shot curve, or the choice of C."""
    if kind is TaskKind.LINEAR_PROBE and details.get("validation"):
        tried = details["validation"]
        plot = sweep_plot([each["c"] for each in tried], [each["top1"] for each in tried], metrics["best_c"])
        return [("Choice of C", plot)]
    levels = [(metric, shots) for metric, shots in _SHOTS.items() if metric in metrics]
    if kind is not TaskKind.FEW_SHOT or not levels:
        return []
    plot = few_shot_plot(
        [shots for _, shots in levels],
        [metrics[metric] for metric, _ in levels],
        [metrics[f"{metric}_std"] for metric, _ in levels],
        metrics.get("top1_zero_shot"),
        details.get("shots_to_zero_shot"),
    )
    return [("A few examples of each class", plot)]


def _classes(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes, the worst first, and the confusion matrix as SVG if there are few."""
    classes = details.get("classes", ())
    met = [each for each in classes if each["recall"] is not None]
    met.sort(key=lambda each: (each["recall"], each["name"]))
    confusion = details.get("confusion", ())
    used = sorted({number for label, chosen, _ in confusion for number in (label, chosen)})
    place = {number: i for i, number in enumerate(used)}
    entries = [(place[label], place[chosen], count) for label, chosen, count in confusion]
    drawn = 1 < len(used) <= _MOST_CLASSES
    return {
        "classes": met[:_MOST_ROWS],
        "num_classes": len(met),
        "confusion": confusion_plot([classes[number]["name"] for number in used], entries) if drawn else None,
    }


def _example(example: Any) -> dict[str, Any]:
    picture = f"data:image/jpeg;base64,{base64.b64encode(example.picture).decode()}"
    right = bool(example.guesses) and example.guesses[0][0] == example.text
    return {"picture": picture, "text": example.text, "guesses": example.guesses, "right": right}


def _matrix(similarity: np.ndarray) -> list[list[tuple[str, float]]]:
    """Return cosines, each as text and as strength of its colour from 0 to 1."""
    low, high = float(similarity.min()), float(similarity.max())
    span = max(high - low, 1e-9)
    return [[(f"{value:.2f}", round((float(value) - low) / span, 3)) for value in row] for row in similarity]
