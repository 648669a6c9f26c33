"""The kinds of contrastive loss: what each does with the logits of a tile, and what the statistics come to.

The diagonal of the similarity matrix (each image with its own text) is kept out of the statistics. So a small loss is a
small number computed directly, and not the difference of two large ones.

Axes: n rows or columns, a rows of a tile, b columns of a tile.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Statistics(NamedTuple):
    """Per row or per column, over all pairs off the diagonal that count.

    Attributes:
        peak: the largest logit; -inf where there is none.
        total: softmax: sum of exp(logit - peak). Sigmoid: sum of softplus(logit).
    """

    peak: Float[Array, "*n"]
    total: Float[Array, "*n"]


class Outcome(NamedTuple):
    """What complete statistics of some images and of their texts come to.

    Attributes:
        loss: the part of each pair.
        log_sums: of each image's row and of each text's column, the diagonal included: what `slope` needs.
        pull: minus the derivative by the logit on the diagonal.
    """

    loss: Float[Array, "n"]
    log_sums: tuple[Float[Array, "n"], Float[Array, "n"]]
    pull: Float[Array, "n"]


@runtime_checkable
class Kind(Protocol):
    """A kind of loss. A logit of -inf counts as if it were not there."""

    weight: float
    """Of one pair, before the mean over the batch."""

    def reduce(self, logits: Float[Array, "a b"], axis: int) -> Statistics:
        """Statistics along an axis of a tile."""
        ...

    def merge(self, left: Statistics, right: Statistics) -> Statistics:
        """Statistics of two disjoint parts together."""
        ...

    def combine(self, part: Statistics, axes: tuple[str, ...]) -> Statistics:
        """Statistics of the parts that the devices along mesh axes hold."""
        ...

    def finish(self, images: Statistics, texts: Statistics, positive: Float[Array, "n"]) -> Outcome:
        """From the statistics of whole rows and columns, and the logits on the diagonal."""
        ...

    def slope(
        self, logits: Float[Array, "a b"], rows: Float[Array, "a"], columns: Float[Array, "b"]
    ) -> Float[Array, "a b"]:
        """Derivative by each logit off the diagonal; `rows` and `columns` are log-sums."""
        ...


def finite(peak: Array) -> Array:
    """A number to subtract before exponentiating: the peak, or 0 where there is none."""
    return jnp.where(jnp.isfinite(peak), peak, 0)


class Softmax:
    """Cross-entropy along rows and along columns, half and half (arXiv 2103.00020, figure 3)."""

    weight = 0.5

    def reduce(self, logits: Float[Array, "a b"], axis: int) -> Statistics:
        peak = jnp.max(logits, axis=axis)
        return Statistics(peak, jnp.sum(jnp.exp(logits - jnp.expand_dims(finite(peak), axis)), axis=axis))

    def merge(self, left: Statistics, right: Statistics) -> Statistics:
        peak = jnp.maximum(left.peak, right.peak)
        shift = finite(peak)
        return Statistics(peak, left.total * jnp.exp(left.peak - shift) + right.total * jnp.exp(right.peak - shift))

    def combine(self, part: Statistics, axes: tuple[str, ...]) -> Statistics:
        peak = jax.lax.pmax(part.peak, axes)
        return Statistics(peak, jax.lax.psum(part.total * jnp.exp(part.peak - finite(peak)), axes))

    def finish(self, images: Statistics, texts: Statistics, positive: Float[Array, "n"]) -> Outcome:
        # -inf where a pair has no negatives: its loss is 0.
        row, column = (side.peak + jnp.log(side.total) for side in (images, texts))
        loss = jax.nn.softplus(row - positive) + jax.nn.softplus(column - positive)
        pull = jax.nn.sigmoid(row - positive) + jax.nn.sigmoid(column - positive)
        return Outcome(loss, (jnp.logaddexp(row, positive), jnp.logaddexp(column, positive)), pull)

    def slope(
        self, logits: Float[Array, "a b"], rows: Float[Array, "a"], columns: Float[Array, "b"]
    ) -> Float[Array, "a b"]:
        return jnp.exp(logits - rows[:, None]) + jnp.exp(logits - columns[None, :])


class Sigmoid:
    """Every pair by itself: the diagonal belongs together, nothing else does (arXiv 2303.15343, equation 1)."""

    weight = 1.0

    def reduce(self, logits: Float[Array, "a b"], axis: int) -> Statistics:
        return Statistics(jnp.max(logits, axis=axis), jnp.sum(jax.nn.softplus(logits), axis=axis))

    def merge(self, left: Statistics, right: Statistics) -> Statistics:
        return Statistics(jnp.maximum(left.peak, right.peak), left.total + right.total)

    def combine(self, part: Statistics, axes: tuple[str, ...]) -> Statistics:
        return Statistics(jax.lax.pmax(part.peak, axes), jax.lax.psum(part.total, axes))

    def finish(self, images: Statistics, texts: Statistics, positive: Float[Array, "n"]) -> Outcome:
        del texts  # the same logits once more
        unused = jnp.zeros_like(positive)
        return Outcome(jax.nn.softplus(-positive) + images.total, (unused, unused), jax.nn.sigmoid(-positive))

    def slope(
        self, logits: Float[Array, "a b"], rows: Float[Array, "a"], columns: Float[Array, "b"]
    ) -> Float[Array, "a b"]:
        del rows, columns
        return jax.nn.sigmoid(logits)
