"""Few-shot probes: logistic regression on a few examples of each class (arXiv 2103.00020, figures 6 and 7).

Axes: n examples, d features.
"""

import math
from collections.abc import Sequence

import numpy as np

SHOTS = (1, 2, 4, 8, 16)


def draw(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Return the places of `shots` examples of each class, int64. Those of fewer shots are among them.

    Args:
        labels: int `[n]`; each class occurs `shots` times or more.
        shots: examples of each class.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def shots_to_reach(target: float, shots: Sequence[int], accuracies: Sequence[float]) -> float | None:
    """Return how many examples of each class first give an accuracy; None if no level does.

    Between two levels it is found on the line over the logarithm of the examples, as in figure 7 of the paper. If the
    first level is above the target, it is the answer: nothing is known below.

    Args:
        target: the accuracy, of zero-shot.
        shots: the levels, ascending.
        accuracies: of the levels.
    """
    for place, (count, accuracy) in enumerate(zip(shots, accuracies, strict=True)):
        if accuracy >= target:
            if place == 0:
                return float(count)
            before, low = math.log(shots[place - 1]), accuracies[place - 1]
            return math.exp(before + (target - low) / (accuracy - low) * (math.log(count) - before))
    return None
