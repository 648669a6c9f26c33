"""The pre-norm transformer that all towers share: attention, MLP, block, and the stack of blocks.

Read bottom up from `Transformer`. Axes: b batch, l tokens, k tokens attended to, w width, n heads, d head dim.
Parameters of all blocks are stacked along a leading layer axis, whether the stack is scanned or unrolled, so a
checkpoint does not depend on that choice.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from clipjax.config import Activation, AttentionMethod, ModelConfig, Projection, Remat, TextTransformerConfig, ViTConfig
from clipjax.models.fused_attention import fused_attention, is_supported
from clipjax.sharding import constrain, platform, runs_on, shards

Initializer = Any

PRODUCT, HIDDEN = "product", "hidden"
"""Names, for `remat_block`, of what comes out of a matrix product, and out of the first one of an MLP."""


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: Float[Array, "... w"], bias: Float[Array, " w"], dtype: Any) -> Float[Array, "... w"]:
    """Their sum, of which the caller keeps no more than `dtype`.

    The bias's gradient is a product with ones, exact in `dtype`: where nothing else reads the whole gradient at the
    same time, a TPU's compiler estimates a third of a sum's time for it.
    """
    del dtype
    return y + align(bias, y)


def _add_bias_backward(dtype: Any, _: None, grad: Array) -> tuple[Array, Array]:
    ones, rows = jnp.ones(grad.shape[:-1], dtype), tuple(range(grad.ndim - 1))
    return grad, _dot(ones, grad.astype(dtype), (rows, rows))


add_bias.defvjp(lambda y, bias, dtype: (add_bias(y, bias, dtype), None), _add_bias_backward)


@dataclass(frozen=True)
class Numerics:
    """What a tower computes in.

    Attributes:
        activations: what blocks hand to each other; sums and normalisations are float32 whatever it is.
        operands: of matrix products with parameters.
        epsilon: added to a variance before its root is taken.
        attention: what computes self-attention.
    """

    activations: Any
    operands: Any
    epsilon: float = 1e-5
    attention: AttentionMethod = AttentionMethod.AUTO


class Linear(nn.Module):
    """Tensor product of the last axes of the input with a kernel, and a bias.

    `saved_as` names the result for `remat_block`; `merge` makes of kernel and bias those of a product of matrices.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    numerics: Numerics
    kernel_init: Initializer
    bias_init: Initializer | None = nn.initializers.zeros
    saved_as: str = PRODUCT
    merge: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.param("kernel", self.kernel_init, (*self.in_shape, *self.out_shape))
        axes, merge = len(self.in_shape), self.merge
        if merge is not None:
            kernel, axes = merge(kernel), 1
        y: Any = product(x, kernel, axes, self.numerics.operands)
        if self.bias_init is not None:
            bias = self.param("bias", self.bias_init, self.out_shape)
            y = y + align(bias, y) if merge is None else add_bias(y, merge(bias), self.numerics.activations)
        return checkpoint_name(y.astype(self.numerics.activations), self.saved_as)


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


def cudnn_attention(qkv: Float[Array, "b l 3 n d"], *, causal: bool) -> Float[Array, "b l n d"]:
    """`attend` by NVIDIA's library, which trains on even lengths only: an odd one gets a token that nobody sees."""
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


def is_fused(method: AttentionMethod, shape: Sequence[int], num_heads: int, head_dim: int) -> bool:
    """Whether one kernel computes the attention of such tokens and heads on the mesh in force."""
    wanted = method is AttentionMethod.FUSED or (method is AttentionMethod.AUTO and platform() == "tpu")
    return wanted and is_supported(shape[0], shape[1], num_heads, head_dim)


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
        if seen is None and is_fused(self.numerics.attention, x.shape, *heads[1:]):
            return self._fused(x, heads)
        qkv = Linear((width,), heads, self.numerics, self.init.qkv, name="qkv")(x)
        if seen is None and self.numerics.attention is AttentionMethod.CUDNN:
            mixed = checkpoint_name(cudnn_attention(qkv, causal=self.causal), PRODUCT)
            return Linear(heads[1:], (width,), self.numerics, self.init.attn_out, name="out")(mixed)
        # Batched matrix products want heads outside tokens; on the CPU this order is 2.5 times as fast.
        query, key, value = jnp.transpose(qkv, (2, 0, 3, 1, 4))  # each [b, n, l, d]
        visible = jnp.tril(jnp.ones((length, length), bool))[None, None] if self.causal else None
        if seen is not None:
            among = seen[:, None, None]
            visible = among if visible is None else visible & among
        mixed = checkpoint_name(attend(query, key, value, visible), PRODUCT)
        return Linear(heads[1:], (width,), self.numerics, self.init.attn_out, name="out")(mixed)

    def _fused(self, x: Float[Array, "b l w"], heads: tuple[int, int, int]) -> Float[Array, "b l w"]:
        """The same in one kernel, which takes and gives all heads side by side."""
        width, parts = x.shape[-1], shards("heads")

        def by_part(parameter: Array) -> Array:
            """[..., 3, n, d] -> [..., 3 w]: queries, keys and values of each part of the heads side by side."""
            *outer, _, count, dim = parameter.shape
            apart = parameter.reshape(*outer, 3, parts, count // parts, dim)
            merged = jnp.moveaxis(apart, -4, -3).reshape(*outer, 3 * width)
            # Else the compiler takes the gradient's product apart into heads, and copies activations for it.
            return jax.lax.optimization_barrier(merged)

        qkv = Linear((width,), heads, self.numerics, self.init.qkv, merge=by_part, name="qkv")(x)
        qkv = constrain(qkv, "batch", None, "heads")
        interpret = self.numerics.attention is AttentionMethod.FUSED and runs_on() != "tpu"
        mixed = fused_attention(qkv, num_heads=heads[1], causal=self.causal, interpret=interpret)
        mixed = checkpoint_name(mixed, PRODUCT)
        merge = lambda parameter: parameter.reshape(-1, width) if parameter.ndim > 1 else parameter  # noqa: E731
        return Linear(heads[1:], (width,), self.numerics, self.init.attn_out, merge=merge, name="out")(mixed)


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
        fc_in = Linear(
            (width,), (self.mlp_dim,), self.numerics, self.init.fc_in, torch_uniform(width), HIDDEN, name="fc_in"
        )
        hidden = fc_in(x)
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
        case Remat.DOTS | Remat.MLP:
            names = (PRODUCT, HIDDEN) if policy is Remat.DOTS else (PRODUCT,)
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
    def __call__(self, x: Float[Array, "b l w"], seen: Bool[Array, "b l"] | None = None) -> Float[Array, "b l w"]:
        tower = self.tower
        stack = stack_blocks(Block, tower.depth, self.model)
        mlp_dim = tower.mlp_dim or 4 * tower.width
        blocks = stack(tower.num_heads, mlp_dim, self.causal, tower.activation, self.numerics, self.init, name="blocks")
        return blocks(x, seen)[0]
