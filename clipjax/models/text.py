"""Text towers: a transformer, causal as OpenAI's (arXiv 2103.00020, section 2.4) or bidirectional as SigLIP's, and the
paper's bag of words. Axes: b batch, l tokens, w width, e embed.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipjax.config import CbowConfig, ModelConfig, Projection, TextPool, TextTransformerConfig
from clipjax.models.layers import LayerNorm, Numerics, align, tower_projection
from clipjax.models.pool import AttentionPool
from clipjax.models.transformer import Transformer, text_block_init
from clipjax.runtime.sharding import Rules, constrain

RULES: Rules = (
    (r"text/token_embed", ("vocab", "width")),
    (r"text/class_embed", (None,)),
    (r"text/pos_embed", (None, "width")),
    (r"text/ln_final/(bias|scale)", (None,)),
    (r"text/proj/kernel", ("width", "embed")),
    (r"text/proj/bias", (None,)),
)
"""Dimensions of both towers' own parameters; those of blocks and pooling lie beside these."""


def end_of_text(tokens: Int[Array, "b l"]) -> Int[Array, " b"]:
    """Return the position of each text's end, the first maximum of its row: its id is every tokenizer's largest."""
    return jnp.argmax(tokens, axis=-1)


def _mask_with_class_token(tokens: Int[Array, "b l"]) -> Bool[Array, "b k"]:
    """Return a mask of the tokens that may be attended to, among a text's tokens and the class token behind them.

    Padding (id 0) is left out, but as in open_clip's CoCa, whose weights are made for it, the mask sits one place late:
    the first token always takes part, and place i + 1 if token i is no padding.
    """
    return jnp.concatenate([jnp.ones((tokens.shape[0], 1), bool), tokens != 0], axis=1)


class TextTransformer(nn.Module):
    """Text tower: token ids in, the embedding before normalisation and the tokens for a decoder out."""

    tower: TextTransformerConfig
    model: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> tuple[Float[Array, "b e"], Float[Array, "b l w"]]:
        tower, width = self.tower, self.tower.width
        normal, with_class = nn.initializers.normal(0.01), tower.pool is TextPool.CLASS
        table = self.param("token_embed", nn.initializers.normal(0.02), (tower.vocab_size, width))
        x = jnp.take(table, tokens, axis=0)
        if with_class:
            token = align(self.param("class_embed", normal, (width,)), x)
            x = jnp.concatenate([x, jnp.broadcast_to(token, (x.shape[0], 1, width))], axis=1)
        positions = self.param("pos_embed", normal, (tower.context_length + with_class, width))
        x = constrain((x + positions[None]).astype(self.numerics.compute_dtype), "batch", None, None)
        init = text_block_init(width, tower.depth)
        mask = _mask_with_class_token(tokens) if with_class else None
        x = Transformer(tower, tower.causal, self.model, self.numerics, init, name="transformer")(x, mask)
        text_tokens = x[:, : tokens.shape[1]]
        x = self._pool(x, tokens)
        return tower_projection(x, tower.projection, width, self.model.embed_dim, self.numerics), text_tokens

    def _pool(self, x: Float[Array, "b m w"], tokens: Int[Array, "b l"]) -> Float[Array, "b w"]:
        tower = self.tower
        norm = LayerNorm(self.numerics, name="ln_final")
        match tower.pool:
            case TextPool.END:
                return norm(jnp.take_along_axis(x, end_of_text(tokens)[:, None, None], axis=1)[:, 0])
            case TextPool.LAST | TextPool.CLASS:
                return norm(x[:, -1])
            case TextPool.ATTENTION:
                pool = AttentionPool(tower.num_heads, tower.hidden_dim, tower.activation, self.numerics, name="pool")
                return pool(norm(x))


class Cbow(nn.Module):
    """The mean of the embeddings of a text's tokens, start and end among them, then a projection.

    Source:
        arXiv 2103.00020, section 2.3.
    """

    tower: CbowConfig
    model: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> tuple[Float[Array, "b e"], None]:
        width = self.tower.width
        table = self.param("token_embed", nn.initializers.normal(0.02), (self.tower.vocab_size, width))
        end = end_of_text(tokens)[:, None]
        inside = (jnp.arange(tokens.shape[1])[None] <= end)[:, :, None]
        x = jnp.where(inside, jnp.take(table, tokens, axis=0), 0).sum(1) / (end + 1)
        return tower_projection(x, Projection.LINEAR, width, self.model.embed_dim, self.numerics), None
