"""A look at samples spread over a source: sizes, caption lengths, and why samples are unusable.

Reading order: `survey`, `Survey`, `Look` (one sample).
"""

import collections
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass

import numpy as np

from clipjax.data.digests import spread
from clipjax.data.images import Decoder
from clipjax.data.sample import BadSample, Source

MOST = 1000
"""Samples that are looked at."""

_THREADS = 8
_RUN = 10  # neighbours that are looked at together
_QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Look:
    """One sample.

    Attributes:
        index: in the source.
        size: width and height; None if the image cannot be used.
        captions: of the sample.
        label: class, -1 for none.
        reason: why training leaves the sample out, empty if it does not. A class stands for a caption.
    """

    index: int
    size: tuple[int, int] | None
    captions: tuple[str, ...]
    label: int
    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """Looks at samples of a source, in its order."""

    looks: Sequence[Look]

    def reasons(self) -> dict[str, int]:
        """Return how many samples are unusable for each reason, the most frequent first."""
        return dict(collections.Counter(look.reason for look in self.looks if look.reason).most_common())

    def describe(self) -> list[str]:
        """Return lines for a terminal; all words are ours."""
        good = [look for look in self.looks if not look.reason]
        captions = [caption for look in good for caption in look.captions]
        rows = {
            "width": [look.size[0] for look in good if look.size],
            "height": [look.size[1] for look in good if look.size],
            "characters of a caption": [len(caption) for caption in captions],
            "captions per image": [len(look.captions) for look in good if look.captions],
        }
        classes = {look.label for look in good if look.label >= 0}
        lines = [f"looked at {len(self.looks)} of them, spread evenly; {len(good)} are usable"]
        lines += [_describe_numbers(name, values) for name, values in rows.items() if values]
        if classes:
            lines.append(f"  {'classes':<24} {len(classes)} seen, from {min(classes)} to {max(classes)}")
        if reasons := self.reasons():
            lines.append(f"  {'unusable':<24} " + ", ".join(f"{reason} {count}" for reason, count in reasons.items()))
        return lines


def _describe_numbers(name: str, values: Sequence[int]) -> str:
    shares = np.quantile(values, list(_QUANTILES.values()), method="nearest").tolist()
    numbers = ", ".join(f"{word} {round(value):,}" for word, value in zip(_QUANTILES, shares, strict=True))
    return f"  {name:<24} {numbers}"


def survey(source: Source, decoder: Decoder, *, most: int = MOST) -> Survey:
    """Look at up to `most` samples: at all, or at runs of a few, spread evenly over the source.

    Neighbours cost little where storage gives blocks, such as a row group of Parquet.
    """
    size = len(source)
    starts = spread(size - _RUN + 1, most // _RUN) if size > most else range(0, size, _RUN)
    places = dict.fromkeys(i for start in starts for i in range(start, min(start + _RUN, size)))
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        return Survey(list(pool.map(lambda index: _look(source, decoder, index), places)))


def _look(source: Source, decoder: Decoder, index: int) -> Look:
    try:
        sample = source[index]
    except BadSample as bad:
        return Look(index, None, (), -1, bad.reason)
    reason = "" if sample.captions or sample.label >= 0 else "missing_caption"
    try:
        height, width = decoder(sample.image).shape[:2]
    except BadSample as bad:
        return Look(index, None, sample.captions, sample.label, bad.reason)
    return Look(index, (width, height), sample.captions, sample.label, reason)
