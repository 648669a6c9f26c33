"""Two towers and a learned scale: the model as three pure functions of `params`.

Axes: b batch, h height, w width, l tokens, e embed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from clipjax.config import DataConfig, ModelConfig
from clipjax.models.captions import Decoder, caption_likelihood, words_likelihood
from clipjax.models.towers import build_caption_head, build_image_tower, build_text_tower
from clipjax.pytrees import leaf_paths, map_with_path, match_any
from clipjax.typing import Batch, Encoded, Key, Params


@dataclass(frozen=True)
class Clip:
    """The pure functions of one model. Parameters are float32; embeddings are unit-norm and float32.

    Attributes:
        init: key -> params.
        init_batch_stats: the running statistics to start with; empty for models without BatchNorm.
        encode_image: params, normalised pixels [b, h, w, 3] -> [b, e]. For evaluation: BatchNorm uses
            `params["batch_stats"]`, and every patch is looked at.
        encode_text: params, tokens [b, l] -> [b, e].
        train: params, batch statistics, pixels, tokens, key -> `Encoded`.
        likelihood: params, pixels [b, h, w, 3], tokens [n, l], longest -> log-likelihood of each text given each image
            [b, n]. Only for models that predict captions. No text may have more than `longest` tokens, its start and
            end among them; None: they may fill all places.
        look: params, pixels [b, h, w, 3] -> what a decoder sees of each image [b, k, v].
        next_logits: params, what is seen [b, k, v], tokens [b, l] -> logits of what follows each token [b, l, t]. Only
            for models with a decoder.
    """

    init: Callable[[Key], Params]
    init_batch_stats: Callable[[], Params]
    encode_image: Callable[[Params, Float[Array, "b h w c"]], Float[Array, "b e"]]
    encode_text: Callable[[Params, Int[Array, "b l"]], Float[Array, "b e"]]
    train: Callable[[Params, Params, Float[Array, "b h w c"], Int[Array, "b l"], Key], Encoded]
    likelihood: Callable[[Params, Float[Array, "b h w c"], Int[Array, "n l"], int | None], Float[Array, "b n"]]
    look: Callable[[Params, Float[Array, "b h w c"]], Float[Array, "b k v"]]
    next_logits: Callable[[Params, Float[Array, "b k v"], Int[Array, "b l"]], Float[Array, "b l t"]]


@dataclass(frozen=True)
class _Towers:
    """The modules, applied: what each of the functions of a `Clip` is put together from."""

    image: nn.Module
    text: nn.Module
    caption: nn.Module | None
    frozen: Sequence[str]

    def see(self, params: Params, pixels: Array) -> tuple[Array, Array]:
        """An image's embedding before normalisation, and its tokens."""
        variables = {"params": params["image"], "batch_stats": params.get("batch_stats", {})}
        return self.image.apply(variables, pixels)  # type: ignore[return-value]

    def see_in_training(self, params: Params, batch_stats: Params, pixels: Array, key: Key) -> tuple[Any, Params]:
        """What `see` gives with patch dropout and the batch's own statistics, and the running ones afterwards.

        A tower of which nothing is trained keeps its running statistics and uses them.
        """
        if batch_stats and all(match_any(self.frozen, f"image/{name}") for name in leaf_paths(params["image"])):
            return self.see({**params, "batch_stats": batch_stats}, pixels), batch_stats
        variables = {"params": params["image"], "batch_stats": batch_stats}
        rngs, mutable = {"patch_dropout": key}, ["batch_stats"]
        seen, changed = self.image.apply(variables, pixels, train=True, rngs=rngs, mutable=mutable)  # type: ignore[misc]
        return seen, changed.get("batch_stats") or {}

    def read(self, params: Params, tokens: Array) -> tuple[Array, Array | None]:
        """A text's embedding before normalisation, and its tokens."""
        return self.text.apply({"params": params["text"]}, tokens)  # type: ignore[return-value]

    def caption_inputs(self, embed: Array, seen: Array, words: Array | None) -> tuple[Any, ...]:
        """What of an image and a text the caption's module takes."""
        return (words, seen) if isinstance(self.caption, Decoder) else (embed,)

    def predict(self, params: Params, embed: Array, seen: Array, words: Array | None) -> Array:
        """Logits of the next tokens, or of a bag of them."""
        assert self.caption is not None
        given = self.caption_inputs(embed, seen, words)
        return self.caption.apply({"params": params["caption"]}, *given)  # type: ignore[return-value]

    def captions(
        self, params: Params, embed: Array, seen: Array, words: Array | None, tokens: Array
    ) -> tuple[Array, Array]:
        """Negative log-likelihoods of captions, and how many tokens each counts."""
        if isinstance(self.caption, Decoder):
            assert words is not None
            return caption_likelihood(self.predict(params, embed, seen, words[:, :-1]), tokens)
        return words_likelihood(self.predict(params, embed, seen, words), tokens)

    def likelihood(
        self, params: Params, pixels: Float[Array, "b h w c"], tokens: Int[Array, "n l"], longest: int | None = None
    ) -> Float[Array, "b n"]:
        """Log-likelihood of each text given each image, text by text; see `Clip.likelihood`."""
        embed, seen = self.see(params, pixels)
        words, rows = self.read(params, tokens)[1], tokens[:, :longest]
        if not isinstance(self.caption, Decoder):
            logits = self.predict(params, embed, seen, words)
            spread = lambda row: jnp.broadcast_to(row[None], (len(logits), *row.shape))  # noqa: E731
            return jax.lax.map(lambda row: -words_likelihood(logits, spread(row))[0], rows).T
        assert words is not None

        def of_text(text: tuple[Array, Array]) -> Array:
            known, row = (jnp.broadcast_to(part[None], (len(pixels), *part.shape)) for part in text)
            return -self.captions(params, embed, seen, known, row)[0]

        return jax.lax.map(of_text, (words[:, :longest], rows)).T


def build_clip(config: ModelConfig, *, frozen: Sequence[str] = ()) -> Clip:
    """The model that a config describes.

    Args:
        config: sizes and numerics.
        frozen: regular expressions of the parameters that training leaves alone (`optim.freeze`).
    """
    towers = _Towers(build_image_tower(config), build_text_tower(config), build_caption_head(config), frozen)
    size, length = config.image.image_size, config.text.context_length

    def init(key: Key) -> Params:
        image_key, text_key = jax.random.split(key)
        (embed, seen), image = towers.image.init_with_output(image_key, jnp.zeros((1, size, size, 3), jnp.float32))
        (_, words), text = towers.text.init_with_output(text_key, jnp.zeros((1, length), jnp.int32))
        params = {
            "image": dict(image["params"]),
            "text": dict(text["params"]),
            "log_logit_scale": jnp.asarray(math.log(config.init_logit_scale), jnp.float32),
        }
        if config.init_logit_bias is not None:
            params["logit_bias"] = jnp.asarray(config.init_logit_bias, jnp.float32)
        if towers.caption is not None:
            given = towers.caption_inputs(embed, seen, words)
            params["caption"] = dict(towers.caption.init(jax.random.fold_in(key, 2), *given)["params"])
        return params

    def init_batch_stats() -> Params:
        pixels = jnp.zeros((1, size, size, 3), jnp.float32)
        shapes = jax.eval_shape(lambda: towers.image.init(jax.random.key(0), pixels))
        start = lambda name, x: jnp.full(x.shape, float(name.endswith("variance")), x.dtype)  # noqa: E731
        return map_with_path(start, shapes.get("batch_stats", {}))

    def encode_image(params: Params, pixels: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        return unit_norm(towers.see(params, pixels)[0])

    def encode_text(params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
        return unit_norm(towers.read(params, tokens)[0])

    def train(
        params: Params, batch_stats: Params, pixels: Float[Array, "b h w c"], tokens: Int[Array, "b l"], key: Key
    ) -> Encoded:
        (embed, seen), stats = towers.see_in_training(params, batch_stats, pixels, key)
        text_embed, words = towers.read(params, tokens)
        nll, num_tokens = (
            (None, None) if towers.caption is None else towers.captions(params, embed, seen, words, tokens)
        )
        scale, bias = jnp.exp(params["log_logit_scale"]), params.get("logit_bias")
        return Encoded(unit_norm(embed), unit_norm(text_embed), scale, bias, nll, num_tokens, stats)

    def look(params: Params, pixels: Float[Array, "b h w c"]) -> Float[Array, "b k v"]:
        return towers.see(params, pixels)[1]

    def next_logits(params: Params, seen: Float[Array, "b k v"], tokens: Int[Array, "b l"]) -> Float[Array, "b l t"]:
        return towers.predict(params, seen, seen, towers.read(params, tokens)[1])

    return Clip(init, init_batch_stats, encode_image, encode_text, train, towers.likelihood, look, next_logits)


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
        return clip.train(params, batch.get("batch_stats", {}), pixels, batch["tokens"], key)

    return encode


def make_frozen_encode(clip: Clip, data: DataConfig) -> Callable[[Params, Batch, Key], Encoded]:
    """`encode(params, batch, key)` as evaluation sees a batch: a teacher's."""

    def encode(params: Params, batch: Batch, key: Key) -> Encoded:
        del key
        image_embed = clip.encode_image(params, normalise_pixels(batch["image"], data))
        text_embed = clip.encode_text(params, batch["tokens"])
        return Encoded(image_embed, text_embed, jnp.exp(params["log_logit_scale"]), params.get("logit_bias"))

    return encode
