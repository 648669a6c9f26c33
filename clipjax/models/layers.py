"""Layers that all towers share: product with a kernel, normalisation, activation, projection, and initialisers.

Axes: b batch, l tokens, w width, e embedding.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from clipjax.config import Activation, AttentionMethod, Projection

Initializer = Any

MATMUL, HIDDEN = "product", "hidden"
"""Names, for `remat_block`, of the result of a matrix product, and of the first one of an MLP."""


def torch_uniform(fan_in: int) -> Initializer:
    """Return U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear and convolution layers, and biases."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def align(parameter: Array, x: Array) -> Array:
    """Return a parameter with leading axes of length 1, so that it broadcasts to x without rank promotion."""
    return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int, dtype: Any) -> Float[Array, "..."]:
    """Contract the last `axes` of x with the first of the kernel; operands in `dtype`, result float32.

    The kernel's gradient is float32 as well, so that devices sum it in float32: were the kernel cast outside, its
    gradient would be rounded to `dtype` before the sum.
    """
    return _matmul_forward(x, kernel, axes, dtype)[0]


def _matmul_forward(x: Array, kernel: Array, axes: int, dtype: Any) -> tuple[Array, tuple[Array, Array, Any]]:
    contract = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    narrow = x.astype(dtype)
    return _dot(narrow, kernel.astype(dtype), contract), (narrow, kernel, jnp.zeros((), x.dtype))


def _matmul_backward(axes: int, dtype: Any, saved: tuple[Array, Array, Any], grad: Array) -> tuple[Array, Array]:
    x, kernel, example = saved
    narrow, batch = grad.astype(dtype), tuple(range(x.ndim - axes))
    outputs = tuple(range(x.ndim - axes, grad.ndim))
    x_grad = _dot(narrow, kernel.astype(dtype), (outputs, tuple(range(axes, kernel.ndim))))
    return x_grad.astype(example.dtype), _dot(x, narrow, (batch, batch))


def _dot(left: Array, right: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=jnp.float32)


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: Float[Array, "... w"], bias: Float[Array, " w"], dtype: Any) -> Float[Array, "... w"]:
    """Return the sum, of which the caller keeps no more than `dtype`.

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
    """Dtypes and methods of a tower's computation.

    Attributes:
        compute_dtype: of activations between blocks; sums and normalisations are float32 whatever it is.
        matmul_dtype: of the operands of matrix products with parameters.
        epsilon: added to a variance before its root is taken.
        attention: the method of self-attention.
    """

    compute_dtype: Any
    matmul_dtype: Any
    epsilon: float = 1e-5
    attention: AttentionMethod = AttentionMethod.AUTO


class Linear(nn.Module):
    """Tensor product of the last axes of the input with a kernel, and a bias.

    `saved_as` names the result for `remat_block`; `merge` reshapes kernel and bias for a product of matrices.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    numerics: Numerics
    kernel_init: Initializer
    bias_init: Initializer | None = nn.initializers.zeros
    saved_as: str = MATMUL
    merge: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.param("kernel", self.kernel_init, (*self.in_shape, *self.out_shape))
        axes, merge = len(self.in_shape), self.merge
        if merge is not None:
            kernel, axes = merge(kernel), 1
        y: Any = matmul(x, kernel, axes, self.numerics.matmul_dtype)
        if self.bias_init is not None:
            bias = self.param("bias", self.bias_init, self.out_shape)
            y = y + align(bias, y) if merge is None else add_bias(y, merge(bias), self.numerics.compute_dtype)
        return checkpoint_name(y.astype(self.numerics.compute_dtype), self.saved_as)


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
        return (normalised * align(scale, x) + align(bias, x)).astype(self.numerics.compute_dtype)


def activate(activation: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply QuickGELU (openai/CLIP `model.py`), or GELU, exact or by tanh (arXiv 1606.08415, section 2)."""
    match activation:
        case Activation.QUICK_GELU:
            return x * jax.nn.sigmoid(1.702 * x)
        case Activation.GELU:
            return jax.nn.gelu(x, approximate=False)
        case Activation.GELU_TANH:
            return jax.nn.gelu(x, approximate=True)


FEATURES = "features"
"""Name under which a tower with a projection keeps its pooled vector, for those who ask for it."""


def tower_projection(
    x: Float[Array, "b w"], projection: Projection, width: int, embed_dim: int, numerics: Numerics
) -> Float[Array, "b e"]:
    """Project the pooled vector of a tower to its embedding before normalisation; for use inside a module."""
    if projection is Projection.NONE:
        return x
    bias = nn.initializers.zeros if projection is Projection.AFFINE else None
    return Linear((x.shape[-1],), (embed_dim,), numerics, nn.initializers.normal(width**-0.5), bias, name="proj")(x)
