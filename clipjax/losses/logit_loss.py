"""The protocol of a contrastive loss: statistics of the logits of a tile, losses of the pairs, gradients of the logits.

Statistics leave out the diagonal of the similarity matrix (each image with its own text), which the loss treats in
closed form. So a small loss is a small number computed directly, and not the difference of two large ones.

Read `Tile`, `PairInputs`, `PairLosses`, `LogitLoss`; then its implementations in `softmax`, `sigmoid` and
`distillation`, which adds a teacher to any of them.
Axes: n rows or columns, a rows of a tile, b columns of a tile.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float


class Tile(NamedTuple):
    """A part of the similarity matrix.

    Attributes:
        logits: -inf where a pair does not count: on the diagonal, in padding, within a group that is left out.
        same: true where a pair off the diagonal is a positive too; None where only the diagonal is.
        teacher: the teacher's logits, -inf where a pair does not count; None without a teacher.
    """

    logits: Float[Array, "a b"]
    same: Bool[Array, "a b"] | None = None
    teacher: Float[Array, "a b"] | None = None


class PairInputs(NamedTuple):
    """Numbers of each pair by itself, which a loss needs beside the statistics.

    Attributes:
        positive: the pair's logit, on the diagonal.
        batch_size: pairs in the global batch.
        teacher: the teacher's logit of the pair.
        memory: logarithms of the moving averages of its image and its text (`GlobalSoftmax`); -inf: not seen yet.
        gamma: weight of a new value in those averages.
    """

    positive: Float[Array, "n"]
    batch_size: int
    teacher: Float[Array, "n"] | None = None
    memory: Float[Array, "n 2"] | None = None
    gamma: Float[Array, ""] | None = None


class PairLosses(NamedTuple):
    """Losses of some pairs, with all that their gradients need of whole rows and columns.

    Attributes:
        loss: of each pair.
        normalizers: of each image's row and each text's column, for `logit_gradient`: log-sum-exps, or trees of them.
        negated_positive_gradient: minus the derivative of each pair's loss by its logit on the diagonal.
        memory: the averages of `PairInputs.memory` with these pairs in them.
    """

    loss: Float[Array, "n"]
    normalizers: tuple[Any, Any]
    negated_positive_gradient: Float[Array, "n"]
    memory: Float[Array, "n 2"] | None = None


@runtime_checkable
class LogitLoss(Protocol):
    """A loss as a function of logits. Statistics are trees of arrays, with one number per row or column in each."""

    @property
    def weight(self) -> float:
        """Weight of one pair, before the mean over the batch."""
        ...

    @property
    def single_pass(self) -> bool:
        """True if no gradient depends on statistics, so that one pass gives loss and gradients."""
        ...

    def empty(self, n: int) -> Any:
        """Return the statistics of n rows or columns without any logit."""
        ...

    def reduce(self, tile: Tile, axis: int) -> Any:
        """Return the statistics along an axis of a tile."""
        ...

    def merge(self, left: Any, right: Any) -> Any:
        """Merge the statistics of two disjoint parts."""
        ...

    def combine(self, part: Any, axes: tuple[str, ...]) -> Any:
        """Merge the statistics of the parts that the devices along mesh axes hold."""
        ...

    def peak(self, statistics: Any) -> Float[Array, "n"]:
        """Return the largest logit of a negative; -inf where there is none."""
        ...

    def finish(self, images: Any, texts: Any, own: PairInputs) -> PairLosses:
        """Compute the losses of pairs from the statistics of their whole rows and columns."""
        ...

    def logit_gradient(self, tile: Tile, rows: Any, columns: Any) -> Float[Array, "a b"]:
        """Return the derivative by each logit off the diagonal, given the normalizers of its rows and columns."""
        ...
