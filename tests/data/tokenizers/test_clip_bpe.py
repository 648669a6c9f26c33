"""CLIP's BPE: golden ids of the reference, the merge order, the cleaning, and files that are wrong."""

import gzip
import itertools
import json
import pathlib
import pickle
import random
import time
from concurrent import futures

import numpy as np
import pytest

from clipjax.data.scenes import language, world
from clipjax.data.tokenizers import clip_bpe
from clipjax.data.tokenizers.clip_bpe import ClipBpe, read_clip_bpe
from tests.conftest import SHARED

TINY = b"#version: 0.2\nd o\ndo g</w>\na n\nan d</w>\n"
DOG, AND = 512 + 1, 512 + 3
START, END = 516, 517
SCENES = [np.random.default_rng(seed) for seed in range(40)]

# Ids from OpenAI's SimpleTokenizer, run on the same vocabulary file.
GOLDEN = [
    ("", []),
    ("a photo of a dog.", [320, 1125, 539, 320, 1929, 269]),
    ("A  Photo\tOF\n a DOG.", [320, 1125, 539, 320, 1929, 269]),
    ("woman farmer: medium-dark skin tone", [2308, 10474, 281, 8675, 268, 3144, 3575, 8408]),
    (
        "it's 2024, they'll say &amp;lt;hi&amp;gt;",
        [585, 568, 273, 271, 273, 275, 267, 889, 1342, 1451, 283, 1883, 285],
    ),
    ("caf\xc3\xa9 na\xefve", [15304, 1097, 35689, 563]),  # UTF-8 read as Latin-1: mended
    ("\U0001f469\U0001f3fd\u200d\U0001f33e", [18800, 8514, 4244, 39796]),
    ("\u3072\u307e\u308f\u308a", [4813, 110, 4813, 122, 3909, 237, 3909, 488]),
    ("x <|endoftext|> y <|startoftext|>", [343, 49407, 344, 49406]),
    ("x <start_of_text> y", [343, 283, 1572, 318, 539, 318, 4160, 285, 344]),
    (
        "pneumonoultramicroscopicsilicovolcanoconiosis",
        [28714, 749, 20253, 9800, 535, 532, 1065, 901, 1556, 13697, 9916, 78, 39031, 13903],
    ),
    (
        "<|\u017ftartoftext|>",
        [27, 91, 129, 123, 2002, 6659, 18169, 91, 285],
    ),  # matches, case-folded, but is not special
    ("\ufb01ne \ud800 print", [3797, 39802, 3557]),  # a ligature and a lone surrogate
]


@pytest.fixture(scope="module")
def vocabulary_path() -> pathlib.Path:
    path = SHARED / "data" / "tokenizers" / "bpe_simple_vocab_16e6.txt.gz"
    if not path.exists():
        pytest.skip("shared/ is absent: no CLIP vocabulary")
    return path


@pytest.fixture(scope="module")
def clip(vocabulary_path: pathlib.Path) -> ClipBpe:
    return read_clip_bpe(vocabulary_path)


def naive_merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The definition: join every place, left to right, of the best pair, until there is none."""
    while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        joined: list[str] = []
        while symbols:
            count = 2 if tuple(symbols[:2]) == best else 1
            joined.append("".join(symbols[:count]))
            symbols = symbols[count:]
        symbols = joined
    return symbols


def test_ids_and_sizes_of_the_reference(clip: ClipBpe) -> None:
    assert (clip.name, clip.vocab_size, clip.start_id, clip.end_id) == ("clip", 49408, 49406, 49407)
    for _ in range(2):  # cold, then from the cache
        for text, ids in GOLDEN:
            assert clip.encode(text) == ids, ascii(text)


def test_rebuilt_from_its_files_and_from_a_pickle(clip: ClipBpe) -> None:
    assert list(clip.files()) == ["merges.txt"]
    for copy in (ClipBpe(clip.files()["merges.txt"]), pickle.loads(pickle.dumps(clip))):
        assert copy.vocabulary == clip.vocabulary
        assert [copy.encode(text) for text, _ in GOLDEN] == [ids for _, ids in GOLDEN]


def test_directory_with_vocab_json(clip: ClipBpe, tmp_path: pathlib.Path) -> None:
    (tmp_path / "merges.txt").write_bytes(clip.files()["merges.txt"] + b"\n")
    (tmp_path / "vocab.json").write_text(json.dumps(clip.vocabulary))
    assert read_clip_bpe(tmp_path).vocabulary == clip.vocabulary


def test_tiny_vocabulary() -> None:
    tiny = ClipBpe(TINY)
    assert (tiny.vocab_size, tiny.start_id, tiny.end_id) == (518, START, END)
    assert tiny.encode("Dog AND dog") == [DOG, AND, DOG]
    assert tiny.encode("a!") == [256 + ord("a") - 33, 256]  # one-byte words are word-final bytes
    assert tiny.encode("do") == [ord("d") - 33, 256 + ord("o") - 33]  # "d o" is not "d o</w>"
    assert tiny.encode("dogdog") == [512, ord("g") - 33, DOG]


def test_merges_as_defined() -> None:
    chooser = random.Random(0)
    for _ in range(60):
        tokens, lines = ["a", "b", "c", "a</w>", "b</w>", "c</w>"], ["#"]
        while len(lines) < 40:
            left, right = chooser.choice(tokens), chooser.choice(tokens)
            if "<" not in left and left + right not in tokens:
                tokens.append(left + right)
                lines.append(f"{left} {right}")
        tokenizer = ClipBpe("\n".join(lines).encode())
        ranks = ranks_of("\n".join(lines).encode())
        names = {i: token for token, i in tokenizer.vocabulary.items()}
        for _ in range(40):
            word = "".join(chooser.choices("abc", k=chooser.randint(1, 40)))
            expected = naive_merge([*word[:-1], word[-1] + "</w>"], ranks)
            assert [names[i] for i in tokenizer.encode(word)] == expected, (lines, word)


def ranks_of(merges: bytes) -> dict[tuple[str, str], int]:
    lines = merges.decode().split("\n")[1:]
    return {(line.split()[0], line.split()[1]): rank for rank, line in enumerate(lines)}


def reference_ids(tokenizer: ClipBpe, ranks: dict[tuple[str, str], int], text: str) -> list[int]:
    """Merge as the definition says, slowly, with no library: what OpenAI's tokenizer does after the same cleaning."""
    ids = []
    for word in clip_bpe._WORD.findall(clip_bpe._clean(text)):
        symbols = [clip_bpe._BYTE_SYMBOLS[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        special = word in (clip_bpe.START_TEXT, clip_bpe.END_TEXT)
        ids += [tokenizer.vocabulary[symbol] for symbol in ([word] if special else naive_merge(symbols, ranks))]
    return ids


def random_text(chooser: random.Random) -> str:
    """Words of one script each, and of all scripts mixed: every byte of UTF-8 that a caption can hold."""
    blocks = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x3040, 0x3100), (0x4E00, 0x9FFF)]
    blocks += [(0x1F300, 0x1FA00), (0x2000, 0x2C00), (0xE000, 0xE100), (0x10000, 0x10FFFF)]
    words = []
    for _ in range(chooser.randint(1, 6)):
        chosen = chooser.choices(blocks, k=1 if chooser.random() < 0.7 else 3)
        words.append("".join(chr(chooser.randrange(*chooser.choice(chosen))) for _ in range(chooser.randint(1, 12))))
    return " ".join(words)


def test_random_text_and_captions_have_the_ids_of_the_definition(clip: ClipBpe) -> None:
    chooser = random.Random(1)
    texts = [random_text(chooser) for _ in range(60)]
    texts += [caption for rng in SCENES for caption in language.write_captions(world.sample_scene(rng, "train"), rng)]
    texts += ["".join(chooser.choices("abcdefghijklmnopqrstuvwxyz", k=200)), "e" * 300, "\U0010ffff\x00\x7f\x80 a"]
    ranks = ranks_of(clip.files()["merges.txt"])
    for text in texts:
        assert clip.encode(text) == reference_ids(clip, ranks, text), ascii(text)
    assert {i for text in texts for i in clip.encode(text)} & {*range(256)}  # bytes that no merge joins are there too


def test_threads_get_the_ids_of_one(clip: ClipBpe) -> None:
    chooser = random.Random(2)
    texts = [random_text(chooser) for _ in range(300)]
    cold = pickle.loads(pickle.dumps(clip))
    with futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(cold.encode, texts * 2))
    assert found == [clip.encode(text) for text in texts] * 2


@pytest.mark.parametrize(
    "text",
    ["don't go", "a.b,c", "they'LL", "!!'s", "''s's", "x<|endoftext|>y", "12ab34", "$5.00 (50%)", "  two  spaces "],
)
def test_ascii_shortcut_and_chunks_change_nothing(text: str) -> None:
    tiny = ClipBpe(TINY)
    words = clip_bpe._WORD.findall(text.lower())
    expected = [i for word in words for i in tiny._encode_word(word)]
    assert tiny.encode(text) == expected
    assert tiny.encode(text + "\n") == expected  # a line feed takes the thorough path


def test_cleaning() -> None:
    assert clip_bpe._clean("A  &amp;amp; B") == "a & b"
    assert clip_bpe._clean("\u2028 Caf\xc3\xa9\xa0\t!") == "caf\xe9 !"
    assert clip_bpe._clean("AB &c") == "ab &c"
    assert clip_bpe._clean("< &amp;amp;") == "< &"  # ftfy leaves entities alone beside "<", so twice is html.unescape's


def test_numbers_that_python_refuses_to_parse() -> None:
    assert clip_bpe._clean("a &#" + "9" * 5000 + "; &amp;#65;") == "a \ufffd a"


def test_long_words_of_hostile_captions_are_quick() -> None:
    tiny = ClipBpe(b"#\na a\naa aa\naaaa aaaa\n")
    assert len(tiny.encode("a" * 65_536)) == 65_536 // 8 + 3  # ... aaaa aa a a</w>
    assert not tiny._cache


def test_a_word_of_200_000_letters_takes_a_moment(clip: ClipBpe) -> None:
    word = "".join(random.Random(3).choices("etaoinshrdlu", k=200_000))
    start = time.process_time()
    ids = clip.encode(word)
    assert time.process_time() - start < 3  # about .3; a scan of the word for every merge takes hours
    assert clip.decode(ids) == word


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_bpe, "_CACHE_ENTRIES", 10)
    tiny = ClipBpe(TINY)
    ids = [tiny.encode(f"dog {number}, and {number * 7}!") for number in range(100)]
    assert len(tiny._cache) <= 10
    assert ids == [ClipBpe(TINY).encode(f"dog {number}, and {number * 7}!") for number in range(100)]


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        (b"#\nd o\ndog g\n", "line 3: 'dog g' must be two known tokens"),
        (b"#\nd o\nd o\n", "line 3"),
        (b"#\nd o x\n", "line 2"),
        (b"#\nd o\n\nd a\n", "line 3: ''"),
        (b"#\n\xff\n", "not UTF-8"),
    ],
)
def test_bad_merges(merges: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipBpe(merges)


def test_bad_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vocab.gz"
    with pytest.raises(ValueError, match=r"vocab\.gz' cannot be read: .*No such file"):
        read_clip_bpe(path)
    path.write_bytes(TINY)
    with pytest.raises(ValueError, match=r"cannot be read: Not a gzipped file.*must be bpe_simple_vocab_16e6"):
        read_clip_bpe(path)
    path.write_bytes(gzip.compress(TINY * 100)[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        read_clip_bpe(path)
    path.write_bytes(gzip.compress(TINY))
    with pytest.raises(ValueError, match="has 5 merges, but CLIP needs 48894"):
        read_clip_bpe(path)
    monkeypatch.setattr(clip_bpe, "_MAX_FILE_BYTES", 1000)
    path.write_bytes(gzip.compress(bytes(100_000)))
    with pytest.raises(ValueError, match="unpacks to more than 1000 bytes"):
        read_clip_bpe(path)
    with pytest.raises(ValueError, match="is larger than 10 bytes"):
        clip_bpe.read_file(path, max_bytes=10)


def test_bad_directories(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"merges\.txt' cannot be read"):
        read_clip_bpe(tmp_path)
    (tmp_path / "merges.txt").write_bytes(TINY)
    with pytest.raises(ValueError, match=r"vocab\.json' cannot be read"):
        read_clip_bpe(tmp_path)
    vocabulary = ClipBpe(TINY).vocabulary
    for content, message in [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", r"token '!' has id None, but the merges make it 0 \(518 such tokens"),
        (json.dumps(vocabulary | {"do": 7}), r"token 'do' has id 7, but the merges make it 512 \(1 such tokens"),
        (json.dumps(vocabulary | {"zebra": 518}), "token 'zebra' has id 518, but the merges make it None"),
    ]:
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_clip_bpe(tmp_path)
