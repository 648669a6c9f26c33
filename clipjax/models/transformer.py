"""The pre-norm transformer that both towers share: attention, MLP, block, and the stack of blocks.

Read bottom up from `Transformer`. Axes: b batch, l tokens, w width, n heads, d head dim, m MLP dim.
Parameters of all blocks are stacked along a leading layer axis, whether the stack is scanned or unrolled, so a
checkpoint does not depend on that choice.
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.config import Activation, ModelConfig, Remat
from clipjax.sharding import constrain

Initializer = Any
LAYER_NORM_EPSILON = 1e-5


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
class Dtypes:
    """What a tower computes in.

    Attributes:
        activations: what blocks hand to each other; sums and normalisations are float32 whatever it is.
        operands: of matrix products with parameters.
    """

    activations: Any
    operands: Any


class Projection(nn.Module):
    """Tensor product of the last axes of the input with a kernel, and a bias."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtypes: Dtypes
    kernel_init: Initializer
    bias_init: Initializer | None = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.param("kernel", self.kernel_init, (*self.in_shape, *self.out_shape))
        y: Any = product(x, kernel, len(self.in_shape), self.dtypes.operands)
        if self.bias_init is not None:
            y = y + align(self.param("bias", self.bias_init, self.out_shape), y)
        return y.astype(self.dtypes.activations)


class LayerNorm(nn.Module):
    """Layer normalisation in float32, returned as activations."""

    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "... w"]) -> Float[Array, "... w"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normalised = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
        return (normalised * align(scale, x) + align(bias, x)).astype(self.dtypes.activations)


def activation(kind: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """QuickGELU (openai/CLIP `model.py`) or the exact GELU (arXiv 1606.08415)."""
    match kind:
        case Activation.QUICK_GELU:
            return x * jax.nn.sigmoid(1.702 * x)
        case Activation.GELU:
            return jax.nn.gelu(x, approximate=False)


class Attention(nn.Module):
    """Multi-head self-attention; logits and softmax in float32."""

    num_heads: int
    causal: bool
    dtypes: Dtypes
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"]) -> Float[Array, "b l w"]:
        length, width = x.shape[1:]
        head_dim = width // self.num_heads
        heads = (3, self.num_heads, head_dim)
        qkv = Projection((width,), heads, self.dtypes, self.init.qkv, name="qkv")(x)
        # Batched matrix products want heads outside tokens; on the CPU this order is 2.5 times as fast.
        query, key, value = jnp.transpose(qkv, (2, 0, 3, 1, 4))  # each [b, n, l, d]
        logits = jnp.einsum("bnqd,bnkd->bnqk", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
        if self.causal:
            visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
            logits = jnp.where(visible, logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtypes.activations)
        mixed = jnp.einsum("bnqk,bnkd->bnqd", weights, value).transpose(0, 2, 1, 3)
        return Projection(heads[1:], (width,), self.dtypes, self.init.attn_out, name="out")(mixed)


class Mlp(nn.Module):
    """Two layers with a non-linearity between."""

    mlp_dim: int
    kind: Activation
    dtypes: Dtypes
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"]) -> Float[Array, "b l w"]:
        width = x.shape[-1]
        hidden = Projection(
            (width,), (self.mlp_dim,), self.dtypes, self.init.fc_in, torch_uniform(width), name="fc_in"
        )(x)
        hidden = constrain(activation(self.kind, hidden), "batch", None, "mlp")
        return Projection(
            (self.mlp_dim,), (width,), self.dtypes, self.init.fc_out, torch_uniform(self.mlp_dim), name="fc_out"
        )(hidden)


class Block(nn.Module):
    """One pre-norm residual block, in the form that `nn.scan` wants: carry in, (carry, None) out."""

    num_heads: int
    mlp_dim: int
    causal: bool
    kind: Activation
    dtypes: Dtypes
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"], _: None) -> tuple[Float[Array, "b l w"], None]:
        x = x + Attention(self.num_heads, self.causal, self.dtypes, self.init, name="attn")(
            LayerNorm(self.dtypes, name="ln_1")(x)
        )
        x = constrain(x, "batch", None, None)
        x = x + Mlp(self.mlp_dim, self.kind, self.dtypes, self.init, name="mlp")(LayerNorm(self.dtypes, name="ln_2")(x))
        return constrain(x, "batch", None, None), None


def remat_block(policy: Remat, *, scanned: bool) -> type[nn.Module]:
    """The block class under a rematerialisation policy; a loop keeps recomputation from being merged away by itself."""
    match policy:
        case Remat.NONE:
            return Block
        case Remat.DOTS:
            saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            return nn.remat(Block, policy=saved, prevent_cse=not scanned)
        case Remat.FULL:
            return nn.remat(Block, prevent_cse=not scanned)


class Transformer(nn.Module):
    """A stack of blocks whose parameters are stacked along the first axis."""

    depth: int
    num_heads: int
    mlp_dim: int
    causal: bool
    model: ModelConfig
    dtypes: Dtypes
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "b l w"]) -> Float[Array, "b l w"]:
        stack = nn.scan(
            remat_block(self.model.remat, scanned=self.model.scan_layers),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=1 if self.model.scan_layers else self.depth,
        )
        blocks = stack(
            self.num_heads, self.mlp_dim, self.causal, self.model.activation, self.dtypes, self.init, name="blocks"
        )
        return blocks(x, None)[0]
