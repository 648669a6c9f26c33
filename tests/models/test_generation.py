"""Writing texts: beam search against trying every text, and what each way of choosing promises."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.models.generation import TextFormat, beam_search, generate, greedy, make_top_k

PAD, START, END, LENGTH, VOCAB = 0, 5, 6, 5, 7
FRAME = TextFormat(START, END, PAD, LENGTH)

pytestmark = pytest.mark.newest


def make_next_logits(rows: int, seed: int = 0):
    """Logits that depend on the row's image, the place and the token before."""
    table = jnp.asarray(np.random.default_rng(seed).normal(size=(2, LENGTH, VOCAB, VOCAB)) * 2, jnp.float32)

    def next_logits(tokens):
        image = jnp.arange(tokens.shape[0]) * 2 // tokens.shape[0]
        return table[image[:, None], jnp.arange(LENGTH)[None], tokens]

    return next_logits, np.asarray(table)


def every_text():
    """All rows that begin once, end once, and hold no padding before."""
    words = [i for i in range(VOCAB) if i not in (PAD, START, END)]
    for count in range(LENGTH - 1):
        for text in itertools.product(words, repeat=count):
            yield [START, *text, END] + [PAD] * (LENGTH - 2 - count)


def log_likelihood(table, image: int, row: list[int]) -> float:
    total, end = 0.0, row.index(END)
    for place in range(1, end + 1):
        logits = table[image, place - 1, row[place - 1]].astype(np.float64).copy()
        logits[[PAD, START]] = -np.inf
        log_p = logits - np.log(np.exp(logits).sum())
        # At the end of a row only the end is left, at the price of its likelihood.
        total += log_p[row[place]]
    return total


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search_with_enough_beams_finds_the_likeliest_text(length_penalty: float):
    beams = 256
    next_logits, table = make_next_logits(2 * beams)
    found = np.asarray(beam_search(next_logits, 2, FRAME, num_beams=beams, length_penalty=length_penalty))
    for image in (0, 1):
        scores = {
            tuple(row): log_likelihood(table, image, row) / row.index(END) ** length_penalty for row in every_text()
        }
        assert tuple(found[image].tolist()) == max(scores, key=scores.__getitem__)


def test_one_beam_is_greedy():
    next_logits, _ = make_next_logits(2, seed=3)
    one = beam_search(next_logits, 2, FRAME, num_beams=1)
    np.testing.assert_array_equal(one, generate(next_logits, 2, FRAME, greedy, jax.random.key(0)))
    top = generate(next_logits, 2, FRAME, make_top_k(1), jax.random.key(0))
    np.testing.assert_array_equal(one, top)


def test_drawn_texts_are_whole_and_follow_the_key():
    next_logits, _ = make_next_logits(200, seed=4)
    draw = jax.jit(lambda key: generate(next_logits, 200, FRAME, make_top_k(3), key))
    rows = np.asarray(draw(jax.random.key(1)))
    allowed = {tuple(row) for row in every_text()}
    assert {tuple(row.tolist()) for row in rows} <= allowed and len({tuple(row.tolist()) for row in rows}) > 10
    np.testing.assert_array_equal(rows, draw(jax.random.key(1)))
    assert (rows != np.asarray(draw(jax.random.key(2)))).any()
