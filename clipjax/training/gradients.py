"""Gradients of the loss over the global batch. Both ways share one signature and give one answer.

`direct` differentiates through towers and loss at once. `cached` (GradCache, arXiv 2101.06983) serves batches whose
activations do not fit; `Microbatches` cuts them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipjax.config import Config
from clipjax.runtime.sharding import batch_devices, constrain
from clipjax.typing import Batch, Encoded, Key, Metrics, Params

Encode = Callable[[Params, Batch, Key], Encoded]
Loss = Callable[..., tuple[jax.Array, Metrics]]
"""What `losses.make_loss` returns."""

LOSS_INPUTS = ("group", "teacher", "memory")
"""What of a batch a loss takes besides embeddings."""


def make_grads(
    config: Config, encode: Encode, loss: Loss, mesh: Mesh
) -> Callable[[Params, Batch, Key], tuple[Params, Metrics]]:
    """`grads_fn(params, batch, key) -> (grads, metrics)` in the way that the config asks for."""
    if config.microbatch_size is None:
        return functools.partial(direct, encode, loss)
    return functools.partial(make_cached(config.microbatch_size, batch_devices(mesh)), encode, loss)


def make_forward(config: Config, encode: Encode, mesh: Mesh) -> Encode:
    """`encode` for a whole batch that nobody differentiates, as many pairs at a time as the config says."""
    if config.microbatch_size is None:
        return encode
    return functools.partial(Microbatches(config.microbatch_size, batch_devices(mesh)).encode, encode)


def direct(encode: Encode, loss: Loss, params: Params, batch: Batch, key: Key) -> tuple[Params, Metrics]:
    """Gradients by one backward pass, and the loss's metrics with `loss` and `batch_stats` among them."""

    def objective(params: Params) -> tuple[jax.Array, Metrics]:
        return _evaluate(loss, encode(params, batch, key), batch)

    return jax.grad(objective, has_aux=True)(params)


def _evaluate(loss: Loss, encoded: Encoded, batch: Batch) -> tuple[jax.Array, Metrics]:
    """The loss of what `encode` gives for the whole batch, and its metrics with `loss` itself among them."""
    inputs = {name: batch[name] for name in LOSS_INPUTS if name in batch}
    if encoded.nll is not None:
        inputs |= {"nll": encoded.nll, "num_tokens": encoded.num_tokens}
    value, metrics = loss(*encoded[:4], **inputs)
    return value, {"loss": value, **metrics, "batch_stats": encoded.batch_stats}


def per_pair(encoded: Encoded) -> dict[str, Any]:
    """What has a row for every pair."""
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

    def cut(self, x: jax.Array) -> jax.Array:
        """[b, ...] -> [parts, size, ...]."""
        parts = x.reshape(self.devices, -1, self.size // self.devices, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts.reshape(-1, self.size, *x.shape[1:]), None, "batch", *[None] * (x.ndim - 1))

    def join(self, x: jax.Array) -> jax.Array:
        """Undo `cut`."""
        parts = x.reshape(x.shape[0], self.devices, -1, *x.shape[2:]).swapaxes(0, 1)
        return constrain(parts.reshape(-1, *x.shape[2:]), "batch", *[None] * (x.ndim - 2))

    def inputs(self, batch: Batch) -> tuple[jax.Array, Batch]:
        """Numbers of the microbatches, and what of each is encoded."""
        microbatches = jax.tree.map(self.cut, {name: batch[name] for name in ("image", "tokens")})
        return jnp.arange(batch["tokens"].shape[0] // self.size), microbatches

    def encode(self, encode: Encode, params: Params, batch: Batch, key: Key) -> Encoded:
        """All pairs, a microbatch at a time; microbatch i draws from `fold_in(key, i)`."""

        def embed(part: tuple[jax.Array, Batch]) -> Encoded:
            return encode(params, part[1], jax.random.fold_in(key, part[0]))

        parts = jax.lax.map(embed, self.inputs(batch))
        joined = jax.tree.map(self.join, per_pair(parts))
        scale, bias = jax.tree.map(lambda x: x[0], (parts.logit_scale, parts.logit_bias))
        return parts._replace(**joined, logit_scale=scale, logit_bias=bias)


def make_cached(
    microbatch_size: int, devices: int
) -> Callable[[Encode, Loss, Params, Batch, Key], tuple[Params, Metrics]]:
    """`cached(encode, loss, params, batch, key)`: the gradients of `direct`, with the activations of one microbatch.

    All pairs are encoded without keeping activations; the loss over the whole batch gives the gradients of the
    embeddings; then each microbatch is encoded again and its share of the gradient taken. Microbatch i draws from
    `fold_in(key, i)`, both times.

    Args:
        microbatch_size: pairs that are encoded at once, over all devices; it divides the global batch.
        devices: how many share the batch; each gives every microbatch as many of its pairs.

    Source:
        arXiv 2101.06983, section 3.2.

    Cost:
        One more forward pass than `direct`; the embeddings and their gradients of the whole batch.
    """
    parts = Microbatches(microbatch_size, devices)

    def cached(encode: Encode, loss: Loss, params: Params, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        encoded = parts.encode(encode, params, batch, key)
        of_loss, metrics = jax.grad(lambda encoded: _evaluate(loss, encoded, batch), has_aux=True)(encoded)
        of_scaling = of_loss.logit_scale, of_loss.logit_bias

        def accumulate(total: Params, part: Any) -> tuple[Params, None]:
            (number, microbatch), of_part = part
            scale, bias = jax.tree.map(lambda x: jnp.where(number == 0, x, 0), of_scaling)
            step_key = jax.random.fold_in(key, number)
            _, pull_back = jax.vjp(lambda params: encode(params, microbatch, step_key), params)
            of_encoded = of_loss._replace(**of_part, logit_scale=scale, logit_bias=bias)
            return jax.tree.map(jnp.add, total, pull_back(of_encoded)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        of_pairs_parts = jax.tree.map(parts.cut, per_pair(of_loss))
        return jax.lax.scan(accumulate, zeros, (parts.inputs(batch), of_pairs_parts))[0], metrics

    return cached
