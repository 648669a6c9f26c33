"""Crop and antialiased resizing as two matrix products, with Pillow's result.

Reading order: `resize_crops`, `filter_weights`. Axes: b batch, c side of the canvas, s side of the result.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from clipjax.config import Interpolation

BOX = 7
"""Numbers that tell a crop: top, left, height, width, height and width of the picture, 1 for a mirrored one."""


def resize_crops(
    canvas: UInt8[Array, "b c c 3"], crop: Float[Array, "b 7"], size: int, interpolation: Interpolation
) -> UInt8[Array, "b s s 3"]:
    """Return the parts of pictures, resized.

    Along rows first, rounded, then along columns, as Pillow does; since version 13 it takes the other order for some
    shapes, where the two roundings then differ by a few levels. Where the order is the same, more than 99.9 % of the
    numbers are equal, and the others differ by 1: weights are float32 here, and have 22 bits after the point there.

    Args:
        canvas: pictures in the upper left corner.
        crop: numbers as in `BOX`.
        size: s.
        interpolation: filter.

    Source:
        Pillow, `src/libImaging/Resample.c`: `precompute_coeffs`, `bicubic_filter` (a = -0.5), `ImagingResample`.

    Cost:
        2 * 3 * s * c * (c + s) FLOPs a picture, 0.31 G for c = 384 and s = 224; float32 copies of the canvas.
    """
    top, left, height, width, rows, columns, is_mirrored = crop.T
    across = filter_weights(left, width, columns, canvas.shape[2], size, interpolation)
    across = jnp.where(is_mirrored[:, None, None] > 0.5, across[:, ::-1], across)
    down = filter_weights(top, height, rows, canvas.shape[1], size, interpolation)
    highest = jax.lax.Precision.HIGHEST  # by default, TPUs and GPUs keep 8 or 10 bits of the weights
    pixels = canvas.astype(jnp.float32)
    pixels = _round(jnp.einsum("bsx,byxc->bysc", across, pixels, precision=highest))
    return _round(jnp.einsum("bty,bysc->btsc", down, pixels, precision=highest)).astype(jnp.uint8)


def _round(pixels: Array) -> Array:
    return jnp.clip(jnp.floor(pixels + 0.5), 0, 255)


def filter_weights(
    start: Float[Array, " b"],
    extent: Float[Array, " b"],
    valid: Float[Array, " b"],
    side: int,
    size: int,
    interpolation: Interpolation,
) -> Float[Array, "b s c"]:
    """Return the weight of each pixel of one side of the canvas in each pixel of the result."""
    scale = (extent / size)[:, None, None]
    center = start[:, None, None] + (jnp.arange(size, dtype=jnp.float32)[None, :, None] + 0.5) * scale
    place = jnp.arange(side, dtype=jnp.float32)[None, None]
    x = jnp.abs((place + 0.5 - center) / jnp.maximum(scale, 1))
    if interpolation is Interpolation.BICUBIC:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
    else:
        weights = jnp.maximum(1 - x, 0)
    weights = jnp.where(place < valid[:, None, None], weights, 0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)
