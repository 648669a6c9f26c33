"""Classification by nearest neighbours among training examples. Axes: n queries, m training examples, d features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TEMPERATURE = 0.07
_BLOCK = 1024  # queries at once


def nearest_scores(
    train: np.ndarray, index: np.ndarray, queries: np.ndarray, *, neighbours: int, num_classes: int
) -> np.ndarray:
    """Return by class the sum of exp(cosine / 0.07) over the nearest training examples of that class. `[n, k]`.

    Of equally near examples the first ones count. The sums are divided by that of the nearest, which keeps them finite.

    Source:
        DINO (arXiv 2104.14294), by the rule of arXiv 1805.01978.

    Args:
        train: `[m, d]`.
        index: class of each of them, from 0 to k - 1, int `[m]`.
        queries: `[n, d]`.
        neighbours: that vote.
        num_classes: k.

    Raises:
        ValueError: there are fewer training examples than neighbours.
    """
    if neighbours > len(train):
        raise ValueError(f"neighbours={neighbours}, but there are {len(train)} training examples; ask for no more")
    train, found = _unit(train), []
    for start in range(0, len(queries), _BLOCK):
        rows = _unit(queries[start : start + _BLOCK])
        padded = np.pad(rows, ((0, min(_BLOCK, len(queries)) - len(rows)), (0, 0)))
        with jax.default_device(jax.local_devices()[0]):
            cosine, place = map(np.asarray, _nearest(padded, train, neighbours))
        cosine, place = cosine[: len(rows)].astype(np.float64), place[: len(rows)]
        weight = np.exp((cosine - cosine[:, :1]) / TEMPERATURE)
        scores = np.zeros((len(rows), num_classes))
        np.add.at(scores, (np.arange(len(rows))[:, None], index[place]), weight)
        found.append(scores)
    return np.concatenate([np.zeros((0, num_classes)), *found])


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnums=2)
def _nearest(
    queries: Float[Array, "n d"], train: Float[Array, "m d"], neighbours: int
) -> tuple[Float[Array, "n q"], Int[Array, "n q"]]:
    """Return the largest cosines in falling order, and whose they are."""
    return jax.lax.top_k(jnp.matmul(queries, train.T, precision=jax.lax.Precision.HIGHEST), neighbours)
