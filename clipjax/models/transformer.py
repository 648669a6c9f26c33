"""The pre-norm transformer that all towers share: attention, MLP, block, and the stack of blocks.

Read bottom up from `Transformer`. Axes: b batch, l tokens, k tokens attended to, w width, n heads, d head dim.
Parameters of all blocks are stacked along a leading layer axis, whether the stack is scanned or unrolled, so a
checkpoint does not depend on that choice.
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipjax.config import Activation, ModelConfig, Projection, Remat, TextTransformerConfig, ViTConfig
from clipjax.sharding import constrain

Initializer = Any


def torch_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear and convolution layers, biases included."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@dataclass(frozen=True, kw_only=True)
class BlockInit:
    """Initialisers of one block's kernels; biases of the MLP follow PyTorch's default, all others start at 0."""

    qkv: Initializer
    attn_out: Initializer
    fc_in: Initializer
    fc_out: Initializer


def text_block_init(width: int, depth: int) -> BlockInit:
    """OpenAI's text tower: residual branches shrink with depth (openai/CLIP, `initialize_parameters`)."""
    residual = nn.initializers.normal(width**-0.5 * (2 * depth) ** -0.5)
    return BlockInit(
        qkv=nn.initializers.normal(width**-0.5),
        attn_out=residual,
        fc_in=nn.initializers.normal((2 * width) ** -0.5),
        fc_out=residual,
    )


def image_block_init(width: int, mlp_dim: int) -> BlockInit:
    """OpenAI's image tower: left at PyTorch's defaults, which are Xavier for the query, key and value kernels."""
    bound = (6 / (width + 3 * width)) ** 0.5

    def xavier(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return BlockInit(
        qkv=xavier, attn_out=torch_uniform(width), fc_in=torch_uniform(width), fc_out=torch_uniform(mlp_dim)
    )


def align(parameter: Array, x: Array) -> Array:
    """A parameter with leading axes of length 1, so that it broadcasts to x without rank promotion."""
    return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int, dtype: Any) -> Float[Array, "..."]:
    """Contract the last `axes` of x with the first of the kernel; operands in `dtype`, result float32.

    The kernel's gradient is float32 as well, so that devices sum it in float32: were the kernel cast outside, its
    gradient would be rounded to `dtype` before the sum.
    """
    return _product(x, kernel, axes, dtype)[0]


def _product(x: Array, kernel: Array, axes: int, dtype: Any) -> tuple[Array, tuple[Array, Array, Any]]:
    contract = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    narrow = x.astype(dtype)
    return _dot(narrow, kernel.astype(dtype), contract), (narrow, kernel, jnp.zeros((), x.dtype))


def _product_backward(axes: int, dtype: Any, saved: tuple[Array, Array, Any], grad: Array) -> tuple[Array, Array]:
    x, kernel, example = saved
    narrow, batch = grad.astype(dtype), tuple(range(x.ndim - axes))
    outputs = tuple(range(x.ndim - axes, grad.ndim))
    x_grad = _dot(narrow, kernel.astype(dtype), (outputs, tuple(range(axes, kernel.ndim))))
    return x_grad.astype(example.dtype), _dot(x, narrow, (batch, batch))


def _dot(left: Array, right: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=jnp.float32)


product.defvjp(_product, _product_backward)


@dataclass(frozen=True)
class Numerics:
    """What a tower computes in.

    Attributes:
        activations: what blocks hand to each other; sums and normalisations are float32 whatever it is.
        operands: of matrix products with parameters.
        epsilon: added to a variance before its root is taken.
    """

    activations: Any
    operands: Any
    epsilon: float = 1e-5


class Linear(nn.Module):
    """Tensor product of the last axes of the input with a kernel, and a bias."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    numerics: Numerics
    kernel_init: Initializer
    bias_init: Initializer | None = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.param("kernel", self.kernel_init, (*self.in_shape, *self.out_shape))
        y: Any = product(x, kernel, len(self.in_shape), self.numerics.operands)
        if self.bias_init is not None:
            y = y + align(self.param("bias", self.bias_init, self.out_shape), y)
        return y.astype(self.numerics.activations)


class LayerNorm(nn.Module):
    """Layer normalisation in float32, returned as activations."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "... w"]) -> Float[Array, "... w"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normalised = centred * jax.lax.rsqrt(variance + self.numerics.epsilon)
        return (normalised * align(scale, x) + align(bias, x)).astype(self.numerics.activations)


def activation(kind: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """QuickGELU (openai/CLIP `model.py`), or GELU, exact or by tanh (arXiv 1606.08415, section 2)."""
    match kind:
        case Activation.QUICK_GELU:
            return x * jax.nn.sigmoid(1.702 * x)
        case Activation.GELU:
            return jax.nn.gelu(x, approximate=False)
        case Activation.GELU_TANH:
            return jax.nn.gelu(x, approximate=True)


def attend(
    query: Float[Array, "b n l d"],
    key: Float[Array, "b n k d"],
    value: Float[Array, "b n k d"],
    visible: Bool[Array, "#b #n #l k"] | None = None,
) -> Float[Array, "b l n d"]:
    """Softmax attention; logits and softmax in float32."""
    logits = jnp.einsum("bnqd,bnkd->bnqk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bnqk,bnkd->bnqd", weights, value).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Multi-head self-attention."""

    num_heads: int
    causal: bool
    numerics: Numerics
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"], seen: Bool[Array, "b l"] | None = None) -> Float[Array, "b l w"]:
        length, width = x.shape[1:]
        heads = (3, self.num_heads, width // self.num_heads)
        qkv = Linear((width,), heads, self.numerics, self.init.qkv, name="qkv")(x)
        # Batched matrix products want heads outside tokens; on the CPU this order is 2.5 times as fast.
        query, key, value = jnp.transpose(qkv, (2, 0, 3, 1, 4))  # each [b, n, l, d]
        visible = jnp.tril(jnp.ones((length, length), bool))[None, None] if self.causal else None
        if seen is not None:
            among = seen[:, None, None]
            visible = among if visible is None else visible & among
        mixed = attend(query, key, value, visible)
        return Linear(heads[1:], (width,), self.numerics, self.init.attn_out, name="out")(mixed)


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
    def __call__(self, queries: Float[Array, "b l v"], x: Float[Array, "b k w"]) -> Float[Array, "b l o"]:
        heads = (self.num_heads, self.width // self.num_heads)

        def project(name: str, tokens: Float[Array, "b l w"]) -> Float[Array, "b n l d"]:
            linear = Linear((tokens.shape[-1],), heads, self.numerics, self.init.qkv, name=name)
            return linear(tokens).transpose(0, 2, 1, 3)

        mixed = attend(project("q", queries), project("k", x), project("v", x))
        return Linear(heads, (self.out_dim,), self.numerics, self.init.attn_out, name="out")(mixed)


class Mlp(nn.Module):
    """Two layers with a non-linearity between."""

    mlp_dim: int
    kind: Activation
    numerics: Numerics
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"]) -> Float[Array, "b l w"]:
        width = x.shape[-1]
        hidden = Linear((width,), (self.mlp_dim,), self.numerics, self.init.fc_in, torch_uniform(width), name="fc_in")(
            x
        )
        hidden = constrain(activation(self.kind, hidden), "batch", None, "mlp")
        return Linear(
            (self.mlp_dim,), (width,), self.numerics, self.init.fc_out, torch_uniform(self.mlp_dim), name="fc_out"
        )(hidden)


class Block(nn.Module):
    """One pre-norm residual block, in the form that `nn.scan` wants: carry in, (carry, None) out.

    `seen`: tokens that may be attended to; None: all of them.
    """

    num_heads: int
    mlp_dim: int
    causal: bool
    kind: Activation
    numerics: Numerics
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"], seen: Bool[Array, "b l"] | None) -> tuple[Float[Array, "b l w"], None]:
        x = x + Attention(self.num_heads, self.causal, self.numerics, self.init, name="attn")(
            LayerNorm(self.numerics, name="ln_1")(x), seen
        )
        x = constrain(x, "batch", None, None)
        x = x + Mlp(self.mlp_dim, self.kind, self.numerics, self.init, name="mlp")(
            LayerNorm(self.numerics, name="ln_2")(x)
        )
        return constrain(x, "batch", None, None), None


def tower_projection(
    x: Float[Array, "b w"], projection: Projection, width: int, embed_dim: int, numerics: Numerics
) -> Float[Array, "b e"]:
    """What a tower has pooled, as its embedding before normalisation; for use inside a module."""
    if projection is Projection.NONE:
        return x
    bias = nn.initializers.zeros if projection is Projection.AFFINE else None
    return Linear((x.shape[-1],), (embed_dim,), numerics, nn.initializers.normal(width**-0.5), bias, name="proj")(x)


def stack_blocks(block: type[nn.Module], depth: int, model: ModelConfig) -> type[nn.Module]:
    """`depth` blocks with parameters and statistics stacked along the first axis; all get the same second input."""
    everyone: Any = nn.broadcast
    return nn.scan(
        remat_block(block, model.remat, scanned=model.scan_layers),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=everyone,
        length=depth,
        unroll=1 if model.scan_layers else depth,
    )


def remat_block(block: type[nn.Module], policy: Remat, *, scanned: bool) -> type[nn.Module]:
    """A block under a rematerialisation policy; a loop keeps recomputation from being merged away by itself."""
    match policy:
        case Remat.NONE:
            return block
        case Remat.DOTS:
            saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
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
    def __call__(self, x: Float[Array, "b l w"], seen: Bool[Array, "b l"] | None = None) -> Float[Array, "b l w"]:
        tower = self.tower
        stack = stack_blocks(Block, tower.depth, self.model)
        mlp_dim = tower.mlp_dim or 4 * tower.width
        blocks = stack(tower.num_heads, mlp_dim, self.causal, tower.activation, self.numerics, self.init, name="blocks")
        return blocks(x, seen)[0]
