"""One vector out of many tokens, by attention. Axes: b batch, l tokens, w width, e embed."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipjax.config import Activation
from clipjax.models.layers import LayerNorm, Numerics, torch_uniform
from clipjax.models.transformer import BlockInit, CrossAttention, Mlp
from clipjax.runtime.sharding import Rules

RULES: Rules = (
    (r"pool/(probe|queries|pos_embed)", (None, "width")),
    (r"pool/attn/[qkv]/kernel", ("width", "heads", None)),
    (r"pool/attn/[qkv]/bias", ("heads", None)),
    (r"pool/attn/out/kernel", ("heads", None, "width")),
    (r"pool/mlp/fc_in/kernel", ("width", "mlp")),
    (r"pool/mlp/fc_in/bias", ("mlp",)),
    (r"pool/mlp/fc_out/kernel", ("mlp", "width")),
    (r"pool/(attn/out|mlp/fc_out|ln|ln_q|ln_k)/(bias|scale)", (None,)),
)
"""Dimensions of the parameters of all poolings by attention."""


class AttentionPool(nn.Module):
    """SigLIP's head (MAP): a learned token attends to all others, then an MLP beside it.

    Source:
        arXiv 2106.04560, section 3.3; google-research/big_vision `models/vit.py`, `MAPHead`.
    """

    num_heads: int
    mlp_dim: int
    activation: Activation
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"], parts: Bool[Array, "b g l"] | None = None) -> Float[Array, "n w"]:
        """Return one vector of each row, or one of each of its parts, row by row."""
        width = x.shape[-1]
        xavier = nn.initializers.xavier_uniform()
        probe = self.param("probe", nn.initializers.normal(width**-0.5), (1, width))
        count = 1 if parts is None else parts.shape[1]
        probe = jnp.broadcast_to(probe[None], (x.shape[0], count, width)).astype(self.numerics.compute_dtype)
        # Of Xavier's variance for a square matrix, whatever the shape of the kernel.
        square = nn.initializers.normal(width**-0.5)
        init = BlockInit(qkv=square, attn_out=square, fc_in=xavier, fc_out=xavier)
        x = CrossAttention(self.num_heads, width, width, self.numerics, init, name="attn")(probe, x, parts)
        y = LayerNorm(self.numerics, name="ln")(x)
        return (x + Mlp(self.mlp_dim, self.activation, self.numerics, init, name="mlp")(y)).reshape(-1, width)


class QueryPool(nn.Module):
    """CoCa's pooling: learned queries attend to all tokens, and each gives a vector.

    Source:
        arXiv 2205.01917, section 3.2, as mlfoundations/open_clip's `AttentionalPooler` builds it.
    """

    num_queries: int
    num_heads: int
    width: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"]) -> Float[Array, "b q v"]:
        width = self.width
        queries = self.param("queries", nn.initializers.normal(1.0), (self.num_queries, width))
        queries = LayerNorm(self.numerics, name="ln_q")(queries[None])
        queries = jnp.broadcast_to(queries, (x.shape[0], *queries.shape[1:]))
        init = BlockInit(
            qkv=nn.initializers.normal(width**-0.5),
            attn_out=torch_uniform(width),
            fc_in=torch_uniform(width),
            fc_out=torch_uniform(width),
        )
        attn = CrossAttention(self.num_heads, width, width, self.numerics, init, name="attn")
        return attn(queries, LayerNorm(self.numerics, name="ln_k")(x))


class MeanQueryPool(nn.Module):
    """The ResNets' head: the mean of all places attends to itself and to them, then a projection.

    Source:
        arXiv 2103.00020, section 2.4; openai/CLIP `model.py`, `AttentionPool2d`.
    """

    num_heads: int
    embed_dim: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"]) -> Float[Array, "b e"]:
        width = x.shape[-1]
        normal = nn.initializers.normal(width**-0.5)
        init = BlockInit(qkv=normal, attn_out=normal, fc_in=torch_uniform(width), fc_out=torch_uniform(width))
        x = x.astype(jnp.float32)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        x = x + self.param("pos_embed", normal, x.shape[1:])[None]
        x = x.astype(self.numerics.compute_dtype)
        attn = CrossAttention(self.num_heads, width, self.embed_dim, self.numerics, init, name="attn")
        return attn(x[:, :1], x)[:, 0]
