"""Gradients of the loss over the global batch, in two ways with one signature and one answer.

`DirectGradients` differentiates through towers and loss at once. `CachedGradients` (GradCache, arXiv 2101.06983) serves
batches whose activations do not fit; `Microbatches` splits them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipjax.config import Config
from clipjax.losses import LossInputs, LossResults, TrainingLoss
from clipjax.models.clip import Clip
from clipjax.runtime.sharding import batch_devices, constrain
from clipjax.typing import Batch, Encoded, Key, Metrics, Params, Patches


class GradientsAux(NamedTuple):
    """Results of a step's forward and backward pass besides the gradients.

    Attributes:
        loss: over the global batch, a scalar.
        metrics: other scalars by name.
        batch_stats: running statistics of BatchNorm after this batch; empty in other models.
        log_mean: new moving averages of the batch's pairs, float32 [n, 2]; None with other losses than `global`.
    """

    loss: jax.Array
    metrics: Metrics
    batch_stats: Params
    log_mean: jax.Array | None


def _to_aux(results: LossResults, encoded: Encoded) -> GradientsAux:
    return GradientsAux(results.loss, results.metrics, encoded.batch_stats, results.log_mean)


@dataclass(frozen=True, eq=False)
class DirectGradients:
    """Gradients by one backward pass through towers and loss."""

    clip: Clip
    loss: TrainingLoss

    def encode(self, params: Params, batch_stats: Params, batch: Batch, key: Key) -> Encoded:
        """Return the embeddings of which the gradients' loss is."""
        return self.clip.encode_batch(params, batch_stats, batch, key)

    def __call__(
        self, params: Params, batch_stats: Params, batch: Batch, inputs: LossInputs, key: Key
    ) -> tuple[Params, GradientsAux]:
        """Return gradients, and all else that the pass gives."""

        def objective(params: Params) -> tuple[jax.Array, GradientsAux]:
            encoded = self.encode(params, batch_stats, batch, key)
            results = self.loss(encoded, inputs)
            return results.loss, _to_aux(results, encoded)

        return jax.grad(objective, has_aux=True)(params)


def per_pair(encoded: Encoded) -> dict[str, Any]:
    """Return the fields with a row for every pair."""
    names = ("image_embed", "text_embed", "nll", "num_tokens")
    return {name: getattr(encoded, name) for name in names}


@dataclass(frozen=True)
class Microbatches:
    """A global batch in microbatches, each with as many pairs of every device.

    Attributes:
        size: pairs of a microbatch, over all devices; it divides the global batch.
        devices: how many share the batch.
    """

    size: int
    devices: int

    def split(self, x: jax.Array, per_row: int = 1) -> jax.Array:
        """Reshape [b, ...] to [parts, size, ...], and rows of several pairs [b / per_row, ...] alike."""
        size = self.size // per_row
        parts = x.reshape(self.devices, -1, size // self.devices, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts.reshape(-1, size, *x.shape[1:]), None, "batch", *[None] * (x.ndim - 1))

    def merge(self, x: jax.Array) -> jax.Array:
        """Undo `split`."""
        parts = x.reshape(x.shape[0], self.devices, -1, *x.shape[2:]).swapaxes(0, 1)
        return constrain(parts.reshape(-1, *x.shape[2:]), "batch", *[None] * (x.ndim - 2))

    def inputs(self, batch: Batch) -> tuple[jax.Array, Batch]:
        """Return numbers of the microbatches, and what of each is encoded."""
        image, tokens = batch["image"], batch["tokens"]
        per_row = image.grid.shape[1] if isinstance(image, Patches) else 1
        images = jax.tree.map(lambda x: self.split(x, per_row), image)
        return jnp.arange(len(tokens) // self.size), {"image": images, "tokens": self.split(tokens)}

    def encode(self, encode: Callable[[Batch, Key], Encoded], batch: Batch, key: Key) -> Encoded:
        """Encode all pairs, a microbatch at a time; microbatch i draws from `fold_in(key, i)`."""

        def encode_part(part: tuple[jax.Array, Batch]) -> Encoded:
            return encode(part[1], jax.random.fold_in(key, part[0]))

        parts = jax.lax.map(encode_part, self.inputs(batch))
        merged = jax.tree.map(self.merge, per_pair(parts))
        scale, bias = jax.tree.map(lambda x: x[0], (parts.logit_scale, parts.logit_bias))
        return parts._replace(**merged, logit_scale=scale, logit_bias=bias)


@dataclass(frozen=True, eq=False)
class CachedGradients:
    """The gradients of `DirectGradients`, with the activations of one microbatch.

    All pairs are encoded without keeping activations; the loss over the whole batch gives the gradients of the
    embeddings; then each microbatch is encoded again and its share of the gradient taken. Microbatch i draws from
    `fold_in(key, i)`, both times.

    Attributes:
        clip: the model, one without BatchNorm.
        loss: over the global batch.
        microbatches: the parts of a batch.

    Source:
        arXiv 2101.06983, section 3.2.

    Cost:
        One more forward pass than `DirectGradients`; the embeddings and their gradients of the whole batch.
    """

    clip: Clip
    loss: TrainingLoss
    microbatches: Microbatches

    def encode(self, params: Params, batch_stats: Params, batch: Batch, key: Key) -> Encoded:
        """Return the embeddings of which the gradients' loss is, a microbatch at a time."""

        def encode(batch: Batch, key: Key) -> Encoded:
            return self.clip.encode_batch(params, batch_stats, batch, key)

        return self.microbatches.encode(encode, batch, key)

    def __call__(
        self, params: Params, batch_stats: Params, batch: Batch, inputs: LossInputs, key: Key
    ) -> tuple[Params, GradientsAux]:
        """Return gradients, and all else that the passes give."""

        def objective(encoded: Encoded) -> tuple[jax.Array, GradientsAux]:
            results = self.loss(encoded, inputs)
            return results.loss, _to_aux(results, encoded)

        encoded = self.encode(params, batch_stats, batch, key)
        embed_grads, aux = jax.grad(objective, has_aux=True)(encoded)
        scaling_grads = embed_grads.logit_scale, embed_grads.logit_bias

        def accumulate(total: Params, part: Any) -> tuple[Params, None]:
            (number, microbatch), part_grads = part
            scale, bias = jax.tree.map(lambda x: jnp.where(number == 0, x, 0), scaling_grads)
            part_key = jax.random.fold_in(key, number)
            _, pull_back = jax.vjp(
                lambda params: self.clip.encode_batch(params, batch_stats, microbatch, part_key), params
            )
            cotangents = embed_grads._replace(**part_grads, logit_scale=scale, logit_bias=bias)
            return jax.tree.map(jnp.add, total, pull_back(cotangents)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        parts_grads = jax.tree.map(self.microbatches.split, per_pair(embed_grads))
        return jax.lax.scan(accumulate, zeros, (self.microbatches.inputs(batch), parts_grads))[0], aux


Gradients = DirectGradients | CachedGradients


def build_gradients(config: Config, clip: Clip, loss: TrainingLoss, mesh: Mesh) -> Gradients:
    """Return gradients in the way that the config asks for."""
    if config.microbatch_size is None:
        return DirectGradients(clip, loss)
    return CachedGradients(clip, loss, Microbatches(config.microbatch_size, batch_devices(mesh)))


@dataclass(frozen=True, eq=False)
class TeacherForward:
    """A frozen model's embeddings of a batch that nobody differentiates.

    Attributes:
        clip: the teacher.
        microbatches: parts in which a batch is encoded; None: at once.
    """

    clip: Clip
    microbatches: Microbatches | None

    def __call__(self, params: Params, batch: Batch, key: Key) -> Encoded:
        """Return the embeddings by the teacher's parameters."""
        if self.microbatches is None:
            return self.clip.encode_frozen(params, batch)
        return self.microbatches.encode(lambda part, _: self.clip.encode_frozen(params, part), batch, key)
