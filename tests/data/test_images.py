"""Decoding odd and hostile files, and crops against references that are computed independently."""

import io
import math
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Config, Crop, DataConfig, Resize
from clipjax.data.images import (
    EvalTransform,
    crop_box,
    decode,
    make_decoder,
    make_training_decoder,
    random_resized_crop,
    resize_center_crop,
)
from clipjax.data.sample import BadSample

pytestmark = pytest.mark.newest


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture: noise would hide filter errors behind compression errors."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def png_header(width: int, height: int) -> bytes:
    """A PNG that is nothing but a header and an empty image."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def palette_with_transparency() -> bytes:
    image = Image.fromarray(picture(30, 40)).quantize(16)
    return encoded(image, "PNG", transparency=bytes(range(0, 160, 10)))


RGB = Image.fromarray(picture(30, 40))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # "rotate by 90 degrees to show"


@pytest.mark.parametrize(
    ("data", "mean_error"),
    [
        (encoded(RGB, "PNG"), 0),
        (encoded(RGB, "WEBP", lossless=True), 0),
        (encoded(RGB, "JPEG", quality=95), 3),
        (encoded(RGB, "JPEG", quality=95, progressive=True), 3),
        (encoded(RGB, "JPEG", quality=95, exif=ROTATED), 3),
        (encoded(RGB.convert("CMYK"), "JPEG", quality=95), 3),
        (encoded(RGB.convert("RGBA"), "PNG"), 0),
    ],
    ids=["png", "webp", "jpeg", "progressive", "exif-rotation-ignored", "cmyk", "rgba"],
)
def test_colours_survive(data, mean_error):
    image = decode(data, max_pixels=1200)
    assert image.shape == (30, 40, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - picture(30, 40)).mean() <= mean_error  # a wrong conversion is off by 50


@pytest.mark.parametrize(("image_format", "mean_error"), [("JPEG", 3), ("PNG", 0), ("WEBP", 3)])
def test_grey_has_three_channels(image_format, mean_error):
    grey = np.asarray(RGB.convert("L"))[..., None].astype(int)
    image = decode(encoded(RGB.convert("L"), image_format), max_pixels=10**6)
    assert image.shape == (30, 40, 3)
    assert np.abs(image - grey).mean() <= mean_error


def test_transparent_palette_keeps_its_colours():
    data = palette_with_transparency()
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3]
    np.testing.assert_array_equal(decode(data, max_pixels=10**6), expected)


def test_16_bit_grey_keeps_its_upper_bits():
    values = (np.arange(1200, dtype=np.uint16) * 54).reshape(30, 40)
    image = decode(encoded(Image.fromarray(values), "PNG"), max_pixels=10**6)
    np.testing.assert_array_equal(image, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_one_pixel(image_format):
    image = decode(encoded(Image.new("RGB", (1, 1), (255, 255, 255)), image_format), max_pixels=1)
    assert image.shape == (1, 1, 3)
    assert resize_center_crop(image, 8).shape == (8, 8, 3)
    assert random_resized_crop(image, 8, min_area=0.9, rng=np.random.default_rng(0)).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        encoded(RGB, "JPEG")[:400],
        encoded(RGB, "PNG")[:-200],
        encoded(RGB, "WEBP", lossless=True)[:-200],
        encoded(RGB, "GIF")[:-200],
        encoded(RGB, "BMP")[:-200],
        encoded(RGB, "TIFF")[:-200],
        encoded(RGB, "TIFF", compression="tiff_lzw")[:-200],
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"RIFF\x10\x00\x00\x00WEBPVP8 ",
        png_header(20, 20),
    ],
    ids=[
        "empty",
        "soi",
        "html",
        "cut-jpeg",
        "cut-png",
        "cut-webp",
        "cut-gif",
        "cut-bmp",
        "cut-tiff",
        "cut-lzw",
        "zeros",
        "riff",
        "no-pixels",
    ],
)
def test_what_is_no_whole_image_is_corrupt(data):
    with pytest.raises(BadSample) as caught:
        decode(data, max_pixels=10**6)
    assert caught.value.reason == "corrupt_image"


@pytest.mark.parametrize("side", [5001, 12_000, 20_000])  # Pillow is silent, warns and raises at these
def test_bomb_is_refused_from_the_header(side):
    start = time.perf_counter()
    with pytest.raises(BadSample) as caught:
        decode(png_header(side, side), max_pixels=25_000_000)
    assert caught.value.reason == "image_too_large"
    assert time.perf_counter() - start < 0.5  # decoding would take seconds and gigabytes


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_pixel_limit_is_inclusive(image_format):
    data = encoded(RGB, image_format)
    assert decode(data, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(BadSample, match="image_too_large"):
        decode(data, max_pixels=1199)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3), (0,), (5, 5)])
def test_an_array_without_pixels_is_corrupt(shape):
    with pytest.raises(BadSample, match="corrupt_image"):
        decode(np.zeros(shape, np.uint8), max_pixels=100)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3)])
def test_nothing_cannot_be_resized(shape):
    image, message = np.zeros(shape, np.uint8), f"an image of {shape[0]} x {shape[1]} pixels cannot be resized"
    with pytest.raises(ValueError, match=message):
        resize_center_crop(image, 4)
    with pytest.raises(ValueError, match=message):
        EvalTransform(4, Resize.SQUASH)(image)
    with pytest.raises(ValueError, match=message):
        random_resized_crop(image, 4, min_area=0.5, rng=np.random.default_rng(0))


def test_arrays_pass_through_but_obey_the_limit():
    image = picture(30, 40)
    assert decode(image, max_pixels=1200) is image
    with pytest.raises(BadSample, match="image_too_large"):
        decode(image, max_pixels=1199)


@pytest.mark.parametrize(
    ("height", "width", "size", "resized", "corner"),
    [
        (40, 60, 32, (32, 48), (0, 8)),
        (60, 40, 32, (48, 32), (8, 0)),
        (37, 101, 32, (32, 87), (0, 28)),  # 55 / 2 rounds to the even 28, as torchvision does
        (50, 71, 33, (33, 46), (0, 6)),  # 13 / 2 rounds to the even 6
        (32, 32, 32, (32, 32), (0, 0)),
        (10, 11, 32, (32, 35), (0, 2)),
    ],
)
def test_resize_center_crop_is_clips(height, width, size, resized, corner):
    image = picture(height, width)
    full = Image.fromarray(image).resize(resized[::-1], Image.Resampling.BICUBIC)
    top, left = corner
    expected = np.asarray(full)[top : top + size, left : left + size]
    np.testing.assert_array_equal(resize_center_crop(image, size), expected)


@pytest.mark.parametrize("shape", [(1, 1_000_000, 3), (1_000_000, 1, 3), (17, 400, 3)])
def test_extreme_shapes_need_little_memory(shape):
    image = np.full(shape, 77, np.uint8)
    assert (resize_center_crop(image, 16) == 77).all()
    assert (random_resized_crop(image, 16, min_area=0.9, rng=np.random.default_rng(0)) == 77).all()


class _FixedDraws:
    """A generator that returns what it is told and records what it was asked."""

    def __init__(self, uniforms, integers):
        self.uniforms, self.draws, self.asked = list(uniforms), list(integers), []

    def random(self):
        return self.uniforms.pop(0)

    def integers(self, low, high):
        self.asked.append((low, high))
        return self.draws.pop(0)


def test_random_resized_crop_follows_torchvision():
    image = picture(60, 80)
    share = (0.5 - 0.3) / (1 - 0.3)  # of the way from 0.3 to 1
    aspect = np.log(1.2 / (3 / 4)) / np.log((4 / 3) / (3 / 4))
    rng = _FixedDraws([share, aspect], [7, 11])
    cropped = random_resized_crop(image, 24, min_area=0.3, rng=rng)
    # Area 2400 at aspect 1.2: width sqrt(2880) = 53.67, height sqrt(2000) = 44.72.
    assert rng.asked == [(0, 60 - 45 + 1), (0, 80 - 54 + 1)]
    box = (11, 7, 11 + 54, 7 + 45)
    expected = Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC, box=box)
    np.testing.assert_array_equal(cropped, np.asarray(expected))


def test_crops_are_those_of_numpys_uniform_draws():
    """Runs go on with the crops that they began with."""
    rng, other = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(200):
        top, left, height, width = crop_box(1000, 1000, 0.2, rng)
        area = 1e6 * other.uniform(0.2, 1.0)
        aspect = math.exp(other.uniform(math.log(3 / 4), math.log(4 / 3)))
        if max(area * aspect, area / aspect) < 1e6:
            assert (height, width) == (round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect)))
            assert (top, left) == (other.integers(0, 1001 - height), other.integers(0, 1001 - width))
        else:  # another try: only draws that fit are compared
            rng, other = np.random.default_rng(height), np.random.default_rng(height)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 100, (43, 0, 56, 10)), (100, 10, (0, 43, 10, 56))],  # the largest crop of aspect 4/3 (3/4): 13 by 10
)
def test_crop_of_a_narrow_image_falls_back_to_the_centre(height, width, box):
    image = picture(height, width)
    cropped = random_resized_crop(image, 16, min_area=0.9, rng=np.random.default_rng(0))
    expected = Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC, box=box)
    np.testing.assert_array_equal(cropped, np.asarray(expected))


def test_random_crops_cover_what_they_should():
    """Positions are marked by value: a ramp that rises to the right and down."""
    ramp = np.arange(200, dtype=np.uint8)
    image = np.repeat((ramp[:, None] // 2 + ramp[None, :] // 2)[..., None], 3, axis=2)
    rng = np.random.default_rng(1)
    crops = [random_resized_crop(image, 16, min_area=0.25, rng=rng) for _ in range(200)]
    spans = np.array([int(crop.max()) - int(crop.min()) for crop in crops])
    assert 75 < spans.min() < 110  # a quarter of the area is half of either side
    assert spans.max() > 170
    corners = np.array([crop[0, 0, 0] for crop in crops])
    assert corners.min() < 10 < 60 < corners.max()


def photograph(width: int, height: int) -> bytes:
    """A JPEG with the detail of a photograph: noise of several scales."""
    draw, pixels = np.random.default_rng(0), np.zeros((height, width, 3), np.float32)
    for scale, strength in ((2, 60), (8, 40), (32, 24), (128, 12), (256, 7)):
        noise = Image.fromarray(draw.integers(0, 256, (scale, scale, 3), dtype=np.uint8))
        pixels += (
            (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128) * strength / 64
        )
    content = io.BytesIO()
    Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
    return content.getvalue()


@pytest.mark.parametrize(("margin", "size", "bound"), [(1.0, (640, 480), 1.5), (2.0, (1600, 1200), 0.5)])
def test_decoding_at_a_part_of_the_size_stays_within_the_stated_error(margin, size, bound):
    """The bounds are those of docs/data.md, in levels of 255 on average."""
    jpeg = photograph(*size)
    whole = decode(jpeg, max_pixels=10**7)
    part = decode(jpeg, max_pixels=10**7, min_side=math.ceil(margin * 224))
    assert whole.shape[:2] == size[::-1]
    assert 224 * margin <= min(part.shape[:2]) <= size[1] / 2
    views = [resize_center_crop(pixels, 224).astype(int) for pixels in (whole, part)]
    assert 0 < np.abs(views[0] - views[1]).mean() < bound


def test_small_jpegs_and_other_formats_are_decoded_whole():
    jpeg = photograph(400, 300)
    np.testing.assert_array_equal(decode(jpeg, max_pixels=10**6, min_side=151), decode(jpeg, max_pixels=10**6))
    content = io.BytesIO()
    Image.fromarray(picture(300, 400)).save(content, "PNG")
    assert decode(content.getvalue(), max_pixels=10**6, min_side=10).shape == (300, 400, 3)


def test_the_limit_of_pixels_is_that_of_the_whole_picture():
    with pytest.raises(BadSample, match="image_too_large"):
        decode(photograph(400, 300), max_pixels=100_000, min_side=10)


@pytest.mark.parametrize(("crop", "expected"), [(Crop.CENTER, 448), (Crop.RANDOM_RESIZED, 863)])
def test_no_crop_of_training_has_fewer_pixels_than_the_margin(crop, expected):
    data = DataConfig(decode_margin=2.0, crop=crop, min_crop_area=0.36)
    decoder = make_training_decoder(Config(data=data))
    assert decoder.min_side == expected
    if crop is Crop.RANDOM_RESIZED:
        draws = [crop_box(expected, expected, 0.36, np.random.default_rng(i)) for i in range(300)]
        assert 448 - 1 <= min(min(height, width) for _, _, height, width in draws) < 500
    assert make_training_decoder(Config()).min_side is None
    assert make_decoder(data).min_side is None  # evaluation
