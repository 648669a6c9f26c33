"""The sizes of the frames inside of an AVIF, before any is decoded.

The header of an AVIF tells the size of the picture, but the frames have headers of their own, and the decoder takes
memory for these: a picture of 64 x 64 pixels may hold a frame of 16,384 x 16,384 that is scaled down.

Reading order: `count_frame_pixels`, `_frames` (the container), `_sequence_pixels` (AV1).

Source: ISO/IEC 14496-12 (boxes) and 23008-12 (items); AV1 specification, sections 5.3 and 5.5.
"""

from collections.abc import Callable, Iterator

_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_MAX_BOXES, _MAX_ITEMS, _MAX_OBUS = 10_000, 10_000, 1000
_SEQUENCE_HEADER = 1


def count_frame_pixels(image: bytes) -> int:
    """Return how many pixels the frames of a file may have, all of them together.

    A frame may be as large as the numbers of bits for its sides allow, so this is up to four times what there is.

    Raises:
        ValueError: the file is damaged, or in a layout that is not known.
    """
    try:
        return sum(_most_pixels(frame) for frame in _frames(image))
    except IndexError as error:
        raise ValueError("a box is cut off") from error


def _boxes(image: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the content of each box."""
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        size, kind, head = int.from_bytes(image[start : start + 4]), image[start + 4 : start + 8], 8
        if size == 1:
            size, head = int.from_bytes(image[start + 8 : start + 16]), 16
        stop = start + size if size else end
        if size and size < head:
            raise ValueError("a box is smaller than its head")
        yield kind, start + head, min(stop, end)
        start = stop
    raise ValueError("too many boxes")


def _frames(image: bytes) -> Iterator[bytes]:
    """Yield the code of each picture item, and of each track from its first frame on."""
    for kind, start, end in _boxes(image, 0, len(image)):
        if kind == b"meta":
            inside = {name: (first, last) for name, first, last in _boxes(image, start + 4, end)}
            pictures = set(_picture_items(image, *inside[b"iinf"])) if b"iinf" in inside else set()
            if b"iloc" in inside:
                stored = inside.get(b"idat", (0, 0))
                for item, code in _items(image, *inside[b"iloc"], stored):
                    if item in pictures:
                        yield code
        elif kind == b"moov":
            yield from _tracks(image, start, end)


def _tracks(image: bytes, start: int, end: int) -> Iterator[bytes]:
    for kind, first, last in _boxes(image, start, end):
        if kind in _CONTAINERS:
            yield from _tracks(image, first, last)
        elif kind in (b"stco", b"co64") and int.from_bytes(image[first + 4 : first + 8]):
            offset = int.from_bytes(image[first + 8 : first + (12 if kind == b"stco" else 16)])
            yield image[offset:]


def _picture_items(image: bytes, start: int, end: int) -> Iterator[int]:
    """Yield the numbers of the items that hold AV1."""
    for kind, first, _ in _boxes(image, start + (6 if image[start] == 0 else 8), end):
        size = {2: 2, 3: 4}.get(image[first], 0)
        if kind == b"infe" and size and image[first + 6 + size : first + 10 + size] == b"av01":
            yield int.from_bytes(image[first + 4 : first + 4 + size])


def _items(image: bytes, start: int, end: int, stored: tuple[int, int]) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the content of each item."""
    version, position = image[start], start + 4
    sizes = [image[position] >> 4, image[position] & 15, image[position + 1] >> 4, image[position + 1] & 15]
    offset_size, length_size, base_size, index_size = sizes if version else [*sizes[:3], 0]
    position += 2

    def number(size: int) -> int:
        nonlocal position
        position += size
        if position > end:
            raise ValueError("the places of items are cut off")
        return int.from_bytes(image[position - size : position])

    id_size = 4 if version == 2 else 2
    count = number(id_size)
    if count > _MAX_ITEMS:
        raise ValueError("too many items")
    for _ in range(count):
        item, method = number(id_size), number(2) & 15 if version else 0
        number(2)
        base, parts = number(base_size), []
        first, last = (0, len(image)) if method == 0 else stored
        for _ in range(number(2)):
            number(index_size)
            offset, length = first + base + number(offset_size), number(length_size)
            parts.append(image[offset : min(last, offset + length if length else last)])
            if len(parts) > _MAX_ITEMS:
                raise ValueError("too many parts of an item")
        yield item, b"".join(parts)


def _most_pixels(code: bytes) -> int:
    """Return the largest frame that the sequence headers in an item's code allow."""
    position, most = 0, 0
    for _ in range(_MAX_OBUS):
        if position >= len(code):
            return most
        head = code[position]
        position += 2 if head & 4 else 1
        size = len(code) - position
        if head & 2:
            size, shift = 0, 0
            while True:
                byte = code[position]
                position, size, shift = position + 1, size | (byte & 127) << shift, shift + 7
                if not byte & 128 or shift > 56:
                    break
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            most = max(most, _sequence_pixels(code[position : position + size]))
        position += size
    return most


def _sequence_pixels(header: bytes) -> int:
    """Return the largest frame of a sequence."""
    bits = f"{int.from_bytes(header[:1024]):0{8 * min(len(header), 1024)}b}"
    position = 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        if position > len(bits):
            raise ValueError("a sequence header is cut off")
        return int(bits[position - count : position] or "0", 2)

    read(4)  # profile, still picture
    if read(1):  # of the short form
        read(5)
        return _size(read)
    delay_bits = 0
    if read(1):  # timing
        read(64)
        if read(1):
            zeros = 0
            while not read(1):
                zeros += 1
            read(zeros)
        if read(1):  # decoder model
            delay_bits = read(5) + 1
            read(42)
    has_display_delay = read(1)
    for _ in range(read(5) + 1):
        read(12)
        if read(5) > 7:
            read(1)
        if delay_bits and read(1):
            read(2 * delay_bits + 1)
        if has_display_delay and read(1):
            read(4)
    return _size(read)


def _size(read: Callable[[int], int]) -> int:
    return 2 ** (read(4) + 1 + read(4) + 1)
