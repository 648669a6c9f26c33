"""The tokenizer of UTF-8 bytes."""

from collections.abc import Sequence

from clipjax.data.tokenizers.protocol import PAD_ID


class BytesTokenizer:
    """UTF-8 bytes in their own case; needs no file. Ids: 0 padding, byte + 1, 257 start, 258 end."""

    name = "bytes"

    def __init__(self) -> None:
        self.vocab_size, self.start_id, self.end_id = 259, 257, 258
        self.pad_id, self.ends_highest = PAD_ID, True

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption, without start and end."""
        return [byte + 1 for byte in text.encode("utf-8", "replace")]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without start and end."""
        return bytes(i - 1 for i in ids if 0 < i <= 256).decode("utf-8", "replace")

    def files(self) -> dict[str, bytes]:
        """Return nothing: the kind says it all."""
        return {}
