"""Writing captions with a decoder: greedy, sampled from the likeliest tokens, or by beam search.

All of it works on one function, `next_logits(tokens [n, l]) -> [n, l, v]`: logits of what follows each token. Rows
have a fixed length, so one program serves. Axes: b images, k beams, l tokens, v vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.typing import Key

NextLogits = Callable[[Int[Array, "n l"]], Float[Array, "n l v"]]
Sampler = Callable[[Float[Array, "b v"], Key], Int[Array, " b"]]


@dataclass(frozen=True)
class TextFormat:
    """Frame of a text: ids of its start, its end and the padding, and the length of a row."""

    start_id: int
    end_id: int
    pad_id: int
    length: int

    def rows(self, count: int) -> Int[Array, "n l"]:
        """Return texts that consist of their start."""
        return jnp.full((count, self.length), self.pad_id, jnp.int32).at[:, 0].set(self.start_id)


def greedy(logits: Float[Array, "b v"], key: Key) -> Int[Array, " b"]:
    """Return the likeliest token."""
    del key
    return jnp.argmax(logits, axis=-1)


def make_top_k(count: int, temperature: float = 1.0) -> Sampler:
    """Return `choose(logits, key)`, which draws one of the `count` likeliest tokens by probability at a temperature."""

    def choose(logits: Float[Array, "b v"], key: Key) -> Int[Array, " b"]:
        best, ids = jax.lax.top_k(logits, count)
        drawn = jax.random.categorical(key, best / temperature, axis=-1)
        return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]

    return choose


def generate(next_logits: NextLogits, count: int, frame: TextFormat, choose: Sampler, key: Key) -> Int[Array, "b l"]:
    """Return `count` texts, written token by token; each ends by itself or at the end of its row."""

    def step(place: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        tokens, done = state
        logits = _allowed(next_logits(tokens)[:, place - 1], frame)
        chosen = choose(logits, jax.random.fold_in(key, place)).astype(jnp.int32)
        chosen = jnp.where(place == frame.length - 1, frame.end_id, chosen)
        chosen = jnp.where(done, frame.pad_id, chosen)
        return tokens.at[:, place].set(chosen), done | (chosen == frame.end_id)

    return jax.lax.fori_loop(1, frame.length, step, (frame.rows(count), jnp.zeros(count, bool)))[0]


def beam_search(
    next_logits: NextLogits, count: int, frame: TextFormat, *, num_beams: int, length_penalty: float = 1.0
) -> Int[Array, "b l"]:
    """Return the likeliest of `num_beams` texts for each of `count` images.

    Args:
        next_logits: for rows that belong to images 0, 0, ..., 1, 1, ...: `num_beams` to each.
        count: images.
        frame: ids and length of a text.
        num_beams: texts that are continued at a time.
        length_penalty: log-likelihoods are divided by the number of tokens to this power before they are compared.
    """

    def step(place: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tokens, scores, done = state
        rows = tokens.reshape(count * num_beams, frame.length)
        log_p = jax.nn.log_softmax(_allowed(next_logits(rows)[:, place - 1], frame).astype(jnp.float32), axis=-1)
        log_p = log_p.reshape(count, num_beams, -1)
        vocab = log_p.shape[-1]
        last = jnp.where(jnp.arange(vocab) == frame.end_id, 0, -jnp.inf)[None, None]
        log_p = jnp.where(place == frame.length - 1, log_p + last, log_p)
        rest = jnp.where(jnp.arange(vocab) == frame.pad_id, 0.0, -jnp.inf)[None, None]
        total = scores[:, :, None] + jnp.where(done[:, :, None], rest, log_p)
        scores, flat = jax.lax.top_k(total.reshape(count, -1), num_beams)
        parent, chosen = flat // vocab, (flat % vocab).astype(jnp.int32)
        tokens = jnp.take_along_axis(tokens, parent[:, :, None], axis=1).at[:, :, place].set(chosen)
        done = jnp.take_along_axis(done, parent, axis=1)
        return tokens, scores, done | (chosen == frame.end_id)

    tokens = jnp.broadcast_to(frame.rows(count)[:, None], (count, num_beams, frame.length))
    # All beams begin alike: only the first counts, or they would stay alike.
    scores = jnp.where(jnp.arange(num_beams) == 0, 0.0, -jnp.inf)[None].repeat(count, axis=0)
    state = (tokens, scores, jnp.zeros((count, num_beams), bool))
    tokens, scores, _ = jax.lax.fori_loop(1, frame.length, step, state)
    lengths = jnp.argmax(tokens == frame.end_id, axis=-1)
    best = jnp.argmax(scores / lengths.astype(jnp.float32) ** length_penalty, axis=1)
    return jnp.take_along_axis(tokens, best[:, None, None], axis=1)[:, 0]


def _allowed(logits: Float[Array, "n v"], frame: TextFormat) -> Float[Array, "n v"]:
    """Return logits in which a second start, and padding, are impossible."""
    ids = jnp.arange(logits.shape[-1])[None]
    banned = (ids == frame.start_id) | ((ids == frame.pad_id) & (frame.pad_id != frame.end_id))
    return jnp.where(banned, -jnp.inf, logits)
