"""Contrastive losses in tiles, on one device or on a mesh: the value, and an exact gradient that keeps no matrix.

Three ways, one answer. `_Whole` has everything on one device. `_Gathered` collects all embeddings once; then every
device computes its own rows, and in the backward pass the complete gradient of its own images and texts, so that no
gradient is summed across devices. `_Ring` passes blocks of texts from neighbour to neighbour, so that nobody ever holds
all of them; with a block of texts travel the statistics, and later the gradient, of its columns.

Axes: n pairs of the global batch, r pairs of one device, e embed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from clipjax.config import LossMethod
from clipjax.losses.kinds import Outcome, Statistics
from clipjax.losses.tiles import Gradients, Product, Scaling, Side, block_gradients, block_statistics, empty
from clipjax.sharding import BATCH_AXES, batch_devices
from clipjax.typing import Metrics

SPLIT, WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec()


TIE = 1e-6
"""Similarities this close are equal: the diagonal is summed in another order than the rest."""


class Pairs(NamedTuple):
    """The pairs of one device.

    Attributes:
        image: unit-norm embeddings.
        text: unit-norm embeddings.
        group: pairs of one group are no negatives of each other; None where there are no groups.
    """

    image: Float[Array, "r e"]
    text: Float[Array, "r e"]
    group: Int[Array, "r"] | None


class Saved(NamedTuple):
    """What the backward pass of one device needs. `everyone` is what was gathered, if anything."""

    pairs: Pairs
    everyone: Pairs | None
    log_sums: tuple[Float[Array, "r"], Float[Array, "r"]]
    pull: Float[Array, "r"]


def own_positions(rows: int) -> Int[Array, "r"]:
    """Places of this device's pairs in the global batch."""
    return jax.lax.axis_index(BATCH_AXES) * rows + jnp.arange(rows)


@dataclass(frozen=True)
class _Whole:
    """Everything on one device."""

    product: Product

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Statistics, Statistics, None]:
        rows, columns = _sides(pairs, jnp.arange(pairs.image.shape[0]))
        return *block_statistics(self.product, rows, columns, scaling), None

    def gradients(self, saved: Saved, scaling: Scaling) -> tuple[Gradients, Array]:
        rows, columns = _sides(saved.pairs, jnp.arange(saved.pull.shape[0]))
        so_far = jnp.zeros(columns.embed.shape, jnp.float32)
        found = block_gradients(self.product, rows, columns, saved.log_sums, scaling, so_far)
        assert found.columns is not None
        return found, found.columns

    def sum(self, x: Array) -> Array:
        return x


@dataclass(frozen=True)
class _Gathered:
    """Embeddings are gathered once; what moves later are a few numbers per pair.

    Cost:
        Moved per device: 2 n e numbers of embeddings, 6 n of statistics. 10 r n e FLOPs, forward and backward together.
    """

    product: Product

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Statistics, Statistics, Pairs]:
        dtype, own = self.product.dtype, own_positions(pairs.image.shape[0])
        everyone = Pairs(
            gather(pairs.image.astype(dtype)),
            gather(pairs.text.astype(dtype)),
            None if pairs.group is None else gather(pairs.group),
        )
        _, columns = _sides(everyone, jnp.arange(everyone.text.shape[0]))
        images, part = block_statistics(self.product, _sides(pairs, own)[0], columns, scaling)
        texts = self.product.kind.combine(part, BATCH_AXES)
        return images, jax.tree.map(lambda x: x[own], texts), everyone

    def gradients(self, saved: Saved, scaling: Scaling) -> tuple[Gradients, Array]:
        assert saved.everyone is not None
        everywhere = jnp.arange(saved.everyone.text.shape[0])
        images, texts = _sides(saved.pairs, own_positions(saved.pull.shape[0]))
        all_images, all_texts = _sides(saved.everyone, everywhere)
        rows, columns = saved.log_sums
        all_rows, all_columns = gather(rows), gather(columns)
        found = block_gradients(self.product, images, all_texts, (rows, all_columns), scaling, None)
        turned = block_gradients(self.product, texts, all_images, (columns, all_rows), scaling, None)
        return found, turned.rows

    def sum(self, x: Array) -> Array:
        return jax.lax.psum(x, BATCH_AXES)


@dataclass(frozen=True)
class _Ring:
    """Blocks of texts travel once around the ring of `size` devices, in both passes; the next one while one is used.

    Cost:
        Moved per device: n e numbers of embeddings forward, 2 n e backward. 8 r n e FLOPs; memory linear in r.
    """

    product: Product
    size: int

    def statistics(self, pairs: Pairs, scaling: Scaling) -> tuple[Statistics, Statistics, None]:
        count = pairs.image.shape[0]
        rows, columns = self.sides(pairs)
        kind = self.product.kind

        def visit(carry: Any, _: None) -> tuple[Any, None]:
            block, of_block, of_rows = carry
            following = self.pass_on(block)
            images, texts = block_statistics(self.product, rows, block, scaling)
            of_block = self.pass_on(kind.merge(of_block, texts))
            return (following, of_block, kind.merge(of_rows, images)), None

        (_, texts, images), _ = jax.lax.scan(visit, (columns, empty(count), empty(count)), None, length=self.size)
        return images, texts, None

    def gradients(self, saved: Saved, scaling: Scaling) -> tuple[Gradients, Array]:
        count = saved.pull.shape[0]
        rows, columns = self.sides(saved.pairs)

        def visit(carry: Any, _: None) -> tuple[Any, None]:
            block, log_sums, of_block, so_far = carry
            following = self.pass_on((block, log_sums))
            found = block_gradients(self.product, rows, block, (saved.log_sums[0], log_sums), scaling, of_block)
            of_rows = jax.tree.map(jnp.add, so_far, found._replace(columns=None))
            return (*following, self.pass_on(found.columns), of_rows), None

        nothing = jnp.zeros(rows.embed.shape, jnp.float32)
        zeros = Gradients(nothing, None, jnp.zeros(count, jnp.float32), jnp.zeros(count, jnp.float32))
        start = (columns, saved.log_sums[1], nothing, zeros)
        (_, _, of_texts, of_images), _ = jax.lax.scan(visit, start, None, length=self.size)
        return of_images, of_texts

    def sides(self, pairs: Pairs) -> tuple[Side, Side]:
        """This device's images, and its texts in the dtype that they travel in."""
        rows, columns = _sides(pairs, own_positions(pairs.image.shape[0]))
        return rows, columns._replace(embed=columns.embed.astype(self.product.dtype))

    def pass_on(self, tree: Any) -> Any:
        """Hand to the previous device, and take from the next."""
        to_previous = [(i, (i - 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, BATCH_AXES, to_previous), tree)

    def sum(self, x: Array) -> Array:
        return jax.lax.psum(x, BATCH_AXES)


Way = _Whole | _Gathered | _Ring


def gather(x: Float[Array, "r *rest"] | Int[Array, "r"]) -> Array:
    """The parts of all devices, in the order of the global batch."""
    return jax.lax.all_gather(x, BATCH_AXES, axis=0, tiled=True)


def _sides(pairs: Pairs, positions: Array) -> tuple[Side, Side]:
    return Side(pairs.image, positions, pairs.group), Side(pairs.text, positions, pairs.group)


def similarity_of_pairs(pairs: Pairs, dtype: Any) -> Float[Array, "r"]:
    """The diagonal of the similarity matrix, from operands of the same dtype as the rest of it."""
    image, text = (x.astype(dtype).astype(jnp.float32) for x in (pairs.image, pairs.text))
    return jnp.sum(image * text, axis=1)


def _forward(way: Way, n: int, pairs: Pairs, scaling: Scaling) -> tuple[Array, Metrics, Saved]:
    """Loss and metrics over the global batch of n pairs; the rest are this device's."""
    kind = way.product.kind
    images, texts, everyone = way.statistics(pairs, scaling)
    similarity = similarity_of_pairs(pairs, way.product.dtype)
    positive = scaling.scale * similarity + scaling.bias
    outcome: Outcome = kind.finish(images, texts, positive)
    tie = TIE * scaling.scale
    sums = jnp.stack(
        [
            kind.weight * jnp.sum(outcome.loss),
            jnp.sum(positive > images.peak + tie, dtype=jnp.float32),
            jnp.sum(positive > texts.peak + tie, dtype=jnp.float32),
            jnp.sum(similarity),
            jnp.sum((images.peak - scaling.bias) / scaling.scale),
        ]
    )
    names = ("image_to_text_accuracy", "text_to_image_accuracy", "positive_similarity", "hardest_negative_similarity")
    loss, *values = way.sum(sums) / n
    return loss, dict(zip(names, values, strict=True)), Saved(pairs, everyone, outcome.log_sums, outcome.pull)


def _backward(way: Way, n: int, cotangent: Array, saved: Saved, scaling: Scaling) -> tuple[Array, Array, Array, Array]:
    """Gradients of this device's images and texts, and of scale and bias."""
    found, of_texts = way.gradients(saved, scaling)
    image, text, _ = saved.pairs
    similarity = similarity_of_pairs(saved.pairs, way.product.dtype)
    weight = cotangent * (way.product.kind.weight / n)
    pull = (scaling.scale * saved.pull)[:, None]
    of_scaling = jnp.stack([jnp.sum(found.scale - saved.pull * similarity), jnp.sum(found.bias - saved.pull)])
    of_scale, of_bias = way.sum(of_scaling)
    return (
        (weight * (found.rows - pull * text)).astype(image.dtype),
        (weight * (of_texts - pull * image)).astype(text.dtype),
        weight * of_scale,
        weight * of_bias,
    )


RING_ROWS = 1024
"""Pairs of one device from which `auto` takes the ring. It needs 8 r n e FLOPs where gathering needs 10, and no memory
for the embeddings of the others, but moves them in as many messages as there are devices: below, these are too small
to hide behind the products (a TPU compiler's estimate for 256 chips puts the two even between 128 and 1,024)."""


def _devices(mesh: Mesh | None) -> int:
    return 1 if mesh is None else batch_devices(mesh)


def choose_method(method: LossMethod, mesh: Mesh | None, global_batch_size: int) -> LossMethod:
    """What `auto` comes to: `gathered`, or `ring` from `RING_ROWS` pairs per device on."""
    if method is not LossMethod.AUTO:
        return method
    devices = _devices(mesh)
    return LossMethod.RING if devices > 1 and global_batch_size // devices >= RING_ROWS else LossMethod.GATHERED


def make_sharded_loss(
    product: Product, *, method: LossMethod, mesh: Mesh | None
) -> Callable[[Pairs, Scaling], tuple[Array, Metrics]]:
    """A loss of global arrays, with a gradient of its own that recomputes what it needs."""
    devices = _devices(mesh)

    def way(n: int) -> Way:
        if devices == 1:
            return _Whole(product)
        ring = choose_method(method, mesh, n) is LossMethod.RING
        return _Ring(product, devices) if ring else _Gathered(product)

    def forward(pairs: Pairs, scaling: Scaling) -> tuple[Array, Metrics, Saved]:
        n = pairs.image.shape[0]
        saved = Saved(SPLIT, WHOLE, SPLIT, SPLIT)  # type: ignore[arg-type]
        run = functools.partial(_forward, way(n), n)
        return _on(mesh, run, (SPLIT, WHOLE), (WHOLE, WHOLE, saved))(pairs, scaling)

    @jax.custom_vjp
    def loss(pairs: Pairs, scaling: Scaling) -> tuple[Array, Metrics]:
        return forward(pairs, scaling)[:2]

    def loss_forward(pairs: Pairs, scaling: Scaling) -> tuple[Any, Any]:
        value, metrics, saved = forward(pairs, scaling)
        return (value, metrics), (saved, scaling)

    def loss_backward(residuals: tuple[Saved, Scaling], cotangents: Any) -> tuple[Pairs, Scaling]:
        saved, scaling = residuals
        n = saved.pull.shape[0]
        run = functools.partial(_backward, way(n), n)
        specs = (WHOLE, Saved(SPLIT, WHOLE, SPLIT, SPLIT), WHOLE)  # type: ignore[arg-type]
        image, text, scale, bias = _on(mesh, run, specs, (SPLIT, SPLIT, WHOLE, WHOLE))(cotangents[0], saved, scaling)
        return Pairs(image, text, None), Scaling(scale, bias)

    loss.defvjp(loss_forward, loss_backward)
    return loss  # type: ignore[return-value]


def _on(mesh: Mesh | None, run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Run on every device of a mesh with its part of the arrays; without a mesh, as it is."""
    if _devices(mesh) == 1:
        return run
    # check_vma cannot see that a gathered array is the same on every device.
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
