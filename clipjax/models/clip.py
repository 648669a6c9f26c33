"""Two towers and a learned scale: the model as pure functions of `params`.

Axes: b batch, k texts of an image, h height, w width, l tokens, e embed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from clipjax.config import DataConfig, ModelConfig
from clipjax.models.captions import Decoder, caption_likelihood, words_likelihood
from clipjax.models.layers import FEATURES, LayerNorm
from clipjax.models.text import TextTransformer
from clipjax.models.towers import build_caption_head, build_image_tower, build_text_tower
from clipjax.pytrees import leaf_paths, map_with_path, match_any
from clipjax.runtime.sharding import constrain
from clipjax.typing import Batch, Encoded, Key, Params, Patches

Pixels = Float[Array, "b h w c"] | UInt8[Array, "b h w c"] | Patches


@dataclass(frozen=True, eq=False, kw_only=True)
class Clip:
    """One model, as pure functions of `params`: float32 parameters in, unit-norm float32 embeddings out.

    Images are pixels that are normalised already (float32), or uint8 pixels, which the model then normalises.

    Attributes:
        config: sizes and numerics.
        image: the image tower.
        text: the text tower.
        caption: the module that predicts captions; None: without.
        data: gives mean and standard deviation of uint8 pixels; None: only normalised pixels are taken.
        frozen: regular expressions of the parameters that training leaves alone.
    """

    config: ModelConfig
    image: nn.Module
    text: nn.Module
    caption: nn.Module | None
    data: DataConfig | None
    frozen: Sequence[str]

    def init(self, key: Key) -> Params:
        """Return fresh parameters."""
        image_key, text_key = jax.random.split(key)
        (embed, image_tokens), image = self.image.init_with_output(image_key, self._blank_pixels())
        length = self.config.text.context_length
        (_, text_tokens), text = self.text.init_with_output(text_key, jnp.zeros((1, length), jnp.int32))
        params = {
            "image": dict(image["params"]),
            "text": dict(text["params"]),
            "log_logit_scale": jnp.asarray(math.log(self.config.init_logit_scale), jnp.float32),
        }
        if self.config.init_logit_bias is not None:
            params["logit_bias"] = jnp.asarray(self.config.init_logit_bias, jnp.float32)
        if self.caption is not None:
            inputs = self._caption_inputs(embed, image_tokens, text_tokens)
            params["caption"] = dict(self.caption.init(jax.random.fold_in(key, 2), *inputs)["params"])
        return params

    def init_batch_stats(self) -> Params:
        """Return the running statistics to start with; empty for models without BatchNorm."""
        shapes = jax.eval_shape(lambda: self.image.init(jax.random.key(0), self._blank_pixels()))
        start = lambda name, x: jnp.full(x.shape, float(name.endswith("variance")), x.dtype)  # noqa: E731
        return map_with_path(start, shapes.get("batch_stats", {}))

    def encode_image(self, params: Params, pixels: Pixels) -> Float[Array, "n e"]:
        """Return embeddings for evaluation: BatchNorm uses `params["batch_stats"]`, and no patch is dropped."""
        return unit_norm(self._encode_pixels(params, pixels)[0])

    def image_features(self, params: Params, pixels: Pixels) -> Float[Array, "n v"]:
        """Return what the image tower projects to its embedding, in float32: the pooled vector after its last norm.

        A tower without a projection gives its embedding before normalisation. The ResNets are among these: their
        attention pooling ends in its own output matrix.
        """
        variables = {"params": params["image"], "batch_stats": params.get("batch_stats", {})}
        applied: Any = self.image.apply(variables, self._normalise(pixels), mutable=["intermediates"])
        (embed, _), kept = applied
        (features,) = kept.get("intermediates", {}).get(FEATURES, (embed,))
        return features.astype(jnp.float32)

    def encode_text(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
        """Return embeddings of texts."""
        return unit_norm(self._encode_tokens(params, tokens)[0])

    def encode_image_tokens(self, params: Params, pixels: Pixels) -> Float[Array, "b k v"]:
        """Return the tokens of each image to which a decoder attends."""
        return self._encode_pixels(params, pixels)[1]

    def encode_text_tokens(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b l w"]:
        """Return the tokens of each text that a decoder reads; only for text transformers."""
        text_tokens = self._encode_tokens(params, tokens)[1]
        assert text_tokens is not None
        return text_tokens

    def text_hidden_states(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b l w"]:
        """Return the tokens of texts after the last norm, before pooling, in float32; only for text transformers."""
        assert isinstance(self.text, TextTransformer)
        norm, x = LayerNorm(self.text.numerics), self.encode_text_tokens(params, tokens)
        normalised: Any = norm.apply({"params": params["text"]["ln_final"]}, x)
        return normalised.astype(jnp.float32)

    def next_logits(
        self, params: Params, image_tokens: Float[Array, "b k v"], tokens: Int[Array, "b l"]
    ) -> Float[Array, "b l t"]:
        """Return logits of what follows each token; only for models with a decoder."""
        return self._predict(params, image_tokens, image_tokens, self.encode_text_tokens(params, tokens))

    def likelihood(
        self, params: Params, pixels: Pixels, tokens: Int[Array, "n l"], max_length: int | None = None
    ) -> Float[Array, "b n"]:
        """Return the log-likelihood of each text given each image; only for models that predict captions.

        Args:
            params: of the model.
            pixels: of the images.
            tokens: of the texts.
            max_length: no text has more tokens than this, its start and end among them; None: they may fill all places.
        """
        embed, image_tokens = self._encode_pixels(params, pixels)
        text_tokens, rows = self._encode_tokens(params, tokens)[1], tokens[:, :max_length]
        if not isinstance(self.caption, Decoder):
            logits = self._predict(params, embed, image_tokens, text_tokens)
            spread = lambda row: jnp.broadcast_to(row[None], (len(logits), *row.shape))  # noqa: E731
            return jax.lax.map(lambda row: -words_likelihood(logits, spread(row))[0], rows).T
        assert text_tokens is not None

        def text_likelihood(text: tuple[Array, Array]) -> Array:
            text_tokens, row = (jnp.broadcast_to(part[None], (len(pixels), *part.shape)) for part in text)
            return -self._caption_losses(params, embed, image_tokens, text_tokens, row)[0]

        return jax.lax.map(text_likelihood, (text_tokens[:, :max_length], rows)).T

    def train(
        self,
        params: Params,
        batch_stats: Params,
        pixels: Pixels,
        tokens: Int[Array, "b l"] | Int[Array, "b k l"],
        key: Key,
    ) -> Encoded:
        """Return what a loss takes: with patch dropout, BatchNorm by this batch, and captions where there are any.

        With several texts of an image the embeddings of texts are `[b, k, e]`; no caption is predicted then.
        """
        (embed, image_tokens), stats = self._encode_pixels_in_training(params, batch_stats, pixels, key)
        nll, num_tokens = None, None
        if tokens.ndim == 3:
            assert self.caption is None
            rows = constrain(tokens.reshape(-1, tokens.shape[-1]), "batch", None)  # one pass through the tower
            text_embed = unit_norm(self._encode_tokens(params, rows)[0])
            text_embed = constrain(text_embed.reshape(*tokens.shape[:2], -1), "batch", None, None)
        else:
            text_embed, text_tokens = self._encode_tokens(params, tokens)
            if self.caption is not None:
                nll, num_tokens = self._caption_losses(params, embed, image_tokens, text_tokens, tokens)
            text_embed = unit_norm(text_embed)
        scale, bias = jnp.exp(params["log_logit_scale"]), params.get("logit_bias")
        return Encoded(unit_norm(embed), text_embed, scale, bias, nll, num_tokens, stats)

    def encode_batch(self, params: Params, batch_stats: Params, batch: Batch, key: Key) -> Encoded:
        """Return what `train` gives for a batch."""
        return self.train(params, batch_stats, batch["image"], batch["tokens"], key)

    def encode_frozen(self, params: Params, batch: Batch) -> Encoded:
        """Return embeddings of a batch as evaluation computes them: those of a teacher."""
        image_embed = self.encode_image(params, batch["image"])
        text_embed = self.encode_text(params, batch["tokens"])
        return Encoded(image_embed, text_embed, jnp.exp(params["log_logit_scale"]), params.get("logit_bias"))

    def _blank_pixels(self) -> Array:
        size = self.config.image.image_size
        return jnp.zeros((1, size, size, 3), jnp.float32)

    def _normalise(self, pixels: Pixels) -> Float[Array, "b h w c"] | Patches:
        """Return normalised pixels, whichever kind is given."""
        if isinstance(pixels, Patches):
            rows = pixels.patches
            each = self._normalise(rows.reshape(*rows.shape[:2], -1, 3))  # pixels in the place of columns
            assert not isinstance(each, Patches)
            return pixels._replace(patches=each.reshape(rows.shape))
        if pixels.dtype != jnp.uint8:
            return pixels
        if self.data is None:
            raise ValueError("uint8 pixels need a mean and a standard deviation: build_clip(model, data=config.data)")
        return normalise_pixels(pixels, self.data)

    def _encode_pixels(self, params: Params, pixels: Pixels) -> tuple[Array, Array]:
        """Return an image's embedding before normalisation, and its tokens."""
        variables = {"params": params["image"], "batch_stats": params.get("batch_stats", {})}
        return self.image.apply(variables, self._normalise(pixels))  # type: ignore[return-value]

    def _encode_pixels_in_training(
        self, params: Params, batch_stats: Params, pixels: Pixels, key: Key
    ) -> tuple[Any, Params]:
        """Return embeddings and tokens with patch dropout and the batch's own statistics, and the new running ones.

        A tower of which nothing is trained keeps its running statistics and uses them.
        """
        if batch_stats and all(match_any(self.frozen, f"image/{name}") for name in leaf_paths(params["image"])):
            return self._encode_pixels({**params, "batch_stats": batch_stats}, pixels), batch_stats
        variables = {"params": params["image"], "batch_stats": batch_stats}
        rngs, mutable = {"patch_dropout": key}, ["batch_stats"]
        encoded, changed = self.image.apply(  # type: ignore[misc]
            variables, self._normalise(pixels), train=True, rngs=rngs, mutable=mutable
        )
        return encoded, changed.get("batch_stats") or {}

    def _encode_tokens(self, params: Params, tokens: Array) -> tuple[Array, Array | None]:
        """Return a text's embedding before normalisation, and its tokens."""
        return self.text.apply({"params": params["text"]}, tokens)  # type: ignore[return-value]

    def _caption_inputs(self, embed: Array, image_tokens: Array, text_tokens: Array | None) -> tuple[Any, ...]:
        """Return the inputs of the caption's module."""
        return (text_tokens, image_tokens) if isinstance(self.caption, Decoder) else (embed,)

    def _predict(self, params: Params, embed: Array, image_tokens: Array, text_tokens: Array | None) -> Array:
        """Return logits of the next tokens, or of a bag of them."""
        assert self.caption is not None
        inputs = self._caption_inputs(embed, image_tokens, text_tokens)
        return self.caption.apply({"params": params["caption"]}, *inputs)  # type: ignore[return-value]

    def _caption_losses(
        self, params: Params, embed: Array, image_tokens: Array, text_tokens: Array | None, tokens: Array
    ) -> tuple[Array, Array]:
        """Return negative log-likelihoods of captions, and the number of tokens that each counts."""
        if isinstance(self.caption, Decoder):
            assert text_tokens is not None
            return caption_likelihood(self._predict(params, embed, image_tokens, text_tokens[:, :-1]), tokens)
        return words_likelihood(self._predict(params, embed, image_tokens, text_tokens), tokens)


def build_clip(config: ModelConfig, *, data: DataConfig | None = None, frozen: Sequence[str] = ()) -> Clip:
    """Return the model that a config describes.

    Args:
        config: sizes and numerics.
        data: gives mean and standard deviation of uint8 pixels; without it the model takes normalised pixels only.
        frozen: regular expressions of the parameters that training leaves alone (`optim.freeze`).
    """
    image, text, caption = build_image_tower(config), build_text_tower(config), build_caption_head(config)
    return Clip(config=config, image=image, text=text, caption=caption, data=data, frozen=frozen)


def abstract_params(config: ModelConfig) -> Params:
    """Return shapes and dtypes of a model's parameters; nothing is allocated, no device is touched."""
    clip = build_clip(config)
    return jax.eval_shape(lambda: clip.init(jax.random.key(0)))


def abstract_model(config: ModelConfig) -> Params:
    """Return what evaluation needs: `abstract_params`, and `batch_stats` among them where there are any."""
    batch_stats = jax.eval_shape(build_clip(config).init_batch_stats)
    return {**abstract_params(config), **({"batch_stats": batch_stats} if batch_stats else {})}


def unit_norm(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Return rows scaled to Euclidean length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def normalise_pixels(image: UInt8[Array, "b h w c"], data: DataConfig) -> Float[Array, "b h w c"]:
    """Return pixels as float32 from 0 to 1, less the mean of the config, in units of its standard deviation."""
    mean = jnp.asarray(data.mean, jnp.float32).reshape(1, 1, 1, -1)
    std = jnp.asarray(data.std, jnp.float32).reshape(1, 1, 1, -1)
    return (image.astype(jnp.float32) / 255 - mean) / std
