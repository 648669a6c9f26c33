"""Heads that predict captions: their fields with ranges, FLOPs, parameters, and rules across fields."""

from dataclasses import dataclass
from typing import ClassVar

from clipjax.config.image import ImageTower
from clipjax.config.layers import Activation, attention_params, block_params, hidden_dim, mlp_params
from clipjax.config.ranges import AT_LEAST_ONE, INSIDE_ONE, POSITIVE, bounded
from clipjax.config.text import TextTower, TextTransformerConfig


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """A causal decoder that reads the text tower's tokens and looks at the image's: it predicts each next token."""

    KIND: ClassVar[str] = "decoder"

    depth: int = bounded(12, AT_LEAST_ONE)
    num_heads: int = bounded(8, AT_LEAST_ONE)
    mlp_dim: int | None = bounded(None, POSITIVE)
    activation: Activation = Activation.QUICK_GELU
    layer_norm_epsilon: float = bounded(1e-5, INSIDE_ONE)

    def hidden_dim(self, width: int) -> int:
        """Return the hidden size of the MLPs of a decoder of this width, that of the text tower."""
        return hidden_dim(self.mlp_dim, width)

    def flops(self, image: ImageTower, text: TextTower, embed_dim: int) -> int:
        """Return the FLOPs of predicting one caption; the text's last place, which nothing follows, counts too."""
        tokens, token_width = image.caption_tokens(embed_dim)
        length, width = text.context_length, text.width
        hidden = 2 * width * self.hidden_dim(width)
        weights = 4 * width**2 + hidden + 2 * width**2 + hidden  # a block; queries, output and MLP of the second one
        layer = 2 * length * weights + 4 * length**2 * width + 4 * tokens * token_width * width
        return self.depth * (layer + 4 * length * tokens * width) + 2 * length * width * text.vocab_size

    def num_params(self, image: ImageTower, text: TextTower, embed_dim: int) -> int:
        """Return the number of parameters of the decoder."""
        token_width, width, hidden = image.caption_tokens(embed_dim)[1], text.width, self.hidden_dim(text.width)
        layer = block_params(width, hidden) + attention_params(width, token_width, width) + mlp_params(width, hidden)
        return self.depth * (layer + 2 * token_width + 4 * width) + 2 * width + width * text.vocab_size

    def errors(self, path: str, text: TextTower) -> list[str]:
        """Return what is wrong between the decoder and the text tower, a line each."""
        if not isinstance(text, TextTransformerConfig) or not text.causal:
            return [f"{path}: a decoder reads a text transformer with model.text.causal=True"]
        if text.width % self.num_heads:
            return [f"{path}.num_heads={self.num_heads} must divide model.text.width={text.width}"]
        return []


@dataclass(kw_only=True, slots=True)
class BagOfWordsConfig:
    """One layer that predicts from the image which tokens its caption has: the paper's bag-of-words prediction."""

    KIND: ClassVar[str] = "words"

    def flops(self, image: ImageTower, text: TextTower, embed_dim: int) -> int:
        """Return the FLOPs of predicting one caption."""
        del image
        return 2 * embed_dim * text.vocab_size

    def num_params(self, image: ImageTower, text: TextTower, embed_dim: int) -> int:
        """Return the number of parameters of the layer."""
        del image
        return (embed_dim + 1) * text.vocab_size

    def errors(self, path: str, text: TextTower) -> list[str]:
        """Return what is wrong between the head and the text tower: nothing can be."""
        del path, text
        return []


CaptionHead = DecoderConfig | BagOfWordsConfig
