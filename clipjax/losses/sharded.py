"""Contrastive losses in tiles, on one device or on a mesh: the value, and an exact gradient that keeps no matrix.

Three ways, one answer. `_Whole` has everything on one device. `_Gathered` collects all embeddings once; then every
device computes its own rows, and in the backward pass the complete gradient of its own images and texts, so that no
gradient is summed across devices. Among slices (a mesh axis with slow links) it collects by a ring: each device passes
its own part on, and what has arrived is gathered inside the slice. `_Ring` passes blocks of texts from neighbour to
neighbour, so that nobody ever holds all of them; with a block of texts travel the statistics, and later the gradient,
of its columns.

Axes: n pairs of the global batch, r pairs of one device, e embed, t embed of a teacher.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from clipjax.config import LossMethod
from clipjax.losses.kinds import Own
from clipjax.losses.tiles import Gradients, Product, Scaling, Side, block_gradients, block_statistics
from clipjax.losses.topology import Stages, choose_method, gather_stages
from clipjax.sharding import SLICE, batch_axes, batch_devices
from clipjax.typing import Metrics

TIE = 1e-6
"""Similarities this close are equal: the diagonal is summed in another order than the rest."""


class Pairs(NamedTuple):
    """The pairs of one device.

    Attributes:
        image: unit-norm embeddings.
        text: unit-norm embeddings.
        group: pairs of one group are no negatives of each other; None where there are no groups.
        teacher: a teacher's embeddings of images and texts; None without one.
        memory: moving averages of `kinds.Global`; None with other kinds.
    """

    image: Float[Array, "r e"]
    text: Float[Array, "r e"]
    group: Int[Array, "r"] | None = None
    teacher: tuple[Float[Array, "r t"], Float[Array, "r t"]] | None = None
    memory: Float[Array, "r 2"] | None = None


class Saved(NamedTuple):
    """What the backward pass of one device needs. `everyone` is what was collected, slice by slice, if anything."""

    pairs: Pairs
    everyone: tuple[Pairs, ...]
    known: tuple[Any, Any]
    pull: Float[Array, "r"]


def _sides(pairs: Pairs, positions: Array) -> tuple[Side, Side]:
    of_images, of_texts = (None, None) if pairs.teacher is None else pairs.teacher
    return Side(pairs.image, positions, pairs.group, of_images), Side(pairs.text, positions, pairs.group, of_texts)


def _cast(pairs: Pairs, dtype: Any) -> Pairs:
    """Embeddings as they travel. What only their own device needs stays behind."""
    image, text, teacher = jax.tree.map(lambda x: x.astype(dtype), (pairs.image, pairs.text, pairs.teacher))
    return Pairs(image, text, pairs.group, teacher)


class Start(NamedTuple):
    """Gradients of a device's images, of scale and bias, and of its texts, as far as the diagonal goes."""

    images: Gradients
    texts: Float[Array, "r e"]


@dataclass(frozen=True)
class _Whole:
    """Everything on one device."""

    product: Product

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Any, Any, tuple[Pairs, ...]]:
        rows, columns = _sides(pairs, jnp.arange(pairs.image.shape[0]))
        return *block_statistics(self.product, rows, columns, scaling), ()

    def gradients(self, saved: Saved, scaling: Scaling, weight: Array, start: Start) -> tuple[Gradients, Array]:
        sides = _sides(saved.pairs, jnp.arange(saved.pull.shape[0]))
        so_far = start.images._replace(columns=start.texts)
        found = block_gradients(self.product, sides, saved.known, scaling, weight=weight, so_far=so_far)
        assert found.columns is not None
        return found, found.columns

    def sum(self, x: Array) -> Array:
        return x


@dataclass(frozen=True)
class _Gathered:
    """Embeddings are collected once; what moves later are a few numbers per pair.

    Attributes:
        product: how logits are computed.
        axes: mesh axes of the batch; the first may be `slice`.
        slices: how many slices there are.
        stages: of the gather inside a slice: axis and groups of places on it (None: all), one after the other.

    Cost:
        Moved per device: 2 n e numbers of embeddings and 6 n of statistics; between slices only what the device itself
        holds, slices - 1 times. 10 r n e FLOPs, forward and backward together.
    """

    product: Product
    axes: tuple[str, ...]
    slices: int
    stages: Stages

    @property
    def inner(self) -> tuple[str, ...]:
        """Axes inside a slice."""
        return tuple(axis for axis in self.axes if axis != SLICE)

    def collect(self, tree: Any) -> list[Any]:
        """The parts of all devices by slice: this device's own, the next one, and so on around."""
        to_previous = [(i, (i - 1) % self.slices) for i in range(self.slices)]
        blocks = []
        for k in range(self.slices):
            if k:
                tree = jax.tree.map(lambda x: jax.lax.ppermute(x, SLICE, to_previous), tree)
            blocks.append(jax.tree.map(self._gather, tree))
        return blocks

    def _gather(self, x: Array) -> Array:
        for axis, groups in self.stages:
            x = jax.lax.all_gather(x, axis, axis=0, tiled=True, axis_index_groups=groups)
        return x

    def positions(self, k: int, count: int) -> Array:
        """Places in the global batch of the pairs in the k-th block of `count`."""
        return self._slice(k) * count + jnp.arange(count)

    def _slice(self, k: int) -> Array | int:
        return (jax.lax.axis_index(SLICE) + k) % self.slices if self.slices > 1 else 0

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Any, Any, tuple[Pairs, ...]]:
        count, kind = pairs.image.shape[0], self.product.kind
        rows, _ = _sides(pairs, own_positions(self.axes, count))
        everyone = self.collect(_cast(pairs, self.product.dtype))
        images, parts = kind.empty(count), []
        for k, block in enumerate(everyone):
            _, columns = _sides(block, self.positions(k, block.text.shape[0]))
            of_rows, of_columns = block_statistics(self.product, rows, columns, scaling)
            images = kind.merge(images, of_rows)
            parts.append(of_columns)
        return images, self._combine(parts, count), tuple(everyone)

    def _combine(self, parts: list[Any], count: int) -> Any:
        """Statistics of this device's own columns, from the parts that all devices have of all columns."""
        kind = self.product.kind
        texts = jax.tree.map(lambda *blocks: jnp.roll(jnp.stack(blocks), self._slice(0), axis=0), *parts)
        place = jax.lax.axis_index(self.inner) * count
        texts = kind.combine(texts, self.inner)
        texts = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place, count, axis=1), texts)
        if self.slices > 1:
            texts = kind.combine(texts, (SLICE,))
        return jax.tree.map(lambda x: x[self._slice(0)], texts)

    def gradients(self, saved: Saved, scaling: Scaling, weight: Array, start: Start) -> tuple[Gradients, Array]:
        images, texts = _sides(saved.pairs, own_positions(self.axes, saved.pull.shape[0]))
        rows, columns = saved.known
        of_images, of_texts = start.images, start.images._replace(rows=start.texts)
        for k, (block, known) in enumerate(zip(saved.everyone, self.collect(saved.known), strict=True)):
            all_images, all_texts = _sides(block, self.positions(k, block.text.shape[0]))
            add = functools.partial(block_gradients, self.product, scaling=scaling, weight=weight)
            of_images = add((images, all_texts), (rows, known[1]), so_far=of_images)
            of_texts = add((texts, all_images), (columns, known[0]), so_far=of_texts)
        return of_images, of_texts.rows

    def sum(self, x: Array) -> Array:
        return jax.lax.psum(x, self.axes)


@dataclass(frozen=True)
class _Ring:
    """Blocks of texts travel once around the ring of `size` devices, in both passes; the next one while one is used.

    Cost:
        Moved per device: n e numbers of embeddings forward, 2 n e backward. 8 r n e FLOPs; memory linear in r.
    """

    product: Product
    axes: tuple[str, ...]
    size: int

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Any, Any, tuple[Pairs, ...]]:
        kind, count = self.product.kind, pairs.image.shape[0]
        rows, columns = self.sides(pairs)

        def visit(carry: Any, _: None) -> tuple[Any, None]:
            block, of_block, of_rows = carry
            following = self.pass_on(block)
            images, texts = block_statistics(self.product, rows, block, scaling)
            of_block = self.pass_on(kind.merge(of_block, texts))
            return (following, of_block, kind.merge(of_rows, images)), None

        start = (columns, kind.empty(count), kind.empty(count))
        (_, texts, images), _ = jax.lax.scan(visit, start, None, length=self.size)
        return images, texts, ()

    def gradients(self, saved: Saved, scaling: Scaling, weight: Array, start: Start) -> tuple[Gradients, Array]:
        rows, columns = self.sides(saved.pairs)
        of_rows, of_columns = saved.known

        def visit(carry: Any, _: None) -> tuple[Any, None]:
            block, known, of_block, of_images = carry
            following = self.pass_on((block, known))
            found = block_gradients(
                self.product,
                (rows, block),
                (of_rows, known),
                scaling,
                weight=weight,
                so_far=of_images._replace(columns=of_block),
            )
            return (*following, self.pass_on(found.columns), found._replace(columns=None)), None

        carry = (columns, of_columns, start.texts, start.images)
        (_, _, of_texts, of_images), _ = jax.lax.scan(visit, carry, None, length=self.size)
        return of_images, of_texts

    def sides(self, pairs: Pairs) -> tuple[Side, Side]:
        """This device's images, and its texts in the dtype that they travel in."""
        positions = own_positions(self.axes, pairs.image.shape[0])
        return _sides(pairs, positions)[0], _sides(_cast(pairs, self.product.dtype), positions)[1]

    def pass_on(self, tree: Any) -> Any:
        """Hand to the previous device, and take from the next."""
        to_previous = [(i, (i - 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, to_previous), tree)

    def sum(self, x: Array) -> Array:
        return jax.lax.psum(x, self.axes)


Way = _Whole | _Gathered | _Ring


def own_positions(axes: tuple[str, ...], rows: int) -> Int[Array, "r"]:
    """Places of this device's pairs in the global batch."""
    return jax.lax.axis_index(axes) * rows + jnp.arange(rows)


def similarity_of_pairs(image: Array, text: Array, dtype: Any) -> Float[Array, "r"]:
    """The diagonal of the similarity matrix, from operands of the same dtype as the rest of it."""
    image, text = (x.astype(dtype).astype(jnp.float32) for x in (image, text))
    return jnp.sum(image * text, axis=1)


def _forward(
    way: Way, n: int, pairs: Pairs, scaling: Scaling
) -> tuple[Array, Metrics, Float[Array, "r 2"] | None, Saved]:
    """Loss and metrics over the global batch of n pairs; the rest are this device's."""
    kind, dtype = way.product.kind, way.product.dtype
    images, texts, everyone = way.statistics(pairs, scaling)
    similarity = similarity_of_pairs(pairs.image, pairs.text, dtype)
    positive = scaling.scale * similarity + scaling.bias
    of_teacher = None
    if pairs.teacher is not None and scaling.teacher is not None:
        of_teacher = scaling.teacher * similarity_of_pairs(*pairs.teacher, dtype)
    outcome = kind.finish(images, texts, Own(positive, n, of_teacher, pairs.memory, scaling.gamma))
    tie, hardest = TIE * scaling.scale, kind.peak(images)
    sums = jnp.stack(
        [
            kind.weight * jnp.sum(outcome.loss),
            jnp.sum(positive > hardest + tie, dtype=jnp.float32),
            jnp.sum(positive > kind.peak(texts) + tie, dtype=jnp.float32),
            jnp.sum(similarity),
            jnp.sum((hardest - scaling.bias) / scaling.scale),
        ]
    )
    names = ("image_to_text_accuracy", "text_to_image_accuracy", "positive_similarity", "hardest_negative_similarity")
    loss, *values = way.sum(sums) / n
    saved = Saved(pairs, everyone, outcome.known, outcome.pull)
    return loss, dict(zip(names, values, strict=True)), outcome.memory, saved


def _backward(way: Way, n: int, cotangent: Array, saved: Saved, scaling: Scaling) -> tuple[Array, Array, Array, Array]:
    """Gradients of this device's images and texts, and of scale and bias."""
    image, text = saved.pairs.image, saved.pairs.text
    weight = cotangent * (way.product.kind.weight / n)
    push = -weight * saved.pull
    along = (scaling.scale * push)[:, None]
    similarity = similarity_of_pairs(image, text, way.product.dtype)
    start = Start(
        Gradients(along * text.astype(jnp.float32), None, push * similarity, push), along * image.astype(jnp.float32)
    )
    of_images, of_texts = way.gradients(saved, scaling, weight, start)
    of_scale, of_bias = way.sum(jnp.stack([jnp.sum(of_images.scale), jnp.sum(of_images.bias)]))
    return of_images.rows.astype(image.dtype), of_texts.astype(text.dtype), of_scale, of_bias


def make_sharded_loss(
    product: Product, *, method: LossMethod, mesh: Mesh | None
) -> Callable[[Pairs, Scaling], tuple[Array, Metrics, Array | None]]:
    """A loss of global arrays, with a gradient of its own that recomputes what it needs; and the new memory."""
    devices = 1 if mesh is None else batch_devices(mesh)
    axes = () if mesh is None else batch_axes(mesh)
    split, whole = PartitionSpec(axes), PartitionSpec()
    slices = 1 if mesh is None else mesh.shape.get(SLICE, 1)
    saved_specs: Any = Saved(split, PartitionSpec(SLICE) if slices > 1 else whole, split, split)  # type: ignore[arg-type]

    def way(image: Array) -> Way:
        if devices == 1:
            return _Whole(product)
        n, e = image.shape
        ring = choose_method(method, mesh, n, 2 * e * jnp.dtype(product.dtype).itemsize) is LossMethod.RING
        assert mesh is not None
        return _Ring(product, axes, devices) if ring else _Gathered(product, axes, slices, gather_stages(mesh))

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

    def loss_forward(pairs: Pairs, scaling: Scaling) -> tuple[Any, Any]:
        *results, saved = forward(pairs, scaling)
        return tuple(results), (saved, scaling)

    def loss_backward(residuals: tuple[Saved, Scaling], cotangents: Sequence[Any]) -> tuple[Pairs, Scaling]:
        saved, scaling = residuals
        run = functools.partial(_backward, way(saved.pairs.image), saved.pairs.image.shape[0])
        gradients = on_mesh(run, (whole, saved_specs, whole), (split, split, whole, whole))
        image, text, scale, bias = gradients(cotangents[0], saved, scaling)
        return Pairs(image, text), Scaling(scale, bias)

    loss.defvjp(loss_forward, loss_backward)
    return loss  # type: ignore[return-value]
