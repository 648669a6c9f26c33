"""Files of pictures, written from values by the specifications of their formats."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
"""Kinds of PNG."""

HEIGHT, WIDTH = 5, 13


def random_values(top: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (HEIGHT, WIDTH, channels), dtype=np.uint16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, bits: int, kind: int, *chunks: bytes) -> bytes:
    """Write a PNG by its specification (ISO/IEC 15948): values [h, w, c] of so many bits, most significant first."""
    planes = ((values[..., None].astype(np.uint32) >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8)
    rows = np.packbits(planes.reshape(len(values), -1), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


RGB = random_values(256, 3).astype(np.uint8)
RGBA = random_values(256, 4, seed=1).astype(np.uint8)


def saved(pixels: np.ndarray | Image.Image, image_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, image_format, **options)
    return stream.getvalue()


def gif(indices: np.ndarray, colours: np.ndarray, *, hidden: int | None) -> bytes:
    """Write a GIF89a whose code never grows: a clear code before each index."""
    codes = [code for index in indices.ravel().tolist() for code in (256, index)] + [257]
    bits = np.concatenate([(code >> np.arange(9)) & 1 for code in codes]).astype(np.uint8)
    data = np.packbits(bits, bitorder="little").tobytes()
    blocks = b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))
    height, width = indices.shape
    control = b"" if hidden is None else b"!\xf9\x04" + bytes([1, 0, 0, hidden, 0])
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF7, 0, 0) + colours.tobytes() + control
        + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08" + blocks + b"\0;"
    )  # fmt: skip


def bmp(pixels: np.ndarray) -> bytes:
    """Write a BMP of 24 bits: rows from below, blue first, each row to a multiple of four bytes."""
    rows = [row[:, ::-1].tobytes() + bytes(-3 * pixels.shape[1] % 4) for row in pixels[::-1]]
    size = sum(map(len, rows))
    head = struct.pack("<IiiHHIIiiII", 40, pixels.shape[1], pixels.shape[0], 1, 24, 0, size, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + size, 0, 0, 54) + head + b"".join(rows)


def tiff(pixels: bytes, *, order: str = "<", big: bool = False, **tags: int | tuple[int, int]) -> bytes:
    """Write a TIFF 6.0 of one page, or a BigTIFF: tags by the names below, as (kind, value) or a whole number."""
    numbers = {"width": 256, "length": 257, "bits": 258, "compression": 259, "photometric": 262, "strip": 273,
               "orientation": 274, "samples": 277, "rows": 278, "count": 279, "tile_width": 322, "tile_length": 323,
               "sample_format": 339, "tile": 324, "tile_count": 325}  # fmt: skip
    offset, kinds = (16, {4: "I"}) if big else (8, {4: "I"})
    tags = {"strip": offset, "count": len(pixels)} | tags
    entries = b""
    for number, value in sorted((numbers[name], value) for name, value in tags.items()):
        entries += struct.pack(order + ("HHQ" if big else "HHI"), number, 4, 1)
        entries += struct.pack(order + kinds[4], value) + bytes(4 if big else 0)
    mark = b"II" if order == "<" else b"MM"
    where = offset + len(pixels)
    if big:
        head = mark + struct.pack(order + "HHHQ", 43, 8, 0, where)
        return head + pixels + struct.pack(order + "Q", len(tags)) + entries + bytes(8)
    return (
        mark + struct.pack(order + "HI", 42, where) + pixels + struct.pack(order + "H", len(tags)) + entries + bytes(4)
    )


PAGE = {"width": WIDTH, "length": HEIGHT, "compression": 1, "rows": HEIGHT}
