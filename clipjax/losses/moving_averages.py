"""Moving averages of the `global` loss: two numbers a sample, split over the devices that split the batch.

Axes: c samples that one device keeps, r pairs of one device, n pairs of the global batch.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from clipjax.config.validation import MEMORY_UNIT
from clipjax.runtime.sharding import batch_axes


def init_moving_averages(num_samples: int) -> Float[Array, "samples 2"]:
    """Room for every sample, and some more (`validation.MEMORY_UNIT`); -inf: nothing is known yet.

    Cost:
        8 bytes a sample, over all devices together.
    """
    capacity = math.ceil(num_samples / MEMORY_UNIT) * MEMORY_UNIT
    return jnp.full((capacity, 2), -jnp.inf, jnp.float32)


@dataclass(frozen=True)
class MovingAveragesAccess:
    """Reading and writing of a memory that is split over the batch axes of a mesh.

    Cost:
        Moved per device: n indices and 2 n numbers, each time.
    """

    mesh: Mesh

    def gather(self, memory: Float[Array, "samples 2"], index: Int[Array, "n"]) -> Float[Array, "n 2"]:
        """Return what is known of these samples."""
        return self._on_mesh(_gather, 2)(memory, index)

    def scatter(
        self, memory: Float[Array, "samples 2"], index: Int[Array, "n"], rows: Float[Array, "n 2"]
    ) -> Float[Array, "samples 2"]:
        """Return the memory with these rows in it; of a sample that occurs more than once, the first row is kept."""
        return self._on_mesh(_scatter, 3)(memory, index, rows)

    def _on_mesh(self, run: Callable[..., Array], num_inputs: int) -> Callable[..., Array]:
        axes = batch_axes(self.mesh)
        split = PartitionSpec(axes)
        run = functools.partial(run, axes)
        return jax.shard_map(run, mesh=self.mesh, in_specs=(split,) * num_inputs, out_specs=split, check_vma=False)


def _all_gather(axes: tuple[str, ...], x: Array) -> Array:
    return jax.lax.all_gather(x, axes, axis=0, tiled=True)


def _own_place(axes: tuple[str, ...], index: Array, kept: int) -> Array:
    """Return the place on this device where a sample is kept; `kept` if another device keeps it."""
    place = index - jax.lax.axis_index(axes) * kept
    return jnp.where((place >= 0) & (place < kept), place, kept)


def _gather(axes: tuple[str, ...], memory: Float[Array, "c 2"], index: Int[Array, "r"]) -> Float[Array, "r 2"]:
    count, kept = index.shape[0], memory.shape[0]
    place = _own_place(axes, _all_gather(axes, index), kept)
    rows = memory.at[place].get(mode="fill", fill_value=-jnp.inf)
    rows = jax.lax.pmax(rows, axes)  # one device has it
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axes) * count, count)


def _scatter(
    axes: tuple[str, ...], memory: Float[Array, "c 2"], index: Int[Array, "r"], rows: Float[Array, "r 2"]
) -> Float[Array, "c 2"]:
    index, rows = _all_gather(axes, index), _all_gather(axes, rows)
    place = jnp.where(_is_first(index), _own_place(axes, index, memory.shape[0]), memory.shape[0])
    return memory.at[place].set(rows, mode="drop")


def _is_first(index: Int[Array, "n"]) -> Array:
    """Return True where a number occurs for the first time, bool [n].

    A scatter that meets a place twice may keep either row.
    """
    order = jnp.argsort(index, stable=True)
    ordered = index[order]
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(index.shape, bool).at[order].set(new)
