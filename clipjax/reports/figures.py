"""Figures of the page of an evaluation, each as SVG that loads nothing.

They are as wide as a phone shows, so that their text is not scaled down there. Names are drawn as text, whatever
they hold.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipjax.evals.robustness import expit, logit
from clipjax.evals.shift_points import ShiftPoints
from clipjax.runtime.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 3.6  # inches
_MOST_NAMED = 30  # classes that the confusion matrix names
_LONGEST_NAME = 24  # characters
_OWN, _OTHER, _GOOD, _FAINT = "#2f6fd0", "#c4571b", "#1a7f4b", "#98a2b3"
_SHARES = (0.001, 0.005, 0.01, 0.02, 0.05, *(number / 10 for number in range(1, 10)), 0.95, 0.98, 0.99, 0.995, 0.999)
_FEWEST_EXAMPLES = 1000
"""Of the reference, for the place of an accuracy of 0 or 1 where its number of examples is not known."""


@contextlib.contextmanager
def _drawing(height: float, width: float = _WIDTH) -> "Iterator[tuple[Figure, Axes]]":
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "clipjax", "font.size": 8, "axes.axisbelow": True}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _to_svg(figure: "Figure") -> str:
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    return text[text.index("<svg") :]


def _short(name: str) -> str:
    name = printable(name)
    half = _LONGEST_NAME // 2  # both ends stay: names often share the first
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def confusion_plot(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """Return the confusion matrix, each row as shares of its class, as SVG.

    Args:
        names: of the classes.
        confusion: label, chosen class and number of images, of the entries that are not 0.
    """
    counts = np.zeros((len(names), len(names)))
    for label, chosen, number in confusion:
        counts[label, chosen] = number
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.16 * min(len(names), _MOST_NAMED)
    with _drawing(side, side) as (figure, axes):
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("chosen")
        axes.set_ylabel("class")
        if len(names) <= _MOST_NAMED:
            shown = [printable(name) for name in names]
            axes.set_xticks(range(len(names)), shown, rotation=90, parse_math=False)
            axes.set_yticks(range(len(names)), shown, parse_math=False)
        return _to_svg(figure)


def few_shot_plot(
    shots: Sequence[int],
    means: Sequence[float],
    deviations: Sequence[float],
    zero_shot: float | None,
    equal: float | None,
) -> str:
    """Return accuracy by examples of each class, and the line of zero-shot, as SVG (arXiv 2103.00020, figure 6).

    Args:
        shots: the levels.
        means: of accuracy, of each level.
        deviations: standard deviation over draws, of each level, drawn as a band.
        zero_shot: accuracy; None: no line.
        equal: examples that equal it; None: not known.
    """
    middle, spread = 100 * np.asarray(means), 100 * np.asarray(deviations)
    with _drawing(2.7) as (figure, axes):
        axes.fill_between(shots, middle - spread, middle + spread, color=_OWN, alpha=0.2, linewidth=0)
        axes.plot(shots, middle, "o-", color=_OWN, markersize=3.5, label="few-shot probe")
        if zero_shot is not None:
            axes.axhline(100 * zero_shot, color=_OTHER, linestyle="--", label="zero-shot")
            if equal is not None:
                label = f"equal at {equal:.3g} a class"
                axes.plot([equal], [100 * zero_shot], "*", color=_OTHER, markersize=9, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(each) for each in shots])
        axes.minorticks_off()
        axes.set_xlabel("examples of each class")
        axes.set_ylabel("top-1, %")
        axes.grid(color=_FAINT, alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
        return _to_svg(figure)


def sweep_plot(strengths: Sequence[float], accuracies: Sequence[float], best: float) -> str:
    """Return accuracy on held-out examples by the C of a linear probe, as SVG.

    Args:
        strengths: that were tried.
        accuracies: of each.
        best: the one that was chosen.
    """
    order = np.argsort(strengths)
    x, y = np.asarray(strengths)[order], 100 * np.asarray(accuracies)[order]
    with _drawing(2.5) as (figure, axes):
        axes.plot(x, y, "o-", color=_OWN, markersize=3.5)
        axes.axvline(best, color=_OTHER, linestyle="--", label=f"chosen: {best:.3g}")
        axes.set_xscale("log")
        ticks = [10.0**power for power in range(-6, 7, 2)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel("C")
        axes.set_ylabel("top-1 on held-out examples, %")
        axes.grid(color=_FAINT, alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
        return _to_svg(figure)


def difference_plot(names: Sequence[str], differences: Sequence[float]) -> str:
    """Return by how many points zero-shot is better than a probe on each set, as SVG (arXiv 2103.00020, figure 5).

    Args:
        names: of the sets.
        differences: zero-shot less probe, as shares; drawn from the top in this order.
    """
    values = 100 * np.asarray(differences)
    places = np.arange(len(names))
    with _drawing(0.9 + 0.22 * len(names)) as (figure, axes):
        axes.barh(places, values, color=[_GOOD if value >= 0 else _OTHER for value in values], height=0.7)
        axes.axvline(0, color="black", linewidth=0.8)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:+.1f}", (value, place), (3 if value >= 0 else -3, 0), textcoords="offset points", va="center",
                ha="left" if value >= 0 else "right", fontsize=7,
            )  # fmt: skip
        axes.set_yticks(places, [_short(name) for name in names], parse_math=False)
        axes.margins(x=0.25)
        axes.invert_yaxis()
        axes.set_xlabel("zero-shot less linear probe, points")
        axes.grid(color=_FAINT, alpha=0.3, axis="x")
        return _to_svg(figure)


@dataclass(frozen=True)
class Shown:
    """An evaluated model in a plot of a shift: name of the task, and its accuracies."""

    name: str
    reference: float
    shifted: float


def shift_plot(shown: Sequence[Shown], reference: str, points: ShiftPoints | None) -> str:
    """Return accuracies on shifted sets by that on the reference, on logit axes, as SVG (arXiv 2007.00644, figure 1).

    Args:
        shown: what was evaluated.
        reference: name of the reference.
        points: of other models, and their baseline; None: y = x alone is drawn.
    """
    own = [(_place(each.reference), _place(each.shifted)) for each in shown]
    groups: list[tuple[Any, str, str, float]] = []
    if points is not None:
        for chosen, color, label in (
            (points.standard, _FAINT, "standard models"),
            (points.others, _GOOD, "other models"),
        ):
            if chosen:
                groups.append(([(logit(p.reference), logit(p.shifted)) for p in chosen], color, label, 8))
    everything = np.array([*own, *(place for places, *_ in groups for place in places)])
    low, high = everything.min(axis=0), everything.max(axis=0)
    margin = np.maximum(0.3, 0.75 - (high - low) / 2)
    low, high = low - margin, high + margin
    with _drawing(3.6) as (figure, axes):
        line = np.array([low[0], high[0]])
        axes.plot(line, line, color="black", linewidth=0.8, linestyle=":", label="y = x")
        if points is not None:
            fitted = points.baseline.slope * line + points.baseline.intercept
            axes.plot(line, fitted, color=_FAINT, linewidth=1, label="baseline")
        for places, color, label, size in groups:
            axes.scatter(*np.array(places).T, s=size, color=color, label=label, linewidths=0)
        for number, ((x, y), each) in enumerate(zip(own, shown, strict=True)):
            # A name that begins with an underscore would be left out of the legend.
            handle = axes.scatter([x], [y], s=60, marker="*", color=f"C{number}", zorder=3)
            handle.set_label(f"\u200b{_short(each.name)}")
        _set_shares(axes, low, high)
        axes.set_xlabel(f"top-1 on {_short(reference)}, %", parse_math=False)
        axes.set_ylabel("top-1 on the shifted set, %")
        axes.grid(color=_FAINT, alpha=0.3)
        legend = axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return _to_svg(figure)


def _place(accuracy: float) -> float:
    return logit(accuracy, _FEWEST_EXAMPLES)


def _set_shares(axes: "Axes", low: np.ndarray, high: np.ndarray) -> None:
    """Set the limits, and percentages as ticks of logits."""
    for limits, ticks, first, last in (
        (axes.set_xlim, axes.set_xticks, low[0], high[0]),
        (axes.set_ylim, axes.set_yticks, low[1], high[1]),
    ):
        limits(first, last)
        inside = [share for share in _SHARES if first <= logit(share) <= last]
        if not inside:
            inside = [round(expit((first + last) / 2), 4)]
        apart = (last - first) / 14
        kept: list[float] = []
        for share in inside:
            if not kept or logit(share) - logit(kept[-1]) >= apart:
                kept.append(share)
        ticks([logit(share) for share in kept], [f"{100 * share:g}" for share in kept])
