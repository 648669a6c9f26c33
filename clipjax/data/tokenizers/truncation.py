"""Truncation in training of texts that have more tokens than the context: which tokens stay.

Source: CLIPA, arXiv 2305.07017, section 3. Its fourth way, which prefers nouns and adjectives, needs a tagger of parts
of speech and is not offered.
"""

import numpy as np

from clipjax.config import TextTruncation


def choose_tokens(truncation: TextTruncation, rng: np.random.Generator, count: int, room: int) -> np.ndarray:
    """Return the places of the tokens that stay, in ascending order: int64 [room].

    Args:
        truncation: the way; `none` keeps the first ones and draws nothing.
        rng: of the sight of the image.
        count: number of tokens, more than `room`.
        room: number of tokens that stay.
    """
    match truncation:
        case TextTruncation.NONE:
            return np.arange(room)
        case TextTruncation.RANDOM:
            return np.sort(rng.choice(count, room, replace=False))
        case TextTruncation.BLOCK:
            return np.arange(room) + rng.integers(count - room + 1)
