"""Tokenizers of Hugging Face's `tokenizer.json`, SigLIP 2's among them."""

from collections.abc import Sequence
from typing import Any

from clipjax.data.tokenizers.clip_bpe import END_TEXT, START_TEXT
from clipjax.data.tokenizers.protocol import PAD_ID, without_surrogates

HUGGINGFACE_FILE = "tokenizer.json"
_SPECIAL_PAIRS = ((START_TEXT, END_TEXT), ("<start_of_text>", "<end_of_text>"))


def read_huggingface(content: bytes) -> Any:
    """Open the content of a `tokenizer.json`.

    Raises:
        ValueError: it is damaged.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{HUGGINGFACE_FILE} is not valid: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # meaning: as text
    return tokenizer


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
        self._tokenizer = read_huggingface(content)
        self._content = content
        size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        largest = (self._tokenizer.id_to_token(size - 2), self._tokenizer.id_to_token(size - 1)) if size > 1 else None
        self.vocab_size = size if largest in _SPECIAL_PAIRS else size + 2
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1
        self.pad_id, self.ends_highest = PAD_ID, True

    def __reduce__(self) -> tuple[type["HuggingFaceTokenizer"], tuple[bytes]]:
        return HuggingFaceTokenizer, (self._content,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption, without start and end."""
        ids = self._tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids
        return [i for i in ids if i < self.start_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without start and end."""
        return self._tokenizer.decode([i for i in ids if i < self.start_id])

    def files(self) -> dict[str, bytes]:
        """Return everything needed to rebuild the tokenizer: `tokenizer.json`."""
        return {HUGGINGFACE_FILE: self._content}


class Siglip2Tokenizer:
    """SigLIP 2's tokenizer: lower case, Gemma's pieces with its own padding and end; no start.

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
        self._content, self._tokenizer = content, read_huggingface(content)
        pad, end = self._tokenizer.token_to_id("<pad>"), self._tokenizer.token_to_id("<eos>")
        if pad is None or end is None:
            raise ValueError(f"{HUGGINGFACE_FILE} lacks <pad> or <eos>, which SigLIP 2's tokenizer has.")
        self.pad_id, self.end_id = pad, end
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def __reduce__(self) -> tuple[type["Siglip2Tokenizer"], tuple[bytes]]:
        return Siglip2Tokenizer, (self._content,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption, without the end."""
        ids = self._tokenizer.encode(without_surrogates(text).lower(), add_special_tokens=False).ids
        return [i for i in ids if i not in (self.pad_id, self.end_id)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without start and end."""
        return self._tokenizer.decode([i for i in ids if i not in (self.pad_id, self.end_id)])

    def files(self) -> dict[str, bytes]:
        """Return everything needed to rebuild the tokenizer: `tokenizer.json`."""
        return {HUGGINGFACE_FILE: self._content}
