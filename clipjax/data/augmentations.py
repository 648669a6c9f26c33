"""Random changes of training pictures behind the crop: flip, colour jitter, grayscale, erasing.

Reading order: `Augmentations`, `jitter_colours` (torchvision's formulas), `erase`. Pixels are uint8 [h, w, 3].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipjax.config import AugmentConfig, Config

_LUMA = np.array([0.2989, 0.587, 0.114], np.float32)  # torchvision's, of ITU-R BT.601
_ERASED_AREA = (0.02, 0.33)  # share of the picture
_ERASED_ASPECT = (0.3, 3.3)  # height / width
_ERASING_TRIES = 10


@dataclass(frozen=True, slots=True)
class Augmentations:
    """The changes that a config asks for. What is off draws no number, so the other draws stay as they are.

    Attributes:
        settings: probabilities and strengths.
        fill: colour of what is erased.
    """

    settings: AugmentConfig
    fill: tuple[int, int, int]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the changed picture; the one that is given stays as it is."""
        settings = self.settings
        if happens(settings.horizontal_flip, rng):
            image = np.ascontiguousarray(image[:, ::-1])
        if happens(settings.color_jitter_probability, rng):
            image = jitter_colours(image, *_draw_jitter(settings.color_jitter, rng))
        if happens(settings.grayscale, rng):
            image = np.repeat(_to_uint8(_luma(image.astype(np.float32))), 3, axis=2)
        if happens(settings.erasing, rng):
            image = erase(image, self.fill, rng)
        return image


def make_augmentations(config: Config) -> Augmentations:
    """Return the changes that a config asks for; what is erased gets the mean colour, which the model sees as 0."""
    red, green, blue = (min(255, max(0, round(255 * share))) for share in config.data.mean)
    return Augmentations(config.data.augment, (red, green, blue))


def happens(probability: float, rng: np.random.Generator) -> bool:
    """Draw whether something happens; what never does draws no number."""
    return probability > 0 and rng.random() < probability


def _draw_jitter(strengths: Sequence[float], rng: np.random.Generator) -> tuple[list[float], list[int]]:
    """Draw the factors of brightness, contrast and saturation, the turn of the hue, and their order."""
    *factors, hue = strengths
    amounts = [float(rng.uniform(max(0.0, 1 - strength), 1 + strength)) for strength in factors]
    return [*amounts, float(rng.uniform(-hue, hue))], rng.permutation(4).tolist()


def jitter_colours(image: np.ndarray, amounts: Sequence[float], order: Sequence[int]) -> np.ndarray:
    """Change brightness, contrast, saturation and hue.

    Args:
        image: uint8 [h, w, 3].
        amounts: the three factors, of which 1 changes nothing, and the turn of the hue as a share of its circle.
        order: permutation of 0 to 3.

    Returns:
        uint8 [h, w, 3].

    Source: torchvision.transforms.v2.ColorJitter, for floats; for uint8 it cuts off the fraction after each of the
    four, while here the result is rounded once.
    """
    pixels = image.astype(np.float32)
    for change in order:
        amount = np.float32(amounts[change])
        if amount == (0 if change == 3 else 1):
            continue
        if change == 0:
            pixels = pixels * amount
        elif change == 1:
            pixels = amount * pixels + (1 - amount) * _luma(pixels).mean()
        elif change == 2:
            pixels = amount * pixels + (1 - amount) * _luma(pixels)
        else:
            pixels = _turn_hue(pixels, amount)
        pixels = np.clip(pixels, 0, 255)
    return _to_uint8(pixels)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels).astype(np.uint8)


def _luma(pixels: np.ndarray) -> np.ndarray:
    return (pixels @ _LUMA)[..., None]


def _turn_hue(pixels: np.ndarray, turn: np.float32) -> np.ndarray:
    """Turn the hue in HSV; value and saturation stay.

    With the hue h in sixths of its circle, a channel lies between the smallest and the largest one at
    clip(|h - 3| - 1, 0, 1), clip(2 - |h - 2|, 0, 1) and clip(2 - |h - 4|, 0, 1) for red, green and blue.
    """
    red, green, blue = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))  # planes are twice as fast
    value = np.maximum(np.maximum(red, green), blue)
    least = np.minimum(np.minimum(red, green), blue)
    chroma = value - least
    divisor = np.where(chroma == 0, np.float32(1), chroma)
    is_green = value == green
    offset = np.where(is_green, np.float32(2), np.float32(4))
    hue = np.where(is_green, blue - red, red - green) / divisor + offset
    hue = np.where(value == red, (green - blue) / divisor, hue) + 6 * turn
    hue -= 6 * np.floor(hue / 6)
    shares = np.abs(hue - 3) - 1, 2 - np.abs(hue - 2), 2 - np.abs(hue - 4)
    return np.stack([least + chroma * np.clip(share, 0, 1) for share in shares], axis=2)


def erase(image: np.ndarray, fill: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Fill a random rectangle with a colour.

    Source: arXiv 1708.04896, algorithm 1, as in torchvision's RandomErasing: 10 tries, then the picture stays.
    """
    height, width = image.shape[:2]
    for _ in range(_ERASING_TRIES):
        area = height * width * rng.uniform(*_ERASED_AREA)
        aspect = math.exp(rng.uniform(math.log(_ERASED_ASPECT[0]), math.log(_ERASED_ASPECT[1])))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < rows < height and 0 < columns < width:
            top = int(rng.integers(0, height - rows + 1))
            left = int(rng.integers(0, width - columns + 1))
            image = image.copy()
            image[top : top + rows, left : left + columns] = fill
            return image
    return image
