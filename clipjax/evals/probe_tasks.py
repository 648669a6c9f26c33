"""Tasks on features of labelled images: linear probe, few-shot probe and nearest neighbours.

All processes see all features, and compute the same. Axes: n images, d features, k classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.config import FeatureKind
from clipjax.data.sample import Sample
from clipjax.evals.class_counts import ClassCounts
from clipjax.evals.encoder import Encoder
from clipjax.evals.few_shot import SHOTS, draw, shots_to_reach
from clipjax.evals.nearest import nearest_scores
from clipjax.evals.probe import Classifier, Problem, split, sweep
from clipjax.evals.zero_shot import zero_shot_classifier

FEW_SHOT_STRENGTH = 0.316
"""Of few-shot probes: the value in the linear-probe example of openai/CLIP's README."""

_HELD_OUT = 0.2  # of the training examples, to choose the strength


@dataclass(frozen=True, eq=False)
class Labelled:
    """Features `[n, d]` of labelled images, their labels int64 `[n]`, and how many images had none."""

    features: np.ndarray
    labels: np.ndarray
    unlabelled: int

    def take(self, chosen: np.ndarray) -> "Labelled":
        """Return some of the examples."""
        return Labelled(self.features[chosen], self.labels[chosen], 0)


def read_labelled(encoder: Encoder, batches: Iterable[dict], kind: FeatureKind, name: str) -> Labelled:
    """Return the features of all labelled images of a source.

    Args:
        encoder: of images.
        batches: of this process.
        kind: of features.
        name: of the source, for messages.

    Raises:
        ValueError: no image has a label.
    """
    features, labels, unlabelled = list[np.ndarray](), list[np.ndarray](), 0
    for batch in batches:
        label = encoder.gather(np.where(batch["mask"], batch["label"], -1).astype(np.int32))
        is_there = encoder.gather(batch["mask"].astype(np.int32)) > 0
        match kind:
            case FeatureKind.EMBEDDING:
                rows = encoder.embed_images(batch["image"])
            case FeatureKind.BEFORE_PROJECTION:
                rows = encoder.image_features(batch["image"])
            case FeatureKind.PIXELS:
                rows = encoder.gather(batch["image"].reshape(len(batch["image"]), -1)).astype(np.float32) / 255
        features.append(rows[label >= 0])
        labels.append(label[label >= 0].astype(np.int64))
        unlabelled += int((is_there & (label < 0)).sum())
    if not sum(map(len, labels)):
        raise ValueError(f"no sample of the {name} has a label; a probe needs an integer label per image")
    return Labelled(np.concatenate(features), np.concatenate(labels), unlabelled)


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression, its strength chosen on validation examples; then trained on these as well.

    Attributes:
        features: that it gets.
        seed: of the validation examples, a fifth of each class of the training source.
    """

    features: FeatureKind
    seed: int = 0
    metrics = ("top1", "per_class")

    def __call__(self, encoder: Encoder, test: Iterable[dict], train: Iterable[dict]) -> dict[str, Any]:
        """Return `top1`, `top5`, `per_class`, counts, `best_c`, and the sweep as details."""
        learnt = read_labelled(encoder, train, self.features, "training source")
        held = split(learnt.labels, _HELD_OUT, self.seed)
        if not held.any():
            raise ValueError("train_source: no class has 3 or more examples, so none can be held out to choose C")
        problem, validation = Problem(*_pair(learnt.take(~held))), learnt.take(held)
        unfinished: list[float] = []

        def score(strength: float) -> float:
            fitted = problem.fit(strength)
            unfinished.extend([] if fitted.converged else [strength])
            return float((fitted.predict(validation.features) == validation.labels).mean())

        best, scores = sweep(score)
        fitted = Problem(*_pair(learnt)).fit(best)
        tested = read_labelled(encoder, test, self.features, "source")
        metrics = _measure(fitted, tested)
        details = {
            "validation": [{"c": strength, "top1": accuracy} for strength, accuracy in scores.items()],
            "not_converged": unfinished,
            "converged": fitted.converged,
        }
        unlabelled = float(learnt.unlabelled + tested.unlabelled)
        return {**metrics, "best_c": best, "num_unlabelled": unlabelled, "details": details}

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse a source without labels, if these are all its samples."""
        _require_labels(samples, is_all)


@dataclass(frozen=True)
class FewShot:
    """Probes on 1, 2, 4, 8 and 16 examples of each class, over several draws.

    Levels for which some class of the training source has too few examples are left out, and told in the details.

    Attributes:
        features: that they get.
        seeds: number of draws.
        prompts: class names and templates, to compare with zero-shot; None: no comparison.
    """

    features: FeatureKind
    seeds: int
    prompts: tuple[Sequence[str], Sequence[str]] | None = None
    metrics = ("top1_1_shot",)

    def __call__(self, encoder: Encoder, test: Iterable[dict], train: Iterable[dict]) -> dict[str, Any]:
        """Return by level the mean and standard deviation of top-1, and what equals zero-shot if that is asked for."""
        learnt = read_labelled(encoder, train, self.features, "training source")
        zero_shot = None if self.prompts is None else _ZeroShotBeside(encoder, *self.prompts)
        tested = read_labelled(encoder, zero_shot.watch(test) if zero_shot else test, self.features, "source")
        smallest = int(np.unique(learnt.labels, return_counts=True)[1].min())
        levels = [shots for shots in SHOTS if shots <= smallest]
        metrics: dict[str, Any] = {}
        converged = True
        for shots in levels:
            found = []
            for seed in range(self.seeds):
                fitted = Problem(*_pair(learnt.take(draw(learnt.labels, shots, seed)))).fit(FEW_SHOT_STRENGTH)
                found.append(_measure(fitted, tested)["top1"])
                converged &= fitted.converged
            metrics |= {f"top1_{shots}_shot": float(np.mean(found)), f"top1_{shots}_shot_std": float(np.std(found))}
        left_out = [shots for shots in SHOTS if shots not in levels]
        details: dict[str, Any] = {"left_out": left_out, "smallest_class": smallest, "converged": converged}
        if zero_shot is not None:
            metrics["top1_zero_shot"] = target = zero_shot.accuracy
            details["shots_to_zero_shot"] = shots_to_reach(
                target, levels, [metrics[f"top1_{shots}_shot"] for shots in levels]
            )
        metrics |= {"num_examples": float(len(tested.labels)), **_unseen(np.unique(learnt.labels), tested)}
        return {**metrics, "num_unlabelled": float(learnt.unlabelled + tested.unlabelled), "details": details}

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse a source without labels, if these are all its samples."""
        _require_labels(samples, is_all)


class _ZeroShotBeside:
    """The accuracy of zero-shot on batches that a probe reads."""

    def __init__(self, encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> None:
        self._encoder, self._names = encoder, names
        self._classifier = zero_shot_classifier(encoder.embed_texts, names, templates, normalise=encoder.normalise)
        self._right = self._total = 0

    def watch(self, batches: Iterable[dict]) -> Iterator[dict]:
        """Yield the batches, and count.

        Raises:
            ValueError: a label beyond the class names.
        """
        for batch in batches:
            label = self._encoder.gather(np.where(batch["mask"], batch["label"], -1).astype(np.int32))
            if (largest := int(label.max(initial=-1))) >= len(self._names):
                raise ValueError(f"label {largest} has no class name: there are {len(self._names)}; check `classes`")
            chosen = (self._encoder.embed_images(batch["image"]) @ self._classifier.T).argmax(axis=1)
            self._right += int((chosen == label).sum())
            self._total += int((label >= 0).sum())
            yield batch

    @property
    def accuracy(self) -> float:
        """Share of the labelled images that are right."""
        return self._right / self._total


@dataclass(frozen=True)
class NearestNeighbours:
    """A vote of the nearest training examples; see `nearest_scores`.

    Attributes:
        features: that are compared.
        neighbours: that vote.
    """

    features: FeatureKind
    neighbours: int
    metrics = ("top1", "per_class")

    def __call__(self, encoder: Encoder, test: Iterable[dict], train: Iterable[dict]) -> dict[str, Any]:
        """Return `top1`, `top5`, `per_class` and counts."""
        learnt = read_labelled(encoder, train, self.features, "training source")
        tested = read_labelled(encoder, test, self.features, "source")
        classes, index = np.unique(learnt.labels, return_inverse=True)
        scores = nearest_scores(
            learnt.features, index, tested.features, neighbours=self.neighbours, num_classes=len(classes)
        )
        unlabelled = float(learnt.unlabelled + tested.unlabelled)
        return {**_count(classes, scores, tested), "num_unlabelled": unlabelled}

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse a source without labels, if these are all its samples."""
        _require_labels(samples, is_all)


def _require_labels(samples: Sequence[Sample], is_all: bool) -> None:
    if is_all and max((sample.label for sample in samples), default=-1) < 0:
        raise ValueError("no sample has a label; a probe needs an integer label per image")


def _pair(examples: Labelled) -> tuple[np.ndarray, np.ndarray]:
    return examples.features, examples.labels


def _measure(fitted: Classifier, tested: Labelled) -> dict[str, float]:
    return _count(fitted.classes, fitted.scores(tested.features), tested)


def _count(classes: np.ndarray, scores: np.ndarray, tested: Labelled) -> dict[str, float]:
    """Return accuracies; an image of a class that training lacks counts as wrong."""
    every = np.union1d(classes, tested.labels)
    wide = np.full((len(scores), len(every)), -np.inf)
    wide[:, np.searchsorted(every, classes)] = scores
    labels = np.searchsorted(every, tested.labels)
    known = np.isin(tested.labels, classes)
    # Classes that training lacks score alike, and of equal scores the first wins: the true one is put behind all.
    wide[~known] = np.where(np.isfinite(wide[~known]), wide[~known], np.finfo(np.float64).min)
    wide[np.flatnonzero(~known), labels[~known]] = -np.inf
    counts = ClassCounts(len(every))
    counts.add(labels, wide)
    return {**counts.metrics(), **_unseen(classes, tested)}


def _unseen(classes: np.ndarray, tested: Labelled) -> dict[str, float]:
    return {"num_of_unseen_classes": float((~np.isin(tested.labels, classes)).sum())}
