"""Parts of a tar that hold one sample each: its members are found by the headers among them.

Reading order: `members_between`, `sample_in`, `quick_sample`.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator

from clipjax.data.tar_format import BLOCK, DamagedTar, Member, walk
from clipjax.data.tar_names import COLUMNS, IMAGE, NUM_COLUMNS, classify
from clipjax.runtime.storage import OpenFile

_QUICK_COLUMNS = {extension.encode(): column for extension, column in COLUMNS.items()}
_ADLER = 65521
_PAX, _FILE, _DOT = b"x0."


def windowed(file: OpenFile, window: int) -> Callable[[int, int], bytes]:
    """Return a function like `file.read` that reads at least so many bytes at once, and keeps the latest."""
    held, first = b"", 0

    def read(offset: int, size: int) -> bytes:
        nonlocal held, first
        start = offset - first
        if start < 0 or start + size > len(held):
            held, first, start = file.read(offset, max(size, window)), offset, 0
        return held[start : start + size]

    return read


def sample_in(members: Iterable[Member]) -> tuple[str, list[int], list[int]]:
    """Return key, offsets and sizes by column of the one sample whose members lie together; the first is one of them.

    Raises:
        DamagedTar: it is not one sample.
    """
    found: str | None = None
    rare: Member | None = None
    offsets, sizes = [-1] * NUM_COLUMNS, [0] * NUM_COLUMNS
    for member in members:
        key, column, is_rare, base = classify(member.name)
        if column < 0 or not member.is_file:
            continue
        if found is None:
            found = key
        elif key != found:
            if not is_rare and base is None:
                raise DamagedTar("members of several samples lie where one was")
            continue
        if is_rare:
            rare = member
        else:
            offsets[column], sizes[column] = member.offset, member.size
    if found is None:
        raise DamagedTar("no sample lies where one was")
    if rare is not None and offsets[IMAGE] < 0:
        offsets[IMAGE], sizes[IMAGE] = rare.offset, rare.size
    return found, offsets, sizes


def members_between(read: Callable[[int, int], bytes], start: int, end: int) -> Iterator[Member]:
    """Yield the members of a part of a tar.

    Args:
        read: function that returns bytes of the archive from an offset on.
        start: place of the first header.
        end: place behind the last member.

    Raises:
        DamagedTar: a header is damaged, or a member does not end there.
    """

    def read_part(offset: int, size: int) -> bytes:
        return read(offset, size) if offset < end else bytes(size)  # the end marker

    return walk(read_part, end, start)


def quick_sample(block: bytes) -> tuple[str, list[int], list[int]] | None:
    """Return what `sample_in` does for the plainest samples, in a third of the time; None for all others.

    Args:
        block: whole members of a tar; offsets count from its start.
    """
    position, key = 0, None
    offsets, sizes = [-1] * NUM_COLUMNS, [0] * NUM_COLUMNS
    try:
        while position < len(block):
            data = position + BLOCK
            size, kind = int(block[position + 124 : position + 135], 8), block[position + 156]
            start, position = position, data + (size + BLOCK - 1) // BLOCK * BLOCK
            if size < 0:
                return None
            if kind == _PAX:
                content = block[data : data + size]
                if b"path=" in content or b"size=" in content:
                    return None
                continue
            header = block[start:data]
            # The sum of `parse_header`, modulo Adler-32's number.
            total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
            name = header[: header.index(0)]
            slash = name.rfind(b"/") + 1
            dot = name.index(b".", slash)
            if (total - int(header[148:154], 8)) % _ADLER or kind != _FILE or header[345] or len(name) > 100:
                return None
            if dot == slash or name[0] == _DOT or (key is not None and key != name[:dot]):
                return None
            column = _QUICK_COLUMNS[name[dot + 1 :]]
            key = name[:dot]
            offsets[column], sizes[column] = data, size
    except (ValueError, LookupError):
        return None
    return (key.decode(), offsets, sizes) if key is not None and position == len(block) else None
