"""Exact search among embeddings that need not fit into memory. Axes: q queries, n rows, b rows of a block, e embed."""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipjax.data.sample import UnreadableData

BLOCK_BYTES = 2**26
"""Embeddings that are compared at a time."""

QUERIES_AT_ONCE = 256


def nearest(
    queries: Float[np.ndarray, "q e"], blocks: Iterable[Float[np.ndarray, "n e"]], top: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Return the largest products of each query with all rows, in falling order, and whose they are.

    Of equal ones the first row comes first. With fewer rows than `top`, k is their number.

    Args:
        queries: up to `QUERIES_AT_ONCE`, float32.
        blocks: all rows in their order, in blocks of any size, float32; each is read once.
        top: how many are wanted, 1 or more.

    Returns:
        Float32 and int64.

    Raises:
        UnreadableData: a row is not finite.

    Cost:
        `BLOCK_BYTES` of rows, and a product of q by the rows of a block, on the device at a time.
    """
    assert len(queries) <= QUERIES_AT_ONCE, len(queries)
    size = max(1, BLOCK_BYTES // (4 * queries.shape[1]))
    scores, places = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    waiting: list[tuple[int, Array, Array]] = []
    with jax.default_device(jax.local_devices()[0]):
        on_device, start = jnp.asarray(queries, jnp.float32), 0
        for block in _cut(blocks, size):
            # The device works on this block while the next one is read.
            waiting.append((start, *_block_top(on_device, _padded(block, size), len(block), top)))
            start += len(block)
            if len(waiting) > 1:
                scores, places = _merge(scores, places, waiting.pop(0), top)
        for each in waiting:
            scores, places = _merge(scores, places, each, top)
    return scores, places


def _cut(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    for block in blocks:
        for start in range(0, len(block), size):
            yield block[start : start + size]


def _padded(block: np.ndarray, size: int) -> np.ndarray:
    """Return a block with a power of two of rows, or the most: so few shapes are compiled."""
    rows = min(size, 1 << (len(block) - 1).bit_length())
    return block if rows == len(block) else np.pad(block, ((0, rows - len(block)), (0, 0)))


@functools.partial(jax.jit, static_argnames="top")
def _block_top(
    queries: Float[Array, "q e"], block: Float[Array, "b e"], count: int, top: int
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Return the best of the first `count` rows of a block; the others are minus infinity."""
    product = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    product = jnp.where(jnp.arange(block.shape[0])[None] < count, product, -jnp.inf)
    return jax.lax.top_k(product, min(top, block.shape[0]))


def _merge(
    scores: np.ndarray, places: np.ndarray, found: tuple[int, Array, Array], top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of those so far, which come first among equals, and of a block."""
    start, more, where = found[0], np.asarray(found[1]), np.asarray(found[2]).astype(np.int64)
    if np.isnan(more).any():  # which counts as the largest, so none is overlooked
        raise UnreadableData("embeddings are not finite: their files are damaged; remove the folder and embed again")
    scores, places = np.concatenate([scores, more], axis=1), np.concatenate([places, where + start], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    scores, places = np.take_along_axis(scores, order, axis=1), np.take_along_axis(places, order, axis=1)
    kept = int(np.isfinite(scores).sum(axis=1).min(initial=scores.shape[1]))  # without the padding of small blocks
    return scores[:, :kept], places[:, :kept]
