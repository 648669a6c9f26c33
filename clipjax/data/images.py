"""Encoded bytes to square uint8 pixels: decode with a size limit, random resized crop, resize and centre crop.

Axes: h height, w width. Pixels stay uint8 up to the device, which normalises them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clipjax.config import Config, Crop, DataConfig, Interpolation, Resize
from clipjax.data.jpeg import SIGNATURE, decode_jpeg, jpeg_orientation
from clipjax.data.pictures import decode_picture, turn
from clipjax.data.sample import BadSample

_ASPECT = (3 / 4, 4 / 3)  # width / height of a random crop, as in torchvision
_LOG_ASPECT = (math.log(_ASPECT[0]), math.log(_ASPECT[1]))
_CROP_TRIES = 10
_MAX_SIDE_RATIO = 16  # of an image's sides before a centre crop


@dataclass(frozen=True, slots=True)
class Decoder:
    """The decoding that a config asks for: a sample's image to uint8 [h, w, 3]; its fields are those of `decode`."""

    max_pixels: int
    background: tuple[int, int, int] | None = None
    exif_orientation: bool = False
    min_side: int | None = None

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """Return the pixels. Raise `BadSample` if there are none to use."""
        return decode(
            image,
            max_pixels=self.max_pixels,
            background=self.background,
            exif_orientation=self.exif_orientation,
            min_side=self.min_side,
        )


def make_decoder(data: DataConfig) -> Decoder:
    """Return the decoder that a config asks for."""
    return Decoder(data.max_image_pixels, data.background, data.exif_orientation)


def make_training_decoder(config: Config) -> Decoder:
    """Return the decoder of a run's training pictures."""
    decoder, data = make_decoder(config.data), config.data
    if data.decode_margin is None:
        return decoder
    area = 1.0 if data.crop is Crop.CENTER else data.min_crop_area * _ASPECT[0]  # of a square as high as the crop
    return replace(decoder, min_side=math.ceil(data.decode_margin * config.model.image.image_size / math.sqrt(area)))


def decode(
    image: bytes | np.ndarray,
    *,
    max_pixels: int,
    background: tuple[int, int, int] | None = None,
    exif_orientation: bool = False,
    min_side: int | None = None,
) -> np.ndarray:
    """Decode a picture to RGB; pixels pass through.

    JPEGs are those of `clipjax.data.jpeg`, the others those of `clipjax.data.pictures`. 16-bit images keep their upper
    8 bits. Colour profiles are not applied. The defaults are those of CLIP's reference.

    Args:
        image: encoded bytes, or pixels uint8 [h, w, 3].
        max_pixels: larger images are refused from the header, before any pixel is decoded. Pillow's own limit, of 179
            megapixels, holds besides for GIF, TIFF and WebP alone.
        background: colour behind transparent pixels; None drops the alpha, whatever colour it hides.
        exif_orientation: turn the picture as its EXIF data says; arrays have none.
        min_side: decode a JPEG at half of its sides or less if both stay as long as this.

    Returns:
        uint8 [h, w, 3].

    Raises:
        BadSample: `corrupt_image` (also for files that are cut off, and without pixels), `image_too_large`, or
            `unsupported_format` for files of a kind that is not decoded.
    """

    def check_size(height: int, width: int) -> None:
        _check_pixels(height, width, max_pixels)

    if isinstance(image, np.ndarray):
        if image.ndim != 3:
            raise BadSample("corrupt_image")
        check_size(*image.shape[:2])
        return image
    try:
        if image.startswith(SIGNATURE):
            pixels = decode_jpeg(image, check_size, min_side)
            orientation = jpeg_orientation(image) if exif_orientation else 1
        else:
            pixels, orientation = decode_picture(image, check_size, background=background)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # the decoders raise many types on hostile bytes
        is_large = type(error).__name__ in ("DecompressionBombError", "DecompressionBombWarning")
        raise BadSample("image_too_large" if is_large else "corrupt_image") from error
    return turn(pixels, orientation) if exif_orientation else pixels


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if not height * width:
        raise BadSample("corrupt_image")
    if height * width > max_pixels:
        raise BadSample("image_too_large")


def _require_pixels(image: np.ndarray) -> None:
    if not image.size:
        raise ValueError(f"an image of {image.shape[0]} x {image.shape[1]} pixels cannot be resized; leave it out")


def random_resized_crop(
    image: np.ndarray,
    size: int,
    *,
    min_area: float,
    rng: np.random.Generator,
    interpolation: Interpolation = Interpolation.BICUBIC,
) -> np.ndarray:
    """Crop a random part and resize it, antialiased.

    Args:
        image: uint8 [h, w, 3].
        size: side of the result in pixels.
        min_area: smallest share of the image's area, in (0, 1].
        rng: source of the randomness.
        interpolation: filter of resizing.

    Returns:
        uint8 [size, size, 3].

    Source: arXiv 1409.4842, section 6, as in torchvision's RandomResizedCrop (10 tries, then the largest allowed
    centre crop). Like Pillow's `resize(box=...)`, the filter sees the pixels around the crop.
    """
    from PIL import Image

    _require_pixels(image)
    top, left, height, width = crop_box(image.shape[0], image.shape[1], min_area, rng)
    box = (left, top, left + width, top + height)
    return np.asarray(Image.fromarray(image).resize((size, size), resampling(interpolation), box=box))


def crop_box(height: int, width: int, min_area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a random crop."""
    for _ in range(_CROP_TRIES):
        # What `rng.uniform` does, bit for bit, in a tenth of its time.
        area = height * width * (min_area + (1.0 - min_area) * rng.random())
        aspect = math.exp(_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * rng.random())
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height = min(height, round(width / _ASPECT[0]))
    crop_width = min(width, round(height * _ASPECT[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@dataclass(frozen=True, slots=True)
class EvalTransform:
    """The transform of evaluation: a picture uint8 [h, w, 3] of any size to uint8 [size, size, 3]."""

    size: int
    resize: Resize = Resize.SHORTER_SIDE
    interpolation: Interpolation = Interpolation.BICUBIC

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the square picture that the model gets."""
        if self.resize is Resize.SHORTER_SIDE:
            return resize_center_crop(image, self.size, self.interpolation)
        from PIL import Image

        _require_pixels(image)
        size = (self.size, self.size)
        return np.asarray(Image.fromarray(image).resize(size, resampling(self.interpolation)))

    def find_box(self, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        """Return the picture, cut if it is too long, and the box that the model gets: top, left, height, width."""
        _require_pixels(image)
        if self.resize is not Resize.SHORTER_SIDE:
            return image, (0.0, 0.0, float(image.shape[0]), float(image.shape[1]))
        image = _cut_ends(image)
        (height, width), (rows, columns) = image.shape[:2], _resized_shape(image, self.size)
        top, left = round((rows - self.size) / 2), round((columns - self.size) / 2)
        down, across = height / rows, width / columns
        return image, (top * down, left * across, self.size * down, self.size * across)


def make_eval_transform(config: Config) -> EvalTransform:
    """Return the transform that a config asks for."""
    return EvalTransform(config.model.image.image_size, config.data.resize, config.data.interpolation)


def resampling(interpolation: Interpolation) -> Any:
    """Return Pillow's filter."""
    from PIL import Image

    return Image.Resampling[interpolation.name]


def resize_center_crop(
    image: np.ndarray, size: int, interpolation: Interpolation = Interpolation.BICUBIC
) -> np.ndarray:
    """Resize the short side to `size` and crop the centre: CLIP's evaluation preprocessing.

    Args:
        image: uint8 [h, w, 3].
        size: side of the result in pixels.
        interpolation: filter of resizing.

    Returns:
        uint8 [size, size, 3].

    Source: `clip.py`, `_transform`, of arXiv 2103.00020, with torchvision's rounding.
    """
    from PIL import Image

    _require_pixels(image)
    image = _cut_ends(image)
    new_height, new_width = _resized_shape(image, size)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    resized = Image.fromarray(image).resize((new_width, new_height), resampling(interpolation))
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _cut_ends(image: np.ndarray) -> np.ndarray:
    """Return the middle of a picture that is too long for its short side."""
    height, width = image.shape[:2]
    short = min(height, width)
    if max(height, width) <= _MAX_SIDE_RATIO * short:
        return image
    # Resizing one line of 25 million pixels would need terabytes. What is cut here is far from the centre.
    top, left = ((side - min(side, _MAX_SIDE_RATIO * short)) // 2 for side in (height, width))
    return image[top : height - top, left : width - left]


def _resized_shape(image: np.ndarray, size: int) -> tuple[int, int]:
    """Return height and width of a picture whose short side becomes `size`."""
    height, width = image.shape[:2]
    short = min(height, width)
    rows, columns = (size if side == short else int(size * side / short) for side in (height, width))
    return rows, columns
