"""Exact search against brute force in float64."""

from fractions import Fraction

import numpy as np
import pytest

from clipjax.evals import search
from clipjax.evals.search import nearest


def unit(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    rows = rng.standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def parts(rows: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(sizes))


@pytest.mark.parametrize("top", [1, 10, 63, 300, 1000])
@pytest.mark.parametrize("queries", [1, 5])
def test_it_is_the_brute_force_however_the_rows_are_cut(monkeypatch, top, queries):
    monkeypatch.setattr(search, "BLOCK_BYTES", 4 * 12 * 64)  # 64 rows
    rng = np.random.default_rng(top)
    rows, asked = unit(rng, 300, 12), unit(rng, queries, 12)
    exact = asked.astype(np.float64) @ rows.astype(np.float64).T
    wanted = np.argsort(-exact, axis=1, kind="stable")[:, :top]
    for sizes in ([], [100, 1, 64], [0, 299, 0]):
        scores, places = nearest(asked, parts(rows, sizes), top)
        assert (scores.dtype, places.dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(places, wanted)
        np.testing.assert_allclose(scores, np.take_along_axis(exact, wanted, axis=1), atol=1e-6)


def test_of_equal_rows_the_first_come_first_in_and_across_blocks(monkeypatch):
    monkeypatch.setattr(search, "BLOCK_BYTES", 4 * 2 * 8)
    rows = np.array([[1, 0], [0, 1]], np.float32)[np.arange(40) % 2]
    scores, places = nearest(np.array([[0, 1]], np.float32), [rows], 25)
    assert places[0].tolist() == [*range(1, 40, 2), *range(0, 10, 2)]
    assert scores[0].tolist() == [1.0] * 20 + [0.0] * 5


def test_rows_below_zero_are_found_and_no_padding_is():
    rows = -(unit(np.random.default_rng(0), 5, 3) ** 2)
    scores, places = nearest(np.ones((1, 3), np.float32), [rows], 8)
    assert sorted(places[0].tolist()) == list(range(5))
    assert (scores < 0).all()
    assert nearest(np.ones((2, 3), np.float32), [], 3)[0].shape == (2, 0)
    assert nearest(np.ones((2, 3), np.float32), [rows[:0]], 3)[1].shape == (2, 0)


def test_the_products_are_those_of_float32_and_not_of_less():
    """Neighbours that differ in the 20th bit: bfloat16 or TF32 would not tell them apart."""
    rows = np.array([[1.0, 0.0], [1.0 + 2**-20, 0.0], [1.0 + 2**-21, 0.0]], np.float32)
    scores, places = nearest(np.array([[1.0, 0.0]], np.float32), [rows], 3)
    assert places[0].tolist() == [1, 2, 0]
    assert [Fraction(float(score)) for score in scores[0]] == [1 + Fraction(1, 2**20), 1 + Fraction(1, 2**21), 1]


def test_rows_are_read_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(search, "BLOCK_BYTES", 4 * 4 * 16)
    read: list[int] = []

    def blocks():
        for start in range(0, 160, 16):
            read.append(start)
            yield np.full((16, 4), start, np.float32)

    seen: list[int] = []
    merge = search._merge
    monkeypatch.setattr(search, "_merge", lambda *given: (seen.append(len(read)), merge(*given))[1])
    nearest(np.ones((1, 4), np.float32), blocks(), 2)
    assert seen == [2, 3, 4, 5, 6, 7, 8, 9, 10, 10]  # never more than one ahead
