"""Encoded bytes to square uint8 pixels: decode with a size limit, random resized crop, resize and centre crop.

Axes: h height, w width. Pixels stay uint8 up to the device, which normalises them.
"""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.config import Config, Interpolation, Resize
from clipjax.data.sample import BadSample

_FORMATS = ("PNG", "WEBP")
_ASPECT = (3 / 4, 4 / 3)  # width / height of a random crop, as in torchvision
_CROP_TRIES = 10
_MAX_SIDE_RATIO = 16  # of an image's sides before a centre crop


def decode(image: bytes | np.ndarray, *, max_pixels: int) -> np.ndarray:
    """Decode a JPEG, PNG or WebP to RGB; pixels pass through.

    As in CLIP's reference, other colour modes are converted without a background and an EXIF rotation is ignored.
    16-bit images keep their upper 8 bits.

    Args:
        image: encoded bytes, or pixels uint8 [h, w, 3].
        max_pixels: larger images are refused from the header, before any pixel is decoded.

    Returns:
        uint8 [h, w, 3].

    Raises:
        BadSample: `corrupt_image` (also for truncated and other files, and without pixels) or `image_too_large`.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3:
            raise BadSample("corrupt_image")
        _check_pixels(image.shape[0], image.shape[1], max_pixels)
        return image
    try:
        return _decode_jpeg(image, max_pixels) if image[:2] == b"\xff\xd8" else _decode_other(image, max_pixels)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # the decoders raise many types on hostile bytes
        raise BadSample("corrupt_image") from error


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if not height * width:
        raise BadSample("corrupt_image")
    if height * width > max_pixels:
        raise BadSample("image_too_large")


def _require_pixels(image: np.ndarray) -> None:
    if not image.size:
        raise ValueError(f"an image of {image.shape[0]} x {image.shape[1]} pixels cannot be resized; leave it out")


def _decode_jpeg(image: bytes, max_pixels: int) -> np.ndarray:
    import simplejpeg

    height, width, *_ = simplejpeg.decode_jpeg_header(image)
    _check_pixels(int(height), int(width), max_pixels)
    # Strict: Pillow would return a damaged file as a half grey image.
    return simplejpeg.decode_jpeg(image, "RGB", strict=True)


def _decode_other(image: bytes, max_pixels: int) -> np.ndarray:
    from PIL import Image

    try:
        opened = Image.open(io.BytesIO(image), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("image_too_large") from error
    with opened:
        _check_pixels(opened.height, opened.width, max_pixels)
        if opened.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
            grey = (np.asarray(opened).astype(np.uint32) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        # Straight from a palette with transparent entries, Pillow warns; the colours are the same.
        flat = opened.convert("RGBA") if "transparency" in opened.info else opened
        return np.asarray(flat.convert("RGB"))


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
    top, left, height, width = _crop_box(image.shape[0], image.shape[1], min_area, rng)
    box = (left, top, left + width, top + height)
    return np.asarray(Image.fromarray(image).resize((size, size), _filter(interpolation), box=box))


def _crop_box(height: int, width: int, min_area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a random crop."""
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
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
        return np.asarray(Image.fromarray(image).resize(size, _filter(self.interpolation)))


def make_eval_transform(config: Config) -> EvalTransform:
    """Return the transform that a config asks for."""
    return EvalTransform(config.model.image.image_size, config.data.resize, config.data.interpolation)


def _filter(interpolation: Interpolation) -> Any:
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
    height, width = image.shape[:2]
    short = min(height, width)
    if max(height, width) > _MAX_SIDE_RATIO * short:
        # Resizing one line of 25 million pixels would need terabytes. What is cut here is far from the centre.
        top, left = ((side - min(side, _MAX_SIDE_RATIO * short)) // 2 for side in (height, width))
        image = image[top : height - top, left : width - left]
        height, width = image.shape[:2]
    new_width, new_height = (size if side == short else int(size * side / short) for side in (width, height))
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    resized = Image.fromarray(image).resize((new_width, new_height), _filter(interpolation))
    return np.asarray(resized.crop((left, top, left + size, top + size)))
