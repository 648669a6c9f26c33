"""Partitionings of the similarity matrix over a mesh: what each device computes, keeps and passes on.

Three partitionings, one answer. `SingleDevice` has everything on one device. `AllGather` collects all embeddings once;
then every device computes its own rows, and in the backward pass the complete gradient of its own images and texts, so
that no gradient is summed across devices. Between slices (a mesh axis with slow links) it collects by a ring: each
device passes its own part on, and what has arrived is gathered inside the slice. `Ring` passes blocks of texts from
neighbour to neighbour, so that no device ever holds all of them; a block of texts travels with the statistics, and
later the gradient, of its columns.

Axes: n pairs of the global batch, r pairs of one device, e embed, t embed of a teacher.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.losses.tiles import (
    Gradients,
    Scaling,
    Side,
    TiledLogits,
    block_gradients,
    block_statistics,
    block_statistics_and_gradients,
)
from clipjax.losses.topology import Stages
from clipjax.runtime.sharding import SLICE


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


class InitialGradients(NamedTuple):
    """Gradients of a device's images, of scale and bias, and of its texts, as far as the diagonal goes."""

    images: Gradients
    texts: Float[Array, "r e"]


class StatisticsAndGradients(NamedTuple):
    """Statistics of a device's images and texts, and gradients of both."""

    images: Any
    texts: Any
    of_images: Gradients
    of_texts: Float[Array, "r e"]


@dataclass(frozen=True)
class SingleDevice:
    """Everything on one device."""

    product: TiledLogits

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Any, Any, tuple[Pairs, ...]]:
        rows, columns = _sides(pairs, jnp.arange(pairs.image.shape[0]))
        return *block_statistics(self.product, rows, columns, scaling), ()

    def gradients(
        self, saved: Saved, scaling: Scaling, weight: Array, start: InitialGradients
    ) -> tuple[Gradients, Array]:
        sides = _sides(saved.pairs, jnp.arange(saved.pull.shape[0]))
        so_far = start.images._replace(columns=start.texts)
        found = block_gradients(self.product, sides, saved.known, scaling, weight=weight, so_far=so_far)
        assert found.columns is not None
        return found, found.columns

    def both(self, pairs: Pairs, scaling: Scaling, weight: Array, start: InitialGradients) -> StatisticsAndGradients:
        sides = _sides(pairs, jnp.arange(pairs.image.shape[0]))
        so_far = start.images._replace(columns=start.texts)
        images, texts, found = block_statistics_and_gradients(
            self.product, sides, scaling, weight=weight, so_far=so_far
        )
        assert found.columns is not None
        return StatisticsAndGradients(images, texts, found, found.columns)

    def sum(self, x: Array) -> Array:
        return x


@dataclass(frozen=True)
class AllGather:
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

    product: TiledLogits
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

    def gradients(
        self, saved: Saved, scaling: Scaling, weight: Array, start: InitialGradients
    ) -> tuple[Gradients, Array]:
        images, texts = _sides(saved.pairs, own_positions(self.axes, saved.pull.shape[0]))
        rows, columns = saved.known
        of_images, of_texts = start.images, start.images._replace(rows=start.texts)
        for k, (block, known) in enumerate(zip(saved.everyone, self.collect(saved.known), strict=True)):
            all_images, all_texts = _sides(block, self.positions(k, block.text.shape[0]))
            add = functools.partial(block_gradients, self.product, scaling=scaling, weight=weight)
            of_images = add((images, all_texts), (rows, known[1]), so_far=of_images)
            of_texts = add((texts, all_images), (columns, known[0]), so_far=of_texts)
        return of_images, of_texts.rows

    def both(self, pairs: Pairs, scaling: Scaling, weight: Array, start: InitialGradients) -> StatisticsAndGradients:
        count, kind = pairs.image.shape[0], self.product.kind
        rows, columns = _sides(pairs, own_positions(self.axes, count))
        images, parts = kind.empty(count), []
        of_images, of_texts = start.images, start.images._replace(rows=start.texts)
        for k, block in enumerate(self.collect(_cast(pairs, self.product.dtype))):
            all_images, all_texts = _sides(block, self.positions(k, block.text.shape[0]))
            of_rows, of_columns, of_images = block_statistics_and_gradients(
                self.product, (rows, all_texts), scaling, weight=weight, so_far=of_images
            )
            of_texts = block_gradients(
                self.product, (columns, all_images), (None, None), scaling, weight=weight, so_far=of_texts
            )
            images = kind.merge(images, of_rows)
            parts.append(of_columns)
        return StatisticsAndGradients(images, self._combine(parts, count), of_images, of_texts.rows)

    def sum(self, x: Array) -> Array:
        return jax.lax.psum(x, self.axes)


@dataclass(frozen=True)
class Ring:
    """Blocks of texts travel once around the ring of `size` devices, in both passes; the next one while one is used.

    Cost:
        Moved per device: n e numbers of embeddings forward, 2 n e backward. 8 r n e FLOPs; memory linear in r.
    """

    product: TiledLogits
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

    def gradients(
        self, saved: Saved, scaling: Scaling, weight: Array, start: InitialGradients
    ) -> tuple[Gradients, Array]:
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

    def both(self, pairs: Pairs, scaling: Scaling, weight: Array, start: InitialGradients) -> StatisticsAndGradients:
        kind, count = self.product.kind, pairs.image.shape[0]
        rows, columns = self.sides(pairs)

        def visit(carry: Any, _: None) -> tuple[Any, None]:
            block, travelling, images, of_images = carry
            of_block, texts = travelling
            following = self.pass_on(block)
            of_rows, of_columns, found = block_statistics_and_gradients(
                self.product,
                (rows, block),
                scaling,
                weight=weight,
                so_far=of_images._replace(columns=of_block),
            )
            travelling = self.pass_on((found.columns, kind.merge(texts, of_columns)))
            return (following, travelling, kind.merge(images, of_rows), found._replace(columns=None)), None

        carry = (columns, (start.texts, kind.empty(count)), kind.empty(count), start.images)
        (_, (of_texts, texts), images, of_images), _ = jax.lax.scan(visit, carry, None, length=self.size)
        return StatisticsAndGradients(images, texts, of_images, of_texts)

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


Partitioning = SingleDevice | AllGather | Ring


def own_positions(axes: tuple[str, ...], rows: int) -> Int[Array, "r"]:
    """Places of this device's pairs in the global batch."""
    return jax.lax.axis_index(axes) * rows + jnp.arange(rows)
