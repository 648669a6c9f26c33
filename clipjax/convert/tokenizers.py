"""Tokenizers in peers' directories: found on the way in, written on the way out."""

import json
import pathlib
from typing import Any

from clipjax.data.bpe import END_TEXT, MERGES_FILE, START_TEXT, ClipBpe, read_file
from clipjax.data.tokenizer import (
    HuggingFaceTokenizer,
    NoTokenizer,
    Siglip2Tokenizer,
    SiglipTokenizer,
    Tokenizer,
    build_tokenizer,
)

OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
PIECES_FILE = "spiece.model"
FAST_FILE = "tokenizer.json"


def find(folder: pathlib.Path | None) -> Tokenizer:
    """The tokenizer that lies beside a peer's weights, or `NoTokenizer`.

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
        content = read_file(folder / FAST_FILE)
        is_gemma = b'"<eos>"' in content and b'"<pad>"' in content
        return build_tokenizer(f"{'siglip2' if is_gemma else 'huggingface'}:{folder / FAST_FILE}")
    return NoTokenizer()


def write(tokenizer: Tokenizer, context_length: int) -> dict[str, bytes]:
    """Files by name, as Hugging Face's `AutoTokenizer` reads them; empty where it has nothing of the kind."""
    match tokenizer:
        case ClipBpe():
            special = {"bos_token": START_TEXT, "eos_token": END_TEXT, "unk_token": END_TEXT, "pad_token": "!"}
            return {
                MERGES_FILE: tokenizer.files()[MERGES_FILE],
                "vocab.json": json.dumps(tokenizer.vocabulary, ensure_ascii=False).encode(),
                "tokenizer_config.json": _config("CLIPTokenizer", context_length, **special),
            }
        case SiglipTokenizer():
            special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "do_lower_case": True}
            [content] = tokenizer.files().values()
            return {
                PIECES_FILE: content,
                "tokenizer_config.json": _config("SiglipTokenizer", context_length, **special),
            }
        case Siglip2Tokenizer():
            [content] = tokenizer.files().values()
            special = {"eos_token": "<eos>", "pad_token": "<pad>"}
            return {FAST_FILE: content, "tokenizer_config.json": _config("GemmaTokenizer", context_length, **special)}
        case HuggingFaceTokenizer():
            special = {"bos_token": START_TEXT, "eos_token": END_TEXT}
            return {
                FAST_FILE: _with_ends(tokenizer),
                "tokenizer_config.json": _config("PreTrainedTokenizerFast", context_length, **special),
            }
        case _:
            return {}


def _config(kind: str, context_length: int, **fields: Any) -> bytes:
    values = {"tokenizer_class": kind, "model_max_length": context_length, **fields}
    return (json.dumps(values, indent=2) + "\n").encode()


def _with_ends(tokenizer: HuggingFaceTokenizer) -> bytes:
    """The file with start and end as tokens, put around every text."""
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    [content] = tokenizer.files().values()
    fast = tokenizers.Tokenizer.from_str(content.decode())
    start, end = (
        fast.id_to_token(i) or name for i, name in ((tokenizer.start_id, START_TEXT), (tokenizer.end_id, END_TEXT))
    )
    fast.add_special_tokens([start, end])
    fast.post_processor = TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, tokenizer.start_id), (end, tokenizer.end_id)]
    )
    return fast.to_str().encode()
