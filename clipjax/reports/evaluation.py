"""The page of an evaluation: what each task gave, which classes are taken for which, and how samples are ranked.

Reading order: `render`, `_task`, `_classes`, `confusion_plot`.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from clipjax.config import TaskConfig
from clipjax.evals.examples import Examples
from clipjax.evals.runner import Evaluation
from clipjax.runtime.terminal import printable

_MOST_CLASSES = 200  # of which the confusion matrix is drawn
_MOST_NAMED = 30  # of which it names every one
_MOST_ROWS = 100  # of a table of classes
_MOST_WORDINGS = 12
_HEADLINES = ("top1", "image_to_text_r1", "source_to_gallery_r1", "caption_preferred", "group_score", "text_score")
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
) -> str:
    """Return the page as HTML.

    Args:
        evaluation: results, details and failures.
        tasks: by name, as the config has them.
        examples: of some tasks.
        title: of the page.
        facts: what was evaluated and how, a name and a value each.
    """
    shown = [
        {"number": number, **_task(name, tasks[name], metrics, evaluation.details.get(name) or {}, examples.get(name))}
        for number, (name, metrics) in enumerate(evaluation.results.items(), 1)
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clipjax.reports"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["plain"] = printable
    page = environment.get_template("evaluation.html")
    failures = [(name, printable(reason)) for name, reason in evaluation.failures.items()]
    return page.render(title=title, facts=facts, tasks=shown, failures=failures)


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
        "metrics": [(_label(metric), value, metric.startswith("num_")) for metric, value in metrics.items()],
        "prompts": [(label, metrics[metric]) for metric, label in _WAYS.items() if metric in metrics]
        if "top1_names" in metrics
        else [],
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


def confusion_plot(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """Return the confusion matrix, each row as shares of its class, as SVG.

    Args:
        names: of the classes.
        confusion: label, chosen class and number of images, of the entries that are not 0.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    counts = np.zeros((len(names), len(names)))
    for label, chosen, number in confusion:
        counts[label, chosen] = number
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.16 * min(len(names), _MOST_NAMED)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "clipjax", "font.size": 8}):
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("chosen")
        axes.set_ylabel("class")
        if len(names) <= _MOST_NAMED:
            shown = [printable(name) for name in names]
            axes.set_xticks(range(len(names)), shown, rotation=90, parse_math=False)
            axes.set_yticks(range(len(names)), shown, parse_math=False)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    return text[text.index("<svg") :]
