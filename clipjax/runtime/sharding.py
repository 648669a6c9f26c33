"""The mesh, and the axis of it on which each dimension of each array lies.

Three tables decide everything: rules, which are handed in, name the dimensions of every array by its path; `MESH_AXES`
says on which mesh axis a named dimension is split, and `BATCH_AXES` are the axes that split the batch.
Models are written as single-device code; they only call `constrain` on activations.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clipjax.config import MeshConfig, resolve_mesh
from clipjax.pytrees import first_match, map_with_path

SLICE = "slice"
AXES = (SLICE, "data", "fsdp", "tensor")
BATCH_AXES = (SLICE, "data", "fsdp")

MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "width": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "embed": "tensor",
}
"""Mesh axis of a named dimension; one that is not listed is never split."""

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""Names of the dimensions of an array by a regular expression of its path. The first match wins. The path of an
optimizer moment ends in its parameter's path, so it follows the parameter."""


def slice_of(device: Any) -> int:
    """Return the number of the hardware's slice that holds a device: slices have slow links between them."""
    return getattr(device, "slice_index", 0) or 0


def hardware_slices(devices: Sequence[Any]) -> int:
    """Return the number of the hardware's slices that these devices lie in."""
    return len({slice_of(device) for device in devices})


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh with the axes `slice`, `data`, `fsdp`, `tensor` over all devices (or those given).

    A slice of the mesh is one of the hardware where that has several, else the devices of processes that follow each
    other.

    Raises:
        ValueError: the axis sizes do not multiply to the number of devices, or slices are not those of the hardware.
    """
    devices = jax.devices() if devices is None else devices
    num_slices = hardware_slices(devices)
    sizes = resolve_mesh(config, len(devices), num_slices)
    if num_slices not in (1, sizes[0]):
        raise ValueError(f"mesh.slice={sizes[0]} must be {num_slices}, the slices of these devices; None finds out")
    if devices[0].platform == "cpu":
        grid = np.asarray(devices, dtype=object).reshape(sizes)
    else:
        places = sorted(devices, key=lambda d: (slice_of(d), d.process_index, d.id))
        count = len(devices) // sizes[0]
        parts = [places[start : start + count] for start in range(0, len(devices), count)]
        grid = np.stack([_torus_mesh(sizes[1:], part) for part in parts])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _torus_mesh(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Return devices so that neighbours on an axis are neighbours on the torus; its sides are split only at need."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices=devices)
    except NotImplementedError:  # 8 of a torus of 16 x 16
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)


def partition_spec(dims: Sequence[str | None]) -> PartitionSpec:
    """Return the mesh axes of an array whose dimensions have these names."""
    return PartitionSpec(*(MESH_AXES.get(dim) if dim else None for dim in dims))


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Return the axes of this mesh that split the batch; a mesh of a user's own may lack some of `BATCH_AXES`."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)


def batch_devices(mesh: Mesh) -> int:
    """Return the number of parts into which the batch is split."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first dimension is split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays of which every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def fetch(x: jax.Array, mesh: Mesh) -> np.ndarray:
    """Return the whole of an array on this mesh, on the host; all processes of the mesh call this."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(jax.jit(_identity, out_shardings=replicated(mesh))(x))


def _identity(x: jax.Array) -> jax.Array:
    return x


def state_shardings(mesh: Mesh, abstract_state: Any, rules: Rules) -> Any:
    """Return the sharding of every leaf of a training state, or of bare parameters.

    Scalars and PRNG keys are replicated. Any other leaf must match a rule with as many dimensions as it has.

    Args:
        mesh: the devices.
        abstract_state: shapes.
        rules: `models.towers.PARAMETER_RULES` for parameters, `training.step.STATE_RULES` for a training state.

    Raises:
        ValueError: leaves that no rule covers, all of them listed.
    """
    unmatched: list[str] = []

    def leaf_sharding(name: str, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return replicated(mesh)
        dims = first_match(rules, name)
        if dims is None or len(dims) != leaf.ndim:
            unmatched.append(f"{name} {tuple(leaf.shape)}")
            return replicated(mesh)
        return NamedSharding(mesh, partition_spec(dims))

    shardings = map_with_path(leaf_sharding, abstract_state)
    if unmatched:
        raise ValueError("no sharding rule covers: " + ", ".join(unmatched))
    return shardings


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Return shapes and dtypes together with the sharding of each leaf."""
    return jax.tree.map(
        lambda leaf, one: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), abstract, shardings
    )


def shardings_of(tree: Any) -> Any:
    """Return the sharding of each leaf of a tree of arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Pin an activation to the mesh in force (`jax.set_mesh`) by the names of its dimensions; without a mesh, x."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(dims))


def platform() -> str:
    """Return the platform of the devices of the mesh in force ("cpu", "gpu", "tpu"); "" without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None else device.platform


def backend() -> str:
    """Return `platform`, or without a mesh that of the default device."""
    return platform() or jax.default_backend()


def num_shards(dim: str) -> int:
    """Return the number of parts into which the mesh in force cuts a dimension of this name."""
    axes, mesh = MESH_AXES.get(dim), jax.sharding.get_abstract_mesh()
    if mesh.empty or axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def shard_map_by_dims(run: Callable[..., jax.Array], *dims: Sequence[str | None]) -> Callable[..., jax.Array]:
    """Return `run`, to be called on every device with its part of the arrays, whose dimensions have these names.

    The result's names are those of the first array. Without a mesh, `run` as it is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run
    specs = tuple(partition_spec(names) for names in dims)
    return jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)


def global_batch(mesh: Mesh, local: Any) -> Any:
    """Return global arrays, split over the batch axes, from the rows that this process has read.

    The rows of process 0 come first, then those of process 1, and so on.
    """
    sharding, processes = batch_sharding(mesh), jax.process_count()
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(
            sharding, rows, (processes * rows.shape[0], *rows.shape[1:])
        ),
        local,
    )
