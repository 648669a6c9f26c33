"""Choices between few: the right caption of an image among wrong ones, and two captions for two images.

Both ask for what a bag of words cannot know: who does what to whom. Axes: n pairs.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clipjax.data.sample import Sample
from clipjax.evals.captioned import NO_CAPTION, NeedsCaptions, embed_captioned, embed_once, split_lines
from clipjax.evals.encoder import Encoder
from clipjax.evals.word_order import TIE, cosines

_NO_WRONG = "no sample has a second caption; caption_choice needs the right one first, and wrong ones behind it"
_NO_PAIR = (
    "no two samples share a label; pair_choice needs one label for both images of a pair, and no third image of it"
)


@dataclass(frozen=True)
class CaptionChoice(NeedsCaptions):
    """The task; see `caption_choice`. `metrics` are those that rank a model."""

    by_line: bool = False

    metrics: ClassVar[tuple[str, ...]] = ("text_score",)

    def __call__(self, encoder: Encoder, batches: Iterable[dict]) -> dict[str, float]:
        """Return the metrics."""
        return caption_choice(encoder, batches, by_line=self.by_line)

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse samples without a wrong caption, if these are all of them.

        Raises:
            ValueError: there is none.
        """
        super().check_samples(samples, is_all=is_all)
        count = split_lines if self.by_line else lambda caption: (caption,)
        if is_all and not any(sum(len(count(each)) for each in sample.captions) > 1 for sample in samples):
            raise ValueError(_NO_WRONG)


@dataclass(frozen=True)
class PairChoice(NeedsCaptions):
    """The task; see `pair_choice`. `metrics` are those that rank a model."""

    metrics: ClassVar[tuple[str, ...]] = ("group_score", "text_score", "image_score")

    def __call__(self, encoder: Encoder, batches: Iterable[dict]) -> dict[str, float]:
        """Return the metrics."""
        return pair_choice(encoder, batches)

    def check_samples(self, samples: Sequence[Sample], *, is_all: bool) -> None:
        """Refuse samples of which no two are a pair, if these are all of them.

        Raises:
            ValueError: there is none.
        """
        super().check_samples(samples, is_all=is_all)
        labels = np.asarray([sample.label for sample in samples if sample.captions])
        if is_all and not _pairs(labels).size:
            raise ValueError(_NO_PAIR)


Choice = CaptionChoice | PairChoice


def caption_choice(encoder: Encoder, batches: Iterable[dict], *, by_line: bool = False) -> dict[str, float]:
    """Return `text_score`, the share of images that are nearer to their first caption than to each other one.

    A tie (`TIE`) is no choice: it counts as wrong, and in `num_ties`. All images have equally many captions; those with
    fewer or more than most (a blank one is dropped in reading, and it may be the right one) are left out and counted in
    `num_left_out`.

    Args:
        encoder: of pictures and texts.
        batches: of pictures with captions, the right one first.
        by_line: as for `retrieval`.

    Raises:
        ValueError: no sample has a caption, or none a second one.

    Source:
        The layout of SugarCrepe (arXiv 2306.14610), as CLIP_benchmark reads it, where a tie counts as right.
    """
    images = embed_captioned(encoder, batches)
    if not images.captions:
        raise ValueError(NO_CAPTION)
    captions = images.texts(by_line=by_line)
    counts = Counter(len(own) for own in captions if len(own) > 1)
    if not counts:
        raise ValueError(_NO_WRONG)
    usual = max(counts, key=lambda count: (counts[count], count))
    rows = [row for row, own in enumerate(captions) if len(own) == usual]
    texts = embed_once(encoder, [text for row in rows for text in captions[row]])
    scores = cosines(np.repeat(images.embed[rows], usual, axis=0), texts).reshape(len(rows), usual)
    lead = scores[:, 0] - scores[:, 1:].max(axis=1)
    return {
        "text_score": float(np.mean(lead > TIE)),
        "num_examples": float(len(rows)),
        "num_ties": float(np.sum(np.abs(lead) <= TIE)),
        "num_left_out": float(len(captions) - len(rows)),
    }


def pair_choice(encoder: Encoder, batches: Iterable[dict]) -> dict[str, float]:
    """Return `text_score`, `image_score` and `group_score` of pairs of images, each with its own caption.

    The text score is the share of pairs in which each image is nearer to its own caption than to the other's, the image
    score that in which each caption is nearer to its own image, the group score that of both. Two images with the same
    label are a pair. Images without a partner, or with two, are left out and counted in `num_left_out`; `num_examples`
    counts pairs, `num_ties` those with two cosines that tie (`TIE`), which is no choice.

    Args:
        encoder: of pictures and texts.
        batches: of pictures with captions, of which the first counts, and labels.

    Raises:
        ValueError: no sample has a caption, or no two a label of their own.

    Source:
        Winoground (arXiv 2204.03162, section 3).
    """
    images = embed_captioned(encoder, batches)
    if not images.captions:
        raise ValueError(NO_CAPTION)
    pairs = _pairs(images.labels)
    if not pairs.size:
        raise ValueError(_NO_PAIR)
    texts = embed_once(encoder, [images.captions[row][0] for row in pairs.ravel()]).reshape(len(pairs), 2, -1)
    pictures = images.embed[pairs]
    own = [cosines(pictures[:, i], texts[:, i]) for i in (0, 1)]
    other = [cosines(pictures[:, i], texts[:, 1 - i]) for i in (0, 1)]  # of image i with the other's caption
    by_text = np.stack([own[0] - other[0], own[1] - other[1]])
    by_image = np.stack([own[0] - other[1], own[1] - other[0]])
    texts_right, images_right = (by_text > TIE).all(axis=0), (by_image > TIE).all(axis=0)
    return {
        "text_score": float(np.mean(texts_right)),
        "image_score": float(np.mean(images_right)),
        "group_score": float(np.mean(texts_right & images_right)),
        "num_examples": float(len(pairs)),
        "num_ties": float(np.sum((np.abs(np.concatenate([by_text, by_image])) <= TIE).any(axis=0))),
        "num_left_out": float(len(images.labels) - pairs.size),
    }


def _pairs(labels: np.ndarray) -> np.ndarray:
    """Return the places of both samples of each label that two have, int64 `[n, 2]`; -1 is no label."""
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels.tolist()):
        places.setdefault(label, []).append(place)
    found = [rows for label, rows in places.items() if label >= 0 and len(rows) == 2]
    return np.asarray(found, np.int64).reshape(-1, 2)
