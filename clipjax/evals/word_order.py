"""Word order: does the text tower hear it? Captions against the same words in another order.

Reading order: `word_order`, `shuffle_words`. Axes: n images, m captions, e embed.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from clipjax.data.sample import Sample
from clipjax.evals.captioned import NO_CAPTION, NeedsCaptions, embed_captioned, embed_once, split_lines
from clipjax.evals.encoder import Encoder
from clipjax.evals.ranks import best_places

TIE = 1e-6
"""Cosines that differ by no more are equal: of unit-norm float32 embeddings, the rest is rounding."""

_SHOWN = 20  # captions in the details
_BLOCK = 4096  # pairs in float64 at once
_NO_ORDER = (
    "no caption has two different words, separated by white space, and fits the model's context; word order needs one"
)


@dataclass(frozen=True)
class WordOrder(NeedsCaptions):
    """The task; see `word_order`. `metrics` are those that rank a model."""

    by_line: bool = False

    metrics: ClassVar[tuple[str, ...]] = ("caption_preferred", "text_to_image_r1")

    def __call__(self, encoder: Encoder, batches: Iterable[dict]) -> dict[str, Any]:
        """Return the metrics."""
        return word_order(encoder, batches, by_line=self.by_line)

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse samples without a caption that another order of its words changes, if these are all of them.

        Raises:
            ValueError: there is none.
        """
        super().check_samples(samples, is_all=is_all)
        captions = [caption for sample in samples for caption in sample.captions]
        texts = [line for caption in captions for line in split_lines(caption)] if self.by_line else captions
        if is_all and not any(map(shuffle_words, texts)):
            raise ValueError(_NO_ORDER)


def word_order(encoder: Encoder, batches: Iterable[dict], *, by_line: bool = False) -> dict[str, Any]:
    """Return how far the model tells captions from their shuffled words.

    A caption is compared with one fixed shuffle of its words (`shuffle_words`), both with single spaces between words.
    Captions that no order changes are left out, and those that the context cuts, since a shuffle would also change
    which words are read.

    Args:
        encoder: of pictures and texts.
        batches: of pictures with captions.
        by_line: as for `retrieval`.

    Returns:
        `caption_preferred`, the share of captions that are nearer to their image than their shuffled words are; ties
        (`TIE`) count half. `shuffled_similarity`, the mean cosine of captions with their shuffled words.
        `text_to_image_r1` and `shuffled_text_to_image_r1`, recall of the image by either, among all images with a
        caption. Counts: `num_examples` of those images, `num_texts` of the captions compared, `num_ties` among them,
        `num_unchanged` and `num_cut` of those left out. `details` holds the first captions with their cosines.

    Raises:
        ValueError: no sample has a caption, or none of them can be compared.
    """
    images = embed_captioned(encoder, batches)
    captions = images.texts(by_line=by_line)
    texts = [(" ".join(text.split()), owner) for owner, own in enumerate(captions) for text in own]
    if not texts:
        raise ValueError(NO_CAPTION)
    changed = [(text, other, owner) for text, owner in texts if (other := shuffle_words(text)) is not None]
    used = [each for each in changed if not encoder.is_cut(each[0]) and not encoder.is_cut(each[1])]
    if not used:
        raise ValueError(_NO_ORDER)
    own_texts, shuffled_texts, owners = zip(*used, strict=True)
    own, shuffled, owner = embed_once(encoder, own_texts), embed_once(encoder, shuffled_texts), np.asarray(owners)
    pictures, number = images.embed[owner], np.arange(len(images.embed))
    near, far = cosines(own, pictures), cosines(shuffled, pictures)
    is_tie = np.abs(near - far) <= TIE
    places = [best_places(each, images.embed, owner, number, encoder.mesh) for each in (own, shuffled)]
    return {
        "caption_preferred": float(np.mean(np.where(is_tie, 0.5, near > far))),
        "shuffled_similarity": float(np.mean(cosines(own, shuffled))),
        "text_to_image_r1": float(np.mean(places[0] < 1)),
        "shuffled_text_to_image_r1": float(np.mean(places[1] < 1)),
        "num_examples": float(len(images.embed)),
        "num_texts": float(len(used)),
        "num_ties": float(is_tie.sum()),
        "num_unchanged": float(len(texts) - len(changed)),
        "num_cut": float(len(changed) - len(used)),
        "details": {
            "captions": [
                {"caption": text, "shuffled": other, "cosine": float(cosine), "shuffled_cosine": float(less)}
                for (text, other, _), cosine, less in zip(used[:_SHOWN], near, far, strict=False)
            ]
        },
    }


def shuffle_words(text: str) -> str | None:
    """Return the words of a text in another order, with single spaces; None if no order changes it.

    Words are what white space separates, and keep their case and punctuation; an order that only moves words that
    differ in case is no other one. The order is drawn by digests of the text: it is the same on every machine, and
    depends on nothing else.
    """
    words = text.split()
    folded = [word.casefold() for word in words]
    if len(set(folded)) < 2:
        return None
    for attempt in itertools.count():  # at least half of all orders are others
        keys = [hashlib.sha256(f"{attempt} {place} {' '.join(words)}".encode()).digest() for place in range(len(words))]
        order = sorted(range(len(words)), key=keys.__getitem__)
        if [folded[place] for place in order] != folded:
            return " ".join(words[place] for place in order)


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the dot product of each row of x with that of y, in float64. `[m, e]` and `[m, e]` to `[m]`."""
    parts = [
        np.einsum(
            "me,me->m", x[start : start + _BLOCK].astype(np.float64), y[start : start + _BLOCK].astype(np.float64)
        )
        for start in range(0, len(x), _BLOCK)
    ]
    return np.concatenate([np.zeros(0), *parts])
