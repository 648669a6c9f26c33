"""SentencePiece models, SigLIP's among them."""

import string
from collections.abc import Sequence
from typing import Any

from clipjax.data.tokenizers.protocol import PAD_ID, without_surrogates

SENTENCEPIECE_FILE = "sentencepiece.model"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def read_sentencepiece(model: bytes) -> Any:
    """Open the content of a `.model` file.

    Raises:
        ValueError: it is empty or damaged.
    """
    import sentencepiece

    if not model:
        raise ValueError("The SentencePiece model is empty.")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"The SentencePiece model is corrupt: {error}") from error


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
        self._processor = read_sentencepiece(model)
        self._model = model
        self.start_id = self._processor.vocab_size()
        self.end_id = self.start_id + 1
        self.vocab_size = self.start_id + 2
        self.pad_id, self.ends_highest = PAD_ID, True

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[bytes]]:
        return SentencePieceTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption, without start and end."""
        return self._processor.encode(without_surrogates(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without start and end."""
        return self._processor.decode([i for i in ids if i < self.start_id])

    def files(self) -> dict[str, bytes]:
        """Return everything needed to rebuild the tokenizer: the model."""
        return {SENTENCEPIECE_FILE: self._model}


class SiglipTokenizer:
    """SigLIP's tokenizer: lower case, no punctuation, a SentencePiece model with its own end, which pads too; no start.

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
        self._model, self._processor = model, read_sentencepiece(model)
        self.end_id = self.pad_id = self._processor.eos_id()
        if self.end_id < 0:
            raise ValueError("The SentencePiece model has no end-of-text piece; SigLIP's needs one.")
        self.vocab_size = self._processor.vocab_size()

    def __reduce__(self) -> tuple[type["SiglipTokenizer"], tuple[bytes]]:
        return SiglipTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption, without the end."""
        bare = without_surrogates(text).translate(_NO_PUNCTUATION)
        return self._processor.encode(" ".join(bare.split()).lower())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without start and end."""
        return self._processor.decode([i for i in ids if i != self.end_id])

    def files(self) -> dict[str, bytes]:
        """Return everything needed to rebuild the tokenizer: the model."""
        return {SENTENCEPIECE_FILE: self._model}
