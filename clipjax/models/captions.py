"""Modules that predict captions: CoCa's decoder, and the two baselines of the paper's figure on efficiency.

Both give the negative log-likelihood of every caption of a batch, so that a loss can average over all devices.
Axes: b batch, l tokens, k image tokens, w width, v vocabulary, e embed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipjax.config import DecoderConfig, ModelConfig, TextTransformerConfig
from clipjax.models.layers import LayerNorm, Linear, Numerics
from clipjax.models.text import end_of_text
from clipjax.models.transformer import Block, CrossAttention, Mlp, stack_blocks, text_block_init
from clipjax.runtime.sharding import Rules, constrain

RULES: Rules = (
    (r"layers/text/attn/qkv/kernel", ("layers", "width", None, "heads", None)),
    (r"layers/text/attn/qkv/bias", ("layers", None, "heads", None)),
    (r"layers/text/attn/out/kernel", ("layers", "heads", None, "width")),
    (r"layers/cross_attn/[qkv]/kernel", ("layers", "width", "heads", None)),
    (r"layers/cross_attn/[qkv]/bias", ("layers", "heads", None)),
    (r"layers/cross_attn/out/kernel", ("layers", "heads", None, "width")),
    (r"layers/(text/)?mlp/fc_in/kernel", ("layers", "width", "mlp")),
    (r"layers/(text/)?mlp/fc_in/bias", ("layers", "mlp")),
    (r"layers/(text/)?mlp/fc_out/kernel", ("layers", "mlp", "width")),
    (r"layers/(text/)?(attn/out|cross_attn/out|mlp/fc_out|ln_\w+)/(bias|scale)", ("layers", None)),
    (r"caption/ln_final/(bias|scale)", (None,)),
    (r"caption/proj/kernel", ("width", "vocab")),
    (r"caption/proj/bias", ("vocab",)),
)
"""Dimensions of the parameters of both caption heads."""


class DecoderLayer(nn.Module):
    """A causal block, then a block that attends to the image, in the form that `nn.scan` wants."""

    tower: DecoderConfig
    width: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"], image: Float[Array, "b k i"]) -> tuple[Float[Array, "b l w"], None]:
        tower, width, numerics = self.tower, self.width, self.numerics
        init, mlp_dim = text_block_init(width, tower.depth), tower.hidden_dim(width)
        x, _ = Block(tower.num_heads, mlp_dim, True, tower.activation, numerics, init, name="text")(x, None)
        image_tokens = LayerNorm(numerics, name="ln_image")(image)
        cross = CrossAttention(tower.num_heads, width, width, numerics, init, name="cross_attn")
        x = x + cross(LayerNorm(numerics, name="ln_1")(x), image_tokens)
        x = constrain(x, "batch", None, None)
        x = x + Mlp(mlp_dim, tower.activation, numerics, init, name="mlp")(LayerNorm(numerics, name="ln_2")(x))
        return constrain(x, "batch", None, None), None


class Decoder(nn.Module):
    """Logits of each next token, from the text tower's tokens and the image's.

    Source:
        arXiv 2205.01917, section 3.2, as mlfoundations/open_clip's `MultimodalTransformer` builds it.
    """

    tower: DecoderConfig
    text: TextTransformerConfig
    model: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"], image: Float[Array, "b k i"]) -> Float[Array, "b l v"]:
        tower, width = self.tower, self.text.width
        stack = stack_blocks(DecoderLayer, tower.depth, self.model)
        x, _ = stack(tower, width, self.numerics, name="layers")(x, image)
        x = LayerNorm(self.numerics, name="ln_final")(x)
        kernel_init = nn.initializers.normal(width**-0.5)
        return Linear((width,), (self.text.vocab_size,), self.numerics, kernel_init, None, name="proj")(x)


def next_tokens(tokens: Int[Array, "b l"]) -> tuple[Int[Array, "b m"], Bool[Array, "b m"]]:
    """Return the successor of each token but the last, and a mask of those up to the caption's end."""
    inside = jnp.arange(1, tokens.shape[1])[None] <= end_of_text(tokens)[:, None]
    return tokens[:, 1:], inside


def caption_likelihood(
    logits: Float[Array, "b m v"], tokens: Int[Array, "b l"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Return each caption's negative log-likelihood, in nats, and its number of predicted tokens; both float32."""
    labels, inside = next_tokens(tokens)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_p, labels[:, :, None], axis=-1)[:, :, 0]
    return -jnp.where(inside, chosen, 0).sum(1), inside.sum(1).astype(jnp.float32)


class BagOfWords(nn.Module):
    """Logits of the tokens that a caption may have, from the image's features.

    Source:
        arXiv 2103.00020, section 2.3; arXiv 1511.02251, section 3.
    """

    vocab_size: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b v"]:
        x, width = constrain(x, "batch", None), x.shape[-1]
        init = nn.initializers.normal(width**-0.5)
        logits = Linear((width,), (self.vocab_size,), self.numerics, init, nn.initializers.zeros, name="proj")(x)
        return constrain(logits, "batch", "vocab")


def bag_of(tokens: Int[Array, "b l"], vocab_size: int) -> Float[Array, "b v"]:
    """Return the set of a caption's tokens as a uniform distribution; start and end are not among them."""
    end = end_of_text(tokens)[:, None]
    places = jnp.arange(tokens.shape[1])[None]
    inside = (places > 0) & (places < end)
    rows = jnp.broadcast_to(jnp.arange(tokens.shape[0])[:, None], tokens.shape)
    present = jnp.zeros((tokens.shape[0], vocab_size)).at[rows, tokens].max(inside.astype(jnp.float32))
    return present / jnp.maximum(present.sum(1, keepdims=True), 1)


def words_likelihood(
    logits: Float[Array, "b v"], tokens: Int[Array, "b l"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Return the cross-entropy of each caption's bag of tokens, in nats, and 1 for each caption; both float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    bag = bag_of(tokens, logits.shape[-1])
    return -(bag * log_p).sum(1), jnp.ones(tokens.shape[0], jnp.float32)
