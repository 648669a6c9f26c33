"""The map of embeddings against NumPy's singular values."""

import numpy as np
import pytest

from clipjax.evals import principal_axes
from clipjax.evals.principal_axes import find_axes, project


def blocks_of(rows: np.ndarray, size: int):
    return lambda: (rows[start : start + size] for start in range(0, len(rows), size))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_map_is_that_of_the_singular_values(size):
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((100, 3)) * [5, 2, 0.3] @ rng.standard_normal((3, 6)) + 1).astype(np.float32)
    mean, axes = find_axes(blocks_of(rows, size), 100, 6)
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    _, _, wanted = np.linalg.svd(centred)
    wanted = wanted[:2] * np.sign(wanted[np.arange(2), np.abs(wanted[:2]).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(axes, wanted, atol=1e-9)
    found = project(rows, mean, axes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, centred @ wanted.T, rtol=1e-5, atol=1e-5)
    again = find_axes(blocks_of(rows, size), 100, 6)
    assert np.array_equal(again[0], mean) and np.array_equal(again[1], axes)


def test_every_so_many_rows_are_taken_wherever_blocks_end(monkeypatch):
    monkeypatch.setattr(principal_axes, "MOST_ROWS", 10)
    rows = np.random.default_rng(1).standard_normal((47, 4)).astype(np.float32)
    wanted = find_axes(blocks_of(rows[::5], 100), 10, 4)
    for size in (1, 3, 5, 47):
        found = find_axes(blocks_of(rows, size), 47, 4)
        np.testing.assert_allclose(found[1], wanted[1], atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("dim", [1, 2, 8])
def test_rows_that_do_not_vary_so_much_lie_on_a_line_or_a_point(count, dim):
    rows = np.outer(np.arange(count), np.ones(dim)).astype(np.float32)
    mean, axes = find_axes(blocks_of(rows, 3), count, dim)
    places = project(rows, mean, axes)
    assert places.shape == (count, 2) and np.isfinite(places).all()
    assert not places[:, 1].any()
    np.testing.assert_allclose(places[:, 0], (np.arange(count) - (count - 1) / 2) * dim**0.5, atol=1e-5)
