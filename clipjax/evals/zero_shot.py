"""Zero-shot classification with prompt ensembles (arXiv 2103.00020, section 3.1).

Reading order: `ZeroShot`, `zero_shot`, `zero_shot_classifier`. Axes: n images, k classes, t templates, e embed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.data.sample import Sample
from clipjax.evals.class_counts import DEEP, ClassCounts
from clipjax.evals.encoder import Encoder, require_finite, unit_norm
from clipjax.evals.overlap import Overlap
from clipjax.evals.prompts import check_templates, check_texts
from clipjax.evals.wording import WordingSpread

_PHOTO = "a photo of a {}."
_COMPARED = ("top1_names", "top1_one_template")


@dataclass(frozen=True)
class ZeroShot:
    """The task; see `zero_shot`.

    Attributes:
        names: of the classes.
        templates: of the prompts.
        compares_prompts: the same with the class names alone, and with one template, beside.
        paraphrases: by class name, other texts for it; see `WordingSpread`. None: no wordings are compared.
        overlap: with training data; None: it is not known.
    """

    names: Sequence[str]
    templates: Sequence[str]
    compares_prompts: bool = False
    paraphrases: Mapping[str, Sequence[str]] | None = None
    overlap: Overlap | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that rank a model; with five classes or fewer, `top5` would say nothing."""
        deep = (f"top{DEEP}",) if len(self.names) > DEEP else ()
        return ("top1", *deep, "per_class", *(_COMPARED if self.compares_prompts else ()))

    def __call__(self, encoder: Encoder, batches: Iterable[dict]) -> dict[str, Any]:
        """Return the metrics."""
        return zero_shot(
            encoder,
            batches,
            self.names,
            self.templates,
            compares_prompts=self.compares_prompts,
            paraphrases=self.paraphrases,
            overlap=self.overlap,
        )

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse labels beyond the class names, or none at all if these are all samples.

        Raises:
            ValueError: there are such.
        """
        labels = [sample.label for sample in samples]
        check_labels(max(labels, default=-1), len(self.names))
        if max(labels, default=-1) < 0 and (is_all or any(sample.labels is not None for sample in samples)):
            raise ValueError(NO_LABEL)


NO_LABEL = "no sample has a label; zero_shot needs an integer label per image, multi_label a list of them"


def check_labels(largest: int, num_classes: int) -> None:
    """Refuse a label beyond the class names.

    Raises:
        ValueError: the largest label is one.
    """
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
    embed_texts: Callable[[Sequence[str]], np.ndarray],
    names: Sequence[str],
    templates: Sequence[str],
    *,
    normalise: Callable[[np.ndarray], np.ndarray] = unit_norm,
) -> np.ndarray:
    """Return a unit-norm row per class, the mean of its prompts' embeddings. Float32 `[k, e]`.

    Args:
        embed_texts: gives a unit-norm row per text.
        names: of the classes.
        templates: each with one `{}` for the name.
        normalise: gives means the norm of embeddings.

    Raises:
        ValueError: names or templates are no sequence of strings, or there is none; a template without one `{}`.
    """
    prompts = embed_texts(make_prompts(names, templates)).reshape(len(names), len(templates), -1)
    return normalise(prompts.mean(axis=1))


def zero_shot(
    encoder: Encoder,
    batches: Iterable[dict],
    names: Sequence[str],
    templates: Sequence[str],
    *,
    compares_prompts: bool = False,
    paraphrases: Mapping[str, Sequence[str]] | None = None,
    overlap: Overlap | None = None,
) -> dict[str, Any]:
    """Return `top1`, `top5` (where there are more than 5 classes), `per_class`, `num_examples`, and `details`.

    The details are those of `ClassCounts.details`. Samples without a label are left out. A model without embeddings
    ranks classes by the mean log-likelihood of their prompts given the image.

    Args:
        encoder: of pictures and texts.
        batches: of pictures with labels.
        names: of the classes.
        templates: of the prompts.
        compares_prompts: also return `top1_names`, of the class names alone, and `top1_one_template`, of "a photo of
            a {}." if it is among the templates, else of the first (arXiv 2103.00020, figure 4).
        paraphrases: also return the metrics and details of `WordingSpread`.
        overlap: of the samples with training data; also return the metrics and details of `Overlap.measure`.

    Raises:
        ValueError: a label beyond the class names, or no labelled sample at all; a model without embeddings that is to
            compare prompts.
    """
    if not encoder.has_embeddings and (compares_prompts or paraphrases is not None):
        raise ValueError("only a model with embeddings can compare prompts; loss.contrastive_weight=0 trains none")
    ways = _choose_ways(encoder, names, templates, compares_prompts)
    counts = [ClassCounts(len(names)) for _ in ways.suffixes]
    spread, parts = None, list[np.ndarray]()
    part_of = None if overlap is None else overlap.parts()
    if paraphrases is not None and ways.classifier is not None:
        spread = WordingSpread(encoder, names, paraphrases, ways.classifier)
    for batch in batches:
        label = encoder.gather(np.where(batch["mask"], batch["label"], -1).astype(np.int32))
        check_labels(int(label.max(initial=-1)), len(names))
        kept = label >= 0
        rows = ways.encode(batch["image"])[kept]
        for each, scores in zip(counts, ways.scores(rows), strict=True):
            each.add(label[kept], require_finite("rows of class scores", scores))
        if spread is not None:
            spread.add(label[kept], rows)
        if part_of is not None:  # padding, whose number is -1, is not kept
            parts.append(encoder.gather(part_of[batch["index"]])[kept])
    if counts[0].total == 0:
        raise ValueError(NO_LABEL)
    found: dict[str, Any] = counts[0].metrics()
    found |= {f"top1{suffix}": each.metrics()["top1"] for suffix, each in zip(ways.suffixes, counts, strict=True)}
    details = counts[0].details(names, ways.similarity())
    if spread is not None:
        found |= spread.metrics()
        details["wordings"] = spread.details()
    if overlap is not None:
        metrics, details["overlap"] = overlap.measure(counts[0].hits(), np.concatenate(parts))
        found |= metrics
    return {**found, "details": details}


def _choose_ways(
    encoder: Encoder, names: Sequence[str], templates: Sequence[str], compares: bool
) -> "_Embeddings | _Likelihood":
    if encoder.has_embeddings:
        return _Embeddings(encoder, names, templates, compares)
    return _Likelihood(encoder, names, templates)


class _Embeddings:
    """Scores by the cosine to each class's prompts: of the ensemble, and of what it is compared with."""

    def __init__(self, encoder: Encoder, names: Sequence[str], templates: Sequence[str], compares: bool) -> None:
        self._encoder = encoder
        prompts = encoder.embed_texts(make_prompts(names, templates)).reshape(len(names), len(templates), -1)
        self.classifier = encoder.normalise(prompts.mean(axis=1))
        self._classifiers, self.suffixes = [self.classifier], [""]
        if compares:
            one = templates.index(_PHOTO) if _PHOTO in templates else 0
            self._classifiers += [encoder.embed_texts(list(names)), prompts[:, one]]
            self.suffixes += ["_names", "_one_template"]

    def encode(self, image: Any) -> np.ndarray:
        return self._encoder.embed_images(image)

    def scores(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows @ classifier.T for classifier in self._classifiers]

    def similarity(self) -> np.ndarray | None:
        return self.classifier @ self.classifier.T


class _Likelihood:
    """Scores by the mean log-likelihood of each class's prompts, of a model that predicts captions alone."""

    suffixes = ("",)
    classifier = None

    def __init__(self, encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> None:
        self._encoder, self._shape = encoder, (len(names), len(templates))
        self._tokens = encoder.tokenize(make_prompts(names, templates))

    def encode(self, image: Any) -> np.ndarray:
        return self._encoder.likelihood(image, self._tokens)

    def scores(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows.reshape(len(rows), *self._shape).mean(axis=2)]

    def similarity(self) -> np.ndarray | None:
        return None
