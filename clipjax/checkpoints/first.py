"""Checkpoints that process 0 alone sees: it writes and reads all arrays, and the others send and get them.

So runs whose hosts share no disk, as on TPU pods with a workdir on an object store. Arrays travel as bits.

Cost: a save brings every array whole onto each device for a moment, one after another, and copies all of the state
from the devices of process 0 to its host while the run waits. A start reads all of it there and sends it through the
devices.
"""

import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from clipjax.checkpoints import exchange
from clipjax.checkpoints.manifest import DamagedCheckpoint
from clipjax.checkpoints.reading import restore_arrays
from clipjax.checkpoints.records import read_record
from clipjax.runtime import processes

CHUNK_BYTES = 2**26
"""Bytes that are sent at a time at most."""

_sendings = itertools.count()


def gather(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays on process 0, as NumPy has them but for keys, and nothing on the others; all call this."""
    moved = {name: jax.tree.map(_gather_leaf, tree) for name, tree in arrays.items()}
    return moved if processes.is_first() else {}


def _gather_leaf(leaf: jax.Array) -> Any:
    whole = leaf if leaf.sharding.is_fully_replicated else _replicate(leaf.sharding)(leaf)
    part = whole.addressable_data(0)
    if _is_key(part):  # which NumPy has not: a copy of which process 0 has the first part
        data = np.asarray(jax.random.key_data(part))
        devices = sorted(whole.sharding.device_set, key=lambda device: (device.process_index, device.id))
        everywhere = NamedSharding(Mesh(np.array(devices), ("copy",)), PartitionSpec())
        return _wrap(jax.make_array_from_callback(data.shape, everywhere, lambda index: data[index]), leaf, everywhere)
    return np.array(part) if processes.is_first() else None


def _wrap(data: jax.Array, like: Any, sharding: Any) -> jax.Array:
    """Return the keys of a global array of their numbers."""
    found: list[str] = []
    jax.eval_shape(lambda key: found.append(str(jax.random.key_impl(key))), like)
    return jax.jit(lambda data: jax.random.wrap_key_data(data, impl=found[0]), out_shardings=sharding)(data)


@functools.cache
def _replicate(sharding: Any) -> Any:
    assert isinstance(sharding, NamedSharding)
    return jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))


def _host() -> Any:
    """Return the CPU as a device of this process, or where it is none its first device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def restore(path: pathlib.Path, abstract_arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return groups of arrays of a step directory of process 0, placed by the shardings of `abstract_arrays`.

    Raises:
        DamagedCheckpoint: on all processes: they cannot be read.
    """
    leaves, structure = jax.tree.flatten(dict(abstract_arrays))
    found: list[Any] = [None] * len(leaves)
    reason = ""
    if processes.is_first():
        here = SingleDeviceSharding(_host())
        local = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for leaf in leaves]
        try:
            found = jax.tree.leaves(restore_arrays(path, jax.tree.unflatten(structure, local)))
        except DamagedCheckpoint as error:
            reason = str(error)
    if reason := exchange.publish(f"first/{next(_sendings)}/reason", lambda: reason):
        raise DamagedCheckpoint(reason)
    placed = [_place(leaf, content) for leaf, content in zip(leaves, _send(leaves, found), strict=True)]
    return jax.tree.unflatten(structure, placed)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of the numbers of an array, which may be of keys."""
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def _send(leaves: list[Any], found: list[Any]) -> Iterator[np.ndarray]:
    """Yield the contents of the arrays that process 0 has found, on all processes, in order."""
    for leaf, array in zip(leaves, found, strict=True):
        about = _data(leaf)
        size = int(np.prod(about.shape, dtype=np.int64)) * about.dtype.itemsize
        content = b""
        if processes.is_first():
            content = np.asarray(jax.random.key_data(array) if _is_key(leaf) else array).tobytes()
            assert len(content) == size
        yield np.frombuffer(_broadcast(content, size), about.dtype).reshape(about.shape)


def _broadcast(content: bytes, size: int) -> bytearray:
    """Return on all processes the `size` bytes that are `content` on process 0."""
    got = bytearray()
    for start in range(0, size, CHUNK_BYTES):
        count = min(CHUNK_BYTES, size - start)
        words = np.zeros(_padded(count) // 4, np.uint32)
        if processes.is_first():
            words.view(np.uint8)[:count] = np.frombuffer(content, np.uint8, count, start)
        sent = np.asarray(multihost_utils.broadcast_one_to_all(words), np.uint32)
        got += sent.view(np.uint8)[:count].tobytes()
    return got


def _padded(count: int) -> int:
    """Return one of a few sizes, each a program."""
    size = 1024
    while size < count:
        size *= 8
    return min(size, CHUNK_BYTES)


def _place(leaf: Any, content: np.ndarray) -> jax.Array:
    """Return an array placed by the sharding of a leaf, from its whole content on every process."""
    if not _is_key(leaf):
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: content[index])
    mesh = leaf.sharding.mesh
    data = jax.make_array_from_callback(
        content.shape, NamedSharding(mesh, PartitionSpec()), lambda index: content[index]
    )
    return _wrap(data, leaf, leaf.sharding)


def read_first(path: pathlib.Path, name: str) -> Any:
    """Return a JSON record of a step directory of process 0, on all processes.

    Raises:
        ValueError: on all processes: it cannot be read.
    """

    def read() -> list[Any]:
        try:
            return [read_record(path, name), ""]
        except (OSError, ValueError) as error:
            return [None, str(error) or repr(error)]

    record, reason = exchange.publish(f"first/{next(_sendings)}/record", read)
    if reason:
        raise ValueError(reason)
    return record
