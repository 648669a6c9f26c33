"""Counts of a classifier by class: accuracies, precision and recall, and what is taken for what.

Axes: n images, k classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

DEEP = 5
"""Classes among which the right one must be, for `top5`."""

_NEIGHBOURS = 5  # told of each class


class ClassCounts:
    """The labels of images beside the classes that scores choose; of equal scores the lower class comes first.

    Args:
        num_classes: that labels and scores can have.
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._hits = np.zeros(min(DEEP, num_classes), np.int64)
        self._labels: list[np.ndarray] = []
        self._chosen: list[np.ndarray] = []

    def add(self, labels: np.ndarray, scores: np.ndarray) -> None:
        """Count images.

        Args:
            labels: int `[n]`, from 0 to k - 1.
            scores: finite, `[n, k]`.
        """
        own = np.take_along_axis(scores, labels[:, None], axis=1)
        before = np.arange(self._num_classes) < labels[:, None]
        place = ((scores > own) | ((scores == own) & before)).sum(axis=1)
        self._hits += np.bincount(place[place < len(self._hits)], minlength=len(self._hits))
        self._labels.append(labels.astype(np.int64))
        self._chosen.append(scores.argmax(axis=1))

    @property
    def total(self) -> int:
        """Number of images."""
        return sum(map(len, self._labels))

    def metrics(self) -> dict[str, float]:
        """Return `top1`, `top5` (of more than five classes), `per_class` and `num_examples`.

        `per_class` is the mean of the classes' recalls, over the classes that occur.

        Raises:
            ZeroDivisionError: there is no image.
        """
        metrics = {"top1": self._hits[0] / self.total}
        if self._num_classes > DEEP:
            metrics["top5"] = self._hits.sum() / self.total
        right, count, _ = self._by_class()
        occurs = count > 0
        metrics["per_class"] = np.mean(right[occurs] / count[occurs])
        return {**{name: float(value) for name, value in metrics.items()}, "num_examples": float(self.total)}

    def hits(self) -> np.ndarray:
        """Return whether the chosen class is the label, by image in the order in which they came: bool `[n]`."""
        return np.concatenate(self._labels) == np.concatenate(self._chosen)

    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return by class how many images are right, are of it, and are taken for it. Int `[k]` each."""
        labels, chosen = np.concatenate(self._labels), np.concatenate(self._chosen)
        right = np.bincount(labels[labels == chosen], minlength=self._num_classes)
        count, taken = (np.bincount(each, minlength=self._num_classes) for each in (labels, chosen))
        return right, count, taken

    def confusion(self) -> list[list[int]]:
        """Return the counts of the confusion matrix that are not 0: label, chosen class and number of images."""
        codes = np.concatenate(self._labels) * self._num_classes + np.concatenate(self._chosen)
        codes, counts = np.unique(codes, return_counts=True)
        return np.stack([codes // self._num_classes, codes % self._num_classes, counts], axis=1).tolist()

    def details(self, names: Sequence[str], similarity: np.ndarray | None = None) -> dict[str, Any]:
        """Return precision, recall and F1 of each class and what it is taken for, and the confusion matrix, as JSON.

        A class that does not occur has no recall, one that is never chosen no precision: None.

        Args:
            names: of the classes.
            similarity: cosine between the classes' texts, `[k, k]`. With it, each class that another is taken for tells
                its similarity, and its place among the other classes by that, from 1: is the nearest one meant?
        """
        right, count, taken = self._by_class()
        confusion = self.confusion()
        wrong: dict[int, list[tuple[int, int]]] = {}
        for label, chosen, number in confusion:
            if label != chosen:
                wrong.setdefault(label, []).append((-number, chosen))
        classes = []
        for label, name in enumerate(names):
            recall = float(right[label] / count[label]) if count[label] else None
            precision = float(right[label] / taken[label]) if taken[label] else None
            shared = count[label] + taken[label]
            classes.append(
                {
                    "name": name,
                    "num_examples": int(count[label]),
                    "precision": precision,
                    "recall": recall,
                    "f1": float(2 * right[label] / shared) if shared else None,
                    "taken_for": [
                        {"name": names[chosen], "share": float(-number / count[label])}
                        | ({} if similarity is None else _nearness(similarity[label], label, chosen))
                        for number, chosen in sorted(wrong.get(label, []))[:_NEIGHBOURS]
                    ],
                }
            )
        return {"classes": classes, "confusion": confusion}


def _nearness(row: np.ndarray, label: int, other: int) -> dict[str, Any]:
    """Return how near another class is in text space, and its place among all others."""
    others = np.delete(row, label)
    return {"cosine": float(row[other]), "place": int((others > row[other]).sum()) + 1}
