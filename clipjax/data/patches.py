"""Patches of a picture that keeps its aspect: rows, columns, pixels. Axes: h height, w width, p patch_size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipjax.config import Config, Interpolation, ViTConfig
from clipjax.data.images import EvalTransform, make_eval_transform, resampling

Pixels = np.ndarray | dict[str, np.ndarray]
"""What the model gets of one picture or several: squares, or the fields of `clipjax.typing.Patches` by name."""

PADDING = -1
"""The segment of places without a patch."""

_LEAST_SCALE, _MOST_SCALE, _ACCURACY = 1e-6, 100.0, 1e-5


def fit_grid(height: int, width: int, max_patches: int, patch_size: int) -> tuple[int, int]:
    """Return rows and columns of patches: the picture at the largest scale with at most `max_patches`.

    Source: arXiv 2502.14786, section 2.4.2, with the search and the limits of the scale of Hugging Face's `Siglip2`.
    """

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return rows, columns

    low, high = _LEAST_SCALE, _MOST_SCALE
    while high - low >= _ACCURACY:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        low, high = (middle, high) if rows * columns <= max_patches else (low, middle)
    return grid(low)


def cut_patches(
    image: np.ndarray, rows: int, columns: int, patch_size: int, interpolation: Interpolation
) -> np.ndarray:
    """Resize a picture uint8 [h, w, 3], antialiased, and cut it: uint8 [rows * columns, p * p * 3], row by row."""
    from PIL import Image

    size = (columns * patch_size, rows * patch_size)
    return cut(np.asarray(Image.fromarray(image).resize(size, resampling(interpolation))), patch_size)


def cut(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut a picture uint8 [rows * p, columns * p, 3]: uint8 [rows * columns, p * p * 3], row by row."""
    rows, columns = (side // patch_size for side in image.shape[:2])
    grid = image.reshape(rows, patch_size, columns, patch_size, 3).swapaxes(1, 2)
    return grid.reshape(rows * columns, 3 * patch_size**2)


@dataclass(frozen=True, slots=True)
class PatchTransform:
    """The transform of evaluation for models of variable aspect: a picture uint8 [h, w, 3] to a row of its own."""

    max_patches: int
    patch_size: int
    interpolation: Interpolation

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Return the fields of `clipjax.typing.Patches`, with places for `max_patches`."""
        rows, columns = fit_grid(image.shape[0], image.shape[1], self.max_patches, self.patch_size)
        patches = cut_patches(image, rows, columns, self.patch_size, self.interpolation)
        numbers = np.arange(self.max_patches)
        is_patch = numbers < len(patches)
        place = np.stack(np.divmod(numbers, columns), axis=-1) * is_patch[:, None]
        return {
            "patches": np.pad(patches, ((0, self.max_patches - len(patches)), (0, 0))),
            "segment": np.where(is_patch, 0, PADDING).astype(np.int32),
            "place": place.astype(np.int32),
            "grid": np.array([[rows, columns]], np.int32),
        }


def make_view(config: Config) -> EvalTransform | PatchTransform:
    """Return the transform of evaluation that a config asks for."""
    image = config.model.image
    if isinstance(image, ViTConfig) and image.max_patches is not None:
        return PatchTransform(image.max_patches, image.patch_size, config.data.interpolation)
    return make_eval_transform(config)


def stack_pixels(pictures: Sequence[Pixels]) -> Pixels:
    """Return a batch of what a transform gives of each picture."""
    first = pictures[0]
    if isinstance(first, np.ndarray):
        return np.stack(pictures)  # type: ignore[arg-type]
    return {name: np.stack([picture[name] for picture in pictures]) for name in first}  # type: ignore[call-overload]
