"""The image tower as the paper's modified ResNet (arXiv 2103.00020, section 2.4; openai/CLIP `model.py`).

Three convolutions before the first stage, strides by average pooling (arXiv 1904.11486), attention pooling at the end.
BatchNorm takes its statistics over the global batch; running ones live in the collection `batch_stats`.
Blocks of a stage after its first are stacked along a leading axis. Axes: b batch, h height, w width, c channels.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.config import ModelConfig, ResNetConfig
from clipjax.models.layers import Initializer, Numerics, align, torch_uniform
from clipjax.models.pool import MeanQueryPool
from clipjax.models.transformer import remat_block, stack_blocks
from clipjax.runtime.sharding import Rules, constrain

RULES: Rules = (
    (r"stage_\d/(conv_\d)/kernel", ("layers", None, None, None, "width")),
    (r"stage_\d/bn_\w+/(scale|bias|mean|variance)", ("layers", None)),
    (r"(conv_\d|downsample)/kernel", (None, None, None, "width")),
    (r"bn_\w+/(scale|bias|mean|variance)", (None,)),
)
"""Dimensions of the tower's parameters and running statistics; those of its pooling lie beside that."""

MOMENTUM = 0.1
"""Share of the newest batch in the running statistics, as in PyTorch."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Float[Array, "b h w c"], kernel: Float[Array, "s s c o"], stride: int) -> Float[Array, "b i j o"]:
    """Convolve with padding that keeps the size at stride 1; operands have the dtype of x, the result is float32.

    The kernel's gradient, which devices add up, is float32 as well: see `layers.matmul`.
    """
    return _convolve(x, kernel.astype(x.dtype), stride)


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    border = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((border, border), (border, border)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
    )


def _convolve_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel.astype(x.dtype), stride), (x, kernel)


def _convolve_backward(stride: int, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    """Return gradients of x and kernel. Operands are rounded as in the forward pass; sums are float32."""
    x, kernel = saved
    wide = x.astype(jnp.float32), kernel.astype(x.dtype).astype(jnp.float32)
    pull_back = jax.vjp(lambda x, kernel: _convolve(x, kernel, stride), *wide)[1]
    x_grad, kernel_grad = pull_back(grad.astype(x.dtype).astype(jnp.float32))
    return x_grad.astype(x.dtype), kernel_grad


convolve.defvjp(_convolve_forward, _convolve_backward)


class Convolution(nn.Module):
    """Convolution without bias."""

    channels: int
    size: int
    numerics: Numerics
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j o"]:
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", torch_uniform(self.size * self.size * x.shape[-1]), shape)
        return convolve(x.astype(self.numerics.matmul_dtype), kernel, self.stride)


class BatchNorm(nn.Module):
    """Batch normalisation over the global batch, in float32."""

    numerics: Numerics
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        channels = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        variance = self.variable("batch_stats", "variance", jnp.ones, channels, jnp.float32)
        x = x.astype(jnp.float32)
        if train:
            batch_mean = x.mean((0, 1, 2))
            batch_variance = jnp.square(x - align(batch_mean, x)).mean((0, 1, 2))
            if not self.is_initializing():
                count = x.shape[0] * x.shape[1] * x.shape[2]
                unbiased = batch_variance * (count / max(count - 1, 1))
                mean.value = (1 - MOMENTUM) * mean.value + MOMENTUM * batch_mean
                variance.value = (1 - MOMENTUM) * variance.value + MOMENTUM * unbiased
        else:
            batch_mean, batch_variance = mean.value, variance.value
        factor = scale * jax.lax.rsqrt(batch_variance + self.numerics.epsilon)
        y = (x - align(batch_mean, x)) * align(factor, x) + align(bias, x)
        return y.astype(self.numerics.compute_dtype)


def average_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b i j c"]:
    """Return means over squares that do not overlap."""
    if size == 1:
        return x
    b, h, w, c = x.shape
    return x.reshape(b, h // size, size, w // size, size, c).mean((2, 4), dtype=jnp.float32).astype(x.dtype)


class Bottleneck(nn.Module):
    """One residual block, in the form that `nn.scan` wants: carry in, (carry, None) out."""

    planes: int
    stride: int
    downsample: bool
    train: bool
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], _: None) -> tuple[Float[Array, "b i j o"], None]:
        numerics, train, wide = self.numerics, self.train, 4 * self.planes
        y = Convolution(self.planes, 1, numerics, name="conv_1")(x)
        y = nn.relu(BatchNorm(numerics, name="bn_1")(y, train))
        y = Convolution(self.planes, 3, numerics, name="conv_2")(y)
        y = nn.relu(BatchNorm(numerics, name="bn_2")(y, train))
        y = Convolution(wide, 1, numerics, name="conv_3")(average_pool(y, self.stride))
        y = BatchNorm(numerics, nn.initializers.zeros, name="bn_3")(y, train)
        if self.downsample:
            x = Convolution(wide, 1, numerics, name="downsample")(average_pool(x, self.stride))
            x = BatchNorm(numerics, name="bn_downsample")(x, train)
        return constrain(nn.relu(y + x), "batch", None, None, None), None


class ModifiedResNet(nn.Module):
    """Image tower: normalised pixels in, the embedding before normalisation and the tokens for a caption out."""

    tower: ResNetConfig
    model: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b h w c"], *, train: bool = False
    ) -> tuple[Float[Array, "b e"], Float[Array, "b k v"]]:
        width, numerics = self.tower.width, self.numerics
        x: Any = pixels
        for number, (channels, stride) in enumerate(((width // 2, 2), (width // 2, 1), (width, 1)), start=1):
            x = Convolution(channels, 3, numerics, stride, name=f"conv_{number}")(x)
            x = nn.relu(BatchNorm(numerics, name=f"bn_{number}")(x, train))
        x = constrain(average_pool(x, 2), "batch", None, None, None)
        block = remat_block(Bottleneck, self.model.remat, scanned=False)
        for stage, depth in enumerate(self.tower.layers):
            planes = width * 2**stage
            x, _ = block(planes, 1 if stage == 0 else 2, True, train, numerics, name=f"stage_{stage + 1}_first")(
                x, None
            )
            if depth > 1:
                rest = stack_blocks(Bottleneck, depth - 1, self.model)
                x, _ = rest(planes, 1, False, train, numerics, name=f"stage_{stage + 1}")(x, None)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return MeanQueryPool(self.tower.num_heads, self.model.embed_dim, numerics, name="pool")(x), x
