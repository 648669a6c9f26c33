"""Contrastive losses in tiles, on one device or on a mesh: the value, and an exact gradient that keeps no matrix.

A loss whose gradients need nothing but their own logit takes a single pass; the others compute every logit once for
the value and once more for the gradient.

Read `make_sharded_loss`, then `_forward` and `_backward`, or `_single_pass`; `partitioning` says which device
computes what.

Axes: n pairs of the global batch, r pairs of one device, e embed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from clipjax.config import LossMethod
from clipjax.losses.logit_loss import PairInputs
from clipjax.losses.partitioning import AllGather, InitialGradients, Pairs, Partitioning, Ring, Saved, SingleDevice
from clipjax.losses.tiles import Gradients, Scaling, TiledLogits
from clipjax.losses.topology import choose_method, gather_stages
from clipjax.runtime.sharding import SLICE, batch_axes, batch_devices
from clipjax.typing import Metrics

TIE = 1e-6
"""Largest difference of equal similarities: the diagonal is summed in another order than the rest."""


def similarity_of_pairs(image: Array, text: Array, dtype: Any) -> Float[Array, "r"]:
    """Compute the diagonal of the similarity matrix, from operands of the same dtype as the rest of it."""
    image, text = (x.astype(dtype).astype(jnp.float32) for x in (image, text))
    return jnp.sum(image * text, axis=1)


def _pair_inputs(partitioning: Partitioning, n: int, pairs: Pairs, scaling: Scaling) -> PairInputs:
    """Collect the numbers of each pair of this device by itself."""
    dtype = partitioning.tiled.dtype
    positive = scaling.scale * similarity_of_pairs(pairs.image, pairs.text, dtype) + scaling.bias
    teacher_logit = None
    if pairs.teacher is not None and scaling.teacher is not None:
        teacher_logit = scaling.teacher * similarity_of_pairs(*pairs.teacher, dtype)
    return PairInputs(positive, n, teacher_logit, pairs.memory, scaling.gamma)


def _finish_loss(
    partitioning: Partitioning, n: int, pairs: Pairs, scaling: Scaling, statistics: tuple[Any, Any]
) -> tuple[Any, ...]:
    """Compute loss and metrics over the global batch of n pairs, and the losses of this device's own pairs."""
    logit_loss, own, (images, texts) = (
        partitioning.tiled.logit_loss,
        _pair_inputs(partitioning, n, pairs, scaling),
        statistics,
    )
    pair_losses = logit_loss.finish(images, texts, own)
    tie, hardest = TIE * scaling.scale, logit_loss.peak(images)
    sums = jnp.stack(
        [
            logit_loss.weight * jnp.sum(pair_losses.loss),
            jnp.sum(own.positive > hardest + tie, dtype=jnp.float32),
            jnp.sum(own.positive > logit_loss.peak(texts) + tie, dtype=jnp.float32),
            jnp.sum(similarity_of_pairs(pairs.image, pairs.text, partitioning.tiled.dtype)),
            jnp.sum((hardest - scaling.bias) / scaling.scale),
        ]
    )
    names = ("image_to_text_accuracy", "text_to_image_accuracy", "positive_similarity", "hardest_negative_similarity")
    loss, *values = partitioning.sum(sums) / n
    return loss, dict(zip(names, values, strict=True)), pair_losses


def _forward(
    partitioning: Partitioning, n: int, pairs: Pairs, scaling: Scaling
) -> tuple[Array, Metrics, Float[Array, "r 2"] | None, Saved]:
    """Compute loss and metrics over the global batch of n pairs; memory and residuals are this device's."""
    images, texts, gathered = partitioning.statistics(pairs, scaling)
    loss, metrics, pair_losses = _finish_loss(partitioning, n, pairs, scaling, (images, texts))
    return (
        loss,
        metrics,
        pair_losses.memory,
        Saved(pairs, gathered, pair_losses.normalizers, pair_losses.negated_positive_gradient),
    )


def _initial_gradients(
    partitioning: Partitioning, pairs: Pairs, negated_positive_gradient: Array, scaling: Scaling, weight: Array
) -> InitialGradients:
    """Return the gradients that the diagonal gives, to which blocks add theirs."""
    logit_grad = -weight * negated_positive_gradient
    along = (scaling.scale * logit_grad)[:, None]
    similarity = similarity_of_pairs(pairs.image, pairs.text, partitioning.tiled.dtype)
    image_grads = Gradients(along * pairs.text.astype(jnp.float32), None, logit_grad * similarity, logit_grad)
    return InitialGradients(image_grads, along * pairs.image.astype(jnp.float32))


def _finish_gradients(
    partitioning: Partitioning, pairs: Pairs, image_grads: Gradients, text_grads: Array
) -> tuple[Array, Array, Array, Array]:
    """Sum the gradients of scale and bias over the devices; return them after those of this device's embeddings."""
    scale_grad, bias_grad = partitioning.sum(jnp.stack([jnp.sum(image_grads.scale), jnp.sum(image_grads.bias)]))
    return image_grads.rows.astype(pairs.image.dtype), text_grads.astype(pairs.text.dtype), scale_grad, bias_grad


def _backward(
    partitioning: Partitioning, n: int, cotangent: Array, saved: Saved, scaling: Scaling
) -> tuple[Array, Array, Array, Array]:
    """Compute the gradients of this device's images and texts, and of scale and bias."""
    weight = cotangent * (partitioning.tiled.logit_loss.weight / n)
    start = _initial_gradients(partitioning, saved.pairs, saved.negated_positive_gradient, scaling, weight)
    return _finish_gradients(partitioning, saved.pairs, *partitioning.gradients(saved, scaling, weight, start))


def _single_pass(
    partitioning: Partitioning, n: int, pairs: Pairs, scaling: Scaling
) -> tuple[Array, Metrics, None, Any]:
    """Compute loss, metrics and gradients, every logit once."""
    logit_loss, weight = partitioning.tiled.logit_loss, jnp.float32(partitioning.tiled.logit_loss.weight / n)
    nothing = logit_loss.empty(pairs.image.shape[0])  # its gradients depend on no statistics
    losses = logit_loss.finish(nothing, nothing, _pair_inputs(partitioning, n, pairs, scaling))
    start = _initial_gradients(partitioning, pairs, losses.negated_positive_gradient, scaling, weight)
    both = partitioning.statistics_and_gradients(pairs, scaling, weight, start)
    loss, metrics, _ = _finish_loss(partitioning, n, pairs, scaling, (both.images, both.texts))
    return loss, metrics, None, _finish_gradients(partitioning, pairs, both.image_grads, both.text_grads)


def make_sharded_loss(
    tiled: TiledLogits, *, method: LossMethod, mesh: Mesh | None
) -> Callable[[Pairs, Scaling], tuple[Array, Metrics, Array | None]]:
    """Build a loss of global arrays that returns value, metrics and new memory; its gradient recomputes the logits."""
    devices = 1 if mesh is None else batch_devices(mesh)
    axes = () if mesh is None else batch_axes(mesh)
    split, whole = PartitionSpec(axes), PartitionSpec()
    slices = 1 if mesh is None else mesh.shape.get(SLICE, 1)
    saved_specs: Any = Saved(split, PartitionSpec(SLICE) if slices > 1 else whole, split, split)  # type: ignore[arg-type]

    def choose(image: Array) -> Partitioning:
        if devices == 1:
            return SingleDevice(tiled)
        n, e = image.shape
        ring = choose_method(method, mesh, n, 2 * e * jnp.dtype(tiled.dtype).itemsize) is LossMethod.RING
        assert mesh is not None
        return Ring(tiled, axes, devices) if ring else AllGather(tiled, axes, slices, gather_stages(mesh))

    def on_mesh(run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Run on every device with its part of the arrays; without a mesh, as it is."""
        if devices == 1:
            return run
        # check_vma cannot see that a gathered array is the same on every device.
        return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def forward(pairs: Pairs, scaling: Scaling) -> tuple[Array, Metrics, Array | None, Saved]:
        run = functools.partial(_forward, choose(pairs.image), pairs.image.shape[0])
        return on_mesh(run, (split, whole), (whole, whole, split, saved_specs))(pairs, scaling)

    @jax.custom_vjp
    def loss(pairs: Pairs, scaling: Scaling) -> tuple[Array, Metrics, Array | None]:
        return forward(pairs, scaling)[:3]

    gradient_specs = (split, split, whole, whole)

    def loss_forward(pairs: Pairs, scaling: Scaling) -> tuple[Any, Any]:
        if tiled.logit_loss.single_pass:
            run = functools.partial(_single_pass, choose(pairs.image), pairs.image.shape[0])
            *results, saved = on_mesh(run, (split, whole), (whole, whole, split, gradient_specs))(pairs, scaling)
        else:
            *results, saved = forward(pairs, scaling)
        return tuple(results), (saved, scaling)

    def loss_backward(residuals: tuple[Any, Scaling], cotangents: Sequence[Any]) -> tuple[Pairs, Scaling]:
        saved, scaling = residuals
        if tiled.logit_loss.single_pass:
            image, text, scale, bias = (cotangents[0].astype(x.dtype) * x for x in saved)
            return Pairs(image, text), Scaling(scale, bias)
        run = functools.partial(_backward, choose(saved.pairs.image), saved.pairs.image.shape[0])
        gradients = on_mesh(run, (whole, saved_specs, whole), gradient_specs)
        image, text, scale, bias = gradients(cotangents[0], saved, scaling)
        return Pairs(image, text), Scaling(scale, bias)

    loss.defvjp(loss_forward, loss_backward)
    return loss  # type: ignore[return-value]
