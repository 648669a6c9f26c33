"""A trained model as a library: pictures and texts in, embeddings out.

model = clipjax.load("runs/quickstart")
image_embed = model.encode_image([picture])                       # unit-norm float32 [1, embed]
classifier = model.zero_shot_classifier(names, templates)         # unit-norm float32 [classes, embed]
logits = model.logit_scale * image_embed @ classifier.T
"""

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipjax.checkpoints.saved import SavedCheckpoint, load_params
from clipjax.config import Config, DecoderConfig, MeshConfig, TextTransformerConfig
from clipjax.config.validation import check_embeddings
from clipjax.data.patches import PatchTransform, Pixels, make_view, stack_pixels
from clipjax.data.tokenizers.protocol import Tokenizer, tokenize
from clipjax.evals.encoder import NotFiniteEmbeddings, require_finite, to_images
from clipjax.evals.prompts import check_texts
from clipjax.evals.zero_shot import zero_shot_classifier
from clipjax.models.clip import build_clip
from clipjax.models.generation import TextFormat, beam_search, generate, greedy, make_top_k
from clipjax.runtime import sharding
from clipjax.typing import Params

CAPTIONS_AT_ONCE = 64
"""Texts that are written at a time, each beam one of them; their logits are what takes memory."""


class Model:
    """A model with its preprocessing and tokenizer. Made by `clipjax.load`.

    Attributes:
        config: the config it was trained with.
        params: its parameters (the moving average, where training kept one).
        tokenizer: text to ids.
        logit_scale: the learned multiplier of similarities.
    """

    def __init__(self, config: Config, params: Params, tokenizer: Tokenizer, *, batch_size: int = 256) -> None:
        self._clip = clip = build_clip(config.model, data=config.data)
        self._captioners: dict[tuple[Any, ...], Callable[..., jax.Array]] = {}
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.logit_scale = float(np.exp(params["log_logit_scale"]))
        self._batch_size, self._view = batch_size, make_view(config)
        self._encode_image, self._encode_text = jax.jit(clip.encode_image), jax.jit(clip.encode_text)
        self._text_hidden_states = jax.jit(clip.text_hidden_states)

    def encode_image(self, images: Any) -> Float[np.ndarray, "n embed"]:
        """Return unit-norm embeddings of pictures of any size; no pictures give no rows.

        Args:
            images: a PIL image or uint8 array `[h, w, 3]`, a sequence of them, or a uint8 array `[n, h, w, 3]`.

        Raises:
            ValueError: an array that is not uint8 or not of such a shape, or a picture without pixels.
        """
        pixels = [self._view(picture) for picture in _pictures(images)]
        if not pixels:
            return np.zeros((0, self.config.model.embed_dim), np.float32)
        return self._in_batches("image embeddings", self._encode_image, stack_pixels(pixels))

    def encode_text(self, texts: str | Sequence[str]) -> Float[np.ndarray, "n embed"]:
        """Return unit-norm embeddings of a text or a sequence of them; longer ones are cut at the context length.

        Raises:
            ValueError: something among them is no string.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if texts:
            check_texts("texts", texts)
        return self.embed_tokens(tokenize(self.tokenizer, texts, self.config.model.text.context_length))

    def caption(
        self, images: Any, *, method: str = "beam", num_beams: int = 4, top_k: int = 10, seed: int = 0
    ) -> list[str]:
        """Return captions that the model writes; it needs a decoder (`model.caption`).

        Args:
            images: as for `encode_image`.
            method: `greedy`, `top_k` (each token drawn from the likeliest ones) or `beam`.
            num_beams: texts that are continued at a time, 1 or more; `beam` only.
            top_k: number of tokens to draw from, 1 to the vocabulary's size; `top_k` only.
            seed: of the draws, 0 or more; `top_k` only.

        Raises:
            ValueError: the model has no decoder, another method, or a number out of range.
        """
        start_id = self.tokenizer.start_id
        if not isinstance(self.config.model.caption, DecoderConfig) or start_id is None:
            raise ValueError(
                "this model writes no captions: it needs a decoder (model.caption=DecoderConfig) and a tokenizer with "
                "a start of texts (`clipjax convert --tokenizer=...` adds one)"
            )
        if method not in ("greedy", "top_k", "beam"):
            raise ValueError(f"method={method!r} must be greedy, top_k or beam")
        vocab_size = self.config.model.text.vocab_size
        for name, value in (("num_beams", num_beams), ("top_k", top_k)):
            if not isinstance(value, int) or not 1 <= value <= vocab_size:
                raise ValueError(
                    f"{name}={value!r} must be a whole number from 1 to {vocab_size}, the vocabulary's size"
                )
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed!r} must be a whole number from 0 to {2**32 - 1}")
        if not (pictures := _pictures(images)):
            return []
        pixels = stack_pixels([self._view(picture) for picture in pictures])
        frame = TextFormat(
            start_id, self.tokenizer.end_id, self.tokenizer.pad_id, self.config.model.text.context_length
        )
        options = {"greedy": (), "top_k": (top_k,), "beam": (num_beams,)}[method]
        if (method, *options) not in self._captioners:
            self._captioners[method, *options] = jax.jit(self._make_captioner(frame, method, *options))
        write, key = self._captioners[method, *options], jax.random.key(seed)
        at_once = max(1, CAPTIONS_AT_ONCE // (num_beams if method == "beam" else 1))
        parts = [
            np.asarray(write(self.params, jnp.asarray(padded), jax.random.fold_in(key, number)))[:count]
            for number, (padded, count) in enumerate(_batches(pixels, at_once))
        ]
        rows = np.concatenate(parts)
        ends = (rows == frame.end_id).argmax(axis=1)
        return [self.tokenizer.decode(row[1:end].tolist()) for row, end in zip(rows, ends, strict=True)]

    def _make_captioner(
        self, frame: TextFormat, method: str, *count: int
    ) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
        """Return `write(params, images, key) -> tokens`; `count` is of beams, or of the tokens that are drawn from."""
        clip = self._clip

        def write(params: Params, image: jax.Array, key: jax.Array) -> jax.Array:
            image_tokens = clip.encode_image_tokens(params, image)
            if method == "beam":
                image_tokens = jnp.repeat(image_tokens, *count, axis=0)
            step = lambda tokens: clip.next_logits(params, image_tokens, tokens)  # noqa: E731
            if method == "beam":
                return beam_search(step, image.shape[0], frame, num_beams=count[0])
            choose = make_top_k(*count) if method == "top_k" else greedy
            return generate(step, image.shape[0], frame, choose, key)

        return write

    def zero_shot_classifier(
        self, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> Float[np.ndarray, "classes embed"]:
        """Return a unit-norm row per class: the mean over templates of the embeddings of its prompts.

        Args:
            names: of the classes, at least one.
            templates: each with one `{}` for the name, at least one.

        Raises:
            ValueError: a single string instead of a sequence, no string at all, or a template without one `{}`.

        Source:
            arXiv 2103.00020, section 3.1.4.
        """
        return zero_shot_classifier(self.encode_text, names, templates)

    def score(self, pixels: Any, texts: str | Sequence[str]) -> Float[Array, "b k"]:
        """Return the cosine similarity of pictures to texts, through which `jax.grad` flows to the pixels.

        It can be differentiated, compiled (`jax.jit`) and batched as part of a larger function; pixels may be traced,
        so their values are not checked: of pixels that are not finite the score is not finite either.

        Args:
            pixels: floating-point `[b, h, w, 3]`, RGB from 0 to 1 at the model's size, not yet normalised.
            texts: a text or a sequence of k texts; they are constants of the function.

        Returns:
            float32; a multiple of it by `logit_scale` is the model's logit, less its bias where it has one.

        Raises:
            ValueError: pixels of another shape, or that are not floating-point; no text, or one that is no string; a
                model of variable aspect, or one that embeds nothing.

        Source:
            arXiv 2204.08583 (VQGAN-CLIP), where such a similarity guides a generator.
        """
        check_embeddings(self.config)
        pixels, size = jnp.asarray(pixels), self.config.model.image.image_size
        if isinstance(self._view, PatchTransform):
            raise ValueError("score takes squares, and this model takes pictures of variable aspect; use encode_image")
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3) or not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise ValueError(
                f"pixels are {pixels.dtype} {pixels.shape}; score takes floating-point [b, {size}, {size}, 3] from 0 "
                "to 1: divide uint8 pixels by 255, and resize or crop them first (jax.image.resize)"
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        check_texts("texts", texts)
        with jax.ensure_compile_time_eval():  # texts are constants, also where a caller's function is being traced
            text_embed = self.encode_text(texts)
        mean, std = (np.asarray(each, np.float32) for each in (self.config.data.mean, self.config.data.std))
        normalised = (pixels.astype(jnp.float32) - mean.reshape(1, 1, 1, 3)) / std.reshape(1, 1, 1, 3)
        image_embed = self._encode_image(self.params, normalised)
        return jnp.matmul(image_embed, text_embed.T, precision=jax.lax.Precision.HIGHEST)

    def text_hidden_states(
        self, texts: str | Sequence[str], *, pads_with_end: bool = False
    ) -> Float[np.ndarray, "n l width"]:
        """Return the vector of every token of texts, after the last norm and before pooling: for diffusion models.

        Args:
            texts: a text or a sequence of them; longer ones are cut at the context length l.
            pads_with_end: repeat the end of a text behind it, as the tokenizer of Stable Diffusion 1 does, instead of
                the padding; it changes the vectors behind the end alone where the tower is causal.

        Returns:
            Float32; all l positions of each text, also those behind its end.

        Raises:
            ValueError: something among the texts is no string, or the text tower is a bag of words.
            NotFiniteEmbeddings: some vectors are not finite.

        Source:
            arXiv 2112.10752, section 3.3, where such vectors are what cross-attention takes; Stable Diffusion 1 takes
            those of CLIP's ViT-L/14. Version 2 takes those of the layer before the last one, which this does not give.
        """
        text = self.config.model.text
        if not isinstance(text, TextTransformerConfig):
            raise ValueError("this text tower is a bag of words, without a vector for each token; take encode_text")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if texts:
            check_texts("texts", texts)
        tokens = tokenize(self.tokenizer, texts, text.context_length)
        if pads_with_end:
            tokens = _with_ends(tokens, self.tokenizer)
        parts = [np.zeros((0, text.context_length, text.width), np.float32)]
        parts += [
            np.asarray(self._text_hidden_states(self.params, jnp.asarray(padded)))[:count]
            for padded, count in _batches(tokens, self._batch_size)
        ]
        return require_finite("texts' hidden states", np.concatenate(parts))

    def embed_pixels(self, pixels: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n embed"]:
        """Return unit-norm embeddings of pixels that are already resized, cropped and normalised.

        Raises:
            ValueError: pixels of another shape.
            NotFiniteEmbeddings: pixels, or embeddings, that are not finite.
        """
        size = self.config.model.image.image_size
        pixels = np.asarray(pixels, np.float32)
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"pixels have shape {pixels.shape}; the model takes [n, {size}, {size}, 3]")
        if not np.isfinite(pixels).all():
            bad = int((~np.isfinite(pixels)).any(axis=(1, 2, 3)).sum())
            raise NotFiniteEmbeddings(f"{bad} of {len(pixels)} pictures are not finite; leave them out")
        return self._in_batches("image embeddings", self._encode_image, pixels)

    def embed_tokens(self, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n embed"]:
        """Return unit-norm embeddings of token ids, start and end included, padded with 0."""
        length, vocab = self.config.model.text.context_length, self.config.model.text.vocab_size
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != length or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens are {tokens.dtype} {tokens.shape}; the model takes int32 [n, {length}]")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
            raise ValueError(f"token ids reach from {tokens.min()} to {tokens.max()}; the model knows 0 to {vocab - 1}")
        return self._in_batches("text embeddings", self._encode_text, tokens.astype(np.int32))

    def _in_batches(self, name: str, encode: Callable[..., jax.Array], rows: Pixels) -> np.ndarray:
        """Encode batch by batch; refuse rows that are not finite."""
        check_embeddings(self.config)
        parts = [np.zeros((0, self.config.model.embed_dim), np.float32)]
        parts += [
            np.asarray(encode(self.params, to_images(jax.tree.map(jnp.asarray, padded))))[:count]
            for padded, count in _batches(rows, self._batch_size)
        ]
        return require_finite(name, np.concatenate(parts))


def _batches(rows: Any, size: int) -> Iterator[tuple[Any, int]]:
    """Yield rows in batches padded to a power of two, so that few shapes are compiled, and the number that counts."""
    total = len(jax.tree.leaves(rows)[0])
    for start in range(0, total, size):
        count = min(size, total - start)
        numbers = np.minimum(np.arange(1 << (count - 1).bit_length()), count - 1) + start  # the last one is repeated
        yield jax.tree.map(lambda array, numbers=numbers: array[numbers], rows), count


def _with_ends(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return token ids with the end repeated behind each text's own, in the place of the padding."""
    is_end = tokens == tokenizer.end_id
    # The end of a text is the last one: some tokenizers take the same id for the start.
    last = tokens.shape[1] - 1 - is_end[:, ::-1].argmax(axis=1)
    return np.where(np.arange(tokens.shape[1])[None] > last[:, None], tokenizer.end_id, tokens)


def _pictures(images: Any) -> list[np.ndarray]:
    """Return single pictures, sequences and batches as a list of uint8 `[h, w, 3]`."""
    from PIL import Image

    if isinstance(images, str | bytes | os.PathLike):
        raise ValueError(f"images={images!r} is no picture; open a file with PIL.Image.open")
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        images = [images]
    pictures = []
    for picture in images:
        if isinstance(picture, str | bytes | os.PathLike):
            raise ValueError(f"{picture!r} is no picture; open a file with PIL.Image.open")
        array = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(
                f"a picture is {array.dtype} {array.shape}; give PIL images or uint8 arrays [h, w, 3] "
                "(normalised float pixels go to embed_pixels)"
            )
        if not array.size:
            raise ValueError(f"a picture has {array.shape[0]} x {array.shape[1]} pixels; leave out empty ones")
        pictures.append(array)
    return pictures


def load(path: str | pathlib.Path) -> Model:
    """Open a checkpoint for use on this machine's first device.

    Args:
        path: a workdir (its newest step), or one step directory.

    Raises:
        ValueError: there is no checkpoint there, or it is damaged.
    """
    saved = SavedCheckpoint(path)
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    params = load_params(saved, mesh)
    return Model(saved.config, params, saved.tokenizer())
