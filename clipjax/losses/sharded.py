"""Contrastive losses in tiles, on one device or on a mesh: the value, and an exact gradient that keeps no matrix.

`ways` says how devices share the matrix. A kind of loss whose slopes need nothing but their own logit is done in a
single pass; the others compute every logit once for the value and once more for the gradient.

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
"""Similarities this close are equal: the diagonal is summed in another order than the rest."""


def similarity_of_pairs(image: Array, text: Array, dtype: Any) -> Float[Array, "r"]:
    """The diagonal of the similarity matrix, from operands of the same dtype as the rest of it."""
    image, text = (x.astype(dtype).astype(jnp.float32) for x in (image, text))
    return jnp.sum(image * text, axis=1)


def _own(way: Partitioning, n: int, pairs: Pairs, scaling: Scaling) -> PairInputs:
    """What is known of each pair of this device by itself."""
    dtype = way.product.dtype
    positive = scaling.scale * similarity_of_pairs(pairs.image, pairs.text, dtype) + scaling.bias
    of_teacher = None
    if pairs.teacher is not None and scaling.teacher is not None:
        of_teacher = scaling.teacher * similarity_of_pairs(*pairs.teacher, dtype)
    return PairInputs(positive, n, of_teacher, pairs.memory, scaling.gamma)


def _conclude(
    way: Partitioning, n: int, pairs: Pairs, scaling: Scaling, statistics: tuple[Any, Any]
) -> tuple[Any, ...]:
    """Loss and metrics over the global batch of n pairs; and what this device's own statistics come to."""
    kind, own, (images, texts) = way.product.kind, _own(way, n, pairs, scaling), statistics
    outcome = kind.finish(images, texts, own)
    tie, hardest = TIE * scaling.scale, kind.peak(images)
    sums = jnp.stack(
        [
            kind.weight * jnp.sum(outcome.loss),
            jnp.sum(own.positive > hardest + tie, dtype=jnp.float32),
            jnp.sum(own.positive > kind.peak(texts) + tie, dtype=jnp.float32),
            jnp.sum(similarity_of_pairs(pairs.image, pairs.text, way.product.dtype)),
            jnp.sum((hardest - scaling.bias) / scaling.scale),
        ]
    )
    names = ("image_to_text_accuracy", "text_to_image_accuracy", "positive_similarity", "hardest_negative_similarity")
    loss, *values = way.sum(sums) / n
    return loss, dict(zip(names, values, strict=True)), outcome


def _forward(
    way: Partitioning, n: int, pairs: Pairs, scaling: Scaling
) -> tuple[Array, Metrics, Float[Array, "r 2"] | None, Saved]:
    """Loss and metrics over the global batch of n pairs; the rest are this device's."""
    images, texts, everyone = way.statistics(pairs, scaling)
    loss, metrics, outcome = _conclude(way, n, pairs, scaling, (images, texts))
    return loss, metrics, outcome.memory, Saved(pairs, everyone, outcome.known, outcome.pull)


def _diagonal(way: Partitioning, pairs: Pairs, pull: Array, scaling: Scaling, weight: Array) -> InitialGradients:
    """Where gradients start."""
    push = -weight * pull
    along = (scaling.scale * push)[:, None]
    similarity = similarity_of_pairs(pairs.image, pairs.text, way.product.dtype)
    of_images = Gradients(along * pairs.text.astype(jnp.float32), None, push * similarity, push)
    return InitialGradients(of_images, along * pairs.image.astype(jnp.float32))


def _finished(
    way: Partitioning, pairs: Pairs, of_images: Gradients, of_texts: Array
) -> tuple[Array, Array, Array, Array]:
    """Gradients of this device's images and texts, and of scale and bias."""
    of_scale, of_bias = way.sum(jnp.stack([jnp.sum(of_images.scale), jnp.sum(of_images.bias)]))
    return of_images.rows.astype(pairs.image.dtype), of_texts.astype(pairs.text.dtype), of_scale, of_bias


def _backward(
    way: Partitioning, n: int, cotangent: Array, saved: Saved, scaling: Scaling
) -> tuple[Array, Array, Array, Array]:
    """Gradients of this device's images and texts, and of scale and bias."""
    weight = cotangent * (way.product.kind.weight / n)
    start = _diagonal(way, saved.pairs, saved.pull, scaling, weight)
    return _finished(way, saved.pairs, *way.gradients(saved, scaling, weight, start))


def _single_pass(way: Partitioning, n: int, pairs: Pairs, scaling: Scaling) -> tuple[Array, Metrics, None, Any]:
    """Loss and metrics as `_forward` gives them, and the gradients of the loss: every logit is computed once."""
    kind, weight = way.product.kind, jnp.float32(way.product.kind.weight / n)
    nothing = kind.empty(pairs.image.shape[0])  # on which the pull of such a kind does not depend
    pull = kind.finish(nothing, nothing, _own(way, n, pairs, scaling)).pull
    both = way.both(pairs, scaling, weight, _diagonal(way, pairs, pull, scaling, weight))
    loss, metrics, _ = _conclude(way, n, pairs, scaling, (both.images, both.texts))
    return loss, metrics, None, _finished(way, pairs, both.of_images, both.of_texts)


def make_sharded_loss(
    product: TiledLogits, *, method: LossMethod, mesh: Mesh | None
) -> Callable[[Pairs, Scaling], tuple[Array, Metrics, Array | None]]:
    """A loss of global arrays, with a gradient of its own that recomputes what it needs; and the new memory."""
    devices = 1 if mesh is None else batch_devices(mesh)
    axes = () if mesh is None else batch_axes(mesh)
    split, whole = PartitionSpec(axes), PartitionSpec()
    slices = 1 if mesh is None else mesh.shape.get(SLICE, 1)
    saved_specs: Any = Saved(split, PartitionSpec(SLICE) if slices > 1 else whole, split, split)  # type: ignore[arg-type]

    def way(image: Array) -> Partitioning:
        if devices == 1:
            return SingleDevice(product)
        n, e = image.shape
        ring = choose_method(method, mesh, n, 2 * e * jnp.dtype(product.dtype).itemsize) is LossMethod.RING
        assert mesh is not None
        return Ring(product, axes, devices) if ring else AllGather(product, axes, slices, gather_stages(mesh))

    def on_mesh(run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Run on every device with its part of the arrays; without a mesh, as it is."""
        if devices == 1:
            return run
        # check_vma cannot see that a gathered array is the same on every device.
        return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def forward(pairs: Pairs, scaling: Scaling) -> tuple[Array, Metrics, Array | None, Saved]:
        run = functools.partial(_forward, way(pairs.image), pairs.image.shape[0])
        return on_mesh(run, (split, whole), (whole, whole, split, saved_specs))(pairs, scaling)

    @jax.custom_vjp
    def loss(pairs: Pairs, scaling: Scaling) -> tuple[Array, Metrics, Array | None]:
        return forward(pairs, scaling)[:3]

    gradient_specs = (split, split, whole, whole)

    def loss_forward(pairs: Pairs, scaling: Scaling) -> tuple[Any, Any]:
        if product.kind.single_pass:
            run = functools.partial(_single_pass, way(pairs.image), pairs.image.shape[0])
            *results, saved = on_mesh(run, (split, whole), (whole, whole, split, gradient_specs))(pairs, scaling)
        else:
            *results, saved = forward(pairs, scaling)
        return tuple(results), (saved, scaling)

    def loss_backward(residuals: tuple[Any, Scaling], cotangents: Sequence[Any]) -> tuple[Pairs, Scaling]:
        saved, scaling = residuals
        if product.kind.single_pass:
            image, text, scale, bias = (cotangents[0].astype(x.dtype) * x for x in saved)
            return Pairs(image, text), Scaling(scale, bias)
        run = functools.partial(_backward, way(saved.pairs.image), saved.pairs.image.shape[0])
        gradients = on_mesh(run, (whole, saved_specs, whole), gradient_specs)
        image, text, scale, bias = gradients(cotangents[0], saved, scaling)
        return Pairs(image, text), Scaling(scale, bias)

    loss.defvjp(loss_forward, loss_backward)
    return loss  # type: ignore[return-value]
