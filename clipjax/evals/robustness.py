"""Robustness to distribution shift: accuracy beside that on a reference (arXiv 2007.00644; 2103.00020, section 3.3).

The effective robustness of a model is its accuracy on the shifted set, less what standard models of its accuracy on the
reference set have there: a line between the logits of both accuracies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from clipjax.evals.shift_points import ShiftPoints

METRIC = "top1"
"""That is compared between a task and its reference."""


def logit(accuracy: float, num_examples: float | None = None) -> float:
    """Return log(a / (1 - a)).

    Args:
        accuracy: from 0 to 1.
        num_examples: that it was measured on. With it, none right and all right are taken for half an example right
            and half an example wrong, as they have no logit; the sources leave such models out.

    Raises:
        ValueError: an accuracy outside of [0, 1]; 0 or 1 without `num_examples`; less than one example.
    """
    if num_examples is not None:
        if not num_examples >= 1:
            raise ValueError(f"num_examples={num_examples} must be 1 or more")
        if 0 <= accuracy <= 1:
            accuracy = min(max(accuracy, 0.5 / num_examples), 1 - 0.5 / num_examples)
    if not 0 < accuracy < 1:
        raise ValueError(f"accuracy={accuracy} must be a share between 0 and 1; 0 and 1 themselves have no logit")
    return math.log(accuracy) - math.log1p(-accuracy)


def expit(value: float) -> float:
    """Return the accuracy of a logit, from 0 to 1."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value)) if value > -700 else 0.0


@dataclass(frozen=True)
class Baseline:
    """A line between the logits of accuracies on a reference set and on a shifted one.

    Attributes:
        slope: of the line.
        intercept: its logit on the shifted set at 50 % on the reference.
        low: least accuracy on the reference among the models that it was fitted to.
        high: the largest.
        num_models: that it was fitted to.
    """

    slope: float
    intercept: float
    low: float
    high: float
    num_models: int

    def expected(self, reference: float, num_examples: float | None = None) -> float:
        """Return the accuracy on the shifted set that a standard model of an accuracy on the reference has.

        Args:
            reference: the accuracy on the reference set.
            num_examples: that it was measured on; see `logit`.
        """
        return expit(self.slope * logit(reference, num_examples) + self.intercept)


def fit_baseline(points: Sequence[tuple[float, float]]) -> Baseline:
    """Return the least-squares line between the logits of both accuracies, computed in float64.

    Args:
        points: of each standard model, the accuracies on the reference and on the shifted set.

    Raises:
        ValueError: fewer than two points, all with the same accuracy on the reference, or one without a logit.
    """
    if len(points) < 2:
        raise ValueError(f"a baseline needs the accuracies of two standard models or more; got {len(points)}")
    x, y = np.array([[logit(reference), logit(shifted)] for reference, shifted in points]).T
    references = [float(reference) for reference, _ in points]
    if min(references) == max(references):
        raise ValueError(
            f"all {len(points)} models have the accuracy {references[0]} on the reference, and fix no line; give "
            "models that differ"
        )
    from_mean = x - x.mean()
    slope = float(from_mean @ (y - y.mean()) / (from_mean @ from_mean))
    return Baseline(slope, float(y.mean() - slope * x.mean()), min(references), max(references), len(points))


def effective_robustness(
    baseline: Baseline, reference: float, shifted: float, num_examples: float | None = None
) -> float:
    """Return how far a model's accuracy on the shifted set lies above what the baseline gives for it.

    Args:
        baseline: of standard models.
        reference: the model's accuracy on the reference set.
        shifted: its accuracy on the shifted set.
        num_examples: of the reference set; see `logit`.
    """
    return shifted - baseline.expected(reference, num_examples)


@dataclass(frozen=True)
class Shift:
    """The reference of a shifted task, and models beside it.

    Attributes:
        reference: name of the task on the set that its own is a shift of.
        points: of other models; None: there are none.
    """

    reference: str
    points: "ShiftPoints | None" = None


def describe_shifts(
    results: Mapping[str, Mapping[str, float]], shifts: Mapping[str, Shift]
) -> dict[str, dict[str, Any]]:
    """Return what is lost from the reference to each shifted task, as JSON.

    `gap` is the accuracy less that on the reference; with points, `expected` is what standard models have,
    `effective_robustness` the rest, and `is_extrapolated` tells that none of them is as good, or as bad, on the
    reference. A reference without a result leaves `reference` alone.

    Args:
        results: metrics of the tasks that worked.
        shifts: by task.
    """
    described = {}
    for name, shift in shifts.items():
        if name not in results:
            continue
        found: dict[str, Any] = {"reference": shift.reference}
        described[name] = found
        if shift.reference not in results:
            continue
        reference, shifted = results[shift.reference], results[name]
        found |= {"reference_top1": reference[METRIC], "top1": shifted[METRIC]}
        found["gap"] = shifted[METRIC] - reference[METRIC]
        if shift.points is not None:
            baseline = shift.points.baseline
            expected = baseline.expected(reference[METRIC], reference["num_examples"])
            found |= {"points": shift.points.name, "expected": expected}
            found["effective_robustness"] = shifted[METRIC] - expected
            found["is_extrapolated"] = not baseline.low <= reference[METRIC] <= baseline.high
    return described
