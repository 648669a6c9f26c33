"""Captions to token ids: the one interface, and the tokenizers that a config can name.

Reading order: `Tokenizer` (the promise that the text tower relies on), `tokenize` (captions to an array),
`build_tokenizer` (a config's string to a tokenizer), then the kinds. Axes: n captions, l tokens.
"""

import dataclasses
import io
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from clipjax.data.bpe import END_TEXT, MERGES_FILE, START_TEXT, ClipBpe, read_clip_bpe, read_file

PAD_ID = 0

_SENTENCEPIECE_FILE = "sentencepiece.model"
_HUGGINGFACE_FILE = "tokenizer.json"
_FILES = {
    "bytes": (),
    "clip": (MERGES_FILE,),
    "sentencepiece": (_SENTENCEPIECE_FILE,),
    "huggingface": (_HUGGINGFACE_FILE,),
}
_SPECS = "bytes, clip:PATH, sentencepiece:PATH or huggingface:PATH"
_SPECIAL_PAIRS = ((START_TEXT, END_TEXT), ("<start_of_text>", "<end_of_text>"))


class Tokenizer(Protocol):
    """Text to ids. `end_id` is the largest id and `start_id` the one below it, because the text tower pools at the
    largest id of a row, as OpenAI's CLIP does. Rows are padded with id 0, which may also be an ordinary token.

    Instances are cheap to use from several threads, and pickle (for worker processes) as the bytes of `files`.
    """

    name: str
    vocab_size: int
    start_id: int
    end_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without start and end."""
        ...

    def files(self) -> dict[str, bytes]:
        """Everything that `tokenizer_from_files` needs to rebuild the tokenizer, by file name."""
        ...


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> np.ndarray:
    """Start, ids and end of every text, padded with 0; a text that is too long loses its tail but not its end.

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
    tokens = np.full((len(texts), context_length), PAD_ID, np.int32)
    tokens[:, 0] = tokenizer.start_id
    for row, text in zip(tokens, texts, strict=True):
        ids = tokenizer.encode(text)[: context_length - 2]
        row[1 : len(ids) + 1] = ids
        row[len(ids) + 1] = tokenizer.end_id
    return tokens


@dataclasses.dataclass(frozen=True)
class TextToTokens:
    """`text -> int32 [context_length]`, as the pipeline wants it; pickles to data workers."""

    tokenizer: Tokenizer
    context_length: int

    def __call__(self, text: str) -> np.ndarray:
        """One row of `tokenize`."""
        return tokenize(self.tokenizer, [text], self.context_length)[0]


def build_tokenizer(spec: str) -> Tokenizer:
    """Builds the tokenizer that a config names.

    Args:
      spec: `bytes`; `clip:PATH` with OpenAI's `bpe_simple_vocab_16e6.txt.gz` or a directory of `vocab.json` and
        `merges.txt`; `sentencepiece:PATH` with a `.model` file; `huggingface:PATH` with a `tokenizer.json`.

    Raises:
      ValueError: the kind is unknown, or its file is missing or corrupt.
    """
    name, separator, path = spec.partition(":")
    if name not in _FILES or (name == "bytes") == bool(separator) or (separator and not path):
        raise ValueError(f"data.tokenizer={spec!r} must be one of {_SPECS}.")
    try:
        match name:
            case "bytes":
                return BytesTokenizer()
            case "clip":
                return read_clip_bpe(pathlib.Path(path))
            case _:
                return tokenizer_from_files(name, {_FILES[name][0]: read_file(pathlib.Path(path))})
    except ValueError as error:
        raise ValueError(f"data.tokenizer={spec!r}: {error}") from error


def tokenizer_from_files(name: str, files: Mapping[str, bytes]) -> Tokenizer:
    """Rebuilds a tokenizer from its `name` and `files()`.

    Raises:
      ValueError: the name is unknown, or a file is missing or corrupt.
    """
    if name not in _FILES:
        raise ValueError(f"Tokenizer kind {name!r} must be one of {', '.join(_FILES)}.")
    missing = [file for file in _FILES[name] if file not in files]
    if missing:
        raise ValueError(f"Tokenizer {name!r} needs the file {missing[0]!r}, but has only {sorted(files)}.")
    match name:
        case "bytes":
            return BytesTokenizer()
        case "clip":
            return ClipBpe(files[MERGES_FILE])
        case "sentencepiece":
            return SentencePieceTokenizer(files[_SENTENCEPIECE_FILE])
        case _:
            return HuggingFaceTokenizer(files[_HUGGINGFACE_FILE])


def _without_surrogates(text: str) -> str:
    """Replaces lone surrogates, which JSON can smuggle into a caption and UTF-8 cannot carry, by "?"."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class BytesTokenizer:
    """UTF-8 bytes, case and all; needs no file. Ids: 0 padding, byte + 1, 257 start, 258 end."""

    name = "bytes"

    def __init__(self) -> None:
        self.vocab_size, self.start_id, self.end_id = 259, 257, 258

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without start and end."""
        return [byte + 1 for byte in text.encode("utf-8", "replace")]

    def files(self) -> dict[str, bytes]:
        """Nothing: the kind says it all."""
        return {}


class SentencePieceTokenizer:
    """A SentencePiece model whose n pieces keep their ids; start is n and end n + 1.

    Captions cannot produce special ids: SentencePiece never matches control pieces in text. In a model of
    `train_sentencepiece` id 0 is padding and id 1 the unknown piece; in most other models id 0 is the unknown piece,
    which is harmless as padding, since the causal text tower pools before it.

    Args:
      model: content of a `.model` file, which also holds its text normalisation.

    Raises:
      ValueError: the model is corrupt.

    Source: arXiv 1808.06226.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        if not model:
            raise ValueError("The SentencePiece model is empty.")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"The SentencePiece model is corrupt: {error}") from error
        self._model = model
        self.start_id = self._processor.vocab_size()
        self.end_id = self.start_id + 1
        self.vocab_size = self.start_id + 2

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[bytes]]:
        return SentencePieceTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without start and end."""
        return self._processor.encode(_without_surrogates(text))

    def files(self) -> dict[str, bytes]:
        """Everything needed to rebuild the tokenizer: the model."""
        return {_SENTENCEPIECE_FILE: self._model}


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` package, without its own special tokens, truncation and padding.

    If its two largest ids are CLIP's start and end, they stay; otherwise two ids are appended. Captions cannot
    produce them: special strings are read as ordinary text, and an id that comes out all the same is dropped.

    Args:
      content: bytes of a `tokenizer.json`.

    Raises:
      ValueError: the file is corrupt.
    """

    name = "huggingface"

    def __init__(self, content: bytes) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{_HUGGINGFACE_FILE} is not valid: {error}") from error
        self._content = content
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # meaning: as text
        size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        largest = (self._tokenizer.id_to_token(size - 2), self._tokenizer.id_to_token(size - 1)) if size > 1 else None
        self.vocab_size = size if largest in _SPECIAL_PAIRS else size + 2
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1

    def __reduce__(self) -> tuple[type["HuggingFaceTokenizer"], tuple[bytes]]:
        return HuggingFaceTokenizer, (self._content,)

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without start and end."""
        ids = self._tokenizer.encode(_without_surrogates(text), add_special_tokens=False).ids
        return [i for i in ids if i < self.start_id]

    def files(self) -> dict[str, bytes]:
        """Everything needed to rebuild the tokenizer: `tokenizer.json`."""
        return {_HUGGINGFACE_FILE: self._content}


def train_sentencepiece(captions: Iterable[str], vocab_size: int) -> bytes:
    """Learns a byte-pair SentencePiece model from captions, all held in memory; the same captions give the same bytes.

    Text is NFKC-normalised and case-folded (`nmt_nfkc_cf`), a rule that the model file carries with it.

    Args:
      captions: captions; whitespace is collapsed, empty ones are skipped.
      vocab_size: size of the finished tokenizer, with padding, unknown, start and end: what the text tower needs.

    Returns:
      Content of a `.model` file, for `SentencePieceTokenizer`.

    Raises:
      ValueError: the captions are empty, or too few or too many-lettered for `vocab_size`.

    Source: arXiv 1808.06226 (SentencePiece), arXiv 1508.07909 (byte pairs).
    """
    import sentencepiece

    lines = [line for caption in captions if (line := " ".join(_without_surrogates(caption).split()))]
    if not lines:
        raise ValueError("captions must contain text to learn a tokenizer from: all of them are empty.")
    if vocab_size < 5:
        raise ValueError(f"vocab_size={vocab_size} must be at least 5: padding, unknown, start, end and one piece.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size - 2,
            model_type="bpe",
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=PAD_ID,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            max_sentence_length=65_536,  # bytes; longer captions are skipped
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        largest = re.search(r"Vocabulary size too high .* <= (\d+)", str(error))
        smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if largest:
            rule = f"is too large for {len(lines)} captions: use at most {int(largest[1]) + 2}, or give more captions"
        elif smallest:
            rule = f"has no room for the characters of the captions: use at least {int(smallest[1]) + 2}"
        else:
            rule = f"cannot be learned from {len(lines)} captions: {error}"
        raise ValueError(f"vocab_size={vocab_size} {rule}.") from error
    return model.getvalue()
