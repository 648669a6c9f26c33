"""Partitionings of the similarity matrix over a mesh, which say what each device computes, keeps and passes on.

Three partitionings give one answer. `SingleDevice` has everything on one device. `AllGather` gathers all embeddings
once; then every device computes its own rows, and in the backward pass the complete gradient of its own images and
texts, so that no gradient is summed across devices. Between slices (a mesh axis with slow links) it gathers by a ring:
each device passes its own part on, and gathers the part that arrives inside the slice. `Ring` passes blocks of texts
from neighbour to neighbour, so that no device ever holds all of them; a block of texts travels with the statistics,
and later the gradient, of its columns. All three have the methods of `SingleDevice`.

Read `Pairs`, `Saved`, `SingleDevice`, `AllGather`, `Ring`.
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
    RowsOrColumns,
    Scaling,
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
        memory: moving averages of `GlobalSoftmax`; None with other losses.
    """

    image: Float[Array, "r e"]
    text: Float[Array, "r e"]
    group: Int[Array, "r"] | None = None
    teacher: tuple[Float[Array, "r t"], Float[Array, "r t"]] | None = None
    memory: Float[Array, "r 2"] | None = None


class Saved(NamedTuple):
    """Residuals that the backward pass of one device needs.

    Attributes:
        pairs: of this device.
        gathered: embeddings of all devices, slice by slice; empty unless they were gathered.
        normalizers: of this device's images and texts (`PairLosses`).
        negated_positive_gradient: of this device's pairs (`PairLosses`).
    """

    pairs: Pairs
    gathered: tuple[Pairs, ...]
    normalizers: tuple[Any, Any]
    negated_positive_gradient: Float[Array, "r"]


def _sides(pairs: Pairs, positions: Array) -> tuple[RowsOrColumns, RowsOrColumns]:
    teacher_image, teacher_text = (None, None) if pairs.teacher is None else pairs.teacher
    rows = RowsOrColumns(pairs.image, positions, pairs.group, teacher_image)
    return rows, RowsOrColumns(pairs.text, positions, pairs.group, teacher_text)


def _cast(pairs: Pairs, dtype: Any) -> Pairs:
    """Cast embeddings to the dtype in which they travel, and leave out what only their own device needs."""
    image, text, teacher = jax.tree.map(lambda x: x.astype(dtype), (pairs.image, pairs.text, pairs.teacher))
    return Pairs(image, text, pairs.group, teacher)


class InitialGradients(NamedTuple):
    """The diagonal's part of the gradients of a device's images, of scale and bias, and of its texts."""

    images: Gradients
    texts: Float[Array, "r e"]


class StatisticsAndGradients(NamedTuple):
    """Statistics of a device's images and texts, and gradients of both."""

    images: Any
    texts: Any
    image_grads: Gradients
    text_grads: Float[Array, "r e"]


@dataclass(frozen=True)
class SingleDevice:
    """Everything on one device."""

    tiled: TiledLogits

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Any, Any, tuple[Pairs, ...]]:
        """Return the statistics of this device's images and texts, and what `Saved.gathered` keeps."""
        rows, columns = _sides(pairs, jnp.arange(pairs.image.shape[0]))
        return *block_statistics(self.tiled, rows, columns, scaling), ()

    def gradients(
        self, saved: Saved, scaling: Scaling, weight: Array, start: InitialGradients
    ) -> tuple[Gradients, Array]:
        """Add all blocks' gradients to the initial ones; return those of images, scale and bias, and of texts."""
        sides = _sides(saved.pairs, jnp.arange(saved.negated_positive_gradient.shape[0]))
        so_far = start.images._replace(columns=start.texts)
        gradients = block_gradients(self.tiled, sides, saved.normalizers, scaling, weight=weight, so_far=so_far)
        assert gradients.columns is not None
        return gradients, gradients.columns

    def statistics_and_gradients(
        self, pairs: Pairs, scaling: Scaling, weight: Array, start: InitialGradients
    ) -> StatisticsAndGradients:
        """Do the work of `statistics` and `gradients` in one pass, for a loss of a single pass."""
        sides = _sides(pairs, jnp.arange(pairs.image.shape[0]))
        so_far = start.images._replace(columns=start.texts)
        images, texts, gradients = block_statistics_and_gradients(
            self.tiled, sides, scaling, weight=weight, so_far=so_far
        )
        assert gradients.columns is not None
        return StatisticsAndGradients(images, texts, gradients, gradients.columns)

    def sum(self, x: Array) -> Array:
        """Sum over the devices."""
        return x


@dataclass(frozen=True)
class AllGather:
    """All embeddings gathered once; later only a few numbers per pair move.

    Attributes:
        tiled: the loss and its tiles.
        axes: mesh axes of the batch; the first may be `slice`.
        slices: how many slices there are.
        stages: of the gather inside a slice: axis and groups of places on it (None: all), one after the other.

    Cost:
        Moved per device: 2 n e numbers of embeddings and 6 n of statistics; between slices only what the device itself
        holds, slices - 1 times. 10 r n e FLOPs, forward and backward together.
    """

    tiled: TiledLogits
    axes: tuple[str, ...]
    slices: int
    stages: Stages

    @property
    def inner(self) -> tuple[str, ...]:
        """Axes inside a slice."""
        return tuple(axis for axis in self.axes if axis != SLICE)

    def gather(self, tree: Any) -> list[Any]:
        """Gather the parts of all devices by slice: this device's own slice, the next one, and so on around."""
        to_previous = [(i, (i - 1) % self.slices) for i in range(self.slices)]
        blocks = []
        for k in range(self.slices):
            if k:
                tree = jax.tree.map(lambda x: jax.lax.ppermute(x, SLICE, to_previous), tree)
            blocks.append(jax.tree.map(self._gather_in_slice, tree))
        return blocks

    def _gather_in_slice(self, x: Array) -> Array:
        for axis, groups in self.stages:
            x = jax.lax.all_gather(x, axis, axis=0, tiled=True, axis_index_groups=groups)
        return x

    def positions(self, k: int, count: int) -> Array:
        """Return the places in the global batch of the pairs in the k-th block of `count`."""
        return self._slice(k) * count + jnp.arange(count)

    def _slice(self, k: int) -> Array | int:
        return (jax.lax.axis_index(SLICE) + k) % self.slices if self.slices > 1 else 0

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Any, Any, tuple[Pairs, ...]]:
        count, loss = pairs.image.shape[0], self.tiled.logit_loss
        rows, _ = _sides(pairs, own_positions(self.axes, count))
        gathered = self.gather(_cast(pairs, self.tiled.dtype))
        images, parts = loss.empty(count), []
        for k, block in enumerate(gathered):
            _, columns = _sides(block, self.positions(k, block.text.shape[0]))
            row_stats, column_stats = block_statistics(self.tiled, rows, columns, scaling)
            images = loss.merge(images, row_stats)
            parts.append(column_stats)
        return images, self._combine(parts, count), tuple(gathered)

    def _combine(self, parts: list[Any], count: int) -> Any:
        """Combine the parts that all devices have of all columns into the statistics of this device's own columns."""
        loss = self.tiled.logit_loss
        texts = jax.tree.map(lambda *blocks: jnp.roll(jnp.stack(blocks), self._slice(0), axis=0), *parts)
        place = jax.lax.axis_index(self.inner) * count
        texts = loss.combine(texts, self.inner)
        texts = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place, count, axis=1), texts)
        if self.slices > 1:
            texts = loss.combine(texts, (SLICE,))
        return jax.tree.map(lambda x: x[self._slice(0)], texts)

    def gradients(
        self, saved: Saved, scaling: Scaling, weight: Array, start: InitialGradients
    ) -> tuple[Gradients, Array]:
        images, texts = _sides(saved.pairs, own_positions(self.axes, saved.negated_positive_gradient.shape[0]))
        rows, columns = saved.normalizers
        image_grads, text_grads = start.images, start.images._replace(rows=start.texts)
        for k, (block, normalizers) in enumerate(zip(saved.gathered, self.gather(saved.normalizers), strict=True)):
            all_images, all_texts = _sides(block, self.positions(k, block.text.shape[0]))
            add = functools.partial(block_gradients, self.tiled, scaling=scaling, weight=weight)
            image_grads = add((images, all_texts), (rows, normalizers[1]), so_far=image_grads)
            text_grads = add((texts, all_images), (columns, normalizers[0]), so_far=text_grads)
        return image_grads, text_grads.rows

    def statistics_and_gradients(
        self, pairs: Pairs, scaling: Scaling, weight: Array, start: InitialGradients
    ) -> StatisticsAndGradients:
        count, loss = pairs.image.shape[0], self.tiled.logit_loss
        rows, columns = _sides(pairs, own_positions(self.axes, count))
        images, parts = loss.empty(count), []
        image_grads, text_grads = start.images, start.images._replace(rows=start.texts)
        for k, block in enumerate(self.gather(_cast(pairs, self.tiled.dtype))):
            all_images, all_texts = _sides(block, self.positions(k, block.text.shape[0]))
            row_stats, column_stats, image_grads = block_statistics_and_gradients(
                self.tiled, (rows, all_texts), scaling, weight=weight, so_far=image_grads
            )
            text_grads = block_gradients(
                self.tiled, (columns, all_images), (None, None), scaling, weight=weight, so_far=text_grads
            )
            images = loss.merge(images, row_stats)
            parts.append(column_stats)
        return StatisticsAndGradients(images, self._combine(parts, count), image_grads, text_grads.rows)

    def sum(self, x: Array) -> Array:
        return jax.lax.psum(x, self.axes)


@dataclass(frozen=True)
class Ring:
    """Blocks of texts that travel once around the ring of `size` devices in each pass, the next while one is used.

    Cost:
        Moved per device: n e numbers of embeddings forward, 2 n e backward. 8 r n e FLOPs; memory linear in r.
    """

    tiled: TiledLogits
    axes: tuple[str, ...]
    size: int

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Any, Any, tuple[Pairs, ...]]:
        loss, count = self.tiled.logit_loss, pairs.image.shape[0]
        rows, columns = self.sides(pairs)

        def visit(carry: Any, _: None) -> tuple[Any, None]:
            block, texts, images = carry
            following = self.shift(block)
            row_stats, column_stats = block_statistics(self.tiled, rows, block, scaling)
            texts = self.shift(loss.merge(texts, column_stats))
            return (following, texts, loss.merge(images, row_stats)), None

        start = (columns, loss.empty(count), loss.empty(count))
        (_, texts, images), _ = jax.lax.scan(visit, start, None, length=self.size)
        return images, texts, ()

    def gradients(
        self, saved: Saved, scaling: Scaling, weight: Array, start: InitialGradients
    ) -> tuple[Gradients, Array]:
        rows, columns = self.sides(saved.pairs)
        row_normalizers, column_normalizers = saved.normalizers

        def visit(carry: Any, _: None) -> tuple[Any, None]:
            block, normalizers, text_grads, image_grads = carry
            following = self.shift((block, normalizers))
            gradients = block_gradients(
                self.tiled,
                (rows, block),
                (row_normalizers, normalizers),
                scaling,
                weight=weight,
                so_far=image_grads._replace(columns=text_grads),
            )
            return (*following, self.shift(gradients.columns), gradients._replace(columns=None)), None

        carry = (columns, column_normalizers, start.texts, start.images)
        (_, _, text_grads, image_grads), _ = jax.lax.scan(visit, carry, None, length=self.size)
        return image_grads, text_grads

    def statistics_and_gradients(
        self, pairs: Pairs, scaling: Scaling, weight: Array, start: InitialGradients
    ) -> StatisticsAndGradients:
        loss, count = self.tiled.logit_loss, pairs.image.shape[0]
        rows, columns = self.sides(pairs)

        def visit(carry: Any, _: None) -> tuple[Any, None]:
            block, travelling, images, image_grads = carry
            text_grads, texts = travelling
            following = self.shift(block)
            row_stats, column_stats, gradients = block_statistics_and_gradients(
                self.tiled,
                (rows, block),
                scaling,
                weight=weight,
                so_far=image_grads._replace(columns=text_grads),
            )
            travelling = self.shift((gradients.columns, loss.merge(texts, column_stats)))
            return (following, travelling, loss.merge(images, row_stats), gradients._replace(columns=None)), None

        carry = (columns, (start.texts, loss.empty(count)), loss.empty(count), start.images)
        (_, (text_grads, texts), images, image_grads), _ = jax.lax.scan(visit, carry, None, length=self.size)
        return StatisticsAndGradients(images, texts, image_grads, text_grads)

    def sides(self, pairs: Pairs) -> tuple[RowsOrColumns, RowsOrColumns]:
        """Return this device's images, and its texts in the dtype in which they travel."""
        positions = own_positions(self.axes, pairs.image.shape[0])
        return _sides(pairs, positions)[0], _sides(_cast(pairs, self.tiled.dtype), positions)[1]

    def shift(self, tree: Any) -> Any:
        """Send to the previous device, and receive from the next."""
        to_previous = [(i, (i - 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, to_previous), tree)

    def sum(self, x: Array) -> Array:
        return jax.lax.psum(x, self.axes)


Partitioning = SingleDevice | AllGather | Ring


def own_positions(axes: tuple[str, ...], rows: int) -> Int[Array, "r"]:
    """Return the places of this device's pairs in the global batch."""
    return jax.lax.axis_index(axes) * rows + jnp.arange(rows)
