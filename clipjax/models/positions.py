"""Positions of tokens: fixed sines and cosines, and learned tables fitted to another number of places.

Axes: l places, w width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipjax.config import ModelConfig
from clipjax.typing import Params


def sincos(side: int, width: int) -> Float[np.ndarray, "l w"]:
    """Return positions of a square grid, row by row: sines and cosines of the column, then of the row.

    Source:
        arXiv 2104.02057, section 4; google-research/big_vision `models/vit.py`, `posemb_sincos_2d`.
    """
    rows, columns = np.mgrid[:side, :side]
    frequencies = 1 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1))
    x, y = columns.reshape(-1, 1) * frequencies, rows.reshape(-1, 1) * frequencies
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def resize_grid(table: Float[Array, "l w"], prefix: int, side: int) -> Float[Array, "m w"]:
    """Return the table of positions for a grid of another side: bicubic and antialiased; the `prefix` places stay."""
    kept, grid = table[:prefix], table[prefix:]
    old = math.isqrt(grid.shape[0])
    if old == side:
        return table
    square = grid.reshape(old, old, -1)
    resized = jax.image.resize(square, (side, side, square.shape[-1]), "cubic", antialias=True)
    return jnp.concatenate([kept, resized.reshape(side * side, -1)])


def positions_of_patches(
    table: Float[Array, "l w"], place: Int[Array, "r t 2"], grid: Int[Array, "r t 2"]
) -> Float[Array, "r t w"]:
    """Return the position of each patch: the table's square grid resized to that of its image, bilinear, antialiased.

    Args:
        table: positions of a square grid, row by row.
        place: row and column of each patch.
        grid: rows and columns of its image.

    Source: arXiv 2502.14786, section 2.4.2; Hugging Face's `Siglip2VisionEmbeddings`, whose `interpolate` weighs by a
    triangle that is as wide as a place of the coarser grid, and makes the weights of each place sum to 1.
    """
    side = math.isqrt(table.shape[0])

    def weights(axis: int) -> Float[Array, "r t s"]:
        scale = side / grid[..., axis].astype(jnp.float32)
        centre = (place[..., axis].astype(jnp.float32) + 0.5) * scale
        distance = jnp.abs(jnp.arange(side, dtype=jnp.float32).reshape(1, 1, -1) + 0.5 - centre[..., None])
        found = jnp.maximum(0.0, 1.0 - distance / jnp.maximum(scale, 1.0)[..., None])
        return found / found.sum(-1, keepdims=True)

    both = weights(0)[..., :, None] * weights(1)[..., None, :]
    both = both.reshape(*both.shape[:2], side * side)
    return jnp.einsum("rts,sw->rtw", both, table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def resize_text(table: Float[Array, "l w"], length: int, keep: int = 0) -> Float[Array, "m w"]:
    """Return the table of positions for texts of another length: cut at the end, or stretched linearly.

    Args:
        table: positions.
        length: of the texts.
        keep: number of the first places that stay as they are where texts are longer, at most l - 2. The others are
            interpolated, and the last ones, behind the table's last, extrapolated; 0: all places are stretched, those
            behind the outermost are like these.

    Source:
        arXiv 2403.15378, section 3.1 (`keep=20`); beyond the last place as beichenzbc/Long-CLIP `model/longclip.py`.
    """
    if length <= table.shape[0]:
        return table[:length]
    if not keep:
        return jax.image.resize(table, (length, table.shape[1]), "linear", antialias=False)
    kept, others = table[:keep], table[keep:]
    places = np.arange(length - keep) * (len(others) / (length - keep))
    before = np.minimum(places.astype(np.int64), len(others) - 2)
    share = jnp.asarray(places - before, table.dtype)[:, None]
    return jnp.concatenate([kept, (1 - share) * others[before] + share * others[before + 1]])


def fit_positions(params: Params, old: ModelConfig, new: ModelConfig, keep: int = 0) -> Params:
    """Return parameters for images of another size or texts of another length; all but positions stay.

    Args:
        params: of the old model.
        old: its config.
        new: the config to fit.
        keep: number of the first places that stay as they are where texts become longer; see `resize_text`.
    """
    image, text = dict(params["image"]), dict(params["text"])
    prefix, side = new.image.grid()
    if old.image.grid() != (prefix, side):
        if "pos_embed" in image:
            image["pos_embed"] = resize_grid(image["pos_embed"], prefix, side)
        elif "pos_embed" in image.get("pool", {}):
            image["pool"] = image["pool"] | {"pos_embed": resize_grid(image["pool"]["pos_embed"], prefix, side)}
    if old.text.context_length != new.text.context_length and "pos_embed" in text:
        table, length = text["pos_embed"], old.text.context_length
        fitted = resize_text(table[:length], new.text.context_length, keep)
        text["pos_embed"] = jnp.concatenate([fitted, table[length:]])  # the class token's place is behind the text's
    return {**params, "image": image, "text": text}
