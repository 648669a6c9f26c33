"""Captions to token ids: the one interface, and the tokenizers that a config can name.

Reading order: `Tokenizer` (the promise that the text tower relies on), `tokenize` (captions to an array),
`build_tokenizer` (a config's string to a tokenizer), then the kinds. Axes: n captions, l tokens.
"""

import dataclasses
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

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
    "siglip": (_SENTENCEPIECE_FILE,),
    "siglip2": (_HUGGINGFACE_FILE,),
    "none": (),
}
_SPECS = "bytes, clip:PATH, sentencepiece:PATH, huggingface:PATH, siglip:PATH or siglip2:PATH"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPECIAL_PAIRS = ((START_TEXT, END_TEXT), ("<start_of_text>", "<end_of_text>"))


class Tokenizer(Protocol):
    """Text to ids, each text with an end, and a start unless `start_id` is None; rows are padded with `pad_id`.

    Instances are cheap to use from several threads, and pickle (for worker processes) as the bytes of `files`.

    Attributes:
        ends_highest: whether `end_id` is the largest id, and `start_id` the one below it. A text tower that pools at
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
        """Ids of a caption, without start and end."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; start and end are left out."""
        ...

    def files(self) -> dict[str, bytes]:
        """Everything that `tokenizer_from_files` needs to rebuild the tokenizer, by file name."""
        ...


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> np.ndarray:
    """Start, ids and end of every text, padded; a text that is too long loses its tail but not its end.

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
        ids = [*start, *tokenizer.encode(text)][: context_length - 1]
        row[: len(ids) + 1] = [*ids, tokenizer.end_id]
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
        `merges.txt`; `sentencepiece:PATH` or `siglip:PATH` with a `.model` file; `huggingface:PATH` or `siglip2:PATH`
        with a `tokenizer.json`.

    Raises:
      ValueError: the kind is unknown, or its file is missing or corrupt.
    """
    name, separator, path = spec.partition(":")
    if name not in _FILES or name == "none" or (name == "bytes") == bool(separator) or (separator and not path):
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
        case "siglip":
            return SiglipTokenizer(files[_SENTENCEPIECE_FILE])
        case "siglip2":
            return Siglip2Tokenizer(files[_HUGGINGFACE_FILE])
        case "none":
            return NoTokenizer()
        case _:
            return HuggingFaceTokenizer(files[_HUGGINGFACE_FILE])


def without_surrogates(text: str) -> str:
    """Replaces lone surrogates, which JSON can smuggle into a caption and UTF-8 cannot carry, by "?"."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _read_sentencepiece(model: bytes) -> Any:
    import sentencepiece

    if not model:
        raise ValueError("The SentencePiece model is empty.")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"The SentencePiece model is corrupt: {error}") from error


def _read_huggingface(content: bytes) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{_HUGGINGFACE_FILE} is not valid: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # meaning: as text
    return tokenizer


class BytesTokenizer:
    """UTF-8 bytes, case and all; needs no file. Ids: 0 padding, byte + 1, 257 start, 258 end."""

    name = "bytes"

    def __init__(self) -> None:
        self.vocab_size, self.start_id, self.end_id = 259, 257, 258
        self.pad_id, self.ends_highest = PAD_ID, True

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without start and end."""
        return [byte + 1 for byte in text.encode("utf-8", "replace")]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; start and end are left out."""
        return bytes(i - 1 for i in ids if 0 < i <= 256).decode("utf-8", "replace")

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
        self._processor = _read_sentencepiece(model)
        self._model = model
        self.start_id = self._processor.vocab_size()
        self.end_id = self.start_id + 1
        self.vocab_size = self.start_id + 2
        self.pad_id, self.ends_highest = PAD_ID, True

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[bytes]]:
        return SentencePieceTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without start and end."""
        return self._processor.encode(without_surrogates(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; start and end are left out."""
        return self._processor.decode([i for i in ids if i < self.start_id])

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
        self._tokenizer = _read_huggingface(content)
        self._content = content
        size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        largest = (self._tokenizer.id_to_token(size - 2), self._tokenizer.id_to_token(size - 1)) if size > 1 else None
        self.vocab_size = size if largest in _SPECIAL_PAIRS else size + 2
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1
        self.pad_id, self.ends_highest = PAD_ID, True

    def __reduce__(self) -> tuple[type["HuggingFaceTokenizer"], tuple[bytes]]:
        return HuggingFaceTokenizer, (self._content,)

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without start and end."""
        ids = self._tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids
        return [i for i in ids if i < self.start_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; start and end are left out."""
        return self._tokenizer.decode([i for i in ids if i < self.start_id])

    def files(self) -> dict[str, bytes]:
        """Everything needed to rebuild the tokenizer: `tokenizer.json`."""
        return {_HUGGINGFACE_FILE: self._content}


class SiglipTokenizer:
    """SigLIP's: lower case without punctuation, a SentencePiece model with its own end, which also pads; no start.

    Args:
      model: content of the `.model` file; its end-of-text piece has id 1, as in the models of T5 and C4.

    Raises:
      ValueError: the model is corrupt, or has no end-of-text piece.

    Source: arXiv 2303.15343; huggingface/transformers `SiglipTokenizer`.
    """

    name = "siglip"
    start_id: int | None = None
    ends_highest = False

    def __init__(self, model: bytes) -> None:
        self._model, self._processor = model, _read_sentencepiece(model)
        self.end_id = self.pad_id = self._processor.eos_id()
        if self.end_id < 0:
            raise ValueError("The SentencePiece model has no end-of-text piece; SigLIP's needs one.")
        self.vocab_size = self._processor.vocab_size()

    def __reduce__(self) -> tuple[type["SiglipTokenizer"], tuple[bytes]]:
        return SiglipTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without the end."""
        bare = without_surrogates(text).translate(_NO_PUNCTUATION)
        return self._processor.encode(" ".join(bare.split()).lower())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; start and end are left out."""
        return self._processor.decode([i for i in ids if i != self.end_id])

    def files(self) -> dict[str, bytes]:
        """Everything needed to rebuild the tokenizer: the model."""
        return {_SENTENCEPIECE_FILE: self._model}


class Siglip2Tokenizer:
    """SigLIP 2's: lower case, Gemma's pieces with its own padding and end; no start.

    Args:
      content: bytes of a `tokenizer.json` that knows `<pad>` and `<eos>`.

    Raises:
      ValueError: the file is corrupt or lacks one of them.

    Source: arXiv 2502.14786, section 2.1; huggingface/transformers `Siglip2Tokenizer`.
    """

    name = "siglip2"
    start_id: int | None = None
    ends_highest = False

    def __init__(self, content: bytes) -> None:
        self._content, self._tokenizer = content, _read_huggingface(content)
        pad, end = self._tokenizer.token_to_id("<pad>"), self._tokenizer.token_to_id("<eos>")
        if pad is None or end is None:
            raise ValueError(f"{_HUGGINGFACE_FILE} lacks <pad> or <eos>, which SigLIP 2's tokenizer has.")
        self.pad_id, self.end_id = pad, end
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def __reduce__(self) -> tuple[type["Siglip2Tokenizer"], tuple[bytes]]:
        return Siglip2Tokenizer, (self._content,)

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without the end."""
        ids = self._tokenizer.encode(without_surrogates(text).lower(), add_special_tokens=False).ids
        return [i for i in ids if i not in (self.pad_id, self.end_id)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; start and end are left out."""
        return self._tokenizer.decode([i for i in ids if i not in (self.pad_id, self.end_id)])

    def files(self) -> dict[str, bytes]:
        """Everything needed to rebuild the tokenizer: `tokenizer.json`."""
        return {_HUGGINGFACE_FILE: self._content}


class NoTokenizer:
    """Stands in for the tokenizer of a model that came without one: token ids can be embedded, texts cannot."""

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
        """The text of ids; start and end are left out."""
        raise ValueError("The model came without its tokenizer, so no text can be made of token ids.")

    def files(self) -> dict[str, bytes]:
        """Nothing."""
        return {}
