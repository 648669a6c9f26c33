"""Moving averages of the `global` loss: two numbers for every sample, split over the devices that split the batch.

Axes: c samples that one device keeps, r pairs of one device, n pairs of the global batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from clipjax.config.validation import MEMORY_UNIT
from clipjax.runtime.sharding import batch_axes


def init_moving_averages(num_samples: int) -> Float[Array, "samples 2"]:
    """Return room for every sample, rounded up to `validation.MEMORY_UNIT`; -inf: not seen yet.

    Cost:
        8 bytes a sample, over all devices together.
    """
    capacity = math.ceil(num_samples / MEMORY_UNIT) * MEMORY_UNIT
    return jnp.full((capacity, 2), -jnp.inf, jnp.float32)


class MovingAveragesAccess(NamedTuple):
    """Reads and writes of the moving averages of a batch's samples.

    Attributes:
        gather: (memory, index [n]) -> the moving averages of these samples, float32 [n, 2].
        scatter: (memory, index [n], rows [n, 2]) -> the memory with these rows in it. Of a sample that is in the batch
            more than once, the first row is kept.
    """

    gather: Callable[[Array, Array], Array]
    scatter: Callable[[Array, Array, Array], Array]


def make_moving_averages_access(mesh: Mesh) -> MovingAveragesAccess:
    """Build the access to a memory that is split over the batch axes of a mesh.

    Cost:
        Moved per device: n indices and 2 n numbers, each time.
    """
    axes = batch_axes(mesh)
    split = PartitionSpec(axes)

    def all_gather(x: Array) -> Array:
        return jax.lax.all_gather(x, axes, axis=0, tiled=True)

    def own_place(index: Array, kept: int) -> Array:
        """Return the place on this device that keeps a sample; `kept` if another device does."""
        place = index - jax.lax.axis_index(axes) * kept
        return jnp.where((place >= 0) & (place < kept), place, kept)

    def gather(memory: Float[Array, "c 2"], index: Int[Array, "r"]) -> Float[Array, "r 2"]:
        count, kept = index.shape[0], memory.shape[0]
        rows = memory.at[own_place(all_gather(index), kept)].get(mode="fill", fill_value=-jnp.inf)
        rows = jax.lax.pmax(rows, axes)  # one device has it
        return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axes) * count, count)

    def scatter(memory: Float[Array, "c 2"], index: Int[Array, "r"], rows: Float[Array, "r 2"]) -> Float[Array, "c 2"]:
        index, rows = all_gather(index), all_gather(rows)
        place = jnp.where(_is_first(index), own_place(index, memory.shape[0]), memory.shape[0])
        return memory.at[place].set(rows, mode="drop")

    def on_mesh(run: Callable[..., Array], inputs: int) -> Callable[..., Array]:
        return jax.shard_map(run, mesh=mesh, in_specs=(split,) * inputs, out_specs=split, check_vma=False)

    return MovingAveragesAccess(on_mesh(gather, 2), on_mesh(scatter, 3))


def _is_first(index: Int[Array, "n"]) -> Array:
    """Mark numbers that have not occurred before, bool [n]. A scatter that meets a place twice may keep either row."""
    order = jnp.argsort(index, stable=True)
    ordered = index[order]
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(index.shape, bool).at[order].set(new)
