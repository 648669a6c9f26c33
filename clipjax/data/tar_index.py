"""The index of a tar shard: the members of each sample, and their places.

Reading order: `index_shard` (members to samples), `_walk` (the tar format), `ShardFile` (reads for the index and for
samples).
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clipjax.data.sample import REASONS, BadSample
from clipjax.runtime.terminal import printable

IMAGE, CAPTION, JSON, CLASS = range(4)
"""Columns of an index: kinds of members."""

NO_FAULT = -1

_COLUMNS = {
    "jpg": IMAGE,
    "jpeg": IMAGE,
    "png": IMAGE,
    "webp": IMAGE,
    "txt": CAPTION,
    "json": JSON,
    "cls": CLASS,
}
_BLOCK = 512
_MAX_HEADER_BYTES = 2**20  # of an extended header


class ShardFile:
    """An open shard. It closes when its last reader lets go, so that the cache may drop it during a read."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Read without a file position, so that threads can share the descriptor.

        Raises:
            BadSample: `truncated_tar`.
        """
        data = os.pread(self.descriptor, size, offset)
        if len(data) < size:
            raise BadSample("truncated_tar")
        return data


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Index of the n samples of one tar.

    Attributes:
        keys: names of the samples.
        offsets: int64 [n, 4] by column (image, caption, JSON, class); -1: absent.
        sizes: uint32 [n, 4].
        faults: int8 [n], index into `REASONS`, or `NO_FAULT`.
    """

    keys: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    faults: np.ndarray


class _DamagedTar(Exception):
    """The rest of a tar cannot be read."""


def index_shard(path: str) -> ShardIndex:
    """Read the headers of a tar.

    Raises:
        ValueError: the file is no tar.
    """
    rows: dict[str, int] = {}
    offsets: list[list[int]] = []
    sizes: list[list[int]] = []
    faults: list[int] = []
    row = -1
    file = ShardFile(path)
    length = os.fstat(file.descriptor).st_size
    try:
        for name, offset, size in _walk(file.descriptor, length):
            key, column = _key_and_column(name)
            if column is None:
                continue
            row = rows.setdefault(key, len(rows))
            if row == len(faults):
                offsets.append([-1] * len(set(_COLUMNS.values())))
                sizes.append([0] * len(offsets[row]))
                faults.append(NO_FAULT)
            if offset + size > length:
                faults[row] = REASONS.index("truncated_tar")
            elif offsets[row][column] >= 0:
                faults[row] = REASONS.index("duplicate_key")
            offsets[row][column] = offset
            sizes[row][column] = min(size, 2**32 - 1)  # far above every limit
    except _DamagedTar as damage:
        if not rows and not _starts_like_tar(file.descriptor):
            raise ValueError(f"{path} is not a tar file; an archive that is compressed must be decompressed") from None
        if row >= 0 and (offsets[row][IMAGE] < 0 or max(offsets[row][1:]) < 0):
            faults[row] = REASONS.index("truncated_tar")
        logging.getLogger(__name__).warning("%s: %s; using the %d keys before", printable(path), damage, len(rows))
    return ShardIndex(
        keys=list(rows),
        offsets=np.array(offsets, np.int64).reshape(-1, 4),
        sizes=np.array(sizes, np.uint32).reshape(-1, 4),
        faults=np.array(faults, np.int8),
    )


def _key_and_column(name: str) -> tuple[str, int | None]:
    directory, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    # Names that start with a dot are hidden files, such as the "._" twins that macOS adds.
    return directory + slash + stem, _COLUMNS.get(extension.lower()) if stem else None


def _starts_like_tar(descriptor: int) -> bool:
    try:
        return _parse_header(os.pread(descriptor, _BLOCK, 0)) is not None
    except _DamagedTar:
        return False


@dataclass(frozen=True, slots=True)
class _Header:
    name: bytes
    size: int
    kind: bytes


def _walk(descriptor: int, length: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each regular file in a tar (ustar, pax, GNU), without reading its content.

    A member that ends beyond `length` is yielded too, as the last one.

    Raises:
        _DamagedTar: the archive stops without its end marker or a header is damaged.

    Source: POSIX.1-2008, pax, "ustar Interchange Format"; the GNU tar manual, "Basic Tar Format".
    """
    position = 0
    name: bytes | None = None
    size: int | None = None
    while True:
        header = _parse_header(os.pread(descriptor, _BLOCK, position))
        if header is None:
            return
        data = position + _BLOCK
        if header.kind in b"123456":  # links, devices, directories and pipes have no content, whatever they say
            position, name, size = data, None, None
            continue
        if header.kind in b"xL":
            if header.size > _MAX_HEADER_BYTES:
                raise _DamagedTar(f"extended header of {header.size} bytes at {position}")
            content = os.pread(descriptor, header.size, data)
            if header.kind == b"L":
                name = content.rstrip(b"\0")
            else:
                fields = _parse_pax(content)
                name = fields.get(b"path", name)
                size = _pax_size(fields) if b"size" in fields else size
            position = _next_header(data, header.size)
            continue
        member_size = header.size if size is None else size
        if header.kind in b"07\0":
            yield (header.name if name is None else name).decode("utf-8", "backslashreplace"), data, member_size
        if data + member_size > length:
            raise _DamagedTar(f"the archive ends inside the member at {position}")
        position = _next_header(data, member_size)
        if header.kind not in b"gK":  # these two stand between an extended header and its member
            name, size = None, None


def _next_header(data: int, size: int) -> int:
    return data + -(-size // _BLOCK) * _BLOCK


def _parse_header(block: bytes) -> _Header | None:
    """Parse a header block; None is the end marker."""
    if len(block) < _BLOCK:
        raise _DamagedTar("the archive ends without its end marker")
    if not block[0] and block.count(0) == _BLOCK:
        return None
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if _number(block[148:156]) != checksum:
        raise _DamagedTar("a header's checksum is wrong")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    kind = block[156:157]
    if kind == b"\0" and name.endswith(b"/"):  # how the oldest tars write a directory
        kind = b"5"
    return _Header(name, _number(block[124:136]), kind)


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # GNU's binary numbers, above 8 GiB
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise _DamagedTar(f"{field!r} is not an octal number")
    return int(digits, 8)


def _parse_pax(content: bytes) -> dict[bytes, bytes]:
    """Parse the records "LENGTH KEY=VALUE\\n" of an extended header."""
    fields = {}
    while content.rstrip(b"\0"):
        length, space, _ = content[:20].partition(b" ")
        size = int(length) if length.isdigit() else 0
        key, equals, value = content[len(length) + 1 : size - 1].partition(b"=")
        if not (space and equals) or size > len(content) or content[size - 1 : size] != b"\n":
            raise _DamagedTar("a pax header is damaged")
        fields[key] = value
        content = content[size:]
    return fields


def _pax_size(fields: dict[bytes, bytes]) -> int:
    if not fields[b"size"].isdigit() or len(fields[b"size"]) > 20:
        raise _DamagedTar("a pax header is damaged")
    return int(fields[b"size"])
