"""Limits of pictures: sizes before pixels, texts that unpack, rubbish of megabytes, Pillow's own limit."""

import contextlib
import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, features

from clipjax.data.avif import count_frame_pixels
from clipjax.data.images import decode
from clipjax.data.sample import BadSample
from tests.data.picture_files import COLOUR, HEIGHT, PAGE, RGB, WIDTH, bmp, chunk, png, saved, tiff

pytestmark = pytest.mark.newest


def reason(data: bytes, max_pixels: int = 10_000) -> str:
    with pytest.raises(BadSample) as caught:
        decode(data, max_pixels=max_pixels)
    return caught.value.reason


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Put the largest number of bytes that Python held meanwhile into the list that is given."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def text_bomb(kind: bytes) -> bytes:
    packed = zlib.compress(bytes(50_000_000), 9)
    return {
        b"zTXt": chunk(b"zTXt", b"a\0\0" + packed),
        b"iTXt": chunk(b"iTXt", b"a\0\1\0\0\0" + packed),
        b"iCCP": chunk(b"iCCP", b"a\0\0" + packed),
        b"tEXt": chunk(b"tEXt", b"workflow\0" + bytes([65]) * 5_000_000),
    }[kind]


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"])
def test_texts_in_a_png_cost_nothing(kind):
    """A workflow of megabytes is beside a good picture, and so may be a text that unpacks to 200 MB."""
    data = png(RGB, 8, COLOUR, text_bomb(kind))
    with peak_memory() as peak:
        np.testing.assert_array_equal(decode(data, max_pixels=10_000), RGB)
    assert peak[0] < 2 * len(data) + 1_000_000


def webp(kind: bytes, body: bytes) -> bytes:
    part = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(part) + 4) + b"WEBP" + part


SIDE = 16_000
BOMBS = {
    "png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)),
    "gif": b"GIF89a" + struct.pack("<HHBBB", SIDE, SIDE, 0, 0, 0),
    "gif frame": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + b","
    + struct.pack("<HHHHB", 0, 0, SIDE, SIDE, 0) + b"\2\1\0\0;",
    "bmp": bmp(RGB)[:18] + struct.pack("<ii", SIDE, SIDE) + bmp(RGB)[26:],
    "webp lossy": webp(b"VP8 ", b"\x30\1\0\x9d\1\x2a" + struct.pack("<HH", SIDE, SIDE) + bytes(20)),
    "webp lossless": webp(b"VP8L", b"\x2f" + struct.pack("<I", (SIDE - 1) | (SIDE - 1) << 14) + bytes(20)),
    "webp canvas": webp(b"VP8X", bytes(4) + ((SIDE - 1).to_bytes(3, "little")) * 2 + bytes(20)),
    "tiff": tiff(bytes(100), bits=8, samples=1, photometric=1, **PAGE | {"width": SIDE, "length": SIDE}),
    "tiff tile": tiff(bytes(100), bits=8, samples=1, photometric=1, compression=8, width=WIDTH, length=HEIGHT,
                      tile_width=SIDE, tile_length=SIDE, tile=8, tile_count=100),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_from_their_header(name):
    with peak_memory() as peak:
        assert reason(BOMBS[name], max_pixels=25_000_000) == "image_too_large"
    assert peak[0] < 1_000_000


LARGE = 4_000_000
SLOW = {
    "fill bytes of a jpeg": b"\xff\xd8" + b"\xff" * LARGE,
    "fill bytes of a scan": saved(RGB, "JPEG")[:-2] + b"\xff" * LARGE + b"\0\1" * 50,
    "stuffed bytes of a scan": saved(RGB, "JPEG")[:-2] + b"\xff\0" * (LARGE // 2),
    "comments of a jpeg": b"\xff\xd8" + b"\xff\xfe\0\2" * (LARGE // 4),
    "restarts in a header": b"\xff\xd8" + b"\xff\xd0" * (LARGE // 2),
    "chunks of a png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))
    + chunk(b"tEXt", b"") * (LARGE // 12),
    "comments of a gif": b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b"!\xfe" + b"\1a" * (LARGE // 2),
    "extensions of a gif": b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b"!\xfe\0" * (LARGE // 3),
    "tags of a tiff": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, LARGE // 20) + bytes(LARGE),
    "offsets of a tiff": b"II*\0" + struct.pack("<IHHHIIHHII", 8, 2, 256, 4, 1, 9, 273, 4, LARGE // 4, 34)
    + bytes(LARGE),
    "boxes of an avif": b"\0\0\0\x1cftypavif" + bytes(16) + b"\0\0\0\x08free" * (LARGE // 8),
    "zeros": bytes(LARGE),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_large_rubbish_costs_little_time_and_memory(name):
    start = time.process_time()
    with peak_memory() as peak:
        assert reason(SLOW[name], max_pixels=25_000_000) == "corrupt_image"
    assert time.process_time() - start < 5 and peak[0] < 5 * LARGE


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_an_avif_above_the_limit():
    assert reason(saved(RGB, "AVIF"), max_pixels=HEIGHT * WIDTH - 1) == "image_too_large"


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("is_animated", [False, True])
def test_the_frames_of_an_avif_are_counted(mode, is_animated):
    frames = [Image.new(mode, (300, 200), 40 * i) for i in range(3)]
    options = {"save_all": True, "append_images": frames[1:]} if is_animated else {}
    data = saved(frames[0], "AVIF", **options)
    assert decode(data, max_pixels=60_000).shape == (200, 300, 3)
    # 512 x 256 are the sizes that fit into as many bits; an animation has a still picture and a track.
    parts = (2 if mode == "RGBA" else 1) * (2 if is_animated else 1)
    assert count_frame_pixels(data) == parts * 512 * 256


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_large_frame_in_a_small_avif_is_refused_before_it_is_decoded():
    """The decoder would decode 4 megapixels, and scale them to 64 x 64."""
    data = saved(Image.new("L", (2048, 2048)), "AVIF")
    at = data.index(b"ispe") + 8
    data = data[:at] + struct.pack(">II", 64, 64) + data[at + 8 :]
    assert reason(data, max_pixels=100_000) == "image_too_large"
    assert decode(data, max_pixels=2048 * 2048).shape == (64, 64, 3)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "AVIF", "GIF", "TIFF", "WEBP"])
def test_pillows_limit_does_not_count(monkeypatch, image_format):
    """It refuses 179 million pixels, and warns from half of that on; it belongs to the whole process."""
    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = saved(RGB, image_format)
    for limit in (HEIGHT * WIDTH - 1, 1):  # warns, raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
            Image.open(io.BytesIO(data))
        assert decode(data, max_pixels=HEIGHT * WIDTH).shape == (HEIGHT, WIDTH, 3)
        assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("screen", [(WIDTH, HEIGHT), (1, 1)])
@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_a_gif_of_any_disposal_is_read_beyond_pillows_limit(monkeypatch, screen, disposal):
    """Pillow looks at its limit where the frame is larger than the screen, or is taken away before the next one."""
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=disposal)
    expected = decode(data, max_pixels=HEIGHT * WIDTH)
    data = data[:6] + struct.pack("<HH", *screen) + data[10:]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    np.testing.assert_array_equal(decode(data, max_pixels=HEIGHT * WIDTH), expected)
    assert reason(data, max_pixels=HEIGHT * WIDTH - 1) == "image_too_large"


@pytest.mark.parametrize("options", [{"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}, {}])
def test_a_webp_of_any_kind_is_read_beyond_pillows_limit(monkeypatch, options):
    data = saved(RGB, "WEBP", **options)
    expected = decode(data, max_pixels=HEIGHT * WIDTH)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    np.testing.assert_array_equal(decode(data, max_pixels=HEIGHT * WIDTH), expected)
    assert reason(data, max_pixels=HEIGHT * WIDTH - 1) == "image_too_large"
