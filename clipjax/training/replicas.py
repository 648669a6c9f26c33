"""Comparison of replicas: devices that should hold the same numbers are asked now and then if they do.

A bit that flips in one device's copy of a parameter is in no loss or norm to be seen, and all later updates keep it.
Each device makes a digest of its own part of every array; digests of the same part must be equal.
"""

import collections
import math
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clipjax.config import Config, steps_of
from clipjax.pytrees import leaf_paths
from clipjax.runtime import processes

ODD = 0x9E3779B1
"""An odd number with many bits (2^32 over the golden ratio): neighbouring places get unlike weights."""
LEAST_STEPS = 125
"""Steps between two checks, at least: one takes up to an eighth of a step, so that they cost 0.1 % at most."""
_HOSTS = "replicas/host"
_SHOWN = 8  # arrays and devices in a message


def steps_between_checks(config: Config) -> int:
    """Return `recovery.replica_check_examples` in steps, at least `LEAST_STEPS`."""
    return max(LEAST_STEPS, steps_of(config.recovery.replica_check_examples or 0, config))


class ReplicaCheck:
    """The comparison of a state's copies on the devices of a mesh.

    A replicated array is compared over the mesh axes that do not split it. One that is split over all devices has no
    copies: `not_covered` names those.

    Args:
        mesh: the devices.
        state: a training state, or shapes with shardings.

    Cost:
        The state is read once; each device sends 4 bytes for every array to all others. On CPUs with the quickstart's
        model a check takes an eighth of a step.
    """

    def __init__(self, mesh: Mesh, state: Any) -> None:
        self._devices = list(mesh.devices.flat)
        self._names = leaf_paths(state)
        leaves = jax.tree.leaves(state)
        rank = {device: i for i, device in enumerate(self._devices)}
        self._groups = [_replica_groups(leaf, rank) for leaf in leaves]
        specs = tuple(leaf.sharding.spec for leaf in leaves)
        self._digests = jax.jit(
            jax.shard_map(
                lambda *parts: jax.lax.all_gather(jnp.stack([digest(part) for part in parts]), mesh.axis_names),
                mesh=mesh,
                in_specs=specs,
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        )
        if jax.process_count() > 1:
            processes.kv_set(f"{_HOSTS}/{jax.process_index()}", socket.gethostname())

    @property
    def not_covered(self) -> list[str]:
        """Paths of the arrays of which no part lies on two devices."""
        return [name for name, groups in zip(self._names, self._groups, strict=True) if not groups]

    def check(self, state: Any) -> jax.Array:
        """Start a check; return the digests of every device, uint32 [devices, arrays], which are being computed."""
        return self._digests(*(_raw(leaf) for leaf in jax.tree.leaves(state)))

    def find_differing(self, result: jax.Array) -> str | None:
        """Return a message that names the devices and the arrays that differ, or None; the same on every process."""
        digests, wrong, unclear = np.asarray(result), collections.defaultdict(list), collections.defaultdict(list)
        for column, (name, groups) in enumerate(zip(self._names, self._groups, strict=True)):
            for group in groups:
                odd, is_clear = _outvoted(digests[group, column].tolist())
                for place in odd:
                    (wrong if is_clear else unclear)[group[place]].append(name)
        if not wrong and not unclear:
            return None
        hosts = self._hosts()
        parts = [f"{self._describe(i, hosts)} differs from the others in {_list(wrong[i])}" for i in sorted(wrong)]
        parts += [f"{self._describe(i, hosts)} is one of a tie in {_list(unclear[i])}" for i in sorted(unclear)]
        return "copies of the state differ between devices: " + "; ".join(_shorten(parts))

    def _describe(self, i: int, hosts: Mapping[str, str]) -> str:
        device = self._devices[i]
        host = hosts.get(str(device.process_index), "unknown")
        return f"device {device.id} ({device.device_kind}) of process {device.process_index} on host {host}"

    def _hosts(self) -> Mapping[str, str]:
        return processes.kv_list(_HOSTS) if jax.process_count() > 1 else {"0": socket.gethostname()}


def digest(x: jax.Array) -> jax.Array:
    """Return a digest of an array, uint32 scalar: another one for any change of one element.

    The bits of each element, times an odd number by its place, are summed modulo 2^32: a difference times an odd number
    is never 0.
    """
    x = _raw(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for dim, stride in enumerate(_strides(x.shape)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
    return jnp.sum(bits * ((2 * place + 1) * jnp.uint32(ODD)), dtype=jnp.uint32)


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _raw(leaf: jax.Array) -> jax.Array:
    """Return the numbers of a PRNG key; other arrays as they are."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _replica_groups(leaf: Any, rank: Mapping[Any, int]) -> list[list[int]]:
    """Return the places of devices that hold the same part of an array, where these are two or more."""
    by_part = collections.defaultdict(list)
    for device, part in leaf.sharding.devices_indices_map(tuple(leaf.shape)).items():
        by_part[str(part)].append(rank[device])
    return [sorted(group) for group in by_part.values() if len(group) > 1]


def _outvoted(digests: Sequence[int]) -> tuple[list[int], bool]:
    """Return the places that differ from the majority, and True; without a majority, all places and False."""
    common, count = collections.Counter(digests).most_common(1)[0]
    if count == len(digests):
        return [], True
    if 2 * count <= len(digests):
        return list(range(len(digests))), False
    return [i for i, one in enumerate(digests) if one != common], True


def _list(names: Sequence[str]) -> str:
    return ", ".join(_shorten(names))


def _shorten(texts: Sequence[str]) -> list[str]:
    more = [f"{len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return [*texts[:_SHOWN], *more]
