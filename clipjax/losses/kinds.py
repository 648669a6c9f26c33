"""The kinds of contrastive loss: what each does with the logits of a tile, and what the statistics come to.

The diagonal of the similarity matrix (each image with its own text) is kept out of the statistics. So a small loss is a
small number computed directly, and not the difference of two large ones.

Read `Tile`, `Own`, `Outcome`, `Kind`, then the kinds: `Softmax`, `Positives`, `Sigmoid`, `Global`, and `Distilled`,
which adds a teacher to any of them.
Axes: n rows or columns, a rows of a tile, b columns of a tile.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Tile(NamedTuple):
    """A part of the similarity matrix.

    Attributes:
        logits: -inf where a pair does not count: on the diagonal, in padding, within a group that is left out.
        same: whether a pair off the diagonal is a positive too; None where only the diagonal is.
        teacher: the teacher's logits, -inf where a pair does not count; None without a teacher.
    """

    logits: Float[Array, "a b"]
    same: Bool[Array, "a b"] | None = None
    teacher: Float[Array, "a b"] | None = None


class Own(NamedTuple):
    """What is known of each pair by itself.

    Attributes:
        positive: its logit, on the diagonal.
        batch_size: pairs in the global batch.
        teacher: the teacher's logit of it.
        memory: logarithms of its image's and its text's moving averages (`Global`); -inf: not seen yet.
        gamma: weight of a new value in those averages.
    """

    positive: Float[Array, "n"]
    batch_size: int
    teacher: Float[Array, "n"] | None = None
    memory: Float[Array, "n 2"] | None = None
    gamma: Float[Array, ""] | None = None


class Outcome(NamedTuple):
    """What complete statistics of some images and of their texts come to.

    Attributes:
        loss: the part of each pair.
        known: of each image's row and of each text's column: what `slope` needs.
        pull: minus the derivative by the logit on the diagonal.
        memory: the averages of `Own.memory` with these pairs in them.
    """

    loss: Float[Array, "n"]
    known: tuple[Any, Any]
    pull: Float[Array, "n"]
    memory: Float[Array, "n 2"] | None = None


@runtime_checkable
class Kind(Protocol):
    """A kind of loss. Statistics are trees of arrays, one number per row or column in each."""

    @property
    def weight(self) -> float:
        """Of one pair, before the mean over the batch."""
        ...

    @property
    def single_pass(self) -> bool:
        """Whether slopes, and the pull of the diagonal, depend on no statistics: one pass gives loss and gradients."""
        ...

    def empty(self, n: int) -> Any:
        """Statistics of nothing."""
        ...

    def reduce(self, tile: Tile, axis: int) -> Any:
        """Statistics along an axis of a tile."""
        ...

    def merge(self, left: Any, right: Any) -> Any:
        """Statistics of two disjoint parts together."""
        ...

    def combine(self, part: Any, axes: tuple[str, ...]) -> Any:
        """Statistics of the parts that the devices along mesh axes hold."""
        ...

    def peak(self, statistics: Any) -> Float[Array, "n"]:
        """The largest logit of a negative; -inf where there is none."""
        ...

    def finish(self, images: Any, texts: Any, own: Own) -> Outcome:
        """From the statistics of whole rows and columns."""
        ...

    def slope(self, tile: Tile, rows: Any, columns: Any) -> Float[Array, "a b"]:
        """Derivative by each logit off the diagonal; `rows` and `columns` are what `finish` made known."""
        ...


class Sums(NamedTuple):
    """Over all pairs off the diagonal that count.

    Attributes:
        peak: the largest logit; -inf where there is none.
        total: softmax: sum of exp(logit - peak). Sigmoid: sum of softplus(logit).
    """

    peak: Float[Array, "*n"]
    total: Float[Array, "*n"]


def finite(peak: Array) -> Array:
    """A number to subtract before exponentiating: the peak, or 0 where there is none."""
    return jnp.where(jnp.isfinite(peak), peak, 0)


def log_sum(sums: Sums) -> Float[Array, "*n"]:
    """Log-sum-exp; -inf where there was nothing."""
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

    def finish(self, images: Sums, texts: Sums, own: Own) -> Outcome:
        positive = own.positive
        # -inf where a pair has no negatives: its loss is 0.
        row, column = log_sum(images), log_sum(texts)
        loss = jax.nn.softplus(row - positive) + jax.nn.softplus(column - positive)
        pull = jax.nn.sigmoid(row - positive) + jax.nn.sigmoid(column - positive)
        return Outcome(loss, (jnp.logaddexp(row, positive), jnp.logaddexp(column, positive)), pull)

    def slope(self, tile: Tile, rows: Float[Array, "a"], columns: Float[Array, "b"]) -> Float[Array, "a b"]:
        return jnp.exp(tile.logits - rows[:, None]) + jnp.exp(tile.logits - columns[None, :])


class PositiveSums(NamedTuple):
    """Of negatives and of further positives (pairs of the same group).

    Attributes:
        negatives: sums over the negatives.
        positives: sums over the further positives.
        logits: plain sum of the further positives' logits.
        count: how many of them there are.
    """

    negatives: Sums
    positives: Sums
    logits: Float[Array, "*n"]
    count: Float[Array, "*n"]


class Positives:
    """Softmax whose target is shared equally by all positives of a row or column (arXiv 2004.11362, equation 2)."""

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

    def finish(self, images: PositiveSums, texts: PositiveSums, own: Own) -> Outcome:
        positive, loss, pull, known = own.positive, jnp.zeros(()), jnp.zeros(()), []
        for side in (images, texts):
            other = jnp.logaddexp(log_sum(side.negatives), log_sum(side.positives))
            share = 1 / (1 + side.count)
            loss = loss + jax.nn.softplus(other - positive) + share * (side.count * positive - side.logits)
            pull = pull + jax.nn.sigmoid(other - positive) - (1 - share)
            known.append((jnp.logaddexp(other, positive), share))
        return Outcome(loss, (known[0], known[1]), pull)

    def slope(self, tile: Tile, rows: tuple[Array, Array], columns: tuple[Array, Array]) -> Float[Array, "a b"]:
        assert tile.same is not None
        target = jnp.where(tile.same, rows[1][:, None] + columns[1][None, :], 0)
        return self._softmax.slope(tile, rows[0], columns[0]) - target


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

    def finish(self, images: Sums, texts: Sums, own: Own) -> Outcome:
        del texts  # the same logits once more
        pull = jax.nn.sigmoid(-own.positive)
        return Outcome(jax.nn.softplus(-own.positive) + images.total, (None, None), pull)

    def slope(self, tile: Tile, rows: None, columns: None) -> Float[Array, "a b"]:
        del rows, columns
        signed = _signed(tile)
        falling = jnp.exp(-jnp.abs(signed))  # also in `reduce`, so that it is computed once
        slope = jnp.where(signed >= 0, 1, falling) / (1 + falling)
        return slope if tile.same is None else jnp.where(tile.same, -slope, slope)


def _signed(tile: Tile) -> Array:
    """Logits of negatives, and minus those of positives: what a sigmoid pushes down."""
    return tile.logits if tile.same is None else jnp.where(tile.same, -tile.logits, tile.logits)


@dataclass(frozen=True)
class Global(Softmax):
    """Softmax against the whole dataset, whose sum each sample estimates by a moving average over its batches.

    With g the sum over the negatives j of exp(logit_ij - logit_ii), divided by the batch without i, and u its average
    over the batches that the sample was in, a pair's loss is log(epsilon + u) by row and by column, and its gradient
    that of g / (epsilon + u). A pair without negatives teaches nothing, and leaves u as it is.

    Source:
        arXiv 2407.01445 (FastCLIP), the loss GCL without its factor 1 / logit_scale; arXiv 2202.12387 (SogCLR).
        Logarithms of the averages are kept, so that no scale overflows.
    """

    epsilon: float

    def finish(self, images: Sums, texts: Sums, own: Own) -> Outcome:
        assert own.memory is not None and own.gamma is not None
        size, small = math.log(max(1, own.batch_size - 1)), math.log(self.epsilon)
        loss, pull, known, memory = jnp.zeros(()), jnp.zeros(()), [], []
        for side, old in ((images, own.memory[:, 0]), (texts, own.memory[:, 1])):
            new = log_sum(side) - own.positive - size
            average = jnp.logaddexp(jnp.log1p(-own.gamma) + old, jnp.log(own.gamma) + new)
            average = jnp.where(old == -jnp.inf, new, jnp.where(new == -jnp.inf, old, average))
            value = jnp.logaddexp(small, average)
            loss = loss + value
            pull = pull + jnp.exp(new - value)
            known.append(own.positive + size + value)
            memory.append(average)
        return Outcome(loss, (known[0], known[1]), pull, jnp.stack(memory, axis=1))


class Taught(NamedTuple):
    """Of a loss with a teacher.

    Attributes:
        base: the loss's own statistics.
        student: sums of the student's logits.
        teacher: sums of the teacher's logits.
        cross: sum of exp(teacher's logit - teacher's peak) * student's logit.
    """

    base: Any
    student: Sums
    teacher: Sums
    cross: Float[Array, "*n"]


@dataclass(frozen=True)
class Distilled:
    """Another loss, plus the cross-entropy of the student's rows and columns against the teacher's, half and half.

    Source:
        arXiv 2309.12314 (TinyCLIP), affinity mimicking.
    """

    base: Kind
    share: float
    """Weight of the teacher's part; the base counts in full."""

    single_pass = False

    @property
    def weight(self) -> float:
        return self.base.weight

    def empty(self, n: int) -> Taught:
        return Taught(self.base.empty(n), Softmax().empty(n), Softmax().empty(n), jnp.zeros(n, jnp.float32))

    def reduce(self, tile: Tile, axis: int) -> Taught:
        assert tile.teacher is not None
        teacher = Softmax().reduce(Tile(tile.teacher), axis)
        shares = jnp.exp(tile.teacher - jnp.expand_dims(finite(teacher.peak), axis))
        cross = jnp.sum(shares * jnp.where(jnp.isfinite(tile.logits), tile.logits, 0), axis=axis)
        return Taught(self.base.reduce(tile, axis), Softmax().reduce(tile, axis), teacher, cross)

    def merge(self, left: Taught, right: Taught) -> Taught:
        shift = finite(jnp.maximum(left.teacher.peak, right.teacher.peak))
        return Taught(
            self.base.merge(left.base, right.base),
            Softmax().merge(left.student, right.student),
            Softmax().merge(left.teacher, right.teacher),
            left.cross * jnp.exp(left.teacher.peak - shift) + right.cross * jnp.exp(right.teacher.peak - shift),
        )

    def combine(self, part: Taught, axes: tuple[str, ...]) -> Taught:
        teacher = Softmax().combine(part.teacher, axes)
        return Taught(
            self.base.combine(part.base, axes),
            Softmax().combine(part.student, axes),
            teacher,
            jax.lax.psum(part.cross * jnp.exp(part.teacher.peak - finite(teacher.peak)), axes),
        )

    def peak(self, statistics: Taught) -> Float[Array, "n"]:
        return self.base.peak(statistics.base)

    def finish(self, images: Taught, texts: Taught, own: Own) -> Outcome:
        assert own.teacher is not None
        outcome = self.base.finish(images.base, texts.base, own)
        share = self.share * 0.5 / self.base.weight
        loss, pull, known = outcome.loss, outcome.pull, []
        for side, of_base in zip((images, texts), outcome.known, strict=True):
            student, teacher = log_sum(side.student), log_sum(side.teacher)
            # Expected logit of the others under the teacher, relative to the positive.
            every = jnp.logaddexp(teacher, own.teacher)
            others = jax.nn.sigmoid(teacher - own.teacher)
            expected = side.cross * jnp.exp(finite(side.teacher.peak - every)) - others * own.positive
            loss = loss + share * (jax.nn.softplus(student - own.positive) - expected)
            pull = pull + share * (jax.nn.sigmoid(student - own.positive) - others)
            known.append((of_base, jnp.logaddexp(student, own.positive), every))
        return Outcome(loss, (known[0], known[1]), pull, outcome.memory)

    def slope(self, tile: Tile, rows: tuple[Any, Array, Array], columns: tuple[Any, Array, Array]) -> Array:
        assert tile.teacher is not None
        student = Softmax().slope(tile, rows[1], columns[1])
        teacher = Softmax().slope(Tile(tile.teacher), rows[2], columns[2])
        share = self.share * 0.5 / self.base.weight
        return self.base.slope(tile, rows[0], columns[0]) + share * (student - teacher)
