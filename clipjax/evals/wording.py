"""Probabilities of the right class with other texts for it: how much depends on the words.

Axes: n images, k classes, w wordings of a class, e embed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.evals.encoder import Encoder


class WordingSpread:
    """The probability of an image's class, with each wording in the place of the class's ensemble, beside all others'.

    The others keep their ensembles, so that only the words for the right class vary. Classes without wordings, and
    images of them, are left out.

    Args:
        encoder: of texts; its parameters give the scale of logits.
        names: of the classes.
        paraphrases: by class name, texts for it.
        classifier: unit-norm ensemble of each class, `[k, e]`.
    """

    def __init__(
        self, encoder: Encoder, names: Sequence[str], paraphrases: Mapping[str, Sequence[str]], classifier: np.ndarray
    ) -> None:
        self._names, self._texts, self._classifier = (
            names,
            [list(paraphrases.get(name, ())) for name in names],
            classifier,
        )
        embed = encoder.embed_texts([text for texts in self._texts for text in texts])
        self._wordings = np.split(embed, np.cumsum([len(texts) for texts in self._texts])[:-1])
        self._scale = encoder.logit_scale
        self._found: list[list[np.ndarray]] = [[] for _ in names]

    def add(self, labels: np.ndarray, image_embed: np.ndarray) -> None:
        """Take images into account.

        Args:
            labels: int `[n]`.
            image_embed: unit norm, `[n, e]`.
        """
        logits = self._scale * (image_embed @ self._classifier.T).astype(np.float64)
        for label in np.unique(labels):
            if not self._texts[label]:
                continue
            rows = labels == label
            others = np.delete(logits[rows], label, axis=1)
            own = self._scale * (image_embed[rows] @ self._wordings[label].T).astype(np.float64)
            wrong = np.logaddexp.reduce(others, axis=1)[:, None]
            self._found[label].append(np.exp(own - np.logaddexp(own, wrong)))

    def metrics(self) -> dict[str, float]:
        """Return `wording_std` and `wording_range`, means over images of what wordings make of one image's probability.

        Without any image they are left out.
        """
        found = [np.concatenate(each) for each in self._found if each]
        if not found:
            return {}
        std = np.concatenate([each.std(axis=1) for each in found])
        ranges = np.concatenate([np.ptp(each, axis=1) for each in found])
        return {"wording_std": float(std.mean()), "wording_range": float(ranges.mean())}

    def details(self) -> list[dict[str, Any]]:
        """Return by class its wordings with the mean probability of each, the best one first."""
        classes = []
        for name, texts, found in zip(self._names, self._texts, self._found, strict=True):
            if found:
                means = np.concatenate(found).mean(axis=0)
                order = np.argsort(-means, kind="stable")
                wordings = [{"text": texts[i], "probability": float(means[i])} for i in order]
                classes.append({"name": name, "wordings": wordings})
        return classes
