"""Two towers and a learned scale: the model as three pure functions of `params`.

Axes: b batch, h height, w width, l tokens, e embed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from clipjax.config import DataConfig, ModelConfig
from clipjax.models.text import TextTower
from clipjax.models.transformer import Dtypes
from clipjax.models.vit import ImageTower
from clipjax.typing import Batch, Key, Params


@dataclass(frozen=True)
class Clip:
    """The pure functions of one model.

    Attributes:
        init: key -> params, all float32.
        encode_image: params, normalised pixels [b, h, w, 3] -> unit-norm float32 [b, e].
        encode_text: params, tokens [b, l] -> unit-norm float32 [b, e].
    """

    init: Callable[[Key], Params]
    encode_image: Callable[[Params, Float[Array, "b h w c"]], Float[Array, "b e"]]
    encode_text: Callable[[Params, Int[Array, "b l"]], Float[Array, "b e"]]


def build_clip(config: ModelConfig) -> Clip:
    """The model that a config describes."""
    activations: Any = jnp.dtype(config.compute_dtype.value)
    dtypes = Dtypes(activations, activations if config.matmul_dtype is None else jnp.dtype(config.matmul_dtype.value))
    image_tower: nn.Module = ImageTower(config, dtypes)
    text_tower: nn.Module = TextTower(config, dtypes)

    def init(key: Key) -> Params:
        image_key, text_key = jax.random.split(key)
        size = config.image.image_size
        image = image_tower.init(image_key, jnp.zeros((1, size, size, 3), jnp.float32))
        text = text_tower.init(text_key, jnp.zeros((1, config.text.context_length), jnp.int32))
        params = {
            "image": dict(image["params"]),
            "text": dict(text["params"]),
            "log_logit_scale": jnp.asarray(math.log(config.init_logit_scale), jnp.float32),
        }
        if config.init_logit_bias is not None:
            params["logit_bias"] = jnp.asarray(config.init_logit_bias, jnp.float32)
        return params

    def encode_image(params: Params, pixels: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        return unit_norm(image_tower.apply({"params": params["image"]}, pixels))  # type: ignore[arg-type]

    def encode_text(params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
        return unit_norm(text_tower.apply({"params": params["text"]}, tokens))  # type: ignore[arg-type]

    return Clip(init, encode_image, encode_text)


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of a model's parameters; nothing is allocated, no device is touched."""
    clip = build_clip(config)
    return jax.eval_shape(lambda: clip.init(jax.random.key(0)))


def unit_norm(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Rows scaled to Euclidean length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def normalise_pixels(image: UInt8[Array, "b h w c"], data: DataConfig) -> Float[Array, "b h w c"]:
    """uint8 pixels to float32 with the mean and standard deviation of the config taken out."""
    mean = jnp.asarray(data.mean, jnp.float32).reshape(1, 1, 1, -1)
    std = jnp.asarray(data.std, jnp.float32).reshape(1, 1, 1, -1)
    return (image.astype(jnp.float32) / 255 - mean) / std


def make_encode(
    clip: Clip, data: DataConfig
) -> Callable[[Params, Batch, Key], tuple[Array, Array, Array, Array | None]]:
    """`encode(params, batch, key) -> (image_embed, text_embed, logit_scale, logit_bias)`, what a loss takes."""

    def encode(params: Params, batch: Batch, key: Key) -> tuple[Array, Array, Array, Array | None]:
        del key  # no tower draws random numbers yet
        image_embed = clip.encode_image(params, normalise_pixels(batch["image"], data))
        text_embed = clip.encode_text(params, batch["tokens"])
        return image_embed, text_embed, jnp.exp(params["log_logit_scale"]), params.get("logit_bias")

    return encode
