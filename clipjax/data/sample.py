"""The contract of every source: `Sample`, `Source`, and `BadSample` for what cannot be used.

Everything that a source reads is untrusted: what cannot be used raises `BadSample` with one of `REASONS`, and nothing
is ever unpickled, extracted to disk or fetched from a network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from clipjax.data.digests import ShardDigest

REASONS = (
    "missing_image",
    "missing_caption",
    "corrupt_image",
    "image_too_large",
    "empty_caption",
    "caption_not_utf8",
    "caption_too_long",
    "bad_metadata",
    "corrupt_record",
    "duplicate_key",
    "truncated_tar",
    "unsupported_format",
    "unreadable",
)
"""Reasons for skipping a sample. Append only: counters in checkpoints refer to these names."""

MAX_LABELS = 10_000
"""Classes that one image can have."""

NUM_COUNTERS = 64
"""Counters of unusable samples in a state, for each source: one for each reason, and room for those to come, so that
no new reason changes the shape of what checkpoints hold."""


def count_by_reason(counters: np.ndarray) -> dict[str, int]:
    """Return the number of unusable samples by reason, of all sources together.

    Args:
        counters: whole numbers [sources * NUM_COUNTERS].
    """
    totals = np.reshape(counters, (-1, NUM_COUNTERS)).sum(axis=0).tolist()
    return dict(zip(REASONS, totals, strict=False))


class BadSample(ValueError):
    """A sample that cannot be used. `reason` is one of `REASONS`."""

    def __init__(self, reason: str):
        assert reason in REASONS, reason
        super().__init__(reason)
        self.reason = reason


class UnreadableData(ValueError):
    """The error of data that its storage does not give: a person has to look at it.

    Unlike `BadSample` it says nothing about the sample itself: it may be read again later. So none takes its place,
    unless `data.on_unreadable` is `skip`.

    Attributes:
        is_away: its storage could not be reached, or was too busy, after all tries.
    """

    def __init__(self, text: str, *, is_away: bool = False):
        super().__init__(text)
        self.is_away = is_away

    def again(self) -> "UnreadableData":
        """Return the same error without the places where it was raised, which would keep what was read there."""
        return type(self)(str(self), is_away=self.is_away)


class ChangedData(UnreadableData):
    """The error of data that is not the data that was opened; nothing can take its place."""


@dataclass(frozen=True, slots=True)
class FieldCaptions:
    """Captions that a sample has in one field, at least one, and the weight of the field in training."""

    name: str
    weight: float
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its captions.

    Attributes:
        image: an encoded JPEG, PNG or WebP, or pixels uint8 [h, w, 3].
        captions: stripped and not empty; no caption at all is `()`, which evaluation by label allows.
        label: class of the image, or -1.
        labels: classes of an image that may have several, ascending; None: its data tells one, or nothing.
        key: name of the sample in the data.
        fields: the captions by field, if the source reads fields (`data.captions`).
        frames: of a video, those that were asked for; `image` is the first of them. A picture has none.
    """

    image: bytes | np.ndarray
    captions: tuple[str, ...]
    label: int = -1
    key: str = ""
    fields: tuple[FieldCaptions, ...] = ()
    labels: tuple[int, ...] | None = None
    frames: tuple[bytes | np.ndarray, ...] = ()


class Source(Protocol):
    """Random access to samples.

    It is pickled to worker processes and read from several threads at once, so it opens files lazily and holds no
    position.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read one sample. Raise `BadSample` if it cannot be used, `UnreadableData` if the data cannot be read."""
        ...

    def location(self, index: int) -> str:
        """Return the place of a sample, for error messages: "shard train-00001.tar, key 000000123"."""
        ...

    def digests(self) -> "Sequence[ShardDigest]":
        """Return a digest of each shard, in the order of the samples; the second call is free."""
        ...

    def files(self) -> Sequence[str]:
        """Return the paths of all files that hold the samples; none for samples in memory."""
        ...


def clean_caption(raw: bytes | str, *, max_bytes: int) -> str:
    """Check and strip one caption of at most `max_bytes` bytes of UTF-8.

    Raises:
        BadSample: `caption_too_long`, `caption_not_utf8` or `empty_caption`.
    """
    if len(raw) > max_bytes:
        raise BadSample("caption_too_long")
    try:
        # A str can hold lone surrogates (from JSON escapes), which no tokenizer can encode.
        encoded = raw.encode("utf-8") if isinstance(raw, str) else raw
        text = encoded.decode("utf-8-sig").strip()
    except UnicodeError:
        raise BadSample("caption_not_utf8") from None
    if len(encoded) > max_bytes:
        raise BadSample("caption_too_long")
    if not text:
        raise BadSample("empty_caption")
    return text


def clean_captions(raws: Sequence[bytes | str], *, max_bytes: int) -> tuple[str, ...]:
    """Check and strip captions; blank ones are left out where others are not.

    Raises:
        BadSample: `caption_too_long` or `caption_not_utf8` for any, `empty_caption` if all are blank.
    """
    if len(raws) == 1:
        return (clean_caption(raws[0], max_bytes=max_bytes),)
    captions, blank = [], None
    for raw in raws:
        try:
            captions.append(clean_caption(raw, max_bytes=max_bytes))
        except BadSample as bad:
            if bad.reason != "empty_caption":
                raise
            blank = bad
    if blank is not None and not captions:
        raise blank
    return tuple(captions)


def labels_of(value: Any) -> tuple[int, ...] | None:
    """Return the classes of a list or an array of class numbers, each once, ascending; None for anything else.

    Raises:
        BadSample: `bad_metadata` for a list of something else, or of more than `MAX_LABELS`.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.ndim == 1 and np.issubdtype(value.dtype, np.integer) else None
    if not isinstance(value, list):
        return None
    if len(value) > MAX_LABELS or not all(map(is_label, value)):
        raise BadSample("bad_metadata")
    return tuple(sorted(set(map(int, value))))


def is_label(value: Any) -> bool:
    """Return True for a class number that fits int32."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= int(value) < 2**31
