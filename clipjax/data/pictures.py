"""Pictures other than JPEG, by their content and never by a name: PNG, WebP, GIF, BMP, TIFF and AVIF.

| format | result |
|---|---|
| PNG | 1 to 16 bits, grey, colour, palette, alpha; of an animation (APNG) the still picture |
| WebP | lossy, lossless, alpha; of an animation the first frame |
| GIF | the first frame, on the whole screen of the animation |
| BMP | as Pillow reads it: 1 to 32 bits, run lengths |
| TIFF | the first page, turned as its own tag says; bits, grey, colour, palette, CMYK, 16 bits |
| AVIF | the first frame, where Pillow has AVIF; a turn by its container counts as its EXIF orientation |
| others | `unsupported_format`, also for kinds of pixels without a fixed range: 32 bits, floats, Lab |

Reading order: `decode_picture`, `_open` (limits before pixels), `_to_rgb` (modes, alpha), `_is_known` (what we do not
decode). The classes of Pillow are called one by one: `Image.open` has a limit of its own, which is the same for the
whole process, and formats that start other programs. Where such a class looks at that limit too, it gets the picture in
a way that leaves nothing to look at: `data.max_image_pixels` has been checked before.
"""

import contextlib
import functools
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from clipjax.data.avif import count_frame_pixels
from clipjax.data.jpeg import read_orientation
from clipjax.data.sample import BadSample

_PNG, _MAX_PNG_CHUNKS = b"\x89PNG\r\n\x1a\n", 100_000
_PNG_USED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0")
_TILE_WIDTH, _TILE_LENGTH, _WIDTH, _LENGTH = 322, 323, 256, 257
_ORIENTATION_TAG = 0x0112
_AVIF_BRANDS, _AVIF_SLACK = {b"avif", b"avis"}, 16
_MAX_TAGS, _MAX_VALUES = 10_000, 1_000_000  # of a TIFF: Pillow makes an object of each
_TIFF_BYTES = (1, 2, 6, 7)  # kinds of values that stay bytes
_MAX_GIF_BLOCKS = 100_000  # before the first frame
_GIF_CONTROL, _GIF_DISPOSAL, _MAX_GIF_SIDE = b"\xf9", 0b11100, 0xFFFF
_WEBP_KIND_END = 16
_MAX_TEXT_HEAD = 4096
_OTHERS = (
    b"%PDF-", b"%!PS", b"\xc5\xd0\xd3\xc6", b"8BPS\0\1", b"8BPS\0\2", b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n",
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"DDS ", b"v/1\x01", b"#?RADIANCE", b"#?RGBE", b"qoif",
    b"gimp xcf", b"\xd7\xcd\xc6\x9a", b"icns", b"\x8aMNG\r\n\x1a\n", b"\x8bJNG\r\n\x1a\n", b"AT&TFORM", b"FLIF",
    b"BPG\xfb", b"farbfeld", b"/* XPM */", b"\x1aE\xdf\xa3", b"FORM", b"id=ImageMagick", b"SIMPLE  =", b"MM\0+\0\x08",
)  # fmt: skip
"""Beginnings of files of a known kind: documents, drawings, films, and pictures that we do not decode. The last is
BigTIFF of the byte order that Pillow 13 takes for the other one."""


def decode_picture(
    image: bytes,
    check_size: Callable[[int, int], None],
    *,
    background: tuple[int, int, int] | None,
) -> tuple[np.ndarray, int]:
    """Decode a picture to RGB.

    Args:
        image: encoded bytes.
        check_size: function of height and width that raises if they are not allowed, before pixels are decoded.
        background: colour behind transparent pixels; None drops the alpha and keeps the colours that it hides.

    Returns:
        uint8 [h, w, 3], and its EXIF orientation, 1 to 8, which is not applied.

    Raises:
        BadSample: `unsupported_format`, `image_too_large`, and those of `check_size`.
        Exception: the decoders raise many types on hostile bytes; the file is damaged.
    """
    opened = _open(image, check_size)
    with opened:
        check_size(opened.height, opened.width)
        pixels = np.ascontiguousarray(_to_rgb(opened, image, background))
        if image.startswith(_TIFF):
            return turn(pixels, _tiff_tags(image).get(_ORIENTATION_TAG, 1)), 1
        return pixels, _orientation(opened, image)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Show a picture upright whose orientation is 1 to 8 (Exif 2.32, tag 0x0112)."""
    if 5 <= orientation <= 8:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _open(image: bytes, check_size: Callable[[int, int], None]) -> Any:
    """Open a picture with the class of Pillow for its kind; sizes in headers are checked first."""
    from PIL import AvifImagePlugin, BmpImagePlugin, GifImagePlugin, PngImagePlugin, WebPImagePlugin

    if image.startswith(_PNG):
        width, height = struct.unpack_from(">II", image, 16)
        check_size(height, width)
        return PngImagePlugin.PngImageFile(io.BytesIO(b"".join(_png_pieces(image))))
    if image.startswith((b"GIF87a", b"GIF89a")):
        check_size(*struct.unpack_from("<HH", image, 6))
        size, controls = _gif_head(image)
        check_size(*size)
        return GifImagePlugin.GifImageFile(io.BytesIO(_still_gif(image, size, controls)))
    if image.startswith(b"BM"):
        with _unsupported_if("nsupported"):
            return BmpImagePlugin.BmpImageFile(io.BytesIO(image))
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        if size := _webp_size(image):  # opening it takes memory for its pixels
            check_size(*size)
        return WebPImagePlugin.WebPImageFile(_ShortReads(image))
    if image.startswith(_TIFF):
        _check_tiff(image, check_size)
        with _unsupported_if("unknown pixel mode"):
            opened = _tiff_class()(io.BytesIO(image))
        opened.check_size = check_size
        return opened
    if image[4:8] == b"ftyp" and _AVIF_BRANDS & _brands(image) and AvifImagePlugin.SUPPORTED:
        # The count is up to four times what there is, of tiles with their edges, and of an alpha as large.
        check_size(1, max(1, count_frame_pixels(image) // _AVIF_SLACK))
        return AvifImagePlugin.AvifImageFile(io.BytesIO(image))
    raise BadSample("unsupported_format" if _is_known(image) else "corrupt_image")


@contextlib.contextmanager
def _unsupported_if(words: str) -> Iterator[None]:
    """Tell what Pillow cannot do from what is damaged, by its message."""
    try:
        yield
    except (OSError, SyntaxError) as error:
        raise BadSample("unsupported_format" if words in str(error) else "corrupt_image") from error


def _png_pieces(image: bytes) -> Iterator[bytes]:
    """Yield the parts of a PNG that make its pixels: texts and profiles can unpack to gigabytes."""
    yield _PNG
    position = len(_PNG)
    for _ in range(_MAX_PNG_CHUNKS):
        if position >= len(image):
            return
        end = position + 12 + int.from_bytes(image[position : position + 4])
        if image[position + 4 : position + 8] in _PNG_USED:
            yield image[position:end]
        position = end
    raise BadSample("corrupt_image")


def _png_chunk(image: bytes, kind: bytes) -> bytes:
    """Return the content of a chunk, empty if there is none."""
    position = len(_PNG)
    while position < len(image):
        size = int.from_bytes(image[position : position + 4])
        if image[position + 4 : position + 8] == kind:
            return image[position + 8 : position + 8 + size]
        position += 12 + size
    return b""


def _gif_head(image: bytes) -> tuple[tuple[int, int], list[int]]:
    """Return height and width of the screen with the first frame on it, and the places of the flags of its controls.

    Raises:
        BadSample: `corrupt_image` if there is no frame behind a reasonable number of comments.
    """
    width, height, flags = struct.unpack_from("<HHB", image, 6)
    position, controls = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), list[int]()
    for _ in range(_MAX_GIF_BLOCKS):
        kind = image[position : position + 1]
        if kind == b",":
            left, top, columns, rows = struct.unpack_from("<HHHH", image, position + 1)
            return (max(height, top + rows), max(width, left + columns)), controls
        if kind == b"!":
            if image[position + 1 : position + 2] == _GIF_CONTROL and image[position + 2 : position + 3] > b"\0":
                controls.append(position + 3)
            position += 2  # its blocks follow, the last one is empty
            kind = image[position : position + 1]
        if not kind:
            break
        position += 1 + kind[0]
    raise BadSample("corrupt_image")


def _still_gif(image: bytes, size: tuple[int, int], controls: Sequence[int]) -> bytes:
    """Return the GIF with a screen for the whole first frame, and nothing done to that frame before a next one.

    Pillow checks a screen that grows, and a frame that is taken away, against its own limit.
    """
    height, width = size
    if max(size) > _MAX_GIF_SIDE:
        return image
    changed = bytearray(image)
    struct.pack_into("<HH", changed, 6, width, height)
    for place in controls:
        changed[place] &= ~_GIF_DISPOSAL
    return bytes(changed)


class _ShortReads(io.BytesIO):
    """A file that gives the beginning of a WebP in pieces too short for Pillow's own check of its size."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, _WEBP_KIND_END))


def _webp_size(image: bytes) -> tuple[int, int] | None:
    """Return height and width from the header of a WebP."""
    match image[12:16]:
        case b"VP8X":
            return int.from_bytes(image[27:30], "little") + 1, int.from_bytes(image[24:27], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(image[21:25], "little")
            return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", image, 26)
            return height & 0x3FFF, width & 0x3FFF
    return None


def _check_tiff(image: bytes, check_size: Callable[[int, int], None]) -> None:
    """Check the size of the first page, and of its tiles: each is unpacked as a whole."""
    tags = _tiff_tags(image)
    check_size(tags.get(_LENGTH, 0), tags.get(_WIDTH, 0))
    if _TILE_WIDTH in tags or _TILE_LENGTH in tags:
        check_size(tags.get(_TILE_LENGTH, 0), tags.get(_TILE_WIDTH, 0))


@functools.cache
def _tiff_class() -> Any:
    """Return Pillow's class with our limit of the size, and without its last step.

    That unpacks all of the EXIF data, and turns the picture.
    """
    from PIL import Image, ImageFile, TiffImagePlugin

    class TiffPixels(TiffImagePlugin.TiffImageFile):
        check_size: Callable[[int, int], None]

        def load_prepare(self) -> None:
            if self._im is None:
                width, height = getattr(self, "_tile_size", self.size)
                self.check_size(height, width)
                self.im = Image.core.new(self.mode, (width, height))
            ImageFile.ImageFile.load_prepare(self)

        def load_end(self) -> None:
            pass

    return TiffPixels


def _tiff_tags(image: bytes) -> dict[int, int]:
    """Return the tags of the first page that are one whole number.

    Raises:
        BadSample: `corrupt_image`.
    """
    order = "<" if image.startswith(b"II") else ">"
    is_big = 43 in image[2:4]
    entry, numbers = ("HHQ", {3: "H", 4: "I", 16: "Q"}) if is_big else ("HHI", {3: "H", 4: "I"})
    tags: dict[int, int] = {}
    try:
        (directory,) = struct.unpack_from(order + ("Q" if is_big else "I"), image, 8 if is_big else 4)
        (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), image, directory)
        if count > _MAX_TAGS:
            raise BadSample("corrupt_image")
        start, size = directory + (8 if is_big else 2), 20 if is_big else 12
        for i in range(count):
            tag, kind, number = struct.unpack_from(order + entry, image, start + size * i)
            if number > _MAX_VALUES and kind not in _TIFF_BYTES:
                raise BadSample("corrupt_image")
            if number == 1 and kind in numbers:
                place = start + size * i + struct.calcsize(order + entry)
                tags[tag] = struct.unpack_from(order + numbers[kind], image, place)[0]
    except (struct.error, OverflowError) as error:
        raise BadSample("corrupt_image") from error
    return tags


def _to_rgb(opened: Any, image: bytes, background: tuple[int, int, int] | None) -> np.ndarray:
    """Return the pixels of the first frame as uint8 [h, w, 3]."""
    if opened.mode.startswith("I;16"):  # grey, which Pillow's own conversion clips at 255
        values = np.asarray(opened)
        grey = np.repeat((values.astype(np.uint16) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        hidden = opened.info.get("transparency")
        if background is not None and isinstance(hidden, int):
            grey[values == hidden] = background
        return grey
    if opened.mode in ("I", "F", "LAB", "HSV"):
        raise BadSample("unsupported_format")
    has_alpha = "transparency" in opened.info or opened.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if not has_alpha:
        return np.asarray(opened.convert("RGB"))
    if image.startswith(_PNG):
        _scale_transparency(opened, image[24])
    # Straight to RGB from a palette with transparent entries, Pillow warns; the colours are the same.
    pixels = np.asarray(opened.convert("RGBA"))
    return pixels[..., :3] if background is None else _compose(pixels, background)


def _scale_transparency(opened: Any, bits: int) -> None:
    """Bring the transparent value of a PNG to the 8 bits of the pixels, as Pillow brings these."""
    hidden = opened.info.get("transparency")
    if opened.mode == "L" and isinstance(hidden, int):
        opened.info["transparency"] = hidden * 255 // (2**bits - 1)
    elif opened.mode == "RGB" and isinstance(hidden, tuple) and bits == 16:
        opened.info["transparency"] = tuple(value >> 8 for value in hidden)


def _compose(pixels: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Lay RGBA over a colour, rounded to the nearest whole number."""
    alpha = pixels[..., 3:].astype(np.uint16)
    total = pixels[..., :3] * alpha + np.array(background, np.uint16) * (255 - alpha)  # at most 255 * 255
    return ((total + np.uint16(127)) // 255).astype(np.uint8)


def _orientation(opened: Any, image: bytes) -> int:
    if image.startswith(_PNG):
        return read_orientation(_png_chunk(image, b"eXIf"))
    exif = opened.info.get("exif", b"")
    return read_orientation(exif.removeprefix(b"Exif\0\0"))


def _brands(image: bytes) -> set[bytes]:
    """Return the brands of an ISO media file."""
    end = min(int.from_bytes(image[:4]), len(image), 1024)
    return {image[8:12], *(image[i : i + 4] for i in range(16, end - 3, 4))}


def _is_known(image: bytes) -> bool:
    """Return True for a file of a known kind that is no picture to us, by its beginning."""
    if image.startswith(_OTHERS) or (image[4:8] == b"ftyp" and len(image) >= 16):  # HEIC, films
        return True
    if image[:4] in (b"\0\0\1\0", b"\0\0\2\0"):  # ICO and CUR: the number of pictures, and a byte that is 0
        return image[4:6] != b"\0\0" and image[9:10] == b"\0" and len(image) > 22
    if image[:1] == b"P" and image[1:2] in b"1234567" and image[2:3] in b" \t\r\n#":
        return len(image) > 8
    if image.startswith(b"RIFF"):
        return image[8:12] in (b"AVI ", b"WAVE")
    text = image[:_MAX_TEXT_HEAD].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in text and b"<html" not in text
