"""Text towers: a transformer, causal as OpenAI's (arXiv 2103.00020, section 2.4) or bidirectional as SigLIP's, and the
paper's bag of words. Axes: b batch, l tokens, w width, e embed.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.config import CbowConfig, ModelConfig, Projection, TextPool, TextTransformerConfig
from clipjax.models.pool import AttentionPool
from clipjax.models.transformer import LayerNorm, Linear, Numerics, Transformer, text_block_init
from clipjax.sharding import constrain


def end_of_text(tokens: Int[Array, "b l"]) -> Int[Array, " b"]:
    """Where each text ends: every tokenizer gives end-of-text its largest id, so at the first maximum of the row."""
    return jnp.argmax(tokens, axis=-1)


class TextTransformer(nn.Module):
    """From token ids to the embedding before normalisation."""

    tower: TextTransformerConfig
    model: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b e"]:
        del train
        tower, width = self.tower, self.tower.width
        table = self.param("token_embed", nn.initializers.normal(0.02), (tower.vocab_size, width))
        x = jnp.take(table, tokens, axis=0)
        positions = self.param("pos_embed", nn.initializers.normal(0.01), (tower.context_length, width))
        x = constrain((x + positions[None]).astype(self.numerics.activations), "batch", None, None)
        init = text_block_init(width, tower.depth)
        x = Transformer(tower, tower.causal, self.model, self.numerics, init, name="transformer")(x)
        x = self._pool(x, tokens)
        if tower.projection is Projection.NONE:
            return x
        kernel_init, bias = nn.initializers.normal(width**-0.5), nn.initializers.zeros
        return Linear(
            (width,),
            (self.model.embed_dim,),
            self.numerics,
            kernel_init,
            bias if tower.projection is Projection.AFFINE else None,
            name="proj",
        )(x)

    def _pool(self, x: Float[Array, "b l w"], tokens: Int[Array, "b l"]) -> Float[Array, "b w"]:
        tower = self.tower
        norm = LayerNorm(self.numerics, name="ln_final")
        match tower.pool:
            case TextPool.END:
                return norm(jnp.take_along_axis(x, end_of_text(tokens)[:, None, None], axis=1)[:, 0])
            case TextPool.LAST:
                return norm(x[:, -1])
            case TextPool.ATTENTION:
                mlp_dim = tower.mlp_dim or 4 * tower.width
                return AttentionPool(tower.num_heads, mlp_dim, tower.activation, self.numerics, name="pool")(norm(x))


class Cbow(nn.Module):
    """The mean of the embeddings of a text's tokens, start and end among them, then a projection.

    Source:
        arXiv 2103.00020, section 2.3.
    """

    tower: CbowConfig
    model: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b e"]:
        del train
        width = self.tower.width
        table = self.param("token_embed", nn.initializers.normal(0.02), (self.tower.vocab_size, width))
        end = end_of_text(tokens)[:, None]
        inside = (jnp.arange(tokens.shape[1])[None] <= end)[:, :, None]
        x = jnp.where(inside, jnp.take(table, tokens, axis=0), 0).sum(1) / (end + 1)
        kernel_init = nn.initializers.normal(width**-0.5)
        return Linear((width,), (self.model.embed_dim,), self.numerics, kernel_init, None, name="proj")(x)
