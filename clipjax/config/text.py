"""Text towers: their fields with ranges, what their fields choose from, FLOPs, parameters, and rules across fields.

A new tower is a class here, one of `TextTower`; its module and sharding rules lie in `models/`.
"""

import enum
from dataclasses import dataclass
from typing import ClassVar

from clipjax.config.layers import Activation, Blocks, Projection, attention_pool_flops, attention_pool_params
from clipjax.config.ranges import INSIDE_ONE, POSITIVE, Range, bounded

CONTEXT_LENGTH = Range("must hold start, a token and end: at least 3", lambda value: value >= 3)


class TextPool(enum.Enum):
    """One vector out of a text's tokens.

    The end-of-text token, the last place, attention (SigLIP's MAP), or a learned token behind the text (CoCa).
    """

    END = "end"
    LAST = "last"
    ATTENTION = "attention"
    CLASS = "class"


@dataclass(kw_only=True, slots=True)
class TextTransformerConfig(Blocks):
    """Text transformer. `vocab_size` is at least the tokenizer's. The defaults are OpenAI's CLIP."""

    KIND: ClassVar[str] = "transformer"

    context_length: int = bounded(77, POSITIVE, CONTEXT_LENGTH)
    vocab_size: int = bounded(49408, POSITIVE)
    width: int = bounded(512, POSITIVE)
    depth: int = bounded(12, POSITIVE)
    num_heads: int = bounded(8, POSITIVE)
    mlp_dim: int | None = bounded(None, POSITIVE)
    activation: Activation = Activation.QUICK_GELU
    layer_norm_epsilon: float = bounded(1e-5, INSIDE_ONE)
    causal: bool = True
    pool: TextPool = TextPool.END
    projection: Projection = Projection.LINEAR

    @property
    def finds_end(self) -> bool:
        """True if the tower looks for the end of a text, as the largest id of a row."""
        return self.pool is TextPool.END

    def flops(self, embed_dim: int) -> int:
        """Return the FLOPs of one text."""
        length = self.context_length + (self.pool is TextPool.CLASS)
        total = self.block_flops(length)
        if self.pool is TextPool.ATTENTION:
            total += attention_pool_flops(length, self.width, self.hidden_dim)
        return total + self.projection.flops(self.width, embed_dim)

    def num_params(self, embed_dim: int) -> int:
        """Return the number of parameters of the tower."""
        with_class = self.pool is TextPool.CLASS  # a token, and its position
        total = (self.vocab_size + self.context_length + 2 * with_class + 2) * self.width + self.block_params()
        if self.pool is TextPool.ATTENTION:
            total += attention_pool_params(self.width, self.hidden_dim)
        return total + self.projection.num_params(self.width, embed_dim)

    def errors(self, path: str, embed_dim: int) -> list[str]:
        """Return what is wrong between the fields, a line each."""
        errors = self.block_errors(path, embed_dim)
        if self.pool is TextPool.CLASS and not self.causal:
            errors.append(f"{path}.pool=class, a token behind the text, needs {path}.causal=True")
        if self.pool is TextPool.LAST and self.causal:
            errors.append(
                f"{path}.pool=last reads the last place, which is padding where a text is short; with "
                f"{path}.causal=True use pool=end"
            )
        return errors


@dataclass(kw_only=True, slots=True)
class CbowConfig:
    """The paper's bag of words: the mean of the tokens' embeddings, projected."""

    KIND: ClassVar[str] = "cbow"

    context_length: int = bounded(77, POSITIVE, CONTEXT_LENGTH)
    vocab_size: int = bounded(49408, POSITIVE)
    width: int = bounded(512, POSITIVE)

    @property
    def finds_end(self) -> bool:
        """True: the mean is over the tokens up to the end of a text, the largest id of a row."""
        return True

    def flops(self, embed_dim: int) -> int:
        """Return the FLOPs of one text."""
        return 2 * self.width * embed_dim

    def num_params(self, embed_dim: int) -> int:
        """Return the number of parameters of the tower."""
        return (self.vocab_size + embed_dim) * self.width

    def errors(self, path: str, embed_dim: int) -> list[str]:
        """Return what is wrong between the fields: nothing can be."""
        del path, embed_dim
        return []


TextTower = TextTransformerConfig | CbowConfig
