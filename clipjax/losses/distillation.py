"""A contrastive loss together with the cross-entropy against a teacher's similarities.

Read `DistillationSums`, `Distilled`.
Axes: n rows or columns, a rows of a tile, b columns of a tile.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.logit_loss import LogitLoss, PairInputs, PairLosses, Tile
from clipjax.losses.softmax import Softmax, Sums, finite, log_sum


class DistillationSums(NamedTuple):
    """Statistics of a loss with a teacher.

    Attributes:
        base: statistics of the loss itself.
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

    base: LogitLoss
    share: float
    """Weight of the teacher's part; the base counts in full."""

    single_pass = False

    @property
    def weight(self) -> float:
        return self.base.weight

    def empty(self, n: int) -> DistillationSums:
        return DistillationSums(self.base.empty(n), Softmax().empty(n), Softmax().empty(n), jnp.zeros(n, jnp.float32))

    def reduce(self, tile: Tile, axis: int) -> DistillationSums:
        assert tile.teacher is not None
        teacher = Softmax().reduce(Tile(tile.teacher), axis)
        shares = jnp.exp(tile.teacher - jnp.expand_dims(finite(teacher.peak), axis))
        cross = jnp.sum(shares * jnp.where(jnp.isfinite(tile.logits), tile.logits, 0), axis=axis)
        return DistillationSums(self.base.reduce(tile, axis), Softmax().reduce(tile, axis), teacher, cross)

    def merge(self, left: DistillationSums, right: DistillationSums) -> DistillationSums:
        shift = finite(jnp.maximum(left.teacher.peak, right.teacher.peak))
        return DistillationSums(
            self.base.merge(left.base, right.base),
            Softmax().merge(left.student, right.student),
            Softmax().merge(left.teacher, right.teacher),
            left.cross * jnp.exp(left.teacher.peak - shift) + right.cross * jnp.exp(right.teacher.peak - shift),
        )

    def combine(self, part: DistillationSums, axes: tuple[str, ...]) -> DistillationSums:
        teacher = Softmax().combine(part.teacher, axes)
        return DistillationSums(
            self.base.combine(part.base, axes),
            Softmax().combine(part.student, axes),
            teacher,
            jax.lax.psum(part.cross * jnp.exp(part.teacher.peak - finite(teacher.peak)), axes),
        )

    def peak(self, statistics: DistillationSums) -> Float[Array, "n"]:
        return self.base.peak(statistics.base)

    def finish(self, images: DistillationSums, texts: DistillationSums, own: PairInputs) -> PairLosses:
        assert own.teacher is not None
        base = self.base.finish(images.base, texts.base, own)
        share = self.share * 0.5 / self.base.weight
        loss, negated_positive_gradient, normalizers = base.loss, base.negated_positive_gradient, []
        for side, base_normalizer in zip((images, texts), base.normalizers, strict=True):
            student, teacher = log_sum(side.student), log_sum(side.teacher)
            # Expected logit of the others under the teacher, relative to the positive.
            every = jnp.logaddexp(teacher, own.teacher)
            others = jax.nn.sigmoid(teacher - own.teacher)
            expected = side.cross * jnp.exp(finite(side.teacher.peak - every)) - others * own.positive
            loss = loss + share * (jax.nn.softplus(student - own.positive) - expected)
            negated_positive_gradient = negated_positive_gradient + share * (
                jax.nn.sigmoid(student - own.positive) - others
            )
            normalizers.append((base_normalizer, jnp.logaddexp(student, own.positive), every))
        return PairLosses(loss, (normalizers[0], normalizers[1]), negated_positive_gradient, base.memory)

    def logit_gradient(self, tile: Tile, rows: tuple[Any, Array, Array], columns: tuple[Any, Array, Array]) -> Array:
        assert tile.teacher is not None
        student = Softmax().logit_gradient(tile, rows[1], columns[1])
        teacher = Softmax().logit_gradient(Tile(tile.teacher), rows[2], columns[2])
        share = self.share * 0.5 / self.base.weight
        return self.base.logit_gradient(tile, rows[0], columns[0]) + share * (student - teacher)
