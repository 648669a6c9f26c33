"""The protocol of a contrastive loss: what it does with the logits of a tile, and what its statistics come to.

The diagonal of the similarity matrix (each image with its own text) is kept out of the statistics. So a small loss is a
small number computed directly, and not the difference of two large ones.

Read `Tile`, `PairInputs`, `PairLosses`, `LogitLoss`; then the kinds in `softmax`, `sigmoid`, and `distillation`, which
adds a teacher to any of them.
Axes: n rows or columns, a rows of a tile, b columns of a tile.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

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


class PairInputs(NamedTuple):
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


class PairLosses(NamedTuple):
    """What complete statistics of some images and of their texts come to.

    Attributes:
        loss: the part of each pair.
        known: of each image's row and of each text's column: what `slope` needs.
        pull: minus the derivative by the logit on the diagonal.
        memory: the averages of `PairInputs.memory` with these pairs in them.
    """

    loss: Float[Array, "n"]
    known: tuple[Any, Any]
    pull: Float[Array, "n"]
    memory: Float[Array, "n 2"] | None = None


@runtime_checkable
class LogitLoss(Protocol):
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

    def finish(self, images: Any, texts: Any, own: PairInputs) -> PairLosses:
        """From the statistics of whole rows and columns."""
        ...

    def slope(self, tile: Tile, rows: Any, columns: Any) -> Float[Array, "a b"]:
        """Derivative by each logit off the diagonal; `rows` and `columns` are what `finish` made known."""
        ...
