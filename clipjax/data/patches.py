"""Patches of a picture that keeps its aspect: rows, columns, pixels. Axes: h height, w width, p patch_size."""

import math

import numpy as np

from clipjax.config import Interpolation
from clipjax.data.images import resampling

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
    resized = np.asarray(Image.fromarray(image).resize(size, resampling(interpolation)))
    grid = resized.reshape(rows, patch_size, columns, patch_size, 3).swapaxes(1, 2)
    return grid.reshape(rows * columns, 3 * patch_size**2)
