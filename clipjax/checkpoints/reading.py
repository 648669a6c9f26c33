"""Arrays of a step directory: each stored byte is read once, by one process, and sent to the devices that need it.

A file holds an array in chunks, and a chunk is read whole. Where the shardings asked for would have a chunk read by
several processes (replicas), or several times by one, the array is first read in other parts, which are whole chunks,
and spread over the devices; one compiled program, or a copy within one process, then moves them to their places.

Reading order: `restore_arrays`, `_Group`, `_find_route`, `_Route`.
"""

import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clipjax.checkpoints import exchange
from clipjax.checkpoints.manifest import DamagedCheckpoint
from clipjax.checkpoints.orbax_noise import silence_orbax
from clipjax.pytrees import leaf_paths, to_flat

SMALL_BYTES = 1024
"""Arrays up to this size, and PRNG keys, are read by every process."""

MOVED_BYTES = 2**30
"""Arrays move to their places in turns; in each a device holds parts of at most this size in all, or of one array."""

T = TypeVar("T")
_agreements = itertools.count()


def restore_arrays(path: pathlib.Path, abstract_arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return groups of arrays of a step directory, placed by the shardings of `abstract_arrays`.

    If these shardings lie on the devices of all processes, all processes call this, and all see the same outcome.

    Raises:
        DamagedCheckpoint: they cannot be read.

    Cost: a device receives its arrays over the network, except the parts that it has read; beside them it holds the
    parts of one turn (`MOVED_BYTES`).
    """
    return {name: _Group(path, name, tree).restore() for name, tree in abstract_arrays.items()}


@dataclass(frozen=True)
class _Route:
    """Parts in which an array is read, and the way from there to its place.

    Attributes:
        devices: those of the target, as `[parts, copies]`; one device of each row reads the row's part.
        reader: the column that reads.
        dim: dimension that is cut into parts.
        shape: of the array.
    """

    devices: np.ndarray
    reader: int
    dim: int
    shape: tuple[int, ...]

    def _sharding(self, devices: np.ndarray, axes: tuple[str, ...]) -> NamedSharding:
        mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))
        return NamedSharding(mesh, PartitionSpec(*[None] * self.dim, axes))

    @property
    def readers(self) -> NamedSharding:
        """The array, cut into parts, on the devices that read."""
        return self._sharding(self.devices[:, self.reader], ("part",))

    def spread(self, part: Any, dtype: Any) -> jax.Array:
        """Return an array on all devices whose blocks along `dim` are the parts, and zeros of the same shape.

        Args:
            part: the array by `readers`; `ocp.PLACEHOLDER` on a process that reads none of it.
            dtype: of the array.
        """
        count, copies = self.devices.shape
        sharding = self._sharding(self.devices, ("part", "copy"))
        shape, block = list(self.shape), list(self.shape)
        shape[self.dim] *= copies
        block[self.dim] //= count
        have = {} if part is ocp.PLACEHOLDER else {shard.device: shard.data for shard in part.addressable_shards}
        blocks = [
            have[device] if device in have else jax.device_put(np.zeros(block, dtype), device)
            for device in sharding.addressable_devices
        ]
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, blocks)

    def join(self, spread: jax.Array) -> jax.Array:
        """Return the array from `spread`, bit for bit: bits are moved, and added to zeros, as whole numbers."""
        (count, copies), d = self.devices.shape, self.dim
        bits = jnp.dtype(f"uint{8 * spread.dtype.itemsize}")
        words = spread.astype(bits) if spread.dtype == bool else jax.lax.bitcast_convert_type(spread, bits)
        if copies > 1:
            words = words.reshape(*self.shape[:d], count, copies, self.shape[d] // count, *self.shape[d + 1 :])
            # As numbers of at least 32 bits: not every backend adds shorter ones between devices.
            words = words.astype(jnp.promote_types(bits, jnp.uint32)).sum(axis=d + 1).astype(bits).reshape(self.shape)
        return words.astype(bool) if spread.dtype == bool else jax.lax.bitcast_convert_type(words, spread.dtype)


class _Group:
    """One group of arrays that is being restored.

    Args:
        path: of the step directory.
        name: of the group.
        tree: shapes, dtypes and shardings.
    """

    def __init__(self, path: pathlib.Path, name: str, tree: Any) -> None:
        self._path, self._name, self._tree = path, name, tree
        self._directory = epath.Path(path.absolute() / name)
        self._leaves, self._structure = jax.tree.flatten(tree)
        options = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={jax.process_index()})
        silence_orbax()
        self._handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)  # it waits for no other process
        self._together = is_read_together(tree)

    def restore(self) -> Any:
        """Return the arrays."""
        routes = self._on_all(self._find_routes)
        found: list[Any] = [None] * len(self._leaves)
        for turn in _turns(self._leaves, routes):
            read = self._on_all(lambda turn=turn: self._read(turn, routes))
            for number, leaf in zip(turn, self._move(turn, routes, read), strict=True):
                found[number] = leaf
        return jax.tree.unflatten(self._structure, found)

    def _on_all(self, work: Callable[[], T]) -> T:
        """Return the result of `work` if it succeeds on all processes.

        Raises:
            DamagedCheckpoint: it failed, here or on another process: none is left waiting in a collective.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # Orbax and TensorStore have many kinds
            failure = error
        reason = "" if failure is None else str(failure)
        if self._together:
            reason = _agree(reason) if failure is None else _agree(reason) and reason
        if reason:
            raise DamagedCheckpoint(
                f"checkpoint {self._path} cannot be restored into this config: {reason}"
            ) from failure
        return result  # pyright: ignore[reportReturnType]

    def _find_routes(self) -> list[_Route | None]:
        """Return the route of each array; None where the target's own parts are read."""
        if not self._directory.is_dir():
            raise KeyError(f"there is no group {self._name!r} in it")
        if all(leaf.sharding.is_fully_replicated and len(_processes(leaf.sharding)) == 1 for leaf in self._leaves):
            return [None] * len(self._leaves)
        stored = to_flat(self._handler.metadata(self._directory).tree)
        chunks = [getattr(stored.get(name), "storage", None) for name in leaf_paths(self._tree)]
        return [
            None if chunk is None or not chunk.chunk_shape else _find_route(leaf, chunk.chunk_shape, number)
            for number, (leaf, chunk) in enumerate(zip(self._leaves, chunks, strict=True))
        ]

    def _read(self, turn: Sequence[int], routes: Sequence[_Route | None]) -> list[Any]:
        """Return what this process reads of the arrays of a turn."""
        items: list[Any] = [ocp.PLACEHOLDER] * len(self._leaves)
        for number in turn:
            leaf, route = self._leaves[number], routes[number]
            where = leaf.sharding if route is None else route.readers
            if where.addressable_devices:
                items[number] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        tree = jax.tree.unflatten(self._structure, items)
        arguments = ocp.checkpoint_utils.construct_restore_args(tree)
        restored = self._handler.restore(self._directory, args=ocp.args.PyTreeRestore(tree, restore_args=arguments))
        leaves = jax.tree.leaves(restored)
        return [leaves[number] for number in turn]

    def _move(self, turn: Sequence[int], routes: Sequence[_Route | None], read: list[Any]) -> list[Any]:
        """Return the arrays of a turn in their places."""
        of_turn = [(i, routes[number], self._leaves[number]) for i, number in enumerate(turn)]
        moved = [(i, route, leaf) for i, route, leaf in of_turn if route is not None]
        if not moved:
            return read
        targets = [leaf.sharding for _, _, leaf in moved]
        if len(_processes(targets[0])) == 1:
            arrays = jax.device_put([read[i] for i, _, _ in moved], targets)
        else:
            spread = [route.spread(read[i], leaf.dtype) for i, route, leaf in moved]

            def join(spread: list[jax.Array]) -> list[jax.Array]:
                return [route.join(each) for (_, route, _), each in zip(moved, spread, strict=True)]

            arrays = jax.block_until_ready(jax.jit(join, out_shardings=targets)(spread))
        for (i, _, _), array in zip(moved, arrays, strict=True):
            read[i] = array
        return read


def _find_route(leaf: jax.ShapeDtypeStruct, chunk: Sequence[int], number: int) -> _Route | None:
    """Return the route of an array with chunks of this shape; None if its own sharding reads each chunk once.

    Args:
        leaf: shape, dtype and sharding.
        chunk: shape of a chunk.
        number: of the array; arrays that one device reads for all are dealt out by it.
    """
    target, shape = leaf.sharding, leaf.shape
    if len(chunk) != len(shape) or math.prod(shape) * leaf.dtype.itemsize <= SMALL_BYTES:
        return None
    if not isinstance(target, NamedSharding) or len(_processes(target)) not in (1, jax.process_count()):
        return None
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or _is_read_once(target, shape, chunk):
        return None
    devices = np.asarray(target.mesh.devices).flatten()
    parts, dim = max(
        (parts, -dim)
        for dim in range(len(shape))
        for parts in range(1, devices.size + 1)
        if devices.size % parts == shape[dim] % parts == 0 and (parts == 1 or shape[dim] // parts % chunk[dim] == 0)
    )
    copies = devices.size // parts
    reader = int(number * (math.sqrt(5) - 1) / 2 % 1 * copies)  # spreads any count evenly
    return _Route(devices.reshape(parts, copies), reader, -dim, shape)


def _is_read_once(sharding: NamedSharding, shape: Sequence[int], chunk: Sequence[int]) -> bool:
    """Return True if no chunk is read by two processes, nor for two different parts of one process."""
    owners: dict[tuple[int, ...], Any] = {}
    seen = set()
    for device, index in sharding.devices_indices_map(tuple(shape)).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        reader = (device.process_index, bounds)
        if reader in seen:
            continue
        seen.add(reader)
        touched = [range(start // size, -(-stop // size)) for (start, stop), size in zip(bounds, chunk, strict=True)]
        if any(owners.setdefault(each, reader) != reader for each in itertools.product(*touched)):
            return False
    return True


def _turns(leaves: Sequence[Any], routes: Sequence[_Route | None]) -> Iterator[list[int]]:
    """Yield the numbers of the arrays that move at the same time."""
    turn, total = [], 0
    for number, (leaf, route) in enumerate(zip(leaves, routes, strict=True)):
        size = 0 if route is None else math.prod(leaf.shape) * leaf.dtype.itemsize // len(route.devices)
        if total and total + size > MOVED_BYTES:
            yield turn
            turn, total = [], 0
        turn.append(number)
        total += size
    if turn:
        yield turn


def is_read_together(tree: Any) -> bool:
    """Return True if the shardings of a tree make several processes read it together."""
    leaves = jax.tree.leaves(tree)
    return any(len(_processes(leaf.sharding)) == jax.process_count() > 1 for leaf in leaves)


def _processes(sharding: Any) -> set[int]:
    return {device.process_index for device in sharding.device_set}


def _agree(reason: str) -> str:
    """Return why some process has failed; empty if none has. The same on all of them."""
    number = next(_agreements)
    key = f"restore/{number}"
    parts = exchange.gather(key, reason)
    failures = [f"process {rank}: {part}" for rank, part in enumerate(parts) if part]
    verdict = exchange.publish(f"{key}/verdict", lambda: "; ".join(failures))
    if number and not jax.process_index():
        exchange.forget(f"restore/{number - 1}")  # all have read it, as they take part in this one
    return verdict
