"""A map of embeddings in two dimensions: their principal components. Axes: n rows, e embed."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

MOST_ROWS = 200_000
"""Rows that the axes are found by, spread evenly; more move them little."""


def find_axes(blocks: Callable[[], Iterator[np.ndarray]], count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of rows and the two directions of their largest variance, each turned to a fixed side.

    The same rows give the same bits on one machine. Where rows vary in fewer directions, the others are zero.

    Args:
        blocks: gives all rows in their order, `[n, e]` at a time.
        count: of the rows.
        dim: e.

    Returns:
        float64 `[e]` and `[2, e]`.
    """
    step = -(-max(count, 1) // MOST_ROWS)
    number, total, products, position = 0, np.zeros(dim), np.zeros((dim, dim)), 0
    for block in blocks():
        rows = block[-position % step :: step].astype(np.float64)
        number, total, products = number + len(rows), total + rows.sum(axis=0), products + rows.T @ rows
        position += len(block)
    mean = total / max(number, 1)
    values, vectors = np.linalg.eigh(products - number * np.outer(mean, mean))
    axes = vectors.T[::-1][:2]
    axes = np.pad(axes, ((0, 2 - len(axes)), (0, 0)))
    noise = max(dim, number) * np.finfo(np.float64).eps * max(float(np.trace(products)), 0.0)
    largest = np.pad(values[::-1][:2], (0, max(0, 2 - dim)))
    axes = np.where((largest > noise)[:, None], axes, 0.0)
    # An eigenvector has no sign of its own.
    heaviest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return mean, np.where(heaviest < 0, -axes, axes)


def project(
    rows: Float[np.ndarray, "n e"], mean: Float[np.ndarray, " e"], axes: Float[np.ndarray, "2 e"]
) -> Float[np.ndarray, "n 2"]:
    """Return the place of each row on the map, float32."""
    return ((rows.astype(np.float64) - mean) @ axes.T).astype(np.float32)
