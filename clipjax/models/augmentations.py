"""Random crops and changes of pictures that gradients flow through, for guiding a generator by a similarity.

A generator that is led by one similarity of its whole picture finds pixels that please the model and nobody else. The
mean over many crops and small changes is harder to please so. All functions are pure: the same key draws the same.

Reading order: `random_crops`, `random_flips`, `jitter_colours`, `add_noise`. Axes: b pictures, k crops of each,
h height, w width, s side of the result.

Source:
    arXiv 2204.08583 (VQGAN-CLIP), section 3.1, with its order: crops, flips, colours, noise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.config import Interpolation
from clipjax.models.device_resize import filter_weights
from clipjax.typing import Key

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in torchvision's saturation


def random_crops(
    key: Key, pixels: Float[Array, "b h w 3"], count: int, size: int, *, min_side: float = 0.5, max_side: float = 1.0
) -> Float[Array, "n s s 3"]:
    """Return square parts of pictures at random places, resized by antialiased bilinear sampling.

    Args:
        key: of the draws.
        pixels: floating-point, of any size.
        count: k, the crops of each picture, 1 or more.
        size: s, for instance the model's `image_size`.
        min_side: smallest side of a crop as a share of the picture's shorter side, above 0.
        max_side: largest, at most 1; sides are uniform between the two.

    Returns:
        The dtype of the pixels; n = k * b: the first crop of each picture, then the second of each, and so on, so that
        scores `[n, texts]` are `[k, b, texts]` after a reshape.

    Raises:
        ValueError: an argument out of its range.

    Cost:
        2 * 3 * s * w * (h + s) FLOPs a crop.
    """
    for name, value in (("count", count), ("size", size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if not 0 < min_side <= max_side <= 1:
        raise ValueError(f"min_side={min_side} and max_side={max_side} must rise from above 0 to at most 1")
    number, height, width, _ = pixels.shape
    if not height * width:
        raise ValueError(f"pictures of {height} x {width} pixels have no parts; leave them out")
    sides_key, rows_key, columns_key = jax.random.split(key, 3)
    draw = lambda key: jax.random.uniform(key, (count * number,))  # noqa: E731
    side = min(height, width) * (min_side + (max_side - min_side) * draw(sides_key))
    grid = (count, number, size)
    down, across = (
        filter_weights(
            (length - side) * draw(place_key),
            side,
            jnp.full(side.shape, float(length)),
            length,
            size,
            Interpolation.BILINEAR,
        ).reshape(*grid, length)
        for length, place_key in ((height, rows_key), (width, columns_key))
    )
    highest = jax.lax.Precision.HIGHEST  # by default, TPUs and GPUs keep 8 or 10 bits of the weights
    rows = jnp.einsum("kbsx,byxc->kbysc", across, pixels.astype(jnp.float32), precision=highest)
    crops = jnp.einsum("kbty,kbysc->kbtsc", down, rows, precision=highest)
    return crops.reshape(count * number, size, size, 3).astype(pixels.dtype)


def random_flips(key: Key, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Return pictures of which each is mirrored, left to right, with probability 1/2."""
    is_mirrored = jax.random.bernoulli(key, shape=(pixels.shape[0], 1, 1, 1))
    return jnp.where(is_mirrored, pixels[:, :, ::-1], pixels)


def jitter_colours(
    key: Key,
    pixels: Float[Array, "b h w 3"],
    *,
    brightness: float = 0.1,
    contrast: float = 0.1,
    saturation: float = 0.1,
) -> Float[Array, "b h w 3"]:
    """Return pictures whose brightness, contrast and saturation, in this order, are changed by factors of their own.

    Nothing is cut off at 0 and 1: the gradient would end there.

    Args:
        key: of the draws.
        pixels: RGB from 0 to 1.
        brightness: factors are uniform from 1 less this to 1 plus this; 0 to 1.
        contrast: the same for the distance to the picture's mean grey.
        saturation: the same for the distance to each pixel's grey.

    Raises:
        ValueError: a share out of its range.
    """
    shares = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be from 0 to 1")
    factors = jax.random.uniform(key, (3, pixels.shape[0], 1, 1, 1), pixels.dtype, -1, 1)
    bright, contrasted, saturated = (1 + share * factor for share, factor in zip(shares.values(), factors, strict=True))
    pixels = pixels * bright
    mean = _grey(pixels).mean(axis=(1, 2), keepdims=True)
    pixels = mean + (pixels - mean) * contrasted
    grey = _grey(pixels)
    return grey + (pixels - grey) * saturated


def add_noise(key: Key, pixels: Float[Array, "b h w 3"], *, most: float = 0.1) -> Float[Array, "b h w 3"]:
    """Return pictures with normal noise, whose standard deviation is uniform from 0 to `most` for each picture.

    Raises:
        ValueError: `most` is below 0.
    """
    if not most >= 0:
        raise ValueError(f"most={most} must be at least 0")
    deviation_key, noise_key = jax.random.split(key)
    deviation = most * jax.random.uniform(deviation_key, (pixels.shape[0], 1, 1, 1), pixels.dtype)
    return pixels + deviation * jax.random.normal(noise_key, pixels.shape, pixels.dtype)


def _grey(pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h w 1"]:
    return (pixels * jnp.asarray(_LUMA, pixels.dtype).reshape(1, 1, 1, 3)).sum(axis=-1, keepdims=True)
