"""What a block of the similarity matrix gives, one tile at a time: statistics of rows and columns, and gradients.

A block is the product of some images with some texts. Only a tile of it exists at any moment: it is computed, used and
forgotten, once for the statistics and once more for the gradients, so memory is linear in the rows and columns.
The diagonal (each image with its own text) is left out here; callers treat it in closed form.

Read `Side`, `TiledLogits`, `block_statistics`, `block_gradients`.
Axes: r rows (images), c columns (texts), e embed, t embed of a teacher, a rows of a tile, b columns of a tile.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipjax.losses.logit_loss import LogitLoss, Tile

DEFAULT_TILE = 1024


class Side(NamedTuple):
    """The rows, or the columns, of a block.

    Attributes:
        embed: unit-norm embeddings.
        position: place in the global batch; -1 for padding.
        group: pairs of the same group are no negatives of each other; None where every pair is a group of its own.
        teacher: a teacher's embeddings; None without one.
    """

    embed: Float[Array, "n e"]
    position: Int[Array, "n"]
    group: Int[Array, "n"] | None = None
    teacher: Float[Array, "n t"] | None = None


class Scaling(NamedTuple):
    """Scalars of a loss: logit = scale * similarity + bias.

    Attributes:
        scale: multiplier.
        bias: additive.
        teacher: multiplier of the teacher's similarities.
        gamma: weight of a new value in the moving averages of `kinds.Global`.
    """

    scale: Float[Array, ""]
    bias: Float[Array, ""]
    teacher: Float[Array, ""] | None = None
    gamma: Float[Array, ""] | None = None


@dataclass(frozen=True)
class TiledLogits:
    """How logits are computed: in tiles of at most `tile` rows and columns, from operands of one dtype.

    float32 products are full float32 also where the hardware's default is fewer bits; sums are float32 always.
    """

    kind: LogitLoss
    tile: int
    dtype: Any = jnp.float32
    positives: bool = False
    """Whether pairs of the same group are positives; if not, they do not count."""

    def dot(self, left: Array, right: Array, contract: tuple[int, int]) -> Array:
        """Product over one dimension of each, in float32."""
        return jax.lax.dot_general(
            left.astype(self.dtype),
            right.astype(self.dtype),
            (((contract[0],), (contract[1],)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def compute(self, rows: Side, columns: Side, scaling: Scaling) -> Tile:
        """One tile."""
        out = (rows.position[:, None] == columns.position[None, :]) | (columns.position < 0)[None, :]
        out |= (rows.position < 0)[:, None]
        same = self._same(rows, columns)
        if self.positives:
            same = None if same is None else same & ~out
        elif same is not None:
            out, same = out | same, None
        # Scaled afterwards: bfloat16 operands are those of the diagonal and of the other pass, whichever side is rows.
        logits = scaling.scale * self.dot(rows.embed, columns.embed, (1, 1)) + scaling.bias
        teacher = None
        if rows.teacher is not None and columns.teacher is not None and scaling.teacher is not None:
            learned = scaling.teacher * self.dot(rows.teacher, columns.teacher, (1, 1))
            teacher = jnp.where(out, -jnp.inf, learned)
        return Tile(jnp.where(out, -jnp.inf, logits), same, teacher)

    def _same(self, rows: Side, columns: Side) -> Bool[Array, "a b"] | None:
        if rows.group is None or columns.group is None:
            return None
        return rows.group[:, None] == columns.group[None, :]


def _split(x: Array, size: int, fill: int = 0) -> Array:
    """Cut the leading dimension into equal tiles of at most `size`, padded with as little as that allows."""
    count = max(1, math.ceil(x.shape[0] / size))
    size = math.ceil(x.shape[0] / count)
    padding = ((0, count * size - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=fill).reshape(count, size, *x.shape[1:])


def split(tree: Any, size: int) -> Any:
    """Cut all arrays of a tree into tiles; positions are padded with -1."""
    tiles = jax.tree.map(lambda x: _split(x, size), tree)
    return tiles._replace(position=_split(tree.position, size, -1)) if isinstance(tree, Side) else tiles


def join(tiles: Any, n: int) -> Any:
    """Undo `split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], tiles)


def block_statistics(product: TiledLogits, rows: Side, columns: Side, scaling: Scaling) -> tuple[Any, Any]:
    """Statistics of every row and of every column of a block, from one product.

    Cost:
        2 r c e FLOPs; memory linear in r and c, and one tile.
    """
    row_tiles, column_tiles = split(rows, product.tile), split(columns, product.tile)
    count, size = column_tiles.position.shape
    kind = product.kind

    def along_rows(of_columns: Any, row_tile: Side) -> tuple[Any, Any]:
        def along_columns(of_rows: Any, column_tile: Side) -> tuple[Any, Any]:
            tile = product.compute(row_tile, column_tile, scaling)
            return kind.merge(of_rows, kind.reduce(tile, axis=1)), kind.reduce(tile, axis=0)

        of_rows, parts = jax.lax.scan(along_columns, kind.empty(row_tile.position.shape[0]), column_tiles)
        return kind.merge(of_columns, parts), of_rows

    nothing = jax.tree.map(lambda x: x.reshape(count, size), kind.empty(count * size))
    of_columns, of_rows = jax.lax.scan(along_rows, nothing, row_tiles)
    return join(of_rows, rows.position.shape[0]), join(of_columns, columns.position.shape[0])


class Gradients(NamedTuple):
    """Gradients of a sum of losses.

    Attributes:
        rows: of the rows' embeddings.
        columns: of the columns' embeddings; None where only those of the rows are asked for.
        scale: of the logit scale, the part of every row.
        bias: of the logit bias, the part of every row.
    """

    rows: Float[Array, "r e"]
    columns: Float[Array, "c e"] | None
    scale: Float[Array, "r"]
    bias: Float[Array, "r"]


def block_gradients(
    product: TiledLogits,
    sides: tuple[Side, Side],
    known: tuple[Any, Any],
    scaling: Scaling,
    *,
    weight: Float[Array, ""],
    so_far: Gradients,
) -> Gradients:
    """Add the gradients that a block gives, off the diagonal, its logits computed anew.

    Args:
        product: how.
        sides: rows and columns.
        known: what the loss knows of the whole rows and whole columns that the block is part of (`Outcome.known`).
        scaling: multiplier and bias of the logits.
        weight: of every pair's loss.
        so_far: what is added to, in place where the compiler can.

    Cost:
        4 r c e FLOPs, and 2 more with the columns' gradient; memory linear in r and c, and one tile.
    """
    return _scan_tiles(product, sides, known, scaling, weight, so_far, reduces=False)[0]


def block_statistics_and_gradients(
    product: TiledLogits, sides: tuple[Side, Side], scaling: Scaling, *, weight: Float[Array, ""], so_far: Gradients
) -> tuple[Any, Any, Gradients]:
    """What `block_statistics` and `block_gradients` give, from one product: for a kind of loss of a single pass."""
    assert product.kind.single_pass
    found, of_rows, of_columns = _scan_tiles(product, sides, (None, None), scaling, weight, so_far, reduces=True)
    return of_rows, of_columns, found


def _scan_tiles(
    product: TiledLogits,
    sides: tuple[Side, Side],
    known: tuple[Any, Any],
    scaling: Scaling,
    weight: Float[Array, ""],
    so_far: Gradients,
    *,
    reduces: bool,
) -> tuple[Gradients, Any, Any]:
    """Gradients of a block added to those so far, and where asked for statistics of its rows and columns."""
    tile, kind, (rows, columns) = product.tile, product.kind, sides
    row_tiles, column_tiles = split(rows, tile), split(columns, tile)
    row_known, column_known = split(known[0], tile), split(known[1], tile)
    count, size = column_tiles.position.shape

    def along_rows(carry: tuple[Gradients, Any], i: Array) -> tuple[tuple[Gradients, Any], Any]:
        total, of_columns = carry
        row_tile, row = jax.tree.map(lambda x: x[i], (row_tiles, row_known))

        def along_columns(carry: tuple[Any, ...], j: Array) -> tuple[tuple[Any, ...], Any]:
            row_grad, column_grad, bias_grad, of_rows = carry
            column_tile, column = jax.tree.map(lambda x: x[j], (column_tiles, column_known))
            computed = product.compute(row_tile, column_tile, scaling)
            slope = weight * kind.slope(computed, row, column)
            row_grad += product.dot(slope, column_tile.embed, (1, 0))
            if column_grad is not None:
                of_column = product.dot(slope, row_tile.embed, (0, 0))
                column_grad = column_grad.at[j].add(scaling.scale * of_column)
            bias_grad += jnp.sum(slope, axis=1)
            if reduces:
                of_rows = kind.merge(of_rows, kind.reduce(computed, axis=1))
            return (row_grad, column_grad, bias_grad, of_rows), kind.reduce(computed, axis=0) if reduces else None

        nothing, length = jnp.zeros_like(row_tile.embed, jnp.float32), row_tile.position.shape[0]
        start = (nothing, total.columns, jnp.zeros(length, jnp.float32), kind.empty(length) if reduces else None)
        (row_grad, column_grad, bias_grad, of_rows), parts = jax.lax.scan(along_columns, start, jnp.arange(count))
        total = Gradients(
            total.rows.at[i].add(scaling.scale * row_grad),
            column_grad,
            total.scale.at[i].add(jnp.sum(row_grad * row_tile.embed, axis=1)),
            total.bias.at[i].add(bias_grad),
        )
        return (total, kind.merge(of_columns, parts) if reduces else None), of_rows

    empty = jax.tree.map(lambda x: x.reshape(count, size), kind.empty(count * size)) if reduces else None
    (total, of_columns), of_rows = jax.lax.scan(
        along_rows, (split(so_far, tile), empty), jnp.arange(row_tiles.position.shape[0])
    )
    columns_grad, of_columns = join((total.columns, of_columns), columns.position.shape[0])
    total, of_rows = join((total._replace(columns=None), of_rows), rows.position.shape[0])
    return total._replace(columns=columns_grad), of_rows, of_columns
