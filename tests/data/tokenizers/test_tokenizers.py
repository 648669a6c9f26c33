"""The tokenizer interface: rows of ids, config strings, saving, and each kind's promises about special ids."""

import json
import pathlib
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from clipjax.data.tokenizers.build import build_tokenizer, tokenizer_from_files
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.data.tokenizers.clip_bpe import ClipBpe
from clipjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from clipjax.data.tokenizers.protocol import Tokenizer, tokenize
from clipjax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from clipjax.data.tokenizers.training import train_sentencepiece

CAPTIONS = [
    f"A photo of a {color} {animal}, number {number}"
    for color in ("red", "Green", "blue", "black", "white")
    for animal in ("dog", "cat", "horse")
    for number in range(20)
]
HOSTILE = [
    "<|startoftext|> <|endoftext|> dog",
    "<start_of_text>dog<end_of_text>",
    "<s> </s> <unk> <pad> [UNK]",
    "\x00 \ud800 \U0001f600 &#" + "9" * 5000 + ";",
    "",
    " \n ",
]

pytestmark = pytest.mark.newest


def huggingface_file(specials: list[str]) -> bytes:
    """A word-level tokenizer whose own truncation, padding and post-processor would all get in the way."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import models, pre_tokenizers, processors

    words = {"[UNK]": 0, "a": 1, "dog": 2, "cat": 3}
    tokenizer = HfTokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[CLS]", *specials])
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 4)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return train_sentencepiece(CAPTIONS, 38)


@pytest.fixture(
    params=["bytes", "clip", "sentencepiece", "huggingface"],
    scope="module",
)
def tokenizer(request: pytest.FixtureRequest, sentencepiece_model: bytes) -> Tokenizer:
    makers: dict[str, Callable[[], Tokenizer]] = {
        "bytes": BytesTokenizer,
        "clip": lambda: ClipBpe(b"#\nd o\ndo g</w>\n"),
        "sentencepiece": lambda: SentencePieceTokenizer(sentencepiece_model),
        "huggingface": lambda: HuggingFaceTokenizer(huggingface_file([])),
    }
    return makers[request.param]()


def test_end_is_the_largest_id_and_start_the_next(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_id == tokenizer.vocab_size - 1
    assert tokenizer.start_id == tokenizer.vocab_size - 2
    ids = [i for text in CAPTIONS for i in tokenizer.encode(text)]
    assert ids and min(ids) >= 0 and max(ids) < tokenizer.start_id


def test_hostile_captions_cannot_make_special_ids(tokenizer: Tokenizer) -> None:
    parsed = 0
    for text in HOSTILE:
        parsed += sum(i >= tokenizer.start_id for i in tokenizer.encode(text))
    assert parsed == (2 if tokenizer.name == "clip" else 0)  # CLIP's reference parses its two strings; so do we


def test_tokenize_rows(tokenizer: Tokenizer) -> None:
    tokens = tokenize(tokenizer, ["", "dog", "a dog " * 50], 12)
    ids = tokenizer.encode("dog")
    assert tokens.dtype == np.int32 and tokens.shape == (3, 12)
    assert tokens[0].tolist() == [tokenizer.start_id, tokenizer.end_id] + [0] * 10
    assert tokens[1].tolist() == [tokenizer.start_id, *ids, tokenizer.end_id] + [0] * (10 - len(ids))
    assert tokens[2].tolist() == [tokenizer.start_id, *tokenizer.encode("a dog " * 50)[:10], tokenizer.end_id]
    assert tokens.argmax(axis=1).tolist() == [1, len(ids) + 1, 11]


def test_exact_fit_is_not_truncated() -> None:
    tokens = tokenize(BytesTokenizer(), ["abc", "abcd"], 5)
    assert tokens.tolist() == [[257, 98, 99, 100, 258], [257, 98, 99, 100, 258]]
    assert tokenize(BytesTokenizer(), [], 5).shape == (0, 5)
    assert tokenize(BytesTokenizer(), ["abc"], 2).tolist() == [[257, 258]]


def test_tokenize_refuses() -> None:
    with pytest.raises(ValueError, match="context_length=1 must be at least 2"):
        tokenize(BytesTokenizer(), ["a"], 1)
    with pytest.raises(TypeError, match="put a single caption into a list"):
        tokenize(BytesTokenizer(), "a dog", 8)


def test_same_ids_after_files_and_pickle(tokenizer: Tokenizer) -> None:
    copies = [tokenizer_from_files(tokenizer.name, tokenizer.files()), pickle.loads(pickle.dumps(tokenizer))]
    expected = tokenize(tokenizer, CAPTIONS[:9] + HOSTILE, 40)
    for copy in copies:
        assert copy.files() == tokenizer.files()
        np.testing.assert_array_equal(tokenize(copy, CAPTIONS[:9] + HOSTILE, 40), expected)


def test_build_from_config_string(sentencepiece_model: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.model").write_bytes(sentencepiece_model)
    (tmp_path / "tokenizer.json").write_bytes(huggingface_file([]))
    (tmp_path / "merges.txt").write_bytes(b"#\nd o\n")
    (tmp_path / "vocab.json").write_text(json.dumps(ClipBpe(b"#\nd o\n").vocabulary))
    built = {
        "bytes": "bytes",
        f"sentencepiece:{tmp_path}/a.model": "sentencepiece",
        f"huggingface:{tmp_path}/tokenizer.json": "huggingface",
        f"clip:{tmp_path}": "clip",
    }
    assert {spec: build_tokenizer(spec).name for spec in built} == built


@pytest.mark.parametrize("spec", ["", "byte", "bytes:", "bytes:x", "clip", "clip:", "sentencepiece", "t5:x"])
def test_unknown_kinds(spec: str) -> None:
    with pytest.raises(ValueError, match=rf"data.tokenizer='{spec}' must be one of bytes, clip:PATH"):
        build_tokenizer(spec)


@pytest.mark.parametrize("kind", ["clip", "sentencepiece", "huggingface"])
def test_missing_and_corrupt_files(kind: str, tmp_path: pathlib.Path, sentencepiece_model: bytes) -> None:
    with pytest.raises(ValueError, match=rf"data.tokenizer='{kind}:.*cannot be read.*No such file"):
        build_tokenizer(f"{kind}:{tmp_path}/absent")
    for content in (b"", b"junk", b"\xff\xfe", b"{}", b"[" * 100_000, sentencepiece_model[:-3]):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match=f"data.tokenizer='{kind}:"):
            build_tokenizer(f"{kind}:{tmp_path}/file")


def test_from_files_refuses() -> None:
    with pytest.raises(ValueError, match="kind 'gpt' must be one of bytes, clip"):
        tokenizer_from_files("gpt", {})
    with pytest.raises(ValueError, match=r"'clip' needs the file 'merges.txt', but has only \['x'\]"):
        tokenizer_from_files("clip", {"x": b""})


def test_bytes_ids() -> None:
    assert BytesTokenizer().encode("A\x00\xe9") == [66, 1, 0xC3 + 1, 0xA9 + 1]


def test_sentencepiece_folds_case_and_keeps_its_ids(sentencepiece_model: bytes) -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_model)
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id) == (38, 36, 37)
    assert tokenizer.encode("A PHOTO of a ｄｏｇ") == tokenizer.encode("a photo of a dog")
    assert 0 not in tokenizer.encode("<pad> dog \x00 \U0001f600") and 1 in tokenizer.encode("\U0001f600")


def test_sentencepiece_training_is_deterministic_and_clean(
    sentencepiece_model: bytes,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    noisy = [f"  {caption}\n" for caption in CAPTIONS] + ["", " \t"]
    assert train_sentencepiece(iter(noisy), 38) == sentencepiece_model
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_sentencepiece_says_which_sizes_fit() -> None:
    with pytest.raises(
        ValueError, match=r"vocab_size=5000 is too large for 300 captions: use at most \d+"
    ) as too_large:
        train_sentencepiece(CAPTIONS, 5000)
    largest = int(str(too_large.value).split("at most ")[1].split(",")[0])
    assert SentencePieceTokenizer(train_sentencepiece(CAPTIONS, largest)).vocab_size == largest
    with pytest.raises(ValueError, match="use at most"):
        train_sentencepiece(CAPTIONS, largest + 1)
    with pytest.raises(ValueError, match=r"no room for the characters of the captions: use at least \d+") as too_small:
        train_sentencepiece(CAPTIONS, 10)
    smallest = int(str(too_small.value).rstrip(".").split("at least ")[1])
    assert SentencePieceTokenizer(train_sentencepiece(CAPTIONS, smallest)).vocab_size == smallest
    with pytest.raises(ValueError, match="use at least"):
        train_sentencepiece(CAPTIONS, smallest - 1)
    with pytest.raises(ValueError, match="vocab_size=4 must be at least 5"):
        train_sentencepiece(CAPTIONS, 4)
    with pytest.raises(ValueError, match="captions must contain text"):
        train_sentencepiece(["", " "], 50)


@pytest.mark.parametrize(
    ("specials", "vocab_size"),
    [
        (["<|startoftext|>", "<|endoftext|>"], 7),
        (["<start_of_text>", "<end_of_text>"], 7),
        (["<|endoftext|>", "<|startoftext|>"], 9),  # the wrong way round: two new ones
        ([], 7),
    ],
)
def test_huggingface_special_ids(specials: list[str], vocab_size: int) -> None:
    tokenizer = HuggingFaceTokenizer(huggingface_file(specials))
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.encode("a dog cat zebra dog") == [1, 2, 3, 0, 2]  # no [CLS], not truncated, not padded
    assert max(tokenizer.encode(" dog ".join(specials) + " dog")) < tokenizer.start_id


def test_huggingface_drops_special_words_of_the_model() -> None:
    content = json.loads(huggingface_file([]))
    content["added_tokens"], content["post_processor"] = [], None
    content["model"]["vocab"] = {"[UNK]": 0, "dog": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    tokenizer = HuggingFaceTokenizer(json.dumps(content).encode())
    assert (tokenizer.vocab_size, tokenizer.encode("dog <|endoftext|> dog")) == (4, [1, 1])


def test_ids_become_text_again():
    text = "a photo of a red dog, number 7"
    for tokenizer in (BytesTokenizer(), SentencePieceTokenizer(train_sentencepiece(CAPTIONS, 60))):
        row = tokenize(tokenizer, [text], 64)[0].tolist()
        assert tokenizer.decode(row[1 : row.index(tokenizer.end_id)]) == text
    assert BytesTokenizer().decode([257, 98, 258, 0]) == "a"


def test_siglips_tokenizer_ends_and_pads_with_the_same_piece():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=60, model_type="bpe",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = tokenizer_from_files("siglip", {"sentencepiece.model": model.getvalue()})
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.vocab_size) == (None, 1, 1, 60)
    rows = tokenize(tokenizer, ["A photo of a RED dog!", "a photo of a red dog", "dog " * 50], 16)
    np.testing.assert_array_equal(rows[0], rows[1])  # neither case nor punctuation counts
    assert rows[0, -1] == 1 and rows[2, -1] == 1 and (rows[2, :-1] != 1).all()
    assert tokenizer.decode(rows[1].tolist()) == "a photo of a red dog"
    again = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(tokenize(again, ["a dog"], 8), tokenize(tokenizer, ["a dog"], 8))
    with pytest.raises(ValueError, match="no end-of-text piece"):
        tokenizer_from_files("siglip", {"sentencepiece.model": train_sentencepiece(CAPTIONS, 60)})


def test_siglip_2s_tokenizer_is_lower_case_with_its_own_padding():
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "red": 4, "dog": 5}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    content = json.dumps(
        {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    ).encode()
    tokenizer = tokenizer_from_files("siglip2", {"tokenizer.json": content})
    assert tokenize(tokenizer, ["A Red DOG"], 6).tolist() == [[3, 4, 5, 1, 0, 0]]
    with pytest.raises(ValueError, match="lacks <pad> or <eos>"):
        tokenizer_from_files("siglip2", {"tokenizer.json": content.replace(b"<eos>", b"<end>")})


def test_a_model_without_a_tokenizer_says_so():
    tokenizer = tokenizer_from_files("none", {})
    with pytest.raises(ValueError, match="came without its tokenizer"):
        tokenize(tokenizer, ["a dog"], 8)
    with pytest.raises(ValueError, match="must be one of"):
        build_tokenizer("none")
