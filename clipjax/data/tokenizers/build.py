"""Tokenizers by a config string, or from the files inside a checkpoint."""

from collections.abc import Mapping

from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.data.tokenizers.clip_bpe import MERGES_FILE, ClipBpe, read_clip_bpe, read_file
from clipjax.data.tokenizers.huggingface import HUGGINGFACE_FILE, HuggingFaceTokenizer, Siglip2Tokenizer
from clipjax.data.tokenizers.protocol import NoTokenizer, Tokenizer
from clipjax.data.tokenizers.sentencepiece import SENTENCEPIECE_FILE, SentencePieceTokenizer, SiglipTokenizer

_FILES = {
    "bytes": (),
    "clip": (MERGES_FILE,),
    "sentencepiece": (SENTENCEPIECE_FILE,),
    "huggingface": (HUGGINGFACE_FILE,),
    "siglip": (SENTENCEPIECE_FILE,),
    "siglip2": (HUGGINGFACE_FILE,),
    "none": (),
}
_SPECS = "bytes, clip:PATH, sentencepiece:PATH, huggingface:PATH, siglip:PATH or siglip2:PATH"


def build_tokenizer(spec: str) -> Tokenizer:
    """Build the tokenizer that a config names.

    Args:
        spec: `bytes`; `clip:PATH` with OpenAI's `bpe_simple_vocab_16e6.txt.gz` or a directory of `vocab.json` and
            `merges.txt`; `sentencepiece:PATH` or `siglip:PATH` with a `.model` file; `huggingface:PATH` or
            `siglip2:PATH` with a `tokenizer.json`.

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
                return read_clip_bpe(path)
            case _:
                return tokenizer_from_files(name, {_FILES[name][0]: read_file(path)})
    except ValueError as error:
        raise ValueError(f"data.tokenizer={spec!r}: {error}") from error


def tokenizer_from_files(name: str, files: Mapping[str, bytes]) -> Tokenizer:
    """Rebuild a tokenizer from its `name` and `files()`.

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
            return SentencePieceTokenizer(files[SENTENCEPIECE_FILE])
        case "siglip":
            return SiglipTokenizer(files[SENTENCEPIECE_FILE])
        case "siglip2":
            return Siglip2Tokenizer(files[HUGGINGFACE_FILE])
        case "none":
            return NoTokenizer()
        case _:
            return HuggingFaceTokenizer(files[HUGGINGFACE_FILE])
