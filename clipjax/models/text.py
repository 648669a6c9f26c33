"""The text tower: OpenAI CLIP's causal transformer, read out at the end-of-text token (arXiv 2103.00020, section 2.4).

Axes: b batch, l tokens, e embed.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.config import ModelConfig
from clipjax.models.transformer import Dtypes, LayerNorm, Projection, Transformer, text_block_init
from clipjax.sharding import constrain


class TextTower(nn.Module):
    """Causal transformer from token ids to the embedding before normalisation.

    Every tokenizer gives end-of-text its largest id, so the place to read out is the first maximum of the row.
    """

    config: ModelConfig
    dtypes: Dtypes

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
        tower, width = self.config.text, self.config.text.width
        table = self.param("token_embed", nn.initializers.normal(0.02), (tower.vocab_size, width))
        x = jnp.take(table, tokens, axis=0)
        positions = self.param("pos_embed", nn.initializers.normal(0.01), (tower.context_length, width))
        x = constrain((x + positions[None]).astype(self.dtypes.activations), "batch", None, None)
        x = Transformer(
            depth=tower.depth,
            num_heads=tower.num_heads,
            mlp_dim=tower.mlp_dim or 4 * width,
            causal=True,
            model=self.config,
            dtypes=self.dtypes,
            init=text_block_init(width, tower.depth),
            name="transformer",
        )(x)
        end = jnp.argmax(tokens, axis=-1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = LayerNorm(self.dtypes, name="ln_final")(x)
        kernel_init = nn.initializers.normal(width**-0.5)
        return Projection((width,), (self.config.embed_dim,), self.dtypes, kernel_init, None, name="proj")(x)
