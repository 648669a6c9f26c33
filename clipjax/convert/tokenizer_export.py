"""clipjax's own tokenizers as a `tokenizer.json`, which peers open with the `tokenizers` package."""

from typing import Any

from clipjax.data.tokenizers.protocol import PAD_ID

PAD = "<pad>"
_NORMAL, _USER_DEFINED = 1, 4  # kinds of pieces (sentencepiece_model.proto)
_UNIGRAM, _BPE = 1, 2  # kinds of models


def export_bytes() -> Any:
    """Export `BytesTokenizer`: byte + 1, and 0 for padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shown = _shown_bytes()
    vocab = {PAD: PAD_ID} | {char: byte + 1 for byte, char in enumerate(shown)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD])
    return tokenizer


def _shown_bytes() -> list[str]:
    """Return the characters of byte-level tokenizers by byte: itself, or one from 256 on if it is invisible."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unseen = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(unseen)) for byte in range(256)]


def export_sentencepiece(content: bytes) -> Any:
    """Build a SentencePiece model (arXiv 1808.06226) of pairs or of unigrams, with its own normalisation.

    Args:
        content: of a `.model` file.

    Raises:
        ValueError: a model of words or characters, or with pieces that users defined: they have no counterpart here.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(content)
    pieces = list(model.pieces)
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE) or any(p.type == _USER_DEFINED for p in pieces):
        raise ValueError(
            "the tokenizer is a SentencePiece model of words, of characters or with pieces that users defined, which "
            "a tokenizer.json cannot hold"
        )
    tokenizer = Tokenizer(_pairs(model) if model.trainer_spec.model_type == _BPE else _unigrams(model))
    _add_whitespace(tokenizer, model.normalizer_spec, byte_fallback=model.trainer_spec.byte_fallback)
    return tokenizer


def _unigrams(model: Any) -> Any:
    from tokenizers import models

    vocab = [(piece.piece, piece.score) for piece in model.pieces]
    return models.Unigram(vocab, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def _pairs(model: Any) -> Any:
    """List the merges in their order: SentencePiece first merges what makes the piece of the highest score."""
    from tokenizers import models

    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    merges = [
        (-score, vocab[piece], (piece[:cut], piece[cut:]))
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return models.BPE(
        vocab=vocab,
        merges=[pair for _, _, pair in sorted(merges)],
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _add_whitespace(tokenizer: Any, spec: Any, *, byte_fallback: bool) -> None:
    """Build the normalisation of text and its inverse: Unicode's forms, spaces as `▁`, one in front."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    before: list[Any] = []
    after: list[Any] = [decoders.Replace("▁", " ")]
    if spec.precompiled_charsmap:
        before.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        before += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.escape_whitespaces:
        before.append(normalizers.Replace(" ", "▁"))
    if byte_fallback:
        after.append(decoders.ByteFallback())
    if spec.add_dummy_prefix:
        before.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))  # a `▁` of the text itself gets one in front too
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
        after += [decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    tokenizer.normalizer = normalizers.Sequence(before)
    tokenizer.decoder = decoders.Sequence(after)
