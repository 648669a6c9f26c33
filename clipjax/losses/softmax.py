"""Softmax losses: over the batch, with several positives, and against the whole dataset.

Read `Sums`, `Softmax`, `MultiPositiveSoftmax`, `GlobalSoftmax`.
Axes: n rows or columns, a rows of a tile, b columns of a tile.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.logit_loss import PairInputs, PairLosses, Tile


class Sums(NamedTuple):
    """Sums over all pairs off the diagonal that count.

    Attributes:
        peak: the largest logit; -inf where there is none.
        total: softmax: sum of exp(logit - peak). Sigmoid: sum of softplus(logit).
    """

    peak: Float[Array, "*n"]
    total: Float[Array, "*n"]


def finite(peak: Array) -> Array:
    """Return the number to subtract before exponentiating: the peak, or 0 where there is none."""
    return jnp.where(jnp.isfinite(peak), peak, 0)


def log_sum(sums: Sums) -> Float[Array, "*n"]:
    """Return the log-sum-exp; -inf where there was nothing."""
    return sums.peak + jnp.log(sums.total)


class Softmax:
    """Cross-entropy along rows and along columns, half and half (arXiv 2103.00020, figure 3)."""

    weight, single_pass = 0.5, False

    def empty(self, n: int) -> Sums:
        return Sums(jnp.full(n, -jnp.inf, jnp.float32), jnp.zeros(n, jnp.float32))

    def reduce(self, tile: Tile, axis: int) -> Sums:
        peak = jnp.max(tile.logits, axis=axis)
        return Sums(peak, jnp.sum(jnp.exp(tile.logits - jnp.expand_dims(finite(peak), axis)), axis=axis))

    def merge(self, left: Sums, right: Sums) -> Sums:
        peak = jnp.maximum(left.peak, right.peak)
        shift = finite(peak)
        return Sums(peak, left.total * jnp.exp(left.peak - shift) + right.total * jnp.exp(right.peak - shift))

    def combine(self, part: Sums, axes: tuple[str, ...]) -> Sums:
        peak = jax.lax.pmax(part.peak, axes)
        return Sums(peak, jax.lax.psum(part.total * jnp.exp(part.peak - finite(peak)), axes))

    def peak(self, statistics: Sums) -> Float[Array, "n"]:
        return statistics.peak

    def finish(self, images: Sums, texts: Sums, own: PairInputs) -> PairLosses:
        positive = own.positive
        # -inf where a pair has no negatives: its loss is 0.
        row, column = log_sum(images), log_sum(texts)
        loss = jax.nn.softplus(row - positive) + jax.nn.softplus(column - positive)
        missing = jax.nn.sigmoid(row - positive) + jax.nn.sigmoid(column - positive)
        return PairLosses(loss, (jnp.logaddexp(row, positive), jnp.logaddexp(column, positive)), missing)

    def logit_gradient(self, tile: Tile, rows: Float[Array, "a"], columns: Float[Array, "b"]) -> Float[Array, "a b"]:
        return jnp.exp(tile.logits - rows[:, None]) + jnp.exp(tile.logits - columns[None, :])


class PositiveSums(NamedTuple):
    """Sums over negatives, and over further positives (pairs of the same group).

    Attributes:
        negatives: sums over the negatives.
        positives: sums over the further positives.
        logits: plain sum of the further positives' logits.
        count: number of the further positives.
    """

    negatives: Sums
    positives: Sums
    logits: Float[Array, "*n"]
    count: Float[Array, "*n"]


class MultiPositiveSoftmax:
    """Softmax whose target all positives of a row or column share equally (arXiv 2004.11362, equation 2)."""

    weight, single_pass = 0.5, False

    def __init__(self) -> None:
        self._softmax = Softmax()

    def empty(self, n: int) -> PositiveSums:
        nothing = jnp.zeros(n, jnp.float32)
        return PositiveSums(self._softmax.empty(n), self._softmax.empty(n), nothing, nothing)

    def reduce(self, tile: Tile, axis: int) -> PositiveSums:
        assert tile.same is not None
        negatives, positives = (Tile(jnp.where(chosen, tile.logits, -jnp.inf)) for chosen in (~tile.same, tile.same))
        return PositiveSums(
            self._softmax.reduce(negatives, axis),
            self._softmax.reduce(positives, axis),
            jnp.sum(jnp.where(tile.same, tile.logits, 0), axis=axis),
            jnp.sum(tile.same, axis=axis, dtype=jnp.float32),
        )

    def merge(self, left: PositiveSums, right: PositiveSums) -> PositiveSums:
        return PositiveSums(
            self._softmax.merge(left.negatives, right.negatives),
            self._softmax.merge(left.positives, right.positives),
            left.logits + right.logits,
            left.count + right.count,
        )

    def combine(self, part: PositiveSums, axes: tuple[str, ...]) -> PositiveSums:
        return PositiveSums(
            self._softmax.combine(part.negatives, axes),
            self._softmax.combine(part.positives, axes),
            *jax.lax.psum((part.logits, part.count), axes),
        )

    def peak(self, statistics: PositiveSums) -> Float[Array, "n"]:
        return statistics.negatives.peak

    def finish(self, images: PositiveSums, texts: PositiveSums, own: PairInputs) -> PairLosses:
        positive, loss, missing, normalizers = own.positive, jnp.zeros(()), jnp.zeros(()), []
        for side in (images, texts):
            other = jnp.logaddexp(log_sum(side.negatives), log_sum(side.positives))
            share = 1 / (1 + side.count)
            loss = loss + jax.nn.softplus(other - positive) + share * (side.count * positive - side.logits)
            missing = missing + jax.nn.sigmoid(other - positive) - (1 - share)
            normalizers.append((jnp.logaddexp(other, positive), share))
        return PairLosses(loss, (normalizers[0], normalizers[1]), missing)

    def logit_gradient(
        self, tile: Tile, rows: tuple[Array, Array], columns: tuple[Array, Array]
    ) -> Float[Array, "a b"]:
        assert tile.same is not None
        target = jnp.where(tile.same, rows[1][:, None] + columns[1][None, :], 0)
        return self._softmax.logit_gradient(tile, rows[0], columns[0]) - target


@dataclass(frozen=True)
class GlobalSoftmax(Softmax):
    """Softmax against the whole dataset, whose sum each sample estimates by a moving average over its batches.

    With g the sum over the negatives j of exp(logit_ij - logit_ii), divided by the size of the batch without i, and u
    its average over the batches that the sample was in, a pair's loss is log(epsilon + u) by row and by column, and its
    gradient that of g / (epsilon + u). A pair without negatives has no gradient, and leaves u as it is.

    Source:
        arXiv 2407.01445 (FastCLIP), the loss GCL without its factor 1 / logit_scale; arXiv 2202.12387 (SogCLR).
        The memory holds logarithms of the averages, so that no scale overflows.
    """

    epsilon: float

    def finish(self, images: Sums, texts: Sums, own: PairInputs) -> PairLosses:
        assert own.memory is not None and own.gamma is not None
        size, small = math.log(max(1, own.batch_size - 1)), math.log(self.epsilon)
        loss, ratio, normalizers, memory = jnp.zeros(()), jnp.zeros(()), [], []
        for side, old in ((images, own.memory[:, 0]), (texts, own.memory[:, 1])):
            new = log_sum(side) - own.positive - size
            average = jnp.logaddexp(jnp.log1p(-own.gamma) + old, jnp.log(own.gamma) + new)
            average = jnp.where(old == -jnp.inf, new, jnp.where(new == -jnp.inf, old, average))
            value = jnp.logaddexp(small, average)
            loss = loss + value
            ratio = ratio + jnp.exp(new - value)
            normalizers.append(own.positive + size + value)
            memory.append(average)
        return PairLosses(loss, (normalizers[0], normalizers[1]), ratio, jnp.stack(memory, axis=1))
