"""From a model on a mesh to the two functions that evaluation needs: pictures in, texts in, embeddings out.

Axes: b rows of this process, n rows over all processes, e embed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clipjax.config import Config
from clipjax.data.tokenizers.protocol import Tokenizer, tokenize
from clipjax.models.clip import Clip, normalise_pixels
from clipjax.models.text import end_of_text
from clipjax.runtime.sharding import batch_sharding, global_batch, replicated
from clipjax.typing import Params


@dataclass(frozen=True)
class Encoder:
    """Embeddings on the host, the same on every process.

    Attributes:
        embed_images: uint8 `[b, s, s, 3]`, this process's part of a batch -> unit-norm float32 `[n, e]`.
        embed_texts: texts (the same on all processes) -> unit-norm float32 `[len(texts), e]`.
        gather: rows `[b, ...]` of this process -> rows `[n, ...]` in the order of `embed_images`.
        make_likelihood: texts -> a function of uint8 `[b, s, s, 3]` that gives the log-likelihood of each text given
            each image `[n, len(texts)]`. For models that predict captions and have no embeddings; None for others.
    """

    embed_images: Callable[[np.ndarray], np.ndarray]
    embed_texts: Callable[[Sequence[str]], np.ndarray]
    gather: Callable[[np.ndarray], np.ndarray]
    make_likelihood: Callable[[Sequence[str]], Callable[[np.ndarray], np.ndarray]] | None = None


def make_encoder_factory(config: Config, clip: Clip, mesh: Mesh, tokenizer: Tokenizer) -> Callable[[Params], Encoder]:
    """`make_encoder(params)`; both towers are compiled once and split each batch over the mesh."""
    sharding = batch_sharding(mesh)
    batch_size = config.eval.batch_size

    @jax.jit
    def encode_image(params: Params, image: jax.Array) -> jax.Array:
        return clip.encode_image(params, normalise_pixels(image, config.data))

    encode_text = jax.jit(clip.encode_text)

    @partial(jax.jit, static_argnames="longest")
    def likelihood(params: Params, image: jax.Array, tokens: jax.Array, longest: int) -> jax.Array:
        return clip.likelihood(params, normalise_pixels(image, config.data), tokens, longest)

    to_all = jax.jit(lambda x: x, out_shardings=replicated(mesh))

    def fetch(x: jax.Array) -> np.ndarray:
        return np.asarray(x if x.is_fully_addressable else to_all(x))

    def make_encoder(params: Params) -> Encoder:
        def embed_images(image: np.ndarray) -> np.ndarray:
            with jax.set_mesh(mesh):
                return fetch(encode_image(params, global_batch(mesh, image)))

        def embed_texts(texts: Sequence[str]) -> np.ndarray:
            tokens = tokenize(tokenizer, texts, config.model.text.context_length)
            parts = []
            for start in range(0, len(tokens), batch_size):
                rows = tokens[start : start + batch_size]
                padded = np.zeros((batch_size, rows.shape[1]), rows.dtype)
                padded[: len(rows)] = rows
                split = jax.make_array_from_callback(padded.shape, sharding, lambda index, padded=padded: padded[index])
                with jax.set_mesh(mesh):
                    parts.append(fetch(encode_text(params, split))[: len(rows)])
            return np.concatenate(parts)

        def gather(rows: np.ndarray) -> np.ndarray:
            return fetch(global_batch(mesh, rows))

        def make_likelihood(texts: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
            tokens = tokenize(tokenizer, texts, config.model.text.context_length)
            longest = int(end_of_text(jnp.asarray(tokens)).max()) + 1

            def of_images(image: np.ndarray) -> np.ndarray:
                with jax.set_mesh(mesh):
                    return fetch(likelihood(params, global_batch(mesh, image), tokens, longest))

            return of_images

        return Encoder(
            embed_images, embed_texts, gather, make_likelihood if config.loss.contrastive_weight == 0 else None
        )

    return make_encoder
