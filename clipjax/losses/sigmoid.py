"""SigLIP's pairwise sigmoid loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.logit_loss import PairInputs, PairLosses, Tile
from clipjax.losses.softmax import Softmax, Sums


class Sigmoid:
    """Every pair by itself: the diagonal, and what is `same`, belongs together, nothing else does.

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
        pull = jax.nn.sigmoid(-own.positive)
        return PairLosses(jax.nn.softplus(-own.positive) + images.total, (None, None), pull)

    def slope(self, tile: Tile, rows: None, columns: None) -> Float[Array, "a b"]:
        del rows, columns
        signed = _signed(tile)
        falling = jnp.exp(-jnp.abs(signed))  # also in `reduce`, so that it is computed once
        slope = jnp.where(signed >= 0, 1, falling) / (1 + falling)
        return slope if tile.same is None else jnp.where(tile.same, -slope, slope)


def _signed(tile: Tile) -> Array:
    """Logits of negatives, and minus those of positives: what a sigmoid pushes down."""
    return tile.logits if tile.same is None else jnp.where(tile.same, -tile.logits, tile.logits)
