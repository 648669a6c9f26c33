"""Tokenizers in peers' directories: found at import, written at export."""

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from clipjax.convert import tokenizer_export
from clipjax.convert.files import read_json
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.data.tokenizers.clip_bpe import END_TEXT, MERGES_FILE, START_TEXT, ClipBpe, read_file
from clipjax.data.tokenizers.huggingface import HuggingFaceTokenizer, Siglip2Tokenizer
from clipjax.data.tokenizers.protocol import NoTokenizer, Tokenizer
from clipjax.data.tokenizers.sentencepiece import SentencePieceTokenizer, SiglipTokenizer

OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
PIECES_FILE = "spiece.model"
FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_WORDS = ("<unk>", "<pad>", "[PAD]", "[UNK]", "<s>")
"""Names of id 0 that no caption spells out."""


def find(folder: pathlib.Path | None) -> Tokenizer:
    """Find the tokenizer that lies beside a peer's weights; without one, return `NoTokenizer`.

    Raises:
        ValueError: there is one, but it is damaged.
    """
    if folder is None:
        return NoTokenizer()
    if (folder / MERGES_FILE).is_file() and (folder / "vocab.json").is_file():
        return build_tokenizer(f"clip:{folder}")
    if (folder / OPENAI_FILE).is_file():
        return build_tokenizer(f"clip:{folder / OPENAI_FILE}")
    if (folder / PIECES_FILE).is_file():
        return build_tokenizer(f"siglip:{folder / PIECES_FILE}")
    if (folder / FAST_FILE).is_file():
        kind = "siglip2" if _is_gemma(folder) else "huggingface"
        return build_tokenizer(f"{kind}:{folder / FAST_FILE}")
    return NoTokenizer()


def _is_gemma(folder: pathlib.Path) -> bool:
    """Return true for Gemma's tokenizer, by the class that its files name or else by its special tokens."""
    if (folder / CONFIG_FILE).is_file():
        named = read_json(folder / CONFIG_FILE)
        kind = named.get("tokenizer_class") if isinstance(named, dict) else None
        if isinstance(kind, str):
            return kind.startswith("Gemma")
    content = read_file(folder / FAST_FILE)
    return b'"<eos>"' in content and b'"<pad>"' in content


def open_clip_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the fields of `text_cfg` by which open_clip opens the files of `write`; it ships CLIP's own vocabulary."""
    match tokenizer:
        case NoTokenizer():
            return {}
        case ClipBpe(vocab_size=49_408):
            return {}
        case SiglipTokenizer() | Siglip2Tokenizer():
            return {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"clean": "canonicalize"}}
        case _:
            return {"hf_tokenizer_name": "local"}


def write(tokenizer: Tokenizer, context_length: int) -> dict[str, bytes]:
    """Return files by name, as Hugging Face's `AutoTokenizer` reads them; none for `NoTokenizer`.

    Raises:
        ValueError: a tokenizer that they cannot express.
    """
    match tokenizer:
        case ClipBpe():
            special = {"bos_token": START_TEXT, "eos_token": END_TEXT, "unk_token": END_TEXT, "pad_token": END_TEXT}
            return {
                MERGES_FILE: tokenizer.files()[MERGES_FILE],
                "vocab.json": json.dumps(tokenizer.vocabulary, ensure_ascii=False).encode(),
                CONFIG_FILE: _config("CLIPTokenizer", context_length, **special),
            }
        case SiglipTokenizer():
            special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "do_lower_case": True}
            [content] = tokenizer.files().values()
            return {
                PIECES_FILE: content,
                CONFIG_FILE: _config("SiglipTokenizer", context_length, **special),
            }
        case Siglip2Tokenizer():
            [content] = tokenizer.files().values()
            special = {"eos_token": "<eos>", "pad_token": "<pad>"}
            return {FAST_FILE: content, CONFIG_FILE: _config("GemmaTokenizer", context_length, **special)}
        case HuggingFaceTokenizer():
            [content] = tokenizer.files().values()
            return _fast_files(tokenizers.Tokenizer.from_str(content.decode()), tokenizer, context_length)
        case SentencePieceTokenizer():
            [content] = tokenizer.files().values()
            return _fast_files(tokenizer_export.export_sentencepiece(content), tokenizer, context_length)
        case BytesTokenizer():
            return _fast_files(tokenizer_export.export_bytes(), tokenizer, context_length)
        case _:
            return {}


def _config(kind: str, context_length: int, **fields: Any) -> bytes:
    values = {"tokenizer_class": kind, "model_max_length": context_length, **fields}
    return (json.dumps(values, indent=2) + "\n").encode()


def _fast_files(fast: tokenizers.Tokenizer, tokenizer: Tokenizer, context_length: int) -> dict[str, bytes]:
    """Return the tokenizer with start and end tokens around every text."""
    assert tokenizer.start_id is not None
    start = fast.id_to_token(tokenizer.start_id) or START_TEXT
    end = fast.id_to_token(tokenizer.end_id) or END_TEXT
    fast.add_special_tokens([start, end])
    fast.post_processor = TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, tokenizer.start_id), (end, tokenizer.end_id)]
    )
    first = fast.id_to_token(tokenizer.pad_id)
    # An ordinary word as padding would be cut out of texts before they are encoded; a causal tower never looks there.
    padding = first if first in SPECIAL_WORDS else end
    special = {"bos_token": start, "eos_token": end, "pad_token": padding}
    config = _config("PreTrainedTokenizerFast", context_length, **special)
    return {FAST_FILE: fast.to_str().encode(), CONFIG_FILE: config}
