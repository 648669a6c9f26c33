"""Restoring reads each stored byte once, on any mesh and in any number of processes, and changes no bit."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clipjax.checkpoints import reading
from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.reading import restore_arrays
from clipjax.config import CheckpointConfig, MeshConfig
from clipjax.runtime import sharding
from tests.checkpoints.conftest import run_two

AXES = {"nowhere": (), "rows": ("fsdp",), "columns": (None, "fsdp"), "part": ("data",)}
RECORDS = {name: {"format": 2} for name in ("config", "data", "tokenizer", "preprocessing")}


def values() -> dict[str, np.ndarray]:
    """Arrays that can be cut, and some that cannot, of all bits: NaN, negative zero, subnormal numbers."""
    words = np.random.default_rng(0).integers(0, 2**32, (1024, 512), np.uint32)
    words[0, :4] = 0x80000000, 0x7FA00001, 0xFFC12345, 1
    halves = words.view(np.uint16)[:, :512].copy()
    halves[halves & 0x7F80 == 0x7F80] = 0x7FC0  # XLA on CPUs keeps no other NaN of bfloat16, in Orbax's save too
    return {
        "wide": words.view(np.float32),
        "odd": words.reshape(-1)[: 509 * 997].reshape(509, 997).view(np.float32),
        "odd_half": halves.reshape(-1)[: 509 * 997].reshape(509, 997).view(jnp.bfloat16),
        "half": halves.view(jnp.bfloat16),
        "odd_bool": words.reshape(-1)[: 509 * 997].reshape(509, 997) % 3 == 0,
        "bias": words[0].view(np.float32),
        "step": np.asarray(3, np.int32),
    }


def place(mesh: jax.sharding.Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding by `spec` where it divides the array, as rules of a config see to; else none."""
    found = NamedSharding(mesh, spec)
    cut = len(spec) <= len(shape) and all(
        size % mesh.shape[axis] == 0 for size, axis in zip(shape, spec, strict=False) if axis
    )
    return found if cut else NamedSharding(mesh, PartitionSpec())


def make_arrays(mesh: jax.sharding.Mesh, spec: PartitionSpec) -> dict:
    """The values on a mesh, and a PRNG key."""
    arrays = {
        name: jax.make_array_from_callback(x.shape, place(mesh, spec, x.shape), lambda index, x=x: x[index])
        for name, x in values().items()
    }
    everywhere = NamedSharding(mesh, PartitionSpec())
    arrays["key"] = jax.jit(lambda: jax.random.fold_in(jax.random.key(9), 4), out_shardings=everywhere)()
    return {"train": arrays}


def abstract(arrays: dict, mesh: jax.sharding.Mesh, spec: PartitionSpec) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(mesh, spec, x.shape)), arrays)


def bytes_read() -> int:
    """What this process has read so far, from files and caches."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def fraction_read(path: pathlib.Path, asked: dict) -> float:
    """Restore, compare all bits with those of `values`, and return bytes read over bytes of all arrays."""
    before = bytes_read()
    restored = restore_arrays(path, asked)["train"]
    read = bytes_read() - before
    for name, x in values().items():
        assert restored[name].sharding == asked["train"][name].sharding
        for shard in restored[name].addressable_shards:
            assert np.asarray(shard.data).tobytes() == x[shard.index].tobytes(), name
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(9), 4))
    for shard in jax.random.key_data(restored["key"]).addressable_shards:
        np.testing.assert_array_equal(shard.data, key)
    return read / sum(x.nbytes for x in values().values())


def meshes() -> dict[str, jax.sharding.Mesh]:
    half = jax.device_count() // 2
    return {
        "fsdp": sharding.make_mesh(MeshConfig(data=1, fsdp=2 * half)),
        "both": sharding.make_mesh(MeshConfig(data=2, fsdp=half)),
    }


def save_and_restore(workdir: pathlib.Path, wanted: list[tuple[str, str, str, str]]) -> list[float]:
    """Save as the first two of each say (mesh, axes), restore as the last two do; return the fractions read."""
    checkpoints, saved, found = Checkpoints(workdir, CheckpointConfig(keep_last=9)), {}, []
    for mesh, axes, target, target_axes in wanted:
        arrays = make_arrays(meshes()[mesh], PartitionSpec(*AXES[axes]))
        if (mesh, axes) not in saved:
            saved[mesh, axes] = len(saved) + 1
            checkpoints.save(len(saved), arrays, RECORDS)
            checkpoints.wait()
        path = checkpoints.path(saved[mesh, axes])
        found.append(fraction_read(path, abstract(arrays, meshes()[target], PartitionSpec(*AXES[target_axes]))))
    checkpoints.close()
    return found


CASES = [
    ("fsdp", "rows", "fsdp", "rows"),
    ("fsdp", "rows", "fsdp", "columns"),
    ("fsdp", "rows", "both", "nowhere"),
    ("both", "nowhere", "both", "part"),
    ("both", "columns", "both", "rows"),
]


def test_one_process_reads_each_byte_once(tmp_path):
    assert max(save_and_restore(tmp_path, CASES)) < 1.05


def test_arrays_beyond_the_bound_move_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOVED_BYTES", 1)
    assert max(save_and_restore(tmp_path, CASES[1:2])) < 1.1


PROGRAM = """
import json, os, pathlib, sys
from clipjax.runtime import processes
workdir, address, rank = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
processes.start({"coordinator": address, "num_processes": "2", "process_id": str(rank)})
from clipjax.checkpoints import reading
from tests.checkpoints import test_reading as tests
found = {"fractions": tests.save_and_restore(workdir, tests.CASES[1:4])}
path, mesh = workdir / "checkpoints" / "1", tests.meshes()["both"]
asked = tests.abstract(tests.make_arrays(mesh, tests.PartitionSpec()), mesh, tests.PartitionSpec())
if rank == 1:
    def fail(*_):
        raise OSError("the disk of one process")
    reading._Group._read = fail
try:
    tests.restore_arrays(path, asked)
except reading.DamagedCheckpoint as error:
    found["error"] = str(error).partition("config: ")[2]
print("FOUND", json.dumps(found))
"""


@pytest.mark.process
def test_two_processes_read_each_byte_once_and_fail_together(tmp_path):
    (first, second), _ = run_two(tmp_path, PROGRAM, xla_flags="--xla_force_host_platform_device_count=2")
    totals = [sum(parts) for parts in zip(first["fractions"], second["fractions"], strict=True)]
    assert max(totals) <= 1.1, (first, second)
    assert first["error"] == "process 1: the disk of one process"
    assert second["error"] == "the disk of one process"
