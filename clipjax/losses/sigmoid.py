"""SigLIP's pairwise sigmoid loss.

Axes: n rows or columns, a rows of a tile, b columns of a tile.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.logit_loss import PairInputs, PairLosses, Tile
from clipjax.losses.softmax import Softmax, Sums


class Sigmoid:
    """Binary cross-entropy of every pair by itself: the diagonal and pairs that are `same` match, all others do not.

    Source:
        arXiv 2303.15343, equation 1.
    """

    weight, single_pass = 1.0, True

    def empty(self, n: int) -> Sums:
        return Softmax().empty(n)

    def reduce(self, tile: Tile, axis: int) -> Sums:
        negatives = tile.logits if tile.same is None else jnp.where(tile.same, -jnp.inf, tile.logits)
        signed = _signed(tile)
        softplus = jnp.maximum(signed, 0) + jnp.log1p(jnp.exp(-jnp.abs(signed)))
        return Sums(jnp.max(negatives, axis=axis), jnp.sum(softplus, axis=axis))

    def merge(self, left: Sums, right: Sums) -> Sums:
        return Sums(jnp.maximum(left.peak, right.peak), left.total + right.total)

    def combine(self, part: Sums, axes: tuple[str, ...]) -> Sums:
        return Sums(jax.lax.pmax(part.peak, axes), jax.lax.psum(part.total, axes))

    def peak(self, statistics: Sums) -> Float[Array, "n"]:
        return statistics.peak

    def finish(self, images: Sums, texts: Sums, own: PairInputs) -> PairLosses:
        del texts  # the same logits once more
        missing = jax.nn.sigmoid(-own.positive)
        return PairLosses(jax.nn.softplus(-own.positive) + images.total, (None, None), missing)

    def logit_gradient(self, tile: Tile, rows: None, columns: None) -> Float[Array, "a b"]:
        del rows, columns
        signed = _signed(tile)
        falling = jnp.exp(-jnp.abs(signed))  # also in `reduce`, so that it is computed once
        gradient = jnp.where(signed >= 0, 1, falling) / (1 + falling)
        return gradient if tile.same is None else jnp.where(tile.same, -gradient, gradient)


def _signed(tile: Tile) -> Array:
    """Return the logits of negatives and minus those of positives: a sigmoid loss lowers both."""
    return tile.logits if tile.same is None else jnp.where(tile.same, -tile.logits, tile.logits)
