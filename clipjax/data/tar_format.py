"""The tar format: the members of an archive (ustar, pax, GNU), found by their headers alone.

Reading order: `walk`, `Member`, `parse_header`.

Source: POSIX.1-2008, pax, "ustar Interchange Format"; the GNU tar manual, "Basic Tar Format".
"""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
"""Bytes of a header; contents are filled up to a multiple of them."""

_MAX_HEADER_BYTES = 2**20  # of an extended header
_HALF = BLOCK // 2  # whose bytes' sum stays below the modulus of Adler-32


class DamagedTar(Exception):
    """The rest of a tar cannot be read."""


class Member(NamedTuple):
    """One member of a tar.

    Attributes:
        name: of the member; bytes that are no UTF-8 are escaped.
        offset: of the content.
        size: of the content; a member that ends beyond the archive is the last one.
        start: of its first header.
        end: place behind the content, where the next header starts.
        is_file: True for a regular file, False for links, devices, pipes and vendors' own kinds.
        target: name of the earlier member that a hard link stands for; None for everything else.
    """

    name: str
    offset: int
    size: int
    start: int
    end: int
    is_file: bool
    target: str | None


class Header(NamedTuple):
    """The fields of a header block that matter."""

    name: bytes
    size: int
    kind: bytes
    linkname: bytes


def walk(read: Callable[[int, int], bytes], length: int, position: int = 0) -> Iterator[Member]:
    """Yield the members of a tar but its directories, without reading their content.

    Args:
        read: function that returns bytes of the archive from an offset on, fewer only at its end.
        length: size of the archive.
        position: of the header to begin with.

    Raises:
        DamagedTar: the archive stops without its end marker or a header is damaged.
    """
    name: bytes | None = None
    link: bytes | None = None
    size: int | None = None
    start = position
    while True:
        header = parse_header(read(position, BLOCK))
        if header is None:
            return
        data, kind = position + BLOCK, header.kind
        if kind in b"xL":
            if header.size > _MAX_HEADER_BYTES:
                raise DamagedTar(f"extended header of {header.size} bytes at {position}")
            content = read(data, header.size)
            if kind == b"L":
                name = content.rstrip(b"\0")
            else:
                fields = _parse_pax(content)
                name, link = fields.get(b"path", name), fields.get(b"linkpath", link)
                size = _pax_size(fields) if b"size" in fields else size
            position = next_header(data, header.size)
            continue
        if kind in b"123456":  # links, devices, directories and pipes have no content, whatever they say
            if kind != b"5":
                target = _decode(header.linkname if link is None else link) if kind == b"1" else None
                yield Member(_decode(header.name if name is None else name), data, 0, start, data, False, target)
            position = start = data
            name = link = size = None
            continue
        member_size = header.size if size is None else size
        end = next_header(data, member_size)
        if kind not in b"gK":
            is_file = kind in b"07\0"
            yield Member(_decode(header.name if name is None else name), data, member_size, start, end, is_file, None)
        if data + member_size > length:
            raise DamagedTar(f"the archive ends inside the member at {position}")
        if kind == b"K" and member_size <= _MAX_HEADER_BYTES:
            link = read(data, member_size).rstrip(b"\0")
        position = end
        if kind not in b"gK":  # these two stand between an extended header and its member
            name = link = size = None
            start = position


def next_header(data: int, size: int) -> int:
    """Return the place behind a content of so many bytes at `data`."""
    return data + -(-size // BLOCK) * BLOCK


def parse_header(block: bytes) -> Header | None:
    """Parse a header block; None is the end marker.

    Raises:
        DamagedTar: it is none.
    """
    if len(block) < BLOCK:
        raise DamagedTar("the archive ends without its end marker")
    if not block[0] and block.count(0) == BLOCK:
        return None
    # The lower half of Adler-32 is 1 + the sum of the bytes, ten times as fast as sum().
    total = (zlib.adler32(block[:_HALF]) & 0xFFFF) + (zlib.adler32(block[_HALF:]) & 0xFFFF) - 2
    if _number(block[148:156]) != total - sum(block[148:156]) + 8 * ord(" "):
        raise DamagedTar("a header's checksum is wrong")
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    kind = block[156:157]
    if kind == b"\0" and name.endswith(b"/"):  # how the oldest tars write a directory
        kind = b"5"
    return Header(name, _number(block[124:136]), kind, block[157:257].split(b"\0", 1)[0])


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _number(field: bytes) -> int:
    plain = field.rstrip(b"\0 ")
    if plain.isdigit() and b"8" not in plain and b"9" not in plain:
        return int(plain, 8)
    if field[0] == 0x80:  # GNU's binary numbers, above 8 GiB
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise DamagedTar(f"{field!r} is not an octal number")
    return int(digits, 8)


def _parse_pax(content: bytes) -> dict[bytes, bytes]:
    """Parse the records "LENGTH KEY=VALUE\\n" of an extended header."""
    fields = {}
    while content.rstrip(b"\0"):
        length, space, _ = content[:20].partition(b" ")
        size = int(length) if length.isdigit() else 0
        key, equals, value = content[len(length) + 1 : size - 1].partition(b"=")
        if not (space and equals) or size > len(content) or content[size - 1 : size] != b"\n":
            raise DamagedTar("a pax header is damaged")
        fields[key] = value
        content = content[size:]
    return fields


def _pax_size(fields: dict[bytes, bytes]) -> int:
    if not fields[b"size"].isdigit() or len(fields[b"size"]) > 20:
        raise DamagedTar("a pax header is damaged")
    return int(fields[b"size"])
