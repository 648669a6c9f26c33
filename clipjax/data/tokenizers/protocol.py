"""The protocol of a tokenizer, and captions to token ids by any of them.

Reading order: `Tokenizer` (the promise that the text tower relies on), `tokenize` (captions to an array). Axes:
n captions, l tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

PAD_ID = 0


class Tokenizer(Protocol):
    """Text to ids, each text with an end, and a start unless `start_id` is None; rows are padded with `pad_id`.

    Instances are cheap to use from several threads, and pickle (for worker processes) as the bytes of `files`.

    Attributes:
        ends_highest: True if `end_id` is the largest id, and `start_id` the one below it. A text tower that pools at
            the end of a text (`TextPool.END`) finds it as the largest id of a row, as OpenAI's CLIP does.
    """

    name: str
    vocab_size: int
    end_id: int
    pad_id: int
    ends_highest: bool

    @property
    def start_id(self) -> int | None:
        """Id before every text, if there is one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption, without start and end."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without start and end."""
        ...

    def files(self) -> dict[str, bytes]:
        """Return everything that `tokenizer_from_files` needs to rebuild the tokenizer, by file name."""
        ...


Choose = Callable[[int, int], np.ndarray]
"""Function from numbers of tokens, of a text and of those that may stay, to the places of those that stay."""


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], context_length: int, choose: Choose | None = None
) -> np.ndarray:
    """Return start, ids and end of every text, padded; a text that is too long loses its tail but not its end.

    Args:
        tokenizer: text to ids.
        texts: any number of them.
        context_length: places of a row.
        choose: chooses the ids that stay of a text that is too long; None: the first ones.

    Returns:
        int32 [n, l] with l = `context_length`.

    Raises:
        ValueError: `context_length` is below 2.
        TypeError: `texts` is a single string.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts={texts[:40]!r} must be a sequence of strings: put a single caption into a list.")
    if context_length < 2:
        raise ValueError(f"context_length={context_length} must be at least 2, for the start and the end of a text.")
    tokens = np.full((len(texts), context_length), tokenizer.pad_id, np.int32)
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    for row, text in zip(tokens, texts, strict=True):
        encoded, room = tokenizer.encode(text), context_length - 1 - len(start)
        if choose is not None and len(encoded) > room:
            encoded = [encoded[place] for place in choose(len(encoded), room).tolist()]
        ids = [*start, *encoded][: context_length - 1]
        row[: len(ids) + 1] = [*ids, tokenizer.end_id]
    return tokens


@dataclasses.dataclass(frozen=True)
class TextToTokens:
    """The function `text -> int32 [context_length]` of a training stream; pickles to data workers."""

    tokenizer: Tokenizer
    context_length: int

    def __call__(self, text: str, choose: Choose | None = None) -> np.ndarray:
        """Return one row of `tokenize`."""
        return tokenize(self.tokenizer, [text], self.context_length, choose)[0]


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON can smuggle into a caption and UTF-8 cannot carry, by "?"."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class NoTokenizer:
    """The stand-in of a model that came without its tokenizer: token ids can be embedded, texts cannot."""

    name = "none"
    vocab_size = 0
    start_id: int | None = None
    end_id = pad_id = PAD_ID
    ends_highest = True

    def encode(self, text: str) -> list[int]:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"The model came without its tokenizer, so {text[:40]!r} cannot be read; convert it again with "
            "--tokenizer=KIND:PATH, or give token ids."
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without start and end."""
        raise ValueError("The model came without its tokenizer, so no text can be made of token ids.")

    def files(self) -> dict[str, bytes]:
        """Return nothing."""
        return {}
