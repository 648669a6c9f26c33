"""Check of the devices before the first step: known matrices are multiplied, known bytes move along each mesh axis.

Reading order: `check_devices`, `_check_products` (each device by itself), `_check_links` (the mesh's collectives),
`_settle` (the findings of all processes become one verdict).

All numbers are small integers, so every right result is exact in any order of summation, and is compared bit by bit. A
wrong or silent device or link ends the run and is named with its host; a slow one is a warning.
"""

import functools
import itertools
import json
import math
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipjax.runtime import process_log, processes

TRIES = 3
SLOW_RATIO = 1.5
"""A device is slow if its best time exceeds that of the median device of its kind by this factor ..."""
SLOW_SECONDS = {"cpu": 10.0, "gpu": 0.005, "tpu": 0.005}
"""... and by this much; cores that are shared with other programs are never slow."""

SILENT_SECONDS = 60.0
"""Time for a result, after it is compiled."""

_POLL_SECONDS = 1e-4
_TILE = 64
_COMPILE_SECONDS = 60.0  # by which other processes may be later at the first message
_READ_SECONDS = 2.0  # for the others to read that they have to stop
_PEERS_SECONDS = 300.0  # for the findings of the other processes
_calls = itertools.count()  # in the keys, each of which is used once; all processes count alike
MATMUL = "matmul"


class BrokenDevice(RuntimeError):
    """A device or link that is missing, or gives wrong results."""


@dataclass(frozen=True)
class _Size:
    """Work of the check on a platform: side of the matrices, products in a row, numbers per message."""

    side: int
    products: int
    message: int


_SIZES = {"cpu": _Size(128, 2, 1024)}
_ACCELERATOR = _Size(4096, 16, 4 * 2**20)


@dataclass
class _Findings:
    """Findings of one process.

    Attributes:
        host: name of its machine.
        broken: a line for each fault.
        seconds: best time by part of the check ("matmul", or a mesh axis), then by device.
        kinds: kind of each device.
    """

    host: str = field(default_factory=socket.gethostname)
    broken: list[str] = field(default_factory=list)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)


def check_devices(mesh: Mesh) -> dict[str, Any]:
    """Check all devices of a mesh and the links between them; all processes call it, before the first step.

    Returns:
        For `run.json`, on the first process: median and largest seconds of the product and of each axis, and the
        slowest device. The other processes get what they measured themselves.

    Raises:
        BrokenDevice: a device or link gives wrong results or none; the message names device, process and host. Every
            process raises it.

    Cost:
        A second or two on accelerators, most of it compiling; 16 MiB per device and axis are moved.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    size = _SIZES.get(devices[0].platform, _ACCELERATOR)
    folder = f"device_check/{next(_calls)}"
    if jax.process_count() > 1:
        processes.kv_set(f"{folder}/hosts/{jax.process_index()}", socket.gethostname())
    products = _settle(folder, "products", _check_products(devices, size))
    return products | _settle(folder, "links", _check_links(mesh, size))


def _name(device: Any) -> str:
    return f"{device.platform}:{device.id} (process {device.process_index})"


def _check_products(devices: Sequence[Any], size: _Size) -> _Findings:
    """Multiply known matrices on each device of this process, all of them at the same time."""
    findings = _Findings(kinds={_name(device): device.device_kind for device in devices})
    mesh = Mesh(np.asarray(devices, dtype=object), ("device",))
    split = NamedSharding(mesh, PartitionSpec("device"))
    matrices = [_known_matrices(device) for device in devices]
    inputs = [
        jax.make_array_from_single_device_arrays(
            (len(devices), _TILE, _TILE),
            split,
            [jax.device_put(one[i][None], device) for one, device in zip(matrices, devices, strict=True)],
        )
        for i in range(3)
    ]
    count_wrong = functools.partial(_wrong_products, size=size)
    run = jax.jit(jax.shard_map(count_wrong, mesh=mesh, in_specs=split.spec, out_specs=split.spec, check_vma=False))
    _measure(findings, MATMUL, lambda: run(*inputs), lambda device, wrong: f"{_name(device)} multiplies wrongly")
    return findings


def _known_matrices(device: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return two tiles of small integers for a device, and their product."""
    a, b = np.random.default_rng(device.id).integers(-4, 5, (2, _TILE, _TILE)).astype(np.float32)
    return a, b, a @ b


def _wrong_products(a: jax.Array, b: jax.Array, product: jax.Array, *, size: _Size) -> jax.Array:
    """Return the number of wrong elements in products of this device, one after the other.

    The matrices repeat a tile, so each tile of their product is that of the tiles, times the number of tiles in a row.
    Sums stay below 2^24, so float32 holds them exactly; bfloat16 holds the factors.
    """
    times = size.side // _TILE
    left, right = (jnp.tile(x[0], (times, times)).astype(jnp.bfloat16) for x in (a, b))

    def multiply(_: int, wrong: jax.Array) -> jax.Array:
        # 0 unless something is wrong, which the compiler cannot know: it computes each product anew.
        shift = wrong.astype(jnp.bfloat16)
        found = jnp.matmul(left + shift, right, preferred_element_type=jnp.float32)
        tiles = found.reshape(times, _TILE, times, _TILE).transpose(0, 2, 1, 3)
        return wrong + jnp.sum(tiles != jnp.broadcast_to(times * product[0], tiles.shape), dtype=jnp.int32)

    return jax.lax.fori_loop(0, size.products, multiply, jnp.int32(0))[None]


def _check_links(mesh: Mesh, size: _Size) -> _Findings:
    """Move known bytes along each axis of the mesh."""
    findings = _Findings(kinds={_name(device): device.device_kind for device in mesh.local_devices})
    every = PartitionSpec(mesh.axis_names)
    places = np.arange(mesh.size, dtype=np.int32)
    spread = jax.make_array_from_callback(places.shape, NamedSharding(mesh, every), lambda index: places[index])
    for axis in mesh.axis_names:
        if mesh.shape[axis] == 1:
            continue
        count_wrong = functools.partial(_wrong_messages, mesh=mesh, axis=axis, length=size.message)
        run = jax.jit(jax.shard_map(count_wrong, mesh=mesh, in_specs=every, out_specs=every, check_vma=False))
        _measure(findings, axis, functools.partial(run, spread), functools.partial(_describe_link, mesh, axis))
    return findings


def _describe_link(mesh: Mesh, axis: str, device: Any, wrong: np.ndarray) -> str:
    """Return the fault of a device that receives wrong bytes along an axis."""
    if not wrong[0]:
        return f"{_name(device)} receives wrong bytes from its group on the mesh axis {axis!r}"
    position = [int(i) for i in np.argwhere(mesh.devices == device)[0]]
    position[mesh.axis_names.index(axis)] -= 1  # the first device's neighbour is the last
    sender = mesh.devices[tuple(position)]
    return f"{_name(device)} receives wrong bytes from {_name(sender)} on the mesh axis {axis!r}"


def _message(sender: jax.Array, length: int) -> jax.Array:
    """Return the words that the device at a place of the mesh sends: others in each place."""
    return sender.astype(jnp.uint32) * jnp.uint32(2654435761) + jnp.arange(length, dtype=jnp.uint32)


def _wrong_messages(place: jax.Array, *, mesh: Mesh, axis: str, length: int) -> jax.Array:
    """Return the number of wrong words that this device receives from its neighbour, and in collectives of the axis."""
    count, index = mesh.shape[axis], jax.lax.axis_index(axis)
    stride = math.prod(mesh.shape[name] for name in mesh.axis_names[mesh.axis_names.index(axis) + 1 :])
    group = place[0] + stride * (jnp.arange(count, dtype=jnp.int32) - index)  # places of the devices along the axis
    sent, short = _message(place[0], length), max(length // count, 1)
    passed = jax.lax.ppermute(sent, axis, [(i, (i + 1) % count) for i in range(count)])
    gathered = jax.lax.all_gather(sent[:short], axis)
    summed = jax.lax.psum(sent[:short], axis)
    messages = jax.vmap(functools.partial(_message, length=short))(group)
    from_neighbour = jnp.sum(passed != _message(group[(index - 1) % count], length), dtype=jnp.int32)
    from_group = jnp.sum(gathered != messages, dtype=jnp.int32)
    from_group += jnp.sum(summed != messages.sum(0, dtype=jnp.uint32), dtype=jnp.int32)
    return jnp.stack([from_neighbour, from_group])[None]


def _measure(
    findings: _Findings, part: str, run: Callable[[], jax.Array], describe: Callable[[Any, np.ndarray], str]
) -> None:
    """Add the faults and the best times of this process's devices in a part of the check.

    Args:
        findings: to add to.
        part: its name.
        run: starts it; gives counts of faults, a row per device.
        describe: a device and its row in words.
    """
    process_log.info(f"device check: {part}")  # the last line of the log if it hangs
    seconds: dict[str, float] = {}
    for attempt in range(1 + TRIES):  # the first one compiles
        start = time.perf_counter()
        waiting = {shard.device: shard.data for shard in run().addressable_shards}
        while waiting and time.perf_counter() - start < SILENT_SECONDS + (attempt == 0) * _COMPILE_SECONDS:
            for device in [device for device, rows in waiting.items() if rows.is_ready()]:
                passed = time.perf_counter() - start
                fault = _fault(waiting.pop(device), functools.partial(describe, device))
                if fault is not None:
                    findings.broken.append(fault)
                if attempt:
                    seconds[_name(device)] = min(seconds.get(_name(device), passed), passed)
            time.sleep(_POLL_SECONDS)
        findings.broken += [f"{_name(device)} gives no result in the part {part!r}" for device in waiting]
        if findings.broken:
            break
    findings.seconds[part] = seconds


def _fault(rows: jax.Array, describe: Callable[[np.ndarray], str]) -> str | None:
    try:
        wrong = np.asarray(rows).reshape(-1)
    except jax.errors.JaxRuntimeError as error:
        return f"{describe(np.ones(2))}: {error}"
    return describe(wrong) if wrong.any() else None


def _settle(folder: str, stage: str, mine: _Findings) -> dict[str, Any]:
    """Judge the findings of all processes on the first one; return the summary there, elsewhere that of its own.

    Raises:
        BrokenDevice: on all processes.
    """
    found, lines = [mine], [f"{line}, on host {mine.host}" for line in mine.broken]
    if jax.process_count() > 1:
        processes.kv_set(f"{folder}/{stage}/{jax.process_index()}", json.dumps(asdict(mine)))
        if processes.is_first():
            found, lines = _gather(folder, stage)
            processes.kv_set(f"{folder}/{stage}/verdict", json.dumps(lines))
            if lines:  # the texts go with this process
                time.sleep(_READ_SECONDS)
        else:
            try:
                lines = json.loads(processes.kv_get(f"{folder}/{stage}/verdict", timeout_seconds=2 * _PEERS_SECONDS))
            except TimeoutError as error:
                lines = [f"process 0 gives no verdict: {error}"]
    if lines:
        raise BrokenDevice(
            "the check before the first step finds broken devices or links; leave these machines out, and start "
            "again:\n" + "\n".join(lines)
        )
    return _summary(found)


def _gather(folder: str, stage: str) -> tuple[list[_Findings], list[str]]:
    """Return the findings of all processes, and a line for each fault and for each process that sends none."""
    found: list[_Findings] = []
    lines: list[str] = []
    deadline = time.monotonic() + _PEERS_SECONDS
    for rank in range(jax.process_count()):
        try:
            text = processes.kv_get(f"{folder}/{stage}/{rank}", timeout_seconds=max(deadline - time.monotonic(), 1.0))
        except TimeoutError:
            host = processes.kv_list(f"{folder}/hosts").get(str(rank), "unknown")
            lines.append(f"process {rank} sends no result of the part {stage!r}, on host {host}")
            continue
        found.append(_Findings(**json.loads(text)))
        lines += [f"{line}, on host {found[-1].host}" for line in found[-1].broken]
    return found, lines


def _summary(found: Sequence[_Findings]) -> dict[str, Any]:
    """Return the times by part, and warn of devices that are slow among their kind."""
    summary: dict[str, Any] = {}
    for part in found[0].seconds:
        times = {(each.kinds[name], name, each.host): s for each in found for name, s in each.seconds[part].items()}
        for kind in {kind for kind, _, _ in times}:
            median = statistics.median(seconds for (other, _, _), seconds in times.items() if other == kind)
            limit = max(SLOW_RATIO * median, median + SLOW_SECONDS.get(jax.default_backend(), 0.005))
            for (other, name, host), seconds in times.items():
                if other == kind and seconds > limit:
                    warnings.warn(
                        f"{name} on host {host} is slow in the check before the first step: {part} takes "
                        f"{seconds:.4f} s, {median:.4f} s on the median device",
                        stacklevel=2,
                    )
        (_, name, host), slowest = max(times.items(), key=lambda item: item[1])
        median = statistics.median(times.values())
        summary[part] = {
            "median_seconds": round(median, 6),
            "max_seconds": round(slowest, 6),
            "slowest": name,
            "host": host,
        }
    return summary
