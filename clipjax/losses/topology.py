"""Choice of method and stages of gathering, by the number, the memory and the links of a mesh's devices."""

import numpy as np
from jax.sharding import Mesh

from clipjax.config import LossMethod
from clipjax.runtime.chips import memory_bytes
from clipjax.runtime.sharding import SLICE, batch_axes, batch_devices

RING_ROWS = 1024
"""Pairs per device from which on `auto` takes the ring. It needs 8 r n e FLOPs where gathering needs 10, and no memory
for the embeddings of the others, but moves them in as many messages as there are devices. Smaller messages do not hide
behind the products (a TPU compiler's estimate for 256 chips puts the two even between 128 and 1,024)."""

GATHERED_SHARE = 0.1
"""The largest share of a device's memory that `auto` spends on the embeddings of all others."""


def choose_method(method: LossMethod, mesh: Mesh | None, global_batch_size: int, pair_bytes: int = 0) -> LossMethod:
    """Resolve `auto` by topology, size and memory; return any other method as it is.

    Args:
        method: of the config.
        mesh: between several slices `auto` gathers: only that keeps most of the traffic inside each.
        global_batch_size: from `RING_ROWS` pairs per device on, `auto` takes the ring.
        pair_bytes: of an image's and a text's embedding; if all of them took more than `GATHERED_SHARE` of a device's
            memory, as far as that is known, `auto` takes the ring.
    """
    if method is not LossMethod.AUTO:
        return method
    devices = 1 if mesh is None else batch_devices(mesh)
    if mesh is None or devices == 1 or mesh.shape.get(SLICE, 1) > 1:
        return LossMethod.GATHERED
    memory = memory_bytes(mesh.devices.flat[0].device_kind)
    many = global_batch_size // devices >= RING_ROWS or global_batch_size * pair_bytes > GATHERED_SHARE * memory
    return LossMethod.RING if many else LossMethod.GATHERED


Stages = tuple[tuple[str, list[list[int]] | None], ...]


def gather_stages(mesh: Mesh) -> Stages:
    """Plan the gather over the batch axes inside a slice: the last axis first, and on a torus side by side.

    The TPU compiler makes a gather over a plane or a whole torus an all-reduce, which moves twice as much; along one
    side of it, it stays a gather.
    """
    stages = []
    for axis in reversed(batch_axes(mesh)):
        size, line = mesh.shape[axis], _line(mesh, axis)
        if axis == SLICE or size == 1:
            continue
        if line == size:
            stages.append((axis, None))
            continue
        stages.append((axis, [[i + j for j in range(line)] for i in range(0, size, line)]))
        stages.append((axis, [[i + j for i in range(0, size, line)] for j in range(line)]))
    return tuple(stages)


def _line(mesh: Mesh, axis: str) -> int:
    """Count the devices that follow each other on an axis along one side of a torus; all, where there is no torus."""
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    places = [getattr(device, "coords", (0,)) for device in devices]
    count = 1
    while count < len(places) and sum(len(set(along)) > 1 for along in zip(*places[: count + 1], strict=True)) <= 1:
        count += 1
    return count if len(places) % count == 0 and count > 1 else len(places)
