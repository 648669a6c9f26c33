"""Statistics and gradients of a block of the similarity matrix, one tile at a time.

A block is the product of some images with some texts. Only one tile of it exists at any moment: it is computed, used
and dropped, once for the statistics and once more for the gradients, so memory is linear in the rows and columns.
Tiles leave out the diagonal (each image with its own text), which callers treat in closed form.

Read `RowsOrColumns`, `TiledLogits`, `block_statistics`, `block_gradients`.
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


class RowsOrColumns(NamedTuple):
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
        gamma: weight of a new value in the moving averages of `GlobalSoftmax`.
    """

    scale: Float[Array, ""]
    bias: Float[Array, ""]
    teacher: Float[Array, ""] | None = None
    gamma: Float[Array, ""] | None = None


@dataclass(frozen=True)
class TiledLogits:
    """Logits in tiles of at most `tile` rows and columns, computed from operands of one dtype.

    float32 products are full float32 also where the hardware's default is fewer bits; sums are always float32.
    """

    logit_loss: LogitLoss
    tile: int
    dtype: Any = jnp.float32
    positives: bool = False
    """True: pairs of the same group are positives of each other; False: they do not count."""

    def dot(self, left: Array, right: Array, contract: tuple[int, int]) -> Array:
        """Multiply over one dimension of each, in float32."""
        return jax.lax.dot_general(
            left.astype(self.dtype),
            right.astype(self.dtype),
            (((contract[0],), (contract[1],)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def compute(self, rows: RowsOrColumns, columns: RowsOrColumns, scaling: Scaling) -> Tile:
        """Compute one tile."""
        out = (rows.position[:, None] == columns.position[None, :]) | (columns.position < 0)[None, :]
        out |= (rows.position < 0)[:, None]
        same = self._same(rows, columns)
        if self.positives:
            same = None if same is None else same & ~out
        elif same is not None:
            out, same = out | same, None
        # Scale afterwards: bfloat16 operands are those of the diagonal and of the other pass, whichever side is rows.
        logits = scaling.scale * self.dot(rows.embed, columns.embed, (1, 1)) + scaling.bias
        teacher = None
        if rows.teacher is not None and columns.teacher is not None and scaling.teacher is not None:
            teacher_logits = scaling.teacher * self.dot(rows.teacher, columns.teacher, (1, 1))
            teacher = jnp.where(out, -jnp.inf, teacher_logits)
        return Tile(jnp.where(out, -jnp.inf, logits), same, teacher)

    def _same(self, rows: RowsOrColumns, columns: RowsOrColumns) -> Bool[Array, "a b"] | None:
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
    """Cut all arrays of a tree into tiles; pad positions with -1."""
    tiles = jax.tree.map(lambda x: _split(x, size), tree)
    return tiles._replace(position=_split(tree.position, size, -1)) if isinstance(tree, RowsOrColumns) else tiles


def join(tiles: Any, n: int) -> Any:
    """Undo `split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], tiles)


def block_statistics(
    tiled: TiledLogits, rows: RowsOrColumns, columns: RowsOrColumns, scaling: Scaling
) -> tuple[Any, Any]:
    """Return the statistics of every row and of every column of a block, from one product.

    Cost:
        2 r c e FLOPs; memory linear in r and c, and one tile.
    """
    row_tiles, column_tiles = split(rows, tiled.tile), split(columns, tiled.tile)
    count, size = column_tiles.position.shape
    loss = tiled.logit_loss

    def along_rows(column_stats: Any, row_tile: RowsOrColumns) -> tuple[Any, Any]:
        def along_columns(row_stats: Any, column_tile: RowsOrColumns) -> tuple[Any, Any]:
            tile = tiled.compute(row_tile, column_tile, scaling)
            return loss.merge(row_stats, loss.reduce(tile, axis=1)), loss.reduce(tile, axis=0)

        row_stats, parts = jax.lax.scan(along_columns, loss.empty(row_tile.position.shape[0]), column_tiles)
        return loss.merge(column_stats, parts), row_stats

    nothing = jax.tree.map(lambda x: x.reshape(count, size), loss.empty(count * size))
    column_stats, row_stats = jax.lax.scan(along_rows, nothing, row_tiles)
    return join(row_stats, rows.position.shape[0]), join(column_stats, columns.position.shape[0])


class Gradients(NamedTuple):
    """Gradients of a sum of losses.

    Attributes:
        rows: by the rows' embeddings.
        columns: by the columns' embeddings; None where only those of the rows are asked for.
        scale: by the logit scale, each row's part.
        bias: by the logit bias, each row's part.
    """

    rows: Float[Array, "r e"]
    columns: Float[Array, "c e"] | None
    scale: Float[Array, "r"]
    bias: Float[Array, "r"]


def block_gradients(
    tiled: TiledLogits,
    sides: tuple[RowsOrColumns, RowsOrColumns],
    normalizers: tuple[Any, Any],
    scaling: Scaling,
    *,
    weight: Float[Array, ""],
    so_far: Gradients,
) -> Gradients:
    """Add the gradients of a block, off the diagonal, to those so far; its logits are computed anew.

    Args:
        tiled: the loss, the tile's size and the operands' dtype.
        sides: rows and columns.
        normalizers: of the whole rows and whole columns that the block is part of (`PairLosses.normalizers`).
        scaling: multiplier and bias of the logits.
        weight: of every pair's loss.
        so_far: gradients to add to, in place where the compiler can.

    Cost:
        4 r c e FLOPs, and 2 more with the columns' gradient; memory linear in r and c, and one tile.
    """
    return _scan_tiles(tiled, sides, normalizers, scaling, weight, so_far, reduces=False)[0]


def block_statistics_and_gradients(
    tiled: TiledLogits,
    sides: tuple[RowsOrColumns, RowsOrColumns],
    scaling: Scaling,
    *,
    weight: Float[Array, ""],
    so_far: Gradients,
) -> tuple[Any, Any, Gradients]:
    """Do the work of `block_statistics` and `block_gradients` with one product, for a loss of a single pass."""
    assert tiled.logit_loss.single_pass
    gradients, row_stats, column_stats = _scan_tiles(tiled, sides, (None, None), scaling, weight, so_far, reduces=True)
    return row_stats, column_stats, gradients


def _scan_tiles(
    tiled: TiledLogits,
    sides: tuple[RowsOrColumns, RowsOrColumns],
    normalizers: tuple[Any, Any],
    scaling: Scaling,
    weight: Float[Array, ""],
    so_far: Gradients,
    *,
    reduces: bool,
) -> tuple[Gradients, Any, Any]:
    """Add a block's gradients to those so far; with `reduces`, also collect statistics of its rows and columns."""
    tile, loss, (rows, columns) = tiled.tile, tiled.logit_loss, sides
    row_tiles, column_tiles = split(rows, tile), split(columns, tile)
    row_normalizers, column_normalizers = split(normalizers[0], tile), split(normalizers[1], tile)
    count, size = column_tiles.position.shape

    def along_rows(carry: tuple[Gradients, Any], i: Array) -> tuple[tuple[Gradients, Any], Any]:
        total, column_stats = carry
        row_tile, row = jax.tree.map(lambda x: x[i], (row_tiles, row_normalizers))

        def along_columns(carry: tuple[Any, ...], j: Array) -> tuple[tuple[Any, ...], Any]:
            row_grad, column_grad, bias_grad, row_stats = carry
            column_tile, column = jax.tree.map(lambda x: x[j], (column_tiles, column_normalizers))
            computed = tiled.compute(row_tile, column_tile, scaling)
            logit_grads = weight * loss.logit_gradient(computed, row, column)
            row_grad += tiled.dot(logit_grads, column_tile.embed, (1, 0))
            if column_grad is not None:
                product = tiled.dot(logit_grads, row_tile.embed, (0, 0))
                column_grad = column_grad.at[j].add(scaling.scale * product)
            bias_grad += jnp.sum(logit_grads, axis=1)
            if reduces:
                row_stats = loss.merge(row_stats, loss.reduce(computed, axis=1))
            return (row_grad, column_grad, bias_grad, row_stats), loss.reduce(computed, axis=0) if reduces else None

        nothing, length = jnp.zeros_like(row_tile.embed, jnp.float32), row_tile.position.shape[0]
        start = (nothing, total.columns, jnp.zeros(length, jnp.float32), loss.empty(length) if reduces else None)
        (row_grad, column_grad, bias_grad, row_stats), parts = jax.lax.scan(along_columns, start, jnp.arange(count))
        total = Gradients(
            total.rows.at[i].add(scaling.scale * row_grad),
            column_grad,
            total.scale.at[i].add(jnp.sum(row_grad * row_tile.embed, axis=1)),
            total.bias.at[i].add(bias_grad),
        )
        return (total, loss.merge(column_stats, parts) if reduces else None), row_stats

    empty = jax.tree.map(lambda x: x.reshape(count, size), loss.empty(count * size)) if reduces else None
    (total, column_stats), row_stats = jax.lax.scan(
        along_rows, (split(so_far, tile), empty), jnp.arange(row_tiles.position.shape[0])
    )
    column_grads, column_stats = join((total.columns, column_stats), columns.position.shape[0])
    total, row_stats = join((total._replace(columns=None), row_stats), rows.position.shape[0])
    return total._replace(columns=column_grads), row_stats, column_stats
