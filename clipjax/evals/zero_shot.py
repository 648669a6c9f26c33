"""Zero-shot classification with prompt ensembles (arXiv 2103.00020, section 3.1).

Axes: n images, k classes, e embed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from clipjax.data.sample import Sample
from clipjax.evals.encoder import Encoder, require_finite
from clipjax.evals.prompts import check_templates, check_texts

DEEP = 5
"""Classes among which the right one must be, for `top5`."""


@dataclass(frozen=True)
class ZeroShot:
    """The task; see `zero_shot`.

    Attributes:
        names: of the classes.
        templates: of the prompts.
    """

    names: Sequence[str]
    templates: Sequence[str]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that rank a model; with five classes or fewer, `top5` would say nothing."""
        return ("top1", f"top{DEEP}") if len(self.names) > DEEP else ("top1",)

    def __call__(self, encoder: Encoder, batches: Iterable[dict]) -> dict[str, float]:
        """Return the metrics."""
        return zero_shot(encoder, batches, self.names, self.templates)

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse labels beyond the class names, or none at all if these are all samples.

        Raises:
            ValueError: there are such.
        """
        labels = [sample.label for sample in samples]
        _check_labels(max(labels, default=-1), len(self.names))
        if is_all and max(labels, default=-1) < 0:
            raise ValueError(NO_LABEL)


NO_LABEL = "no sample has a label; zero-shot classification needs an integer label per image"


def _check_labels(largest: int, num_classes: int) -> None:
    if largest >= num_classes:
        raise ValueError(f"label {largest} has no class name: there are {num_classes}; check `classes`")


def make_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return all prompts of the first class, one a template, then of the second, and so on.

    Raises:
        ValueError: names or templates are no sequence of strings, or there is none; a template without one `{}`.
    """
    check_texts("names", names)
    check_templates(templates)
    return [template.replace("{}", name) for name in names for template in templates]


def zero_shot_classifier(
    embed_texts: Callable[[Sequence[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Return a unit-norm row per class, the mean of its prompts' embeddings. Float32 `[k, e]`.

    Args:
        embed_texts: gives a unit-norm row per text.
        names: of the classes.
        templates: each with one `{}` for the name.

    Raises:
        ValueError: names or templates are no sequence of strings, or there is none; a template without one `{}`.
    """
    embed = embed_texts(make_prompts(names, templates)).reshape(len(names), len(templates), -1).mean(axis=1)
    return (embed / np.linalg.norm(embed, axis=1, keepdims=True)).astype(np.float32)


def _make_score(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Return `score(images) -> [n, k]`, larger for likelier classes."""
    if encoder.has_embeddings:
        classifier = zero_shot_classifier(encoder.embed_texts, names, templates)
        return lambda images: encoder.embed_images(images) @ classifier.T
    tokens = encoder.tokenize(make_prompts(names, templates))

    def score(images: np.ndarray) -> np.ndarray:
        rows = encoder.likelihood(images, tokens)
        return rows.reshape(len(rows), len(names), len(templates)).mean(axis=2)

    return score


def zero_shot(
    encoder: Encoder, batches: Iterable[dict], names: Sequence[str], templates: Sequence[str]
) -> dict[str, float]:
    """Return `top1`, `top5` (where there are more than 5 classes) and `num_examples`.

    Samples without a label are left out. A model without embeddings ranks classes by the mean log-likelihood of their
    prompts given the image.

    Raises:
        ValueError: a label beyond the class names, or no labelled sample at all.
    """
    score = _make_score(encoder, names, templates)
    depth = min(DEEP, len(names))
    hits = np.zeros(depth, np.int64)
    total = 0
    for batch in batches:
        label = encoder.gather(np.where(batch["mask"], batch["label"], -1).astype(np.int32))
        _check_labels(int(label.max(initial=-1)), len(names))
        scores = require_finite("rows of class scores", score(batch["image"]))
        kept = label >= 0
        best = np.argsort(-scores[kept], axis=1, kind="stable")[:, :depth]
        hits += (best == label[kept][:, None]).sum(axis=0)
        total += int(kept.sum())
    if total == 0:
        raise ValueError(NO_LABEL)
    metrics = {"top1": hits[0] / total, "num_examples": total}
    if len(names) > DEEP:
        metrics["top5"] = hits.sum() / total
    return {name: float(value) for name, value in metrics.items()}
