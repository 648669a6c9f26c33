"""Truncation of long texts in training: which tokens stay, how evenly, and that none is drawn without it."""

import math

import numpy as np
import pytest

from clipjax.config import TextTruncation
from clipjax.data.sources import ArraySource
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.data.tokenizers.protocol import tokenize
from clipjax.data.tokenizers.truncation import choose_tokens
from tests.data.test_caption_fields import rng, take, texts

pytestmark = pytest.mark.newest

LONG = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("truncation", [TextTruncation.RANDOM, TextTruncation.BLOCK])
def test_truncation_keeps_tokens_in_their_order_and_the_end(truncation):
    images = rng().integers(0, 256, (16, 12, 14, 3), dtype=np.uint8)
    source = ArraySource(images, [LONG] * 8 + ["short"] * 8)
    batches = take(10, source, text_truncation=truncation)
    rows = [(row, index) for batch in batches for row, index in zip(batch["tokens"], batch["index"], strict=True)]
    kept = set()
    for row, index in rows:
        ids = row.tolist()
        assert ids[0] == 257
        if index >= 8:
            assert ids == tokenize(BytesTokenizer(), ["short"], 8)[0].tolist()
            continue
        text = texts(row)
        assert ids[-1] == 258 and len(text) == 6 and sorted(set(text)) == list(text)
        kept.add(text)
        if truncation is TextTruncation.BLOCK:
            assert text in LONG
    assert len(kept) > 10
    if truncation is TextTruncation.RANDOM:
        assert any(text not in LONG for text in kept)


def test_truncation_is_even():
    count, length, room = 4000, 10, 4
    random = rng()
    chosen = [choose_tokens(TextTruncation.RANDOM, random, length, room) for _ in range(count)]
    hits = np.bincount(np.concatenate(chosen), minlength=length)
    # Every place stays with probability 4 / 10; five standard deviations.
    assert np.abs(hits - count * 0.4).max() < 5 * math.sqrt(count * 0.24)
    blocks = [choose_tokens(TextTruncation.BLOCK, random, length, room) for _ in range(count)]
    assert all((np.diff(block) == 1).all() for block in blocks)
    starts = np.bincount([block[0] for block in blocks], minlength=7)
    assert len(starts) == 7 and np.abs(starts - count / 7).max() < 5 * math.sqrt(count * 6 / 49)


def test_no_truncation_draws_nothing():
    random = rng()
    before = random.bit_generator.state
    assert choose_tokens(TextTruncation.NONE, random, 9, 3).tolist() == [0, 1, 2]
    assert random.bit_generator.state == before
    plain = take(2, tokenizer=lambda text: tokenize(BytesTokenizer(), [text], 8)[0])  # never given a choice
    ours = take(2)
    assert all((a[name] == b[name]).all() for a, b in zip(plain, ours, strict=True) for name in a)


def test_a_choice_fills_the_context_without_a_start():
    class NoStart(BytesTokenizer):
        @property
        def start_id(self):
            return None

        @start_id.setter
        def start_id(self, value):
            pass

    rows = tokenize(NoStart(), [LONG, "ab"], 5, lambda count, room: np.arange(count)[-room:])
    assert texts(rows[0]) == "wxyz" and rows[0, -1] == 258
    assert rows[1].tolist() == [98, 99, 258, 0, 0]
