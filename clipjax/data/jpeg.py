"""JPEGs: decoding that refuses every loss of pixels, and only that.

Reading order: `decode_jpeg`, `harmless_copies` (oddities that lose nothing), `_read_markers` (the format),
`read_orientation` (EXIF).

Source: ITU-T T.81, annex B; the warnings of libjpeg-turbo, `jerror.h`.
"""

import contextlib
import itertools
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipjax.data.sample import BadSample

SIGNATURE = b"\xff\xd8"

_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
_START_OF_SCAN, _END, _START = 0xDA, 0xD9, 0xD8
_JPEG_LS = 0xF7
_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2  # with Huffman codes
_DECODED = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
_AFTER_SCAN = re.compile(rb"(?<!\xff)\xff++[^\x00\xd0-\xd7]", re.DOTALL)  # in linear time, whatever the bytes
_FILL = re.compile(rb"\xff*")
_MAX_SEGMENTS = 10_000
_USUAL_SEGMENTS = 30
_MAX_SCANS = 100  # each goes over all pixels, however few bytes it has; encoders write about ten
_MAX_STRAY_BYTES = 5  # between segments: the shortest one that matters, the restart interval, has 6
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_MAX_TAGS = 1000


def decode_jpeg(image: bytes, check_size: Callable[[int, int], None], min_side: int | None = None) -> np.ndarray:
    """Decode a JPEG to RGB; of several pictures in one file (MPO), the first.

    The decoder stops at each of its warnings. It names only the first one, behind which others may hide, so a picture
    that loses nothing by its oddities is decoded from a copy without them, and again every warning stops it.

    Args:
        image: encoded bytes.
        check_size: function of height and width that raises if they are not allowed, before pixels are decoded.
        min_side: decode at half of the sides or less if both stay as long as this; None: whole.

    Returns:
        uint8 [h, w, 3]. CMYK and YCCK are taken as Adobe writes them, inverted, as Pillow does.

    Raises:
        BadSample: `unsupported_format` for lossless, hierarchical and 12-bit JPEGs, and for samplings of colours that
            TurboJPEG has no name for (it decodes 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 and 4:4:1).
        ValueError: pixels are lost, or the file is no JPEG.
    """
    # There may be a film behind the picture, too. Counting takes longer than all else here but decoding.
    if not _is_plainly_sequential(image) and image.count(b"\xff\xda") > _MAX_SCANS:
        scans = sum(marker.code == _START_OF_SCAN for marker in _read_markers(image))
        if scans > _MAX_SCANS:
            raise ValueError(f"{scans} scans")
    try:
        return _decode_strictly(image, check_size, min_side)
    except ValueError as error:
        if isinstance(error, BadSample):
            raise
        if not _is_decoded(image):
            raise BadSample("unsupported_format") from error
        copies = harmless_copies(image)
        if not copies:
            raise
    for copy in copies[:-1]:
        with contextlib.suppress(ValueError):
            return _decode_strictly(copy, check_size, min_side)
    return _decode_strictly(copies[-1], check_size, min_side)


def _decode_strictly(image: bytes, check_size: Callable[[int, int], None], min_side: int | None) -> np.ndarray:
    import simplejpeg

    height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    check_size(int(height), int(width))
    # At 3/4, say, decoding takes longer than whole.
    scale: dict[str, Any] = {}
    if min_side is not None and min(int(height), int(width)) >= 2 * min_side:
        scale = {"min_height": min_side, "min_width": min_side, "min_factor": 2}
    # Strict: Pillow would return a damaged file as a half grey image.
    if colours not in ("CMYK", "YCCK"):
        return simplejpeg.decode_jpeg(image, "RGB", strict=True, **scale)
    paper = simplejpeg.decode_jpeg(image, "CMYK", strict=True, **scale)  # 255 - ink
    product = paper[..., :3].astype(np.uint16) * paper[..., 3:]  # at most 255 * 255
    return ((product + np.uint16(127)) // 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class _Marker:
    """A marker with its segment: `image[start:end]`, behind `stray` bytes that belong to none."""

    code: int
    stray: bytes
    start: int
    end: int


@dataclass(slots=True)
class _Frame:
    """The header of a frame, and the scans seen so far: components, first and last coefficient, lowest bit."""

    code: int
    components: bytes
    scans: list[tuple[bytes, int, int, int]] = field(default_factory=list)

    def is_complete(self) -> bool:
        """Return True if the scans hold every bit of every coefficient."""
        if self.code in _SEQUENTIAL:
            return self.is_sequential()
        done = {
            (name, k)
            for names, first, last, low in self.scans
            for name in names
            for k in range(first, min(last, 63) + 1)
            if low == 0
        }
        return self.code == _PROGRESSIVE and done >= set(itertools.product(self.components, range(64)))

    def is_sequential(self) -> bool:
        """Return True if each component has one scan, with Huffman codes."""
        names = Counter(name for scan in self.scans for name in scan[0])
        return self.code in _SEQUENTIAL and names == Counter(self.components)


def _read_markers(image: bytes) -> Iterator[_Marker]:
    """Visit the markers up to the end of the picture; the code of a scan lies behind its segment.

    Raises:
        ValueError: a segment is cut off, or there are absurdly many.
    """
    position, in_scan = len(SIGNATURE), False
    for _ in range(_MAX_SEGMENTS):
        found = _AFTER_SCAN.search(image, position) if in_scan else None
        start = found.start() if found else image.find(b"\xff", position)
        if (in_scan and found is None) or start < 0:
            return
        stray = b"" if in_scan else image[position:start]
        code_at = _code_at(image, start)
        code = image[code_at] if code_at < len(image) else -1
        if code <= 0:
            raise ValueError("no marker where one must be")
        end = code_at + 1
        if code not in (_START, _END) and code not in _STANDALONE:
            end += int.from_bytes(image[end : end + 2])
            if end > len(image) or end < code_at + 3:
                raise ValueError("a segment is cut off")
        yield _Marker(code, stray, start, end)
        if code in (_START, _END):
            return
        position, in_scan = end, code == _START_OF_SCAN
    raise ValueError("too many segments")


def _is_plainly_sequential(image: bytes) -> bool:
    """Return True if the segments before the frame are as usual and it is sequential.

    Its scans have bits for every block, so the size of the file bounds their time, however many there are.
    """
    position = len(SIGNATURE)
    for _ in range(_USUAL_SEGMENTS):
        head = image[position : position + 4]
        if len(head) < 4 or head[0] != 0xFF or head[1] < 0xC0 or head[1] == 0xFF:
            return False
        if head[1] in _SEQUENTIAL:
            return True
        if head[1] in _FRAMES or head[1] == _START_OF_SCAN or head[1] in _STANDALONE or head[1] in (_START, _END):
            return False
        position += 2 + int.from_bytes(head[2:])
    return False


def _is_decoded(image: bytes) -> bool:
    """Return False for the processes and samplings of JPEG that the decoder does not know."""
    try:
        for marker in _read_markers(image):
            if marker.code in _FRAMES:
                frame = image[marker.end - _size(image, marker) + 2 : marker.end]
                return marker.code in _DECODED and frame[0] == 8 and _has_name(frame[7::3][: frame[5]])
            if marker.code == _JPEG_LS:
                return False
    except (ValueError, IndexError):
        return True
    return True


def _has_name(sampling: bytes) -> bool:
    """Return True for factors (two times 4 bits) that TurboJPEG has a name for, as its `getSubsamp` finds them."""
    if len(sampling) < 2:
        return True
    first, others = sampling[0], set(sampling[1:3])
    usual = first in (0x11, 0x21, 0x22, 0x12, 0x41, 0x14) and others == {0x11}
    doubled = first == 0x22 and others in ({0x21}, {0x12})
    equal = others == {first} and (first >> 4) * (first & 15) <= 3
    return usual or doubled or equal


def _size(image: bytes, marker: _Marker) -> int:
    """Return the length of a segment, its two bytes of length included."""
    return marker.end - _code_at(image, marker.start) - 1


def _code_at(image: bytes, start: int) -> int:
    """Return the place of a marker's code, behind any number of fill bytes."""
    found = _FILL.match(image, start)
    assert found is not None
    return found.end()


def harmless_copies(image: bytes) -> list[bytes]:
    """Return a JPEG without oddities that lose no pixel, to be tried in turn; none if it has none or others besides.

    - The header of a sequential scan names coefficients or bits: the process has no choice of them.
    - A version of JFIF other than 1, and a colour profile that is cut: neither changes a pixel here.
    - A colour transform that Adobe has not defined: libjpeg takes YCbCr or YCCK.
    - Bytes between two segments: zeros, or too few to be a segment that has lost its marker.
    - Zeros behind the code of the last scan. All zeros go, also those that may be code: if code were lost, the decoder
      would make pixels of zeros that stay.
    - No end marker, if the scans hold all bits of all coefficients. A file that is cut off lacks it too, so the copy
      gets one; the decoder then stops where the code ends too early.

    Never mended: bad or missing code, other bytes behind it, restart markers out of order, scans out of order.
    """
    try:
        pieces, has_end = _mend(image)
    except (ValueError, IndexError):
        return []
    end = bytes([0xFF, _END])
    bare = [*pieces[:-1], _without_zeros(pieces[-1]), end]
    copies = ([*pieces, end], bare) if has_end else (bare,)
    return [copy for copy in dict.fromkeys(map(b"".join, copies)) if copy != image]


def _mend(image: bytes) -> tuple[list[bytes], bool]:
    """Return the pieces of a JPEG without its oddities and its end, the last scan last, and True if it has an end.

    Raises:
        ValueError: it has another oddity, or is cut off.
    """
    has_end = False
    pieces, frame, adobe, previous, scan_at = [SIGNATURE], None, None, 0, 0
    for marker in _read_markers(image):
        if scan_at:
            pieces.append(image[scan_at : marker.start])
            scan_at = 0
        size = 0 if marker.code in (_START, _END) or marker.code in _STANDALONE else _size(image, marker)
        body = image[marker.end - size + 2 : marker.end] if size else b""
        is_stray = marker.stray.strip(b"\0") and (len(marker.stray) > _MAX_STRAY_BYTES or previous == _APP14)
        if is_stray or marker.code == _START:
            raise ValueError("a part may be lost")
        previous = marker.code
        if marker.code in _FRAMES:
            frame = _Frame(marker.code, body[6::3][: body[5]])
        elif marker.code == _START_OF_SCAN:
            if frame is None:
                raise ValueError("a scan without a frame")
            body = _mend_scan(body, frame)
            scan_at = marker.end
        elif marker.code == _END:
            has_end = True
            break
        elif marker.code == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 7:
            body = body[:5] + b"\1" + body[6:]
        elif marker.code == _APP2 and body.startswith(b"ICC_PROFILE\0"):
            continue
        elif marker.code == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = len(pieces)
        head = bytes([0xFF, marker.code])
        pieces.append(head + (len(body) + 2).to_bytes(2) + body if size else head)
    if scan_at and not has_end:
        pieces.append(image[scan_at:].rstrip(b"\xff"))
    if frame is None or (frame.code in _SEQUENTIAL and not frame.is_sequential()):
        raise ValueError("a component without a scan, or with two")
    if not (has_end or frame.is_complete()):
        raise ValueError("scans are missing")
    if adobe is not None:
        pieces[adobe] = _mend_adobe(pieces[adobe], len(frame.components))
    return pieces, has_end


def _mend_scan(body: bytes, frame: _Frame) -> bytes:
    """Note a scan; return its header with the numbers of a sequential one."""
    names, numbers = body[1 : 1 + 2 * body[0] : 2], body[1 + 2 * body[0] :]
    frame.scans.append((names, numbers[0], numbers[1], numbers[2] & 15))
    return body[: 1 + 2 * body[0]] + b"\x00\x3f\x00" if frame.code in _SEQUENTIAL else body


def _mend_adobe(segment: bytes, components: int) -> bytes:
    """Replace an unknown colour transform by the one that libjpeg takes for it."""
    known = {3: (0, 1), 4: (0, 2)}.get(components)
    at = 4 + 11
    return segment if known is None or segment[at] in known else segment[:at] + bytes([known[1]]) + segment[at + 1 :]


def _without_zeros(scan: bytes) -> bytes:
    """Remove zeros at the end of a scan."""
    bare = scan.rstrip(b"\0")
    return bare + b"\0" if bare.endswith(b"\xff") else bare  # a byte of code that is 255 is written with a zero


def jpeg_orientation(image: bytes) -> int:
    """Return the EXIF orientation of a JPEG, 1 to 8; 1 if it has none that can be read."""
    try:
        for marker in _read_markers(image):
            body = image[marker.start : marker.end].lstrip(b"\xff")[3:]
            if marker.code == _APP1 and body.startswith(b"Exif\0\0"):
                return read_orientation(body[6:])
            if marker.code == _START_OF_SCAN:
                break
    except ValueError:
        return 1
    return 1


def read_orientation(exif: bytes) -> int:
    """Return the orientation in EXIF data (a TIFF header and its first directory), 1 if there is none."""
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[exif[:4]]
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, directory)
        for i in range(min(count, _MAX_TAGS)):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", exif, directory + 2 + 12 * i)
            if tag == _ORIENTATION_TAG:
                return value if kind == _SHORT and number == 1 and 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        return 1
    return 1
