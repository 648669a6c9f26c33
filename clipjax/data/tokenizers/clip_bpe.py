"""CLIP's lower-cased byte-level BPE: the ids of OpenAI's reference tokenizer, several times as fast.

Reading order: `read_clip_bpe` (files to tokenizer), `ClipBpe.encode` (clean, split, look up), `_clean`. Cleaning and
splitting are ours, as the reference's; the bytes of a word are merged by `tokenizers`, in Rust.
"""

import gzip
import html
import io
import json
import pathlib
import zlib
from collections.abc import Sequence

import ftfy
import regex
from tokenizers.models import BPE

from clipjax.runtime import objects
from clipjax.runtime.storage import is_address, read_small

START_TEXT = "<|startoftext|>"
END_TEXT = "<|endoftext|>"
MERGES_FILE = "merges.txt"

_REFERENCE_MERGES = 49152 - 256 - 2  # the reference uses this many of the 262,144 merges in OpenAI's file
_HEADER = "#version: 0.2"
_MAX_FILE_BYTES = 64 * 2**20
_WORD_END = "</w>"
_WORD = regex.compile(
    regex.escape(START_TEXT)
    + "|"
    + regex.escape(END_TEXT)
    + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_SPACE = regex.compile(r"\s+")
_HUGE_REFERENCE = regex.compile("&#[0-9]{640,};?")
_CACHE_ENTRIES = 2**17  # about 30 MB of ordinary English
_CACHE_KEY_LENGTH = 32  # characters


def read_file(path: pathlib.Path | str, *, max_bytes: int = _MAX_FILE_BYTES) -> bytes:
    """Read a small file, or object of a store.

    Raises:
        ValueError: it cannot be read or is larger than `max_bytes`.
    """
    try:
        return read_small(path, max_bytes)
    except OSError as error:
        raise ValueError(f"Tokenizer file {str(path)!r} cannot be read: {error}. Check the path.") from error
    except ValueError as error:
        raise ValueError(f"Tokenizer file {error}: not a tokenizer file.") from error


def read_clip_bpe(path: pathlib.Path | str) -> "ClipBpe":
    """Read OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or a directory with `vocab.json` and `merges.txt`.

    Of an address, one that ends with `.gz` is the file, any other a directory.

    Raises:
        ValueError: a file is missing, corrupt or too large, or the two files of a directory contradict each other.
    """
    path = str(path)
    if not path.endswith(".gz") if is_address(path) else pathlib.Path(path).is_dir():
        tokenizer = ClipBpe(read_file(objects.join(path, MERGES_FILE)))
        _check_vocabulary(tokenizer, objects.join(path, "vocab.json"))
        return tokenizer
    try:
        with gzip.open(io.BytesIO(read_small(path, _MAX_FILE_BYTES))) as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(
            f"Tokenizer file {str(path)!r} cannot be read: {error}. "
            "It must be bpe_simple_vocab_16e6.txt.gz, or a directory with vocab.json and merges.txt."
        ) from error
    if len(text) > _MAX_FILE_BYTES:
        raise ValueError(f"Tokenizer file {str(path)!r} unpacks to more than {_MAX_FILE_BYTES} bytes.")
    merges = text.split(b"\n")[1 : _REFERENCE_MERGES + 1]
    if len(merges) < _REFERENCE_MERGES:
        raise ValueError(f"Tokenizer file {str(path)!r} has {len(merges)} merges, but CLIP needs {_REFERENCE_MERGES}.")
    return ClipBpe(b"\n".join([_HEADER.encode(), *merges]))


def _check_vocabulary(tokenizer: "ClipBpe", path: str) -> None:
    try:
        vocabulary = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Tokenizer file {str(path)!r} is not valid JSON: {error}") from error
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    expected = tokenizer.vocabulary
    if vocabulary == expected:
        return
    wrong = sorted((token for token in expected if vocabulary.get(token) != expected[token]), key=expected.__getitem__)
    wrong += sorted(vocabulary.keys() - expected.keys())
    raise ValueError(
        f"{str(path)!r} contradicts {MERGES_FILE}: token {wrong[0]!r} has id {vocabulary.get(wrong[0])}, but the "
        f"merges make it {expected.get(wrong[0])} ({len(wrong)} such tokens). Take both files from one tokenizer."
    )


def _byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte, indexed by byte: GPT-2's table."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_BYTE_SYMBOLS = _byte_symbols()
_SYMBOL_BYTES = {symbol: byte for byte, symbol in enumerate(_BYTE_SYMBOLS)}


class ClipBpe:
    """CLIP's tokenizer, from the merges alone: 256 bytes, 256 word-final bytes, one token per merge, start, end.

    As in the reference, the strings `<|startoftext|>` and `<|endoftext|>` inside a caption become the special ids, so
    a caption can end itself early (the text tower pools at the first end). It cannot do anything else.

    Args:
        merges: content of `merges.txt`: a header line, then one merge `left right` per line, in order of rank.

    Raises:
        ValueError: a merge is malformed or joins tokens that do not exist.

    Source: arXiv 2103.00020, section 2.4; the ids are those of `SimpleTokenizer` in OpenAI's CLIP.
    """

    name = "clip"

    def __init__(self, merges: bytes) -> None:
        self._merges = merges
        self.vocabulary, pairs = _parse_merges(merges)
        self.vocab_size = 512 + len(pairs) + 2
        self.start_id = self.vocab_size - 2
        self.end_id = self.vocab_size - 1
        self.pad_id, self.ends_highest = 0, True
        self._tokens = {i: token for token, i in self.vocabulary.items()}
        # It caches nothing: the cache here is of whole words before they become symbols, and bounded.
        self._bpe = BPE(self.vocabulary, pairs, cache_capacity=0, end_of_word_suffix=_WORD_END)
        self._cache: dict[str, tuple[int, ...]] = {}

    def __reduce__(self) -> tuple[type["ClipBpe"], tuple[bytes]]:
        return ClipBpe, (self._merges,)

    def files(self) -> dict[str, bytes]:
        """Return everything needed to rebuild the tokenizer: `merges.txt`."""
        return {MERGES_FILE: self._merges}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without start and end."""
        tokens = [token for i in ids if i < self.start_id and (token := self._tokens.get(int(i))) is not None]
        content = bytes(_SYMBOL_BYTES[symbol] for symbol in "".join(tokens).replace(_WORD_END, "\u0120"))
        return content.decode("utf-8", "replace").strip()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption, without start and end."""
        cached = self._cache.get
        ids: list[int] = []
        for chunk in _clean(text).split(" "):
            ids += cached(chunk) or self._encode_chunk(chunk)
        return ids

    def _encode_chunk(self, chunk: str) -> tuple[int, ...]:
        """Return the ids of a run of characters without whitespace, which never shares a word with its neighbours."""
        words = _WORD.findall(chunk)
        if words == [chunk]:
            return self._remember(chunk, self._encode_word(chunk))
        ids: list[int] = []
        for word in words:
            ids += self._cache.get(word) or self._remember(word, self._encode_word(word))
        return self._remember(chunk, tuple(ids))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Return the ids of one word: its bytes as symbols, joined by the merges, the lowest-ranked pair first.

        The time is O(n log n) in the length of the word, so that one long "word" of a hostile caption stays cheap. The
        reference scans the whole word for every merge.
        """
        if word in (START_TEXT, END_TEXT):
            return (self.vocabulary[word],)
        symbols = "".join(_BYTE_SYMBOLS[byte] for byte in word.encode())
        return tuple(token.id for token in self._bpe.tokenize(symbols))

    def _remember(self, chunk: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        if len(chunk) <= _CACHE_KEY_LENGTH:
            if len(self._cache) >= _CACHE_ENTRIES:
                self._cache.clear()
            self._cache[chunk] = ids
        return ids


def _parse_merges(content: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary (token to id), and the pairs to merge in order of rank."""
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{MERGES_FILE} is not UTF-8: {error}") from error
    symbols = sorted(_BYTE_SYMBOLS)  # the bytes that stand for themselves have the first ids
    vocabulary = {token: i for i, token in enumerate(symbols + [symbol + _WORD_END for symbol in symbols])}
    pairs: list[tuple[str, str]] = []
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines[1:], start=2):
        left, _, right = line.strip().partition(" ")
        joined = left + right
        if left not in vocabulary or right not in vocabulary or joined in vocabulary:
            raise ValueError(
                f"{MERGES_FILE}, line {number}: {line[:80]!r} must be two known tokens that make a new one. "
                "The file is damaged or belongs to another kind of tokenizer."
            )
        pairs.append((left, right))
        vocabulary[joined] = len(vocabulary)
    vocabulary[START_TEXT] = len(vocabulary)
    vocabulary[END_TEXT] = len(vocabulary)
    return vocabulary, pairs


def _clean(text: str) -> str:
    """Clean as the reference does: repair mojibake, resolve HTML entities (twice), collapse whitespace, lower-case."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.lower()  # nothing to repair or resolve, and runs of spaces are split away later
    text = _unescape(_unescape(ftfy.fix_text(text))).strip()
    return _SPACE.sub(" ", text).strip().lower()


def _unescape(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # Python refuses to parse thousands of digits; no such character exists anyway
        return html.unescape(_HUGE_REFERENCE.sub("\ufffd", text))
