"""The encoder of evaluation: a model on a mesh, with pictures and texts in, embeddings on the host out.

Axes: b rows of this process, n rows over all processes, m texts, l tokens, e embed.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clipjax.config import Config
from clipjax.data.patches import Pixels
from clipjax.data.tokenizers.protocol import Tokenizer, tokenize
from clipjax.models.clip import Clip
from clipjax.runtime.sharding import batch_sharding, fetch, global_batch
from clipjax.typing import Params, Patches

_MAX_KNOWN = 2**29  # bytes of embeddings of texts


class NotFiniteEmbeddings(ValueError):
    """Embeddings, or scores, that are not finite: no order of them means anything."""


def require_finite(name: str, rows: np.ndarray) -> np.ndarray:
    """Return the rows if all of them are finite.

    Args:
        name: of the rows, for the message.
        rows: `[n, ...]`.

    Raises:
        NotFiniteEmbeddings: some are not; with their number and the likely cause.
    """
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows)).reshape(len(rows), -1).any(axis=1).sum())
        raise NotFiniteEmbeddings(
            f"{bad} of {len(rows)} {name} are not finite, so nothing can be ranked: either the checkpoint's parameters "
            "are not finite (take an earlier one), or the model overflows in its model.compute_dtype (use float32)"
        )
    return rows


def unit_norm(rows: np.ndarray) -> np.ndarray:
    """Return rows `[..., e]` of norm 1, float32."""
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def to_images(pixels: Any) -> Any:
    """Return what a model takes of pixels on the devices: squares, or the rows that fields of `Patches` tell."""
    return Patches(**pixels) if isinstance(pixels, dict) else pixels


@dataclass(frozen=True, eq=False)
class Encoder:
    """Embeddings on the host, the same on every process, and all finite. Each batch is split over the mesh.

    All encoders of one `Clip` share its compiled programs.

    Attributes:
        config: gives the batch size, the context length and the kind of model.
        clip: the model.
        mesh: the devices.
        tokenizer: text to ids.
        params: the parameters to evaluate, BatchNorm's statistics among them.
    """

    config: Config
    clip: Clip
    mesh: Mesh
    tokenizer: Tokenizer
    params: Params
    _known_texts: dict[bytes, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def has_embeddings(self) -> bool:
        """False for models that only predict captions."""
        return self.config.loss.contrastive_weight != 0

    @property
    def logit_scale(self) -> float:
        """The factor of cosines in the model's logits."""
        value = self.params["log_logit_scale"]
        return float(np.exp(self._fetch(value) if isinstance(value, jax.Array) else value))

    def embed_images(self, image: Pixels) -> np.ndarray:
        """Return unit-norm float32 `[n, e]` of uint8 `[b, s, s, 3]` or rows, this process's part of a batch.

        Of frames of videos, `[b, f, s, s, 3]`, it is the mean of their embeddings, at unit norm.
        """
        if _is_video(image):
            return self.normalise(_mean_over_frames(self.embed_images, image))
        with jax.set_mesh(self.mesh):
            rows = self._fetch(_encode_image(self.clip, self.params, to_images(global_batch(self.mesh, image))))
        return require_finite("image embeddings", rows)

    def normalise(self, rows: np.ndarray) -> np.ndarray:
        """Return rows `[..., e]`, such as means of embeddings, scaled as embeddings are. Float32."""
        return unit_norm(rows)

    def image_features(self, image: Pixels) -> np.ndarray:
        """Return what is projected to embeddings, float32 `[n, v]`; see `Clip.image_features`. Of frames the mean."""
        if _is_video(image):
            return _mean_over_frames(self.image_features, image)
        with jax.set_mesh(self.mesh):
            rows = self._fetch(_image_features(self.clip, self.params, to_images(global_batch(self.mesh, image))))
        return require_finite("image features", rows)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit-norm float32 `[m, e]` of texts, which are the same on all processes.

        What the same tokens have given before is not computed again, as far as 512 MiB hold it.
        """
        tokens = self.tokenize(texts)
        key = hashlib.sha256(repr(tokens.shape).encode() + tokens.tobytes()).digest()
        if key not in self._known_texts:
            rows = self._embed_tokens(tokens)
            rows.flags.writeable = False
            self._known_texts[key] = rows
            while sum(each.nbytes for each in self._known_texts.values()) > _MAX_KNOWN and len(self._known_texts) > 1:
                del self._known_texts[next(iter(self._known_texts))]
        return self._known_texts[key]

    def _embed_tokens(self, tokens: np.ndarray) -> np.ndarray:
        size = self.config.eval.batch_size
        sharding = batch_sharding(self.mesh)
        parts = [np.zeros((0, self.config.model.embed_dim), np.float32)]
        for start in range(0, len(tokens), size):
            rows = tokens[start : start + size]
            padded = np.zeros((size, rows.shape[1]), rows.dtype)
            padded[: len(rows)] = rows
            split = jax.make_array_from_callback(padded.shape, sharding, lambda index, padded=padded: padded[index])
            with jax.set_mesh(self.mesh):
                parts.append(self._fetch(_encode_text(self.clip, self.params, split))[: len(rows)])
        return require_finite("text embeddings", np.concatenate(parts))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return rows `[n, ...]` of all processes, in the order of `embed_images`, from rows `[b, ...]` of each."""
        return self._fetch(global_batch(self.mesh, rows))

    def gather_json(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes, in their order."""
        if jax.process_count() == 1:
            return [json.loads(json.dumps(value))]
        from jax.experimental import multihost_utils

        content = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.asarray([content.size])).ravel()
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: content.size] = content
        rows = multihost_utils.process_allgather(padded)
        return [json.loads(bytes(row[: int(size)])) for row, size in zip(rows, sizes, strict=True)]

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Return token ids int32 `[m, l]`."""
        return tokenize(self.tokenizer, texts, self.config.model.text.context_length)

    def is_cut(self, text: str) -> bool:
        """Return True if a text is too long for the model's context, so that it loses its tail."""
        frame = 1 + (self.tokenizer.start_id is not None)
        return len(self.tokenizer.encode(text)) + frame > self.config.model.text.context_length

    def likelihood(self, image: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the log-likelihood of each text given each image, float32 `[n, m]`; for models that predict captions.

        Args:
            image: uint8 `[b, s, s, 3]`, this process's part of a batch.
            tokens: of the texts, int32 `[m, l]`, as `tokenize` gives them.
        """
        max_length = int(tokens.argmax(axis=1).max()) + 1  # the end of a text has the largest id
        with jax.set_mesh(self.mesh):
            split = global_batch(self.mesh, image)
            rows = self._fetch(_likelihood(self.clip, self.params, split, tokens, max_length))
        return require_finite("rows of likelihoods", rows)

    def _fetch(self, x: jax.Array) -> np.ndarray:
        return fetch(x, self.mesh)


def _is_video(image: Pixels) -> bool:
    return isinstance(image, np.ndarray) and image.ndim == 5


def _mean_over_frames(embed: Callable[[Pixels], np.ndarray], image: Any) -> np.ndarray:
    """Return the mean of what frames give, a batch of pictures at a time."""
    return np.mean([embed(np.ascontiguousarray(image[:, frame])) for frame in range(image.shape[1])], axis=0)


@partial(jax.jit, static_argnums=0)
def _encode_image(clip: Clip, params: Params, image: jax.Array) -> jax.Array:
    return clip.encode_image(params, image)


@partial(jax.jit, static_argnums=0)
def _image_features(clip: Clip, params: Params, image: jax.Array) -> jax.Array:
    return clip.image_features(params, image)


@partial(jax.jit, static_argnums=0)
def _encode_text(clip: Clip, params: Params, tokens: jax.Array) -> jax.Array:
    return clip.encode_text(params, tokens)


@partial(jax.jit, static_argnums=(0, 4))
def _likelihood(clip: Clip, params: Params, image: jax.Array, tokens: jax.Array, max_length: int) -> jax.Array:
    return clip.likelihood(params, image, tokens, max_length)
