"""Tokenizers on the way out and back: the same ids, by the `tokenizers` package that peers use."""

import io
import json
import pathlib
import random

import numpy as np
import pytest

from clipjax.convert import tokenizer_export
from clipjax.convert.tokenizers import find, open_clip_fields, write
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.data.tokenizers.protocol import NoTokenizer, Tokenizer, tokenize, without_surrogates
from clipjax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from clipjax.data.tokenizers.training import train_sentencepiece

LENGTH = 24
WORDS = ("a", "photo", "of", "the", "red", "Dog's", "café", "naïve", "ÉCOLE", "3,141", "½", "東京", "😀", "ﬁ", "\u200d")
EDGES = ("", " ", "  a  b ", "▁", "▁a", " ▁a", "\ta\nb\r", "a\u00a0b", "\ud800", "\x00", "l'été", "a" * 300)


def texts(count: int = 3_000) -> list[str]:
    rng = random.Random(0)
    odd = [chr(rng.randrange(32, 0x2FFFF)) for _ in range(500)]
    words = [*WORDS, *(char for char in odd if not 0xD800 <= ord(char) < 0xE000)]
    drawn = [" ".join(rng.choice(words if rng.random() < 0.2 else WORDS) for _ in range(12)) for _ in range(count)]
    return [*EDGES, *drawn]


def unigrams(*, byte_fallback: bool) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()[len(EDGES) :]),
        model_writer=model,
        vocab_size=800,
        model_type="unigram",
        byte_fallback=byte_fallback,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


MAKE = {
    "bytes": BytesTokenizer,
    "pairs": lambda: SentencePieceTokenizer(train_sentencepiece([*WORDS, "a photo of the red dog"] * 3, 90)),
    "unigrams": lambda: SentencePieceTokenizer(unigrams(byte_fallback=False)),
    "unigrams and bytes": lambda: SentencePieceTokenizer(unigrams(byte_fallback=True)),
}


@pytest.mark.parametrize("kind", MAKE)
def test_ids_stay_the_same(kind: str, tmp_path: pathlib.Path):
    import tokenizers

    ours: Tokenizer = MAKE[kind]()
    for name, content in write(ours, LENGTH).items():
        (tmp_path / name).write_bytes(content)
    assert open_clip_fields(ours) == {"hf_tokenizer_name": "local"}
    again = find(tmp_path)
    assert (again.name, again.vocab_size, again.start_id, again.end_id) == (
        "huggingface",
        ours.vocab_size,
        ours.start_id,
        ours.end_id,
    )
    np.testing.assert_array_equal(tokenize(again, texts(), LENGTH), tokenize(ours, texts(), LENGTH))
    # As a peer opens it: start and end around every text, cut and padded.
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert peer.token_to_id(config["pad_token"]) == ours.pad_id == 0
    peer.enable_truncation(config["model_max_length"])
    peer.enable_padding(length=LENGTH, pad_id=0, pad_token=config["pad_token"])
    rows = [row.ids for row in peer.encode_batch([without_surrogates(text) for text in texts()])]
    np.testing.assert_array_equal(rows, tokenize(ours, texts(), LENGTH))
    words = "a photo of the red dog"
    assert peer.decode(ours.encode(words)) == ours.decode(ours.encode(words)) == words


def test_an_ordinary_first_word_is_not_cut_out_of_texts(tmp_path: pathlib.Path):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    words = ["!", "a", "b", "!!"]
    plain = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("!", "!")]))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "plain.json"))
    ours = build_tokenizer(f"huggingface:{tmp_path / 'plain.json'}")
    files = write(ours, LENGTH)
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == "<|endoftext|>"
    peer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert peer.encode("a!! b!").ids == [ours.start_id, 1, 3, 2, 0, ours.end_id]


def test_a_model_of_words_is_refused():
    import sentencepiece

    model = io.BytesIO()
    options = {"vocab_size": 8, "model_type": "word", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(WORDS * 3), model_writer=model, **options)
    with pytest.raises(ValueError, match=r"a tokenizer\.json cannot hold"):
        tokenizer_export.export_sentencepiece(model.getvalue())


def test_clips_own_vocabulary_is_found_again(shared: pathlib.Path, tmp_path: pathlib.Path):
    [vocabulary] = (shared / "data" / "tokenizers").glob("bpe_simple_vocab_16e6.txt.gz")
    ours = build_tokenizer(f"clip:{vocabulary}")
    for name, content in write(ours, 77).items():
        (tmp_path / name).write_bytes(content)
    assert open_clip_fields(ours) == open_clip_fields(NoTokenizer()) == {}
    # As padding `!` would be cut out of every text; nothing reads behind the end of one.
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"
    np.testing.assert_array_equal(tokenize(find(tmp_path), texts(300), 77), tokenize(ours, texts(300), 77))


def test_nothing_is_written_for_no_tokenizer(tmp_path: pathlib.Path):
    assert write(NoTokenizer(), LENGTH) == {} and isinstance(find(tmp_path), NoTokenizer)
