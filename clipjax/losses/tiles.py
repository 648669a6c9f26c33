"""What a block of the similarity matrix gives, one tile at a time: statistics of rows and columns, and gradients.

A block is the product of some images with some texts. Only a tile of it exists at any moment: it is computed, used and
forgotten, once for the statistics and once more for the gradients, so memory is linear in the rows and columns.
The diagonal (each image with its own text) is left out here; callers treat it in closed form.

Read `Side`, `Product`, `block_statistics`, `block_gradients`.
Axes: r rows (images), c columns (texts), e embed, a rows of a tile, b columns of a tile.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.losses.kinds import Kind, Statistics

DEFAULT_TILE = 1024


class Side(NamedTuple):
    """The rows, or the columns, of a block.

    Attributes:
        embed: unit-norm embeddings.
        position: place in the global batch; -1 for padding.
        group: pairs of the same group are no negatives of each other; None where every pair is a group of its own.
    """

    embed: Float[Array, "n e"]
    position: Int[Array, "n"]
    group: Int[Array, "n"] | None


class Scaling(NamedTuple):
    """logit = scale * similarity + bias."""

    scale: Float[Array, ""]
    bias: Float[Array, ""]


@dataclass(frozen=True)
class Product:
    """How logits are computed: in tiles of at most `tile` rows and columns, from operands of one dtype.

    float32 products are full float32 also where the hardware's default is fewer bits; sums are float32 always.
    """

    kind: Kind
    tile: int
    dtype: Any = jnp.float32

    def dot(self, left: Array, right: Array, contract: tuple[int, int]) -> Array:
        """Product over one dimension of each, in float32."""
        return jax.lax.dot_general(
            left.astype(self.dtype),
            right.astype(self.dtype),
            (((contract[0],), (contract[1],)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def logits(self, rows: Side, columns: Side, scaling: Scaling) -> Float[Array, "a b"]:
        """Logits of one tile; -inf where a pair is none: on the diagonal, in padding, within a group."""
        logits = self.dot(scaling.scale * rows.embed, columns.embed, (1, 1)) + scaling.bias
        out = (rows.position[:, None] == columns.position[None, :]) | (columns.position < 0)[None, :]
        out |= (rows.position < 0)[:, None]
        if rows.group is not None and columns.group is not None:
            out |= rows.group[:, None] == columns.group[None, :]
        return jnp.where(out, -jnp.inf, logits)


def split(x: Array, size: int, fill: int = 0) -> Array:
    """Cut the leading dimension into equal tiles of at most `size`, padded with as little as that allows."""
    count = max(1, math.ceil(x.shape[0] / size))
    size = math.ceil(x.shape[0] / count)
    padding = ((0, count * size - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=fill).reshape(count, size, *x.shape[1:])


def _split_side(side: Side, size: int) -> Side:
    group = None if side.group is None else split(side.group, size)
    return Side(split(side.embed, size), split(side.position, size, -1), group)


def join(tiles: Any, n: int) -> Any:
    """Undo `split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], tiles)


def empty(n: int) -> Statistics:
    """Statistics of nothing."""
    return Statistics(jnp.full(n, -jnp.inf, jnp.float32), jnp.zeros(n, jnp.float32))


def block_statistics(product: Product, rows: Side, columns: Side, scaling: Scaling) -> tuple[Statistics, Statistics]:
    """Statistics of every row and of every column of a block, from one product.

    Cost:
        2 r c e FLOPs; memory linear in r and c, and one tile.
    """
    row_tiles, column_tiles = _split_side(rows, product.tile), _split_side(columns, product.tile)
    count, size = column_tiles.position.shape
    kind = product.kind

    def along_rows(of_columns: Statistics, row_tile: Side) -> tuple[Statistics, Statistics]:
        def along_columns(of_rows: Statistics, column_tile: Side) -> tuple[Statistics, Statistics]:
            logits = product.logits(row_tile, column_tile, scaling)
            return kind.merge(of_rows, kind.reduce(logits, axis=1)), kind.reduce(logits, axis=0)

        of_rows, parts = jax.lax.scan(along_columns, empty(row_tile.position.shape[0]), column_tiles)
        return kind.merge(of_columns, parts), of_rows

    nothing = Statistics(*(x.reshape(count, size) for x in empty(count * size)))
    of_columns, of_rows = jax.lax.scan(along_rows, nothing, row_tiles)
    return join(of_rows, rows.position.shape[0]), join(of_columns, columns.position.shape[0])


class Gradients(NamedTuple):
    """Gradients that a block gives, off the diagonal, before the weight of the mean.

    Attributes:
        rows: of the rows' embeddings.
        columns: of the columns' embeddings; None where only those of the rows were asked for.
        scale: of the logit scale, the part of every row.
        bias: of the logit bias, the part of every row.
    """

    rows: Float[Array, "r e"]
    columns: Float[Array, "c e"] | None
    scale: Float[Array, "r"]
    bias: Float[Array, "r"]


def block_gradients(
    product: Product,
    rows: Side,
    columns: Side,
    log_sums: tuple[Float[Array, "r"], Float[Array, "c"]],
    scaling: Scaling,
    columns_so_far: Float[Array, "c e"] | None,
) -> Gradients:
    """Gradients by the embeddings of a block, its logits computed anew.

    Args:
        product: how.
        rows: the rows.
        columns: the columns.
        log_sums: log-sum-exps of the whole rows and whole columns that the block is part of.
        scaling: multiplier and bias of the logits.
        columns_so_far: what the columns' gradient is added to; None leaves that gradient out.

    Cost:
        4 r c e FLOPs, and 2 more with the columns' gradient; memory linear in r and c, and one tile.
    """
    tile = product.tile
    row_tiles, column_tiles = _split_side(rows, tile), _split_side(columns, tile)
    row_sums, column_sums = split(log_sums[0], tile), split(log_sums[1], tile)
    so_far = None if columns_so_far is None else split(columns_so_far, tile)
    count = column_tiles.position.shape[0]

    def along_rows(column_grad: Array | None, row: tuple[Side, Array]) -> tuple[Array | None, tuple[Array, ...]]:
        row_tile, row_sum = row
        scaled = scaling.scale * row_tile.embed

        def along_columns(carry: tuple[Any, ...], j: Array) -> tuple[tuple[Any, ...], None]:
            row_grad, column_grad, bias_grad = carry
            column_tile, column_sum = jax.tree.map(lambda x: x[j], (column_tiles, column_sums))
            slope = product.kind.slope(product.logits(row_tile, column_tile, scaling), row_sum, column_sum)
            row_grad += product.dot(slope, column_tile.embed, (1, 0))
            if column_grad is not None:
                column_grad = column_grad.at[j].add(product.dot(slope, scaled, (0, 0)))
            return (row_grad, column_grad, bias_grad + jnp.sum(slope, axis=1)), None

        start = (jnp.zeros_like(row_tile.embed, jnp.float32), column_grad, jnp.zeros_like(row_sum))
        (row_grad, column_grad, bias_grad), _ = jax.lax.scan(along_columns, start, jnp.arange(count))
        scale_grad = jnp.sum(row_grad * row_tile.embed, axis=1)
        return column_grad, (scaling.scale * row_grad, scale_grad, bias_grad)

    column_grad, of_rows = jax.lax.scan(along_rows, so_far, (row_tiles, row_sums))
    row_grad, scale_grad, bias_grad = join(of_rows, rows.position.shape[0])
    if column_grad is not None:
        column_grad = join(column_grad, columns.position.shape[0])
    return Gradients(row_grad, column_grad, scale_grad, bias_grad)
