"""Names of members: which part of which sample a member of a shard is, by its name alone.

A sample is the members that share everything before the first dot of their base name, as in WebDataset; what follows
is the kind of the member. Names that tell more than one thing are classified here and judged in `tar_index.py`.

Reading order: `classify`, `Place`.
"""

import functools
from typing import NamedTuple

IMAGE, CAPTION, JSON, CLASS = range(4)
"""Columns of an index: kinds of members."""

NUM_COLUMNS = 4
COLUMNS = {
    "jpg": IMAGE,
    "jpeg": IMAGE,
    "png": IMAGE,
    "webp": IMAGE,
    "txt": CAPTION,
    "json": JSON,
    "cls": CLASS,
}
"""Kinds of members by their extension, in lower case."""

_NOT_DECODED = (
    "heic",
    "heif",
    "jxl",
    "jp2",
    "j2k",
    "svg",
    "pdf",
    "psd",
    "eps",
    "ico",
    "ppm",
    "pgm",
    "pnm",
    "qoi",
    "exr",
)
_RARE_IMAGES = frozenset(["tif", "tiff", "gif", "bmp", "avif", "jfif", "jpe", *_NOT_DECODED])


class Place(NamedTuple):
    """The meaning of a member's name.

    Attributes:
        key: of the sample that it may belong to.
        column: kind of member; -1 for one that no sample takes.
        is_rare: True for an image that is taken only where there is no other.
        base: the key by WebDataset's rule, where `key` is all before the last dot; None where that is `key`.
    """

    key: str
    column: int
    is_rare: bool
    base: str | None

    @property
    def is_certain(self) -> bool:
        """True for a member of the sample of its key, whatever else there is."""
        return self.column >= 0 and not self.is_rare and self.base is None


def classify(name: str) -> Place:
    """Return the meaning of a member's name."""
    directory, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, kind = base.partition(".")
    key = directory + slash + stem
    if not stem:  # hidden files, such as the "._" twins that macOS adds
        return Place(key, -1, False, None)
    column, is_rare, suffix = _classify_kind(kind)
    return (
        Place(directory + slash + base[:-suffix], column, is_rare, key) if suffix else Place(key, column, is_rare, None)
    )


@functools.lru_cache(4096)  # nearly all members of a shard have one of a few kinds
def _classify_kind(kind: str) -> tuple[int, bool, int]:
    """Return column, whether the image is rare, and the length of what follows the key if that goes to the last dot."""
    _, dot, extension = kind.lower().rpartition(".")
    is_rare = extension in _RARE_IMAGES
    column = IMAGE if is_rare else COLUMNS.get(extension, -1)
    return column, is_rare, len(extension) + 1 if dot and column >= 0 else 0
