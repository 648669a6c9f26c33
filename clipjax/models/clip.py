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

from clipjax.config import CbowConfig, DataConfig, ModelConfig, ResNetConfig, TextTransformerConfig, ViTConfig
from clipjax.models.resnet import ModifiedResNet
from clipjax.models.text import Cbow, TextTransformer
from clipjax.models.transformer import Numerics
from clipjax.models.vit import VisionTransformer
from clipjax.trees import map_with_name
from clipjax.typing import Batch, Encoded, Key, Params


@dataclass(frozen=True)
class Clip:
    """The pure functions of one model.

    Attributes:
        init: key -> params, all float32.
        init_batch_stats: the running statistics to start with; empty for models without BatchNorm.
        encode_image: params, normalised pixels [b, h, w, 3] -> unit-norm float32 [b, e]. For evaluation: BatchNorm uses
            `params["batch_stats"]`, and every patch is looked at.
        encode_text: params, tokens [b, l] -> unit-norm float32 [b, e].
        train_image: params, batch statistics, pixels, key -> unit-norm float32 [b, e] and the statistics afterwards.
    """

    init: Callable[[Key], Params]
    init_batch_stats: Callable[[], Params]
    encode_image: Callable[[Params, Float[Array, "b h w c"]], Float[Array, "b e"]]
    encode_text: Callable[[Params, Int[Array, "b l"]], Float[Array, "b e"]]
    train_image: Callable[[Params, Params, Float[Array, "b h w c"], Key], tuple[Float[Array, "b e"], Params]]


def _towers(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """The image tower and the text tower."""
    activations: Any = jnp.dtype(config.compute_dtype.value)
    operands = activations if config.matmul_dtype is None else jnp.dtype(config.matmul_dtype.value)

    def numerics(tower: Any) -> Numerics:
        return Numerics(activations, operands, getattr(tower, "layer_norm_epsilon", 1e-5))

    image: nn.Module
    match config.image:
        case ViTConfig():
            image = VisionTransformer(config.image, config, numerics(config.image))
        case ResNetConfig():
            image = ModifiedResNet(config.image, config, numerics(config.image))
    text: nn.Module
    match config.text:
        case TextTransformerConfig():
            text = TextTransformer(config.text, config, numerics(config.text))
        case CbowConfig():
            text = Cbow(config.text, config, numerics(config.text))
    return image, text


def build_clip(config: ModelConfig) -> Clip:
    """The model that a config describes."""
    image_tower, text_tower = _towers(config)
    pixels = jax.ShapeDtypeStruct((1, config.image.image_size, config.image.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)

    def init(key: Key) -> Params:
        image_key, text_key = jax.random.split(key)
        image = image_tower.init(image_key, jnp.zeros(pixels.shape, pixels.dtype))
        text = text_tower.init(text_key, jnp.zeros(tokens.shape, tokens.dtype))
        params = {
            "image": dict(image["params"]),
            "text": dict(text["params"]),
            "log_logit_scale": jnp.asarray(math.log(config.init_logit_scale), jnp.float32),
        }
        if config.init_logit_bias is not None:
            params["logit_bias"] = jnp.asarray(config.init_logit_bias, jnp.float32)
        return params

    def init_batch_stats() -> Params:
        shapes = jax.eval_shape(lambda: image_tower.init(jax.random.key(0), jnp.zeros(pixels.shape, pixels.dtype)))
        ones = lambda name: float(name.endswith("variance"))  # noqa: E731
        return map_with_name(lambda name, x: jnp.full(x.shape, ones(name), x.dtype), shapes.get("batch_stats", {}))

    def encode_image(params: Params, pixels: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        variables = {"params": params["image"], "batch_stats": params.get("batch_stats", {})}
        return unit_norm(image_tower.apply(variables, pixels))  # type: ignore[arg-type]

    def encode_text(params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
        return unit_norm(text_tower.apply({"params": params["text"]}, tokens))  # type: ignore[arg-type]

    def train_image(
        params: Params, batch_stats: Params, pixels: Float[Array, "b h w c"], key: Key
    ) -> tuple[Float[Array, "b e"], Params]:
        variables = {"params": params["image"], "batch_stats": batch_stats}
        rngs, mutable = {"patch_dropout": key}, ["batch_stats"]
        changed: dict[str, Any]
        x, changed = image_tower.apply(variables, pixels, train=True, rngs=rngs, mutable=mutable)  # type: ignore[misc]
        return unit_norm(x), changed.get("batch_stats") or {}

    return Clip(init, init_batch_stats, encode_image, encode_text, train_image)


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of a model's parameters; nothing is allocated, no device is touched."""
    clip = build_clip(config)
    return jax.eval_shape(lambda: clip.init(jax.random.key(0)))


def abstract_model(config: ModelConfig) -> Params:
    """`abstract_params`, and `batch_stats` among them where there are any: what evaluation needs."""
    batch_stats = jax.eval_shape(build_clip(config).init_batch_stats)
    return {**abstract_params(config), **({"batch_stats": batch_stats} if batch_stats else {})}


def unit_norm(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Rows scaled to Euclidean length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def normalise_pixels(image: UInt8[Array, "b h w c"], data: DataConfig) -> Float[Array, "b h w c"]:
    """uint8 pixels to float32 with the mean and standard deviation of the config taken out."""
    mean = jnp.asarray(data.mean, jnp.float32).reshape(1, 1, 1, -1)
    std = jnp.asarray(data.std, jnp.float32).reshape(1, 1, 1, -1)
    return (image.astype(jnp.float32) / 255 - mean) / std


def make_encode(clip: Clip, data: DataConfig) -> Callable[[Params, Batch, Key], Encoded]:
    """`encode(params, batch, key)` as training sees a batch: what a loss takes, and running statistics afterwards."""

    def encode(params: Params, batch: Batch, key: Key) -> Encoded:
        pixels = normalise_pixels(batch["image"], data)
        image_embed, batch_stats = clip.train_image(params, batch.get("batch_stats", {}), pixels, key)
        text_embed = clip.encode_text(params, batch["tokens"])
        return Encoded(
            image_embed, text_embed, jnp.exp(params["log_logit_scale"]), params.get("logit_bias"), batch_stats
        )

    return encode


def make_frozen_encode(clip: Clip, data: DataConfig) -> Callable[[Params, Batch, Key], Encoded]:
    """`encode(params, batch, key)` as evaluation sees a batch: a teacher's."""

    def encode(params: Params, batch: Batch, key: Key) -> Encoded:
        del key
        image_embed = clip.encode_image(params, normalise_pixels(batch["image"], data))
        text_embed = clip.encode_text(params, batch["tokens"])
        return Encoded(image_embed, text_embed, jnp.exp(params["log_logit_scale"]), params.get("logit_bias"))

    return encode
