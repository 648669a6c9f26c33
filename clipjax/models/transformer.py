"""The pre-norm transformer that all towers share: attention, MLP, block, and the stack of blocks.

Read bottom up from `Transformer`. Axes: b batch, l tokens, k tokens attended to, w width, n heads, d head dim.
Parameters of all blocks are stacked along a leading layer axis, whether the stack is scanned or unrolled, so a
checkpoint does not depend on that choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from clipjax.config import Activation, AttentionMethod, ModelConfig, Remat, TextTransformerConfig, ViTConfig
from clipjax.models.fused_attention import fused_attention, is_supported
from clipjax.models.layers import HIDDEN, MATMUL, Initializer, LayerNorm, Linear, Numerics, activate, torch_uniform
from clipjax.runtime.sharding import Rules, backend, constrain, num_shards, platform

RULES: Rules = (
    (r"blocks/attn/qkv/kernel", ("layers", "width", None, "heads", None)),
    (r"blocks/attn/qkv/bias", ("layers", None, "heads", None)),
    (r"blocks/attn/out/kernel", ("layers", "heads", None, "width")),
    (r"blocks/mlp/fc_in/kernel", ("layers", "width", "mlp")),
    (r"blocks/mlp/fc_in/bias", ("layers", "mlp")),
    (r"blocks/mlp/fc_out/kernel", ("layers", "mlp", "width")),
    (r"blocks/(attn/out|mlp/fc_out|ln_\w+)/(bias|scale)", ("layers", None)),
)
"""Dimensions of the parameters of a stack of blocks."""


Mask = Bool[Array, "b l"] | Bool[Array, "b l l"]


@dataclass(frozen=True, kw_only=True)
class BlockInit:
    """Initialisers of one block's kernels; biases of the MLP follow PyTorch's default, all others start at 0."""

    qkv: Initializer
    attn_out: Initializer
    fc_in: Initializer
    fc_out: Initializer


def text_block_init(width: int, depth: int) -> BlockInit:
    """Return OpenAI's for texts: residual branches shrink with depth (openai/CLIP, `initialize_parameters`)."""
    residual = nn.initializers.normal(width**-0.5 * (2 * depth) ** -0.5)
    return BlockInit(
        qkv=nn.initializers.normal(width**-0.5),
        attn_out=residual,
        fc_in=nn.initializers.normal((2 * width) ** -0.5),
        fc_out=residual,
    )


def image_block_init(width: int, mlp_dim: int) -> BlockInit:
    """Return OpenAI's for images: PyTorch's defaults, Xavier for the query, key and value kernels."""
    bound = (6 / (width + 3 * width)) ** 0.5

    def xavier(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return BlockInit(
        qkv=xavier, attn_out=torch_uniform(width), fc_in=torch_uniform(width), fc_out=torch_uniform(mlp_dim)
    )


def attend(
    query: Float[Array, "b n l d"],
    key: Float[Array, "b n k d"],
    value: Float[Array, "b n k d"],
    visible: Bool[Array, "#b #n #l k"] | None = None,
) -> Float[Array, "b l n d"]:
    """Return softmax attention; logits and softmax are float32."""
    logits = jnp.einsum("bnqd,bnkd->bnqk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bnqk,bnkd->bnqd", weights, value).transpose(0, 2, 1, 3)


def cudnn_attention(qkv: Float[Array, "b l 3 n d"], *, causal: bool) -> Float[Array, "b l n d"]:
    """Return `attend` by NVIDIA's library, which trains on even lengths only: an odd one gets a masked token."""
    batch, length = qkv.shape[:2]
    qkv = jnp.pad(qkv, ((0, 0), (0, length % 2), (0, 0), (0, 0), (0, 0)))
    lengths = jnp.full(batch, length, jnp.int32) if length % 2 else None
    query, key, value = (qkv[:, :, part] for part in range(3))
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return mixed[:, :length]


def is_fused(method: AttentionMethod, shape: Sequence[Any], num_heads: int, head_dim: int) -> bool:
    """Return True if one kernel computes the attention of such tokens and heads on the mesh in force.

    An exported program never uses it, as its batch is a symbol until it runs.
    """
    wanted = method is AttentionMethod.FUSED or (method is AttentionMethod.AUTO and platform() == "tpu")
    return wanted and isinstance(shape[0], int) and is_supported(shape[0], shape[1], num_heads, head_dim)


class Attention(nn.Module):
    """Multi-head self-attention."""

    num_heads: int
    causal: bool
    numerics: Numerics
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"], mask: Mask | None = None) -> Float[Array, "b l w"]:
        length, width = x.shape[1:]
        heads = (3, self.num_heads, width // self.num_heads)
        if mask is None and is_fused(self.numerics.attention, x.shape, *heads[1:]):
            return self._fused(x, heads)
        qkv = Linear((width,), heads, self.numerics, self.init.qkv, name="qkv")(x)
        if mask is None and self.numerics.attention is AttentionMethod.CUDNN:
            mixed = checkpoint_name(cudnn_attention(qkv, causal=self.causal), MATMUL)
            return Linear(heads[1:], (width,), self.numerics, self.init.attn_out, name="out")(mixed)
        # Batched matrix products want heads outside tokens; on the CPU this order is 2.5 times as fast.
        query, key, value = jnp.transpose(qkv, (2, 0, 3, 1, 4))  # each [b, n, l, d]
        visible = jnp.tril(jnp.ones((length, length), bool))[None, None] if self.causal else None
        if mask is not None:
            attended = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
            visible = attended if visible is None else visible & attended
        mixed = checkpoint_name(attend(query, key, value, visible), MATMUL)
        return Linear(heads[1:], (width,), self.numerics, self.init.attn_out, name="out")(mixed)

    def _fused(self, x: Float[Array, "b l w"], heads: tuple[int, int, int]) -> Float[Array, "b l w"]:
        """Compute the same in one kernel, whose inputs and outputs have all heads side by side."""
        width, parts = x.shape[-1], num_shards("heads")

        # Barriers: else the compiler takes the gradients' products apart into heads, and copies activations for it.
        def by_part(parameter: Array) -> Array:
            """Reshape [..., 3, n, d] to [..., 3 w]: queries, keys and values of each part of the heads side by side."""
            *outer, _, count, dim = parameter.shape
            apart = parameter.reshape(*outer, 3, parts, count // parts, dim)
            return jax.lax.optimization_barrier(jnp.moveaxis(apart, -4, -3).reshape(*outer, 3 * width))

        def by_width(parameter: Array) -> Array:
            """Reshape [n, d, w] to [n d, w]; a bias stays."""
            return parameter if parameter.ndim == 1 else jax.lax.optimization_barrier(parameter.reshape(-1, width))

        qkv = Linear((width,), heads, self.numerics, self.init.qkv, merge=by_part, name="qkv")(x)
        qkv = constrain(qkv, "batch", None, "heads")
        interpret = self.numerics.attention is AttentionMethod.FUSED and backend() != "tpu"
        mixed = fused_attention(qkv, num_heads=heads[1], causal=self.causal, interpret=interpret)
        mixed = checkpoint_name(mixed, MATMUL)
        return Linear(heads[1:], (width,), self.numerics, self.init.attn_out, merge=by_width, name="out")(mixed)


class CrossAttention(nn.Module):
    """Multi-head attention from some tokens to others; both may have widths of their own.

    `out_dim` is the width of the result.
    """

    num_heads: int
    width: int
    out_dim: int
    numerics: Numerics
    init: BlockInit

    @nn.compact
    def __call__(
        self, queries: Float[Array, "b l v"], x: Float[Array, "b k w"], visible: Bool[Array, "b l k"] | None = None
    ) -> Float[Array, "b l o"]:
        heads = (self.num_heads, self.width // self.num_heads)

        def project(name: str, tokens: Float[Array, "b l w"]) -> Float[Array, "b n l d"]:
            linear = Linear((tokens.shape[-1],), heads, self.numerics, self.init.qkv, name=name)
            return linear(tokens).transpose(0, 2, 1, 3)

        visible = None if visible is None else visible[:, None]
        mixed = attend(project("q", queries), project("k", x), project("v", x), visible)
        return Linear(heads, (self.out_dim,), self.numerics, self.init.attn_out, name="out")(mixed)


class Mlp(nn.Module):
    """Two layers with a non-linearity between."""

    mlp_dim: int
    activation: Activation
    numerics: Numerics
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"]) -> Float[Array, "b l w"]:
        width = x.shape[-1]
        fc_in = Linear(
            (width,), (self.mlp_dim,), self.numerics, self.init.fc_in, torch_uniform(width), HIDDEN, name="fc_in"
        )
        hidden = fc_in(x)
        hidden = constrain(activate(self.activation, hidden), "batch", None, "mlp")
        return Linear(
            (self.mlp_dim,), (width,), self.numerics, self.init.fc_out, torch_uniform(self.mlp_dim), name="fc_out"
        )(hidden)


class Block(nn.Module):
    """One pre-norm residual block, in the form that `nn.scan` wants: carry in, (carry, None) out.

    `mask` is True for tokens that may be attended to, by all or by each; None: all of them by all.
    """

    num_heads: int
    mlp_dim: int
    causal: bool
    activation: Activation
    numerics: Numerics
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"], mask: Mask | None) -> tuple[Float[Array, "b l w"], None]:
        x = x + Attention(self.num_heads, self.causal, self.numerics, self.init, name="attn")(
            LayerNorm(self.numerics, name="ln_1")(x), mask
        )
        x = constrain(x, "batch", None, None)
        x = x + Mlp(self.mlp_dim, self.activation, self.numerics, self.init, name="mlp")(
            LayerNorm(self.numerics, name="ln_2")(x)
        )
        return constrain(x, "batch", None, None), None


def stack_blocks(block: type[nn.Module], depth: int, model: ModelConfig) -> type[nn.Module]:
    """Return `depth` blocks with parameters stacked along the first axis; all get the same second input."""
    shared: Any = nn.broadcast
    return nn.scan(
        remat_block(block, model.remat, scanned=model.scan_layers),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=shared,
        length=depth,
        unroll=1 if model.scan_layers else depth,
    )


def remat_block(block: type[nn.Module], policy: Remat, *, scanned: bool) -> type[nn.Module]:
    """Return a block under a rematerialisation policy; a loop by itself keeps recomputation from being merged away."""
    match policy:
        case Remat.NONE:
            return block
        case Remat.DOTS | Remat.MLP:
            names = (MATMUL, HIDDEN) if policy is Remat.DOTS else (MATMUL,)
            saved = jax.checkpoint_policies.save_only_these_names(*names)
            return nn.remat(block, policy=saved, prevent_cse=not scanned)
        case Remat.FULL:
            return nn.remat(block, prevent_cse=not scanned)


class Transformer(nn.Module):
    """A stack of blocks whose parameters are stacked along the first axis."""

    tower: ViTConfig | TextTransformerConfig
    causal: bool
    model: ModelConfig
    numerics: Numerics
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"], mask: Mask | None = None) -> Float[Array, "b l w"]:
        tower = self.tower
        stack = stack_blocks(Block, tower.depth, self.model)
        sizes = (tower.num_heads, tower.hidden_dim)
        blocks = stack(*sizes, self.causal, tower.activation, self.numerics, self.init, name="blocks")
        return blocks(x, mask)[0]
