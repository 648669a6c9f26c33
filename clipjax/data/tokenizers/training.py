"""Training of a SentencePiece tokenizer on captions."""

import io
import re
from collections.abc import Iterable

from clipjax.data.tokenizers.protocol import PAD_ID, without_surrogates


def train_sentencepiece(captions: Iterable[str], vocab_size: int) -> bytes:
    """Learn a byte-pair SentencePiece model from captions, all held in memory; the same captions give the same bytes.

    Text is NFKC-normalised and case-folded (`nmt_nfkc_cf`); the model file carries this rule.

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

    lines = [line for caption in captions if (line := " ".join(without_surrogates(caption).split()))]
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
