"""Samples of compressed tars, from front to back: nothing is unpacked to a disk, and no name is ever opened.

The members of a sample must follow each other, as WebDataset writes them.

Reading order: `read_archive`, `_Group` (one sample), `_Forward` (the decompressed bytes).
"""

import gzip
import logging
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from clipjax.data.packed_samples import PackedSample
from clipjax.data.sample import BadSample
from clipjax.data.tar_format import DamagedTar, walk
from clipjax.data.tar_names import CAPTION, CLASS, IMAGE, JSON, NUM_COLUMNS, Place, classify
from clipjax.data.tar_samples import MAX_JSON_BYTES, Limits
from clipjax.runtime.storage import OpenFile, open_file
from clipjax.runtime.terminal import printable

ENDINGS = (".tar.gz", ".tgz")
"""Names of the archives that are read here."""

_CHUNK = 2**20
_ENDLESS = 2**62
_MAX_CLASS_BYTES = 64
_log = logging.getLogger(__name__)


def is_archive(path: str) -> bool:
    """Return True for the name of a compressed tar that is read here."""
    return path.lower().endswith(ENDINGS)


def read_archive(path: str, limits: Limits) -> Iterator[PackedSample | BadSample]:
    """Yield the samples of a compressed tar, the error of each that cannot be used in its place.

    Args:
        path: of the archive.
        limits: larger members are passed over.

    Raises:
        ValueError: the file holds no tar.
        OSError: it cannot be read.
    """
    with gzip.GzipFile(fileobj=_Raw(open_file(path))) as file:  # pyright: ignore[reportArgumentType]
        forward, group, is_tar = _Forward(file), None, False
        try:
            for member in walk(forward.read, _ENDLESS):
                is_tar = True
                place = classify(member.name)
                if place.column < 0 or not member.is_file:
                    continue
                if group is None or not group.takes(place):
                    if group is not None:
                        yield group.finish()
                    group = _Group(place.key, limits)
                content = forward.read(member.offset, member.size) if group.wants(place, member.size) else None
                if content is not None and len(content) < member.size:
                    raise DamagedTar("the archive ends inside a member")
                group.add(place, member.size, content)
            if group is not None:
                yield group.finish()
            while file.read(_CHUNK):  # to the checksum at the end
                pass
        except (DamagedTar, EOFError, zlib.error, gzip.BadGzipFile) as error:
            if not is_tar:
                raise ValueError(f"{path} is no tar that gzip has compressed: {error}") from error
            _log.warning("%s is damaged or cut off (%s): what lies behind is lost", printable(path), error)


class _Raw:
    """A file from front to back, as gzip wants it."""

    def __init__(self, file: OpenFile):
        self._file, self._position = file, 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._position, _CHUNK if size < 0 else min(size, _CHUNK))
        self._position += len(data)
        return data


class _Forward:
    """The bytes of a stream at rising places; what is passed over is thrown away a piece at a time."""

    def __init__(self, file: BinaryIO | gzip.GzipFile):
        self._file, self._position = file, 0

    def read(self, offset: int, size: int) -> bytes:
        assert offset >= self._position
        while self._position < offset:
            skipped = len(self._file.read(min(_CHUNK, offset - self._position)))
            if not skipped:
                return b""
            self._position += skipped
        data = self._file.read(size)
        self._position += len(data)
        return data


class _Group:
    """A sample whose members are being read."""

    def __init__(self, key: str, limits: Limits):
        self._key, self._has_rare = key, False
        self._limits = {IMAGE: limits.image, CAPTION: limits.caption, JSON: MAX_JSON_BYTES, CLASS: _MAX_CLASS_BYTES}
        self._contents: list[bytes | None] = [None] * NUM_COLUMNS
        self._fault = ""

    def takes(self, place: Place) -> bool:
        """Return True for a member of this sample, or a further field of it, such as x.seg.png of x."""
        return self._key in (place.key, place.base)

    def wants(self, place: Place, size: int) -> bool:
        """Return True if the content of a member is needed."""
        return place.key == self._key and size <= self._limits[place.column]

    def add(self, place: Place, size: int, content: bytes | None) -> None:
        """Take a member, without its content where that is not wanted."""
        if place.key != self._key:
            return
        column = place.column
        if content is None:
            too_large = {IMAGE: "image_too_large", CAPTION: "caption_too_long"}.get(column, "")
            self._fault = self._fault or too_large
        elif self._contents[column] is None or (column == IMAGE and self._has_rare):
            self._contents[column] = content
            self._has_rare = place.is_rare if column == IMAGE else self._has_rare
        elif not place.is_rare:
            self._fault = self._fault or "duplicate_key"

    def finish(self) -> PackedSample | BadSample:
        """Return the sample."""
        image, caption, metadata, label = self._contents
        if self._fault or image is None:
            return BadSample(self._fault or "missing_image")
        return PackedSample(self._key, image, caption, metadata, label)
