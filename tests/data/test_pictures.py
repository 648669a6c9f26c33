"""Pictures of every format against references that are computed here from the values that were written."""

import dataclasses
import io
import struct
import threading
import warnings

import numpy as np
import pytest
from PIL import Image, features

from clipjax.config import DataConfig
from clipjax.data.eval_batches import eval_batches
from clipjax.data.images import Decoder, EvalTransform, decode, make_decoder
from clipjax.data.sample import BadSample
from clipjax.data.sources import ArraySource
from tests.data.picture_files import (
    COLOUR,
    COLOUR_ALPHA,
    GREY,
    GREY_ALPHA,
    HEIGHT,
    PAGE,
    PALETTE,
    RGB,
    RGBA,
    WIDTH,
    bmp,
    chunk,
    gif,
    png,
    random_values,
    saved,
    tiff,
)

pytestmark = pytest.mark.newest

SEA = (10, 200, 77)


def over(rgb: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int] | None) -> np.ndarray:
    """Return the colours over a background, in float64."""
    if background is None:
        return rgb
    share = alpha.astype(np.float64)[..., None] / 255
    return np.round(rgb * share + np.array(background) * (1 - share))


def read(data: bytes, **options) -> np.ndarray:
    pixels = decode(data, max_pixels=10_000, **options)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.flags.c_contiguous
    return pixels


def reason(data: bytes, max_pixels: int = 10_000) -> str:
    with pytest.raises(BadSample) as caught:
        decode(data, max_pixels=max_pixels)
    return caught.value.reason


BACKGROUNDS = pytest.mark.parametrize("background", [None, SEA, (0, 0, 0)])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@BACKGROUNDS
def test_grey_png(bits, background):
    values = random_values(2**bits, 1)
    grey = values * 255 // (2**bits - 1) if bits <= 8 else values >> 8
    hidden = int(values[2, 3, 0])
    data = png(values, bits, GREY, chunk(b"tRNS", struct.pack(">H", hidden)))
    alpha = np.where(values[..., 0] == hidden, 0, 255)
    np.testing.assert_array_equal(read(data, background=background), over(np.repeat(grey, 3, 2), alpha, background))
    np.testing.assert_array_equal(read(png(values, bits, GREY), background=background), np.repeat(grey, 3, 2))


@pytest.mark.parametrize("bits", [8, 16])
@BACKGROUNDS
def test_colour_png(bits, background):
    values = random_values(2**bits, 3)
    hidden = values[1, 4]
    data = png(values, bits, COLOUR, chunk(b"tRNS", struct.pack(">3H", *hidden)))
    alpha = np.where((values == hidden).all(-1), 0, 255)
    np.testing.assert_array_equal(read(data, background=background), over(values >> (bits - 8), alpha, background))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@BACKGROUNDS
def test_palette_png(bits, background):
    values = random_values(2**bits, 1)[..., 0]
    colours = np.random.default_rng(1).integers(0, 256, (2**bits, 3), dtype=np.uint8)
    alphas = np.full(2**bits, 255)
    alphas[: 2 ** (bits - 1)] = np.random.default_rng(2).integers(0, 256, 2 ** (bits - 1))
    parts = chunk(b"PLTE", colours.tobytes()), chunk(b"tRNS", bytes(alphas[: 2 ** (bits - 1)].tolist()))
    expected = over(colours[values], alphas[values], background)
    np.testing.assert_array_equal(read(png(values[..., None], bits, PALETTE, *parts), background=background), expected)


@pytest.mark.parametrize(("kind", "channels"), [(GREY_ALPHA, 2), (COLOUR_ALPHA, 4)])
@pytest.mark.parametrize("bits", [8, 16])
@BACKGROUNDS
def test_png_with_alpha(kind, channels, bits, background):
    values = random_values(2**bits, channels)
    upper = values >> (bits - 8)
    rgb = np.repeat(upper[..., :1], 3, 2) if channels == 2 else upper[..., :3]
    expected = over(rgb, upper[..., -1], background)
    np.testing.assert_array_equal(read(png(values, bits, kind), background=background), expected)


@BACKGROUNDS
def test_webp_with_alpha(background):
    data = saved(RGBA, "WEBP", lossless=True, exact=True)
    np.testing.assert_array_equal(read(data, background=background), over(RGBA[..., :3], RGBA[..., 3], background))


def test_animations_show_their_first_frame():
    frames = [Image.fromarray(RGB), Image.new("RGB", (WIDTH, HEIGHT), SEA)]
    options = {"save_all": True, "append_images": frames[1:], "duration": 40}
    for image_format in ("PNG", "WEBP", "TIFF"):
        extra = {"lossless": True} if image_format == "WEBP" else {}
        data = saved(frames[0], image_format, **options, **extra)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        np.testing.assert_array_equal(read(data), RGB)
    few = Image.fromarray(RGB).quantize(8)
    data = saved(few, "GIF", save_all=True, append_images=[frames[1].quantize(2)])
    np.testing.assert_array_equal(read(data), np.asarray(few.convert("RGB")))


@BACKGROUNDS
@pytest.mark.parametrize("hidden", [None, 7])
def test_gif(background, hidden):
    indices = random_values(256, 1)[..., 0].astype(np.uint8)
    indices[0, 0] = 7
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    alpha = np.where(indices == hidden, 0, 255)
    data = gif(indices, colours, hidden=hidden)
    np.testing.assert_array_equal(read(data, background=background), over(colours[indices], alpha, background))


def test_bmp():
    np.testing.assert_array_equal(read(bmp(RGB)), RGB)
    grey = saved(Image.fromarray(RGB).convert("L"), "BMP")
    np.testing.assert_array_equal(read(grey), np.repeat(np.asarray(Image.fromarray(RGB).convert("L"))[..., None], 3, 2))


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
def test_16_bit_tiff_keeps_its_upper_bits(order, big):
    values = random_values(2**16, 1)[..., 0]
    data = tiff(values.astype(order + "u2").tobytes(), order=order, big=big, bits=16, samples=1, photometric=1, **PAGE)
    np.testing.assert_array_equal(read(data), np.repeat((values >> 8)[..., None], 3, 2))


def test_tiff_is_turned_by_its_own_tag():
    """Orientation belongs to the format, and Pillow always applies it."""
    grey = random_values(256, 1)[..., 0].astype(np.uint8)
    for orientation, upright in UPRIGHT.items():
        data = tiff(grey.tobytes(), bits=8, samples=1, photometric=1, orientation=orientation, **PAGE)
        for option in (False, True):
            np.testing.assert_array_equal(read(data, exif_orientation=option)[..., 0], upright(grey))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), upright(grey))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits"])
def test_tiff_of_colours_and_ink(compression):
    np.testing.assert_array_equal(read(saved(RGB, "TIFF", compression=compression)), RGB)
    ink = Image.frombytes("CMYK", (WIDTH, HEIGHT), RGBA.tobytes())
    values = RGBA.astype(np.float64)
    expected = np.round((255 - values[..., :3]) * (255 - values[..., 3:]) / 255)
    # Pillow's CMYK, which it computes in whole numbers.
    assert np.abs(read(saved(ink, "TIFF", compression=compression)) - expected).max() <= 1


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif():
    smooth = np.asarray(Image.fromarray(RGB).resize((64, 48), Image.Resampling.BILINEAR))
    found = read(saved(smooth, "AVIF", quality=95, subsampling="4:4:4"))
    assert np.abs(found.astype(int) - smooth).mean() < 2  # lossy


def test_avif_without_a_decoder_is_another_format(monkeypatch):
    from PIL import AvifImagePlugin

    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    assert reason(b"\0\0\0\x1cftypavif" + bytes(20)) == "unsupported_format"


UPRIGHT = {  # Exif 2.32, tag 0x0112: where row 0 and column 0 of the stored pixels are shown
    1: lambda stored: stored,
    2: lambda stored: np.fliplr(stored),
    3: lambda stored: np.rot90(stored, 2),
    4: lambda stored: np.flipud(stored),
    5: lambda stored: np.swapaxes(stored, 0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(np.swapaxes(stored, 0, 1), 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    extra = {"lossless": True} if image_format == "WEBP" else {}
    data = saved(RGB, image_format, exif=exif, **extra)
    stored = read(data)
    assert stored.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(read(data, exif_orientation=True), UPRIGHT[orientation](stored))


def exif_jpeg(exif: bytes) -> bytes:
    plain = saved(RGB, "JPEG")
    body = b"Exif\0\0" + exif
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]


def entry(order: str, value: int, *, tag: int = 0x0112, kind: int = 3, count: int = 1) -> bytes:
    return struct.pack(order + "HHIHH", tag, kind, count, value, 0)


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (b"II*\0" + struct.pack("<IH", 8, 1) + entry("<", 6), 6),
        (b"MM\0*" + struct.pack(">IH", 8, 2) + entry(">", 1, tag=0x0100) + entry(">", 8), 8),
        (b"II*\0" + struct.pack("<IH", 8, 1) + entry("<", 9), 1),
        (b"II*\0" + struct.pack("<IH", 8, 1) + entry("<", 0), 1),
        (b"II*\0" + struct.pack("<IH", 8, 1) + entry("<", 6, kind=4), 1),
        (b"II*\0" + struct.pack("<IH", 8, 1) + entry("<", 6, count=2), 1),
        (b"II*\0" + struct.pack("<IH", 2**32 - 1, 1), 1),
        (b"II*\0" + struct.pack("<IH", 8, 65_535), 1),
        (b"II*\0", 1),
        (b"", 1),
        (b"JUNK" * 30, 1),
    ],
)
def test_hostile_exif_turns_nothing(exif, orientation):
    data = exif_jpeg(exif)
    np.testing.assert_array_equal(read(data, exif_orientation=True), UPRIGHT[orientation](read(data)))


OTHERS = {
    "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj",
    "svg": b"\xef\xbb\xbf <?xml version='1.0'?>\n<!-- by hand -->\n<svg xmlns='http://www.w3.org/2000/svg'/>",
    "svg without a head": b"<svg width='1'></svg>",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "jpeg xl": b"\xff\x0a" + bytes(50),
    "jpeg xl in boxes": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50),
    "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50),
    "psd": b"8BPS\0\1" + bytes(50),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "ico": saved(RGB, "ICO"),
    "ppm": saved(RGB, "PPM"),
    "film": b"\0\0\0\x20ftypisom" + bytes(50),
    "big-endian BigTIFF": tiff(bytes(130), order=">", big=True, bits=16, samples=1, photometric=1, **PAGE),
    "floats": tiff(bytes(260), bits=32, samples=1, photometric=1, sample_format=3, **PAGE),
    "32 bits": tiff(bytes(260), bits=32, samples=1, photometric=1, sample_format=2, **PAGE),
    "tiff of 3 bits": tiff(bytes(200), bits=3, samples=1, photometric=1, **PAGE),
    "bmp of a jpeg": bmp(RGB)[:30] + struct.pack("<I", 4) + bmp(RGB)[34:],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_whole_files_of_another_kind(name):
    assert reason(OTHERS[name]) == "unsupported_format"


@pytest.mark.parametrize(
    "data",
    [b"<html><svg></svg></html>", b"<!DOCTYPE html><html><svg/></html>", b"\0\0\1\0" + bytes(50), b"P3",
     b"Page not found", b"BMW, a car", b"RIFFxxxxWEBP", b"GIF89a", b"II*\0", b"II*\0" + bytes(30), b"MM\0+" + bytes(3),
     bytes(1000), b"\0\0\0\x1cftypavif" + bytes(20), b"<?xml version='1.0'?><feed/>"],
)  # fmt: skip
def test_what_is_no_picture_is_corrupt(data):
    assert reason(data) == "corrupt_image"


def test_content_decides():
    """A name or a type is never asked for: there is none in the call. An EPS behind another beginning runs nothing."""
    assert reason(b"\xc5\xd0\xd3\xc6" + bytes(30)) == "unsupported_format"


def test_threads_decode_all_formats_at_once():
    wrong = []

    def work() -> None:
        for _ in range(20):
            for data in (saved(RGB, "PNG"), saved(RGB, "WEBP", lossless=True), bmp(RGB), saved(RGB, "TIFF")):
                if not np.array_equal(read(data), RGB):
                    wrong.append(data[:4])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_config_decides():
    data = DataConfig(background=SEA, exif_orientation=True, max_image_pixels=99)
    assert make_decoder(data) == Decoder(99, SEA, True)
    clear = png(np.zeros((HEIGHT, WIDTH, 4), np.uint16), 8, COLOUR_ALPHA)
    assert (make_decoder(dataclasses.replace(data, background=None))(clear) == 0).all()
    assert (make_decoder(data)(clear) == SEA).all()
    with pytest.raises(BadSample, match="image_too_large"):
        Decoder(HEIGHT * WIDTH - 1)(clear)


def test_evaluation_uses_it():
    clear = png(np.zeros((8, 8, 4), np.uint16), 8, COLOUR_ALPHA)
    source = ArraySource([clear], ["nothing"])
    options = {"view": EvalTransform(8), "batch_size": 1, "max_image_pixels": 64, "num_threads": 1}
    (batch,) = eval_batches(source, background=SEA, **options)
    assert (batch["image"] == SEA).all()
    (batch,) = eval_batches(source, **options)
    assert (batch["image"] == 0).all()


def test_no_format_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image_format in ("PNG", "GIF", "BMP", "TIFF", "WEBP"):
            read(saved(RGB, image_format))
        read(saved(Image.fromarray(RGB).quantize(8), "PNG", transparency=bytes(range(0, 80, 10))))
