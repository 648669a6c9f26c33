"""Zero-shot classification of images with several classes each: mean average precision.

Axes: n images, k classes, e embed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.data.sample import Sample
from clipjax.evals.encoder import Encoder
from clipjax.evals.zero_shot import check_labels, zero_shot_classifier

NO_LABELS = "no sample has a list of labels; multi_label needs one per image, zero_shot a single label"


@dataclass(frozen=True)
class MultiLabel:
    """The task: for each class, its images are to be nearer to its prompts than all others.

    Attributes:
        names: of the classes.
        templates: of the prompts.
    """

    names: Sequence[str]
    templates: Sequence[str]
    metrics = ("map", "map_11_points")

    def __call__(self, encoder: Encoder, batches: Iterable[dict]) -> dict[str, Any]:
        """Return `map`, `map_11_points`, counts, and by class the average precision as details.

        The means are over classes that some image has. Images without a list of labels are left out; an empty list
        counts.

        Raises:
            ValueError: a label beyond the class names; no list of labels at all; a model without embeddings.
        """
        classifier = zero_shot_classifier(encoder.embed_texts, self.names, self.templates, normalise=encoder.normalise)
        scores, truths, unlabelled = list[np.ndarray](), list[np.ndarray](), 0
        for batch in batches:
            truth = encoder.gather(_truth(batch, len(self.names)))
            check_labels(int(truth[:, 2].max(initial=0)), len(self.names))
            has_labels, is_there = truth[:, 0] > 0, truth[:, 1] > 0
            scores.append((encoder.embed_images(batch["image"]) @ classifier.T)[has_labels])
            truths.append(truth[has_labels, 3:] > 0)
            unlabelled += int((is_there & ~has_labels).sum())
        score, truth = np.concatenate(scores), np.concatenate(truths)
        if not truth.any():
            raise ValueError(NO_LABELS if not len(truth) else "no image has any class: the lists of labels are empty")
        classes = [
            {
                "name": name,
                "num_examples": int(own.sum()),
                **({} if not own.any() else dict(zip(self.metrics, average_precision(row, own), strict=True))),
            }
            for name, row, own in zip(self.names, score.T, truth.T, strict=True)
        ]
        found = {
            metric: float(np.mean([each[metric] for each in classes if metric in each])) for metric in self.metrics
        }
        counts = {"num_examples": float(len(truth)), "num_unlabelled": float(unlabelled)}
        return {**found, **counts, "details": {"average_precision": classes}}

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse labels beyond the class names, and a source without lists of labels, as far as samples tell.

        Raises:
            ValueError: there are such, or every sample has one label.
        """
        check_labels(max((max(each.labels or (-1,)) for each in samples), default=-1), len(self.names))
        has_list = any(each.labels is not None for each in samples)
        if not has_list and (is_all or any(each.label >= 0 for each in samples)):
            raise ValueError(NO_LABELS)


def average_precision(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return the average precision of a ranking, and that by 11 points, from 0 to 1.

    The first is the sum over ranks of the rise of recall times precision; scores that are equal share a rank. The
    second is the mean over recalls of 0, 0.1 ... 1 of the best precision at that recall or more.

    Source:
        The PASCAL Visual Object Classes Challenge, IJCV 88 (2010), section 4.2 (11 points).

    Args:
        scores: of images for one class, `[n]`.
        truth: which have it, bool `[n]`, at least one.
    """
    order = np.argsort(-scores, kind="stable")
    right, last = np.cumsum(truth[order]), np.append(np.diff(scores[order]) != 0, True)
    right, count = right[last], np.arange(1, len(scores) + 1)[last]
    precision, recall = right / count, right / right[-1]
    area = float((np.diff(recall, prepend=0.0) * precision).sum())
    # By whole numbers: 3 of 10 is a recall of 0.3, whatever floats make of it.
    points = [precision[10 * right >= tenths * right[-1]].max() for tenths in range(11)]
    return area, float(np.mean(points))


def _truth(batch: dict, num_classes: int) -> np.ndarray:
    """Return by image whether it has a list of labels, whether it is there, its largest label, and its classes.

    Int32 `[b, 3 + k]`, which processes can exchange.
    """
    truth = np.zeros((len(batch["labels"]), 3 + num_classes), np.int32)
    for row, labels, is_there in zip(truth, batch["labels"], batch["mask"], strict=True):
        row[1] = is_there
        if is_there and labels is not None:
            row[0], row[2] = 1, max(labels, default=0)
            row[[3 + label for label in labels if label < num_classes]] = 1
    return truth
