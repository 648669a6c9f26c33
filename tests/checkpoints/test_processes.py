"""Checkpoints of two processes: both write, hash, verify and decide alike, and the failure of one hangs none."""

import jax
import pytest

from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.records import RECORDS, make_records
from clipjax.config import CheckpointConfig, Config
from clipjax.data.tokenizers.build import build_tokenizer
from tests.checkpoints.conftest import run_two

PROGRAM = """
import json, os, pathlib, resource, sys
import jax, jax.numpy as jnp, numpy as np
from clipjax.checkpoints import manager, manifest
from clipjax.checkpoints.manager import Checkpoints, DamagedCheckpoint, SavesFail
from clipjax.config import CheckpointConfig, MeshConfig
from clipjax.runtime import processes, sharding
from jax.sharding import NamedSharding, PartitionSpec

workdir, address, rank = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
processes.start({"coordinator": address, "num_processes": "2", "process_id": str(rank)})
folder = workdir / "checkpoints"
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2))
split = NamedSharding(mesh, PartitionSpec("fsdp"))
values = np.random.default_rng(0).standard_normal((64, 64), np.float32)
arrays = {"params": {"kernel": jax.make_array_from_callback(values.shape, split, lambda index: values[index])}}
records = {name: {"format": 2} for name in ("config", "data", "tokenizer", "preprocessing")}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), arrays)
told, found = [], {}

def together(name):
    processes.kv_set(f"{name}/{rank}", "here")
    processes.kv_get(f"{name}/{1 - rank}", timeout_seconds=60)

def names():
    return sorted(path.name for path in folder.iterdir())

checkpoints = Checkpoints(
    workdir, CheckpointConfig(keep_last=2), max_failed_saves=2, on_failure=lambda *each: told.append(each)
)
checkpoints.save(10, arrays, records)
checkpoints.wait()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if rank == 1:  # its disk is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
checkpoints.save(20, arrays, records)
try:
    checkpoints.wait()
except SavesFail as error:
    found["wait"] = str(error).partition(": /")[0]
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
for step in (30, 40):
    checkpoints.save(step, arrays, records)
    checkpoints.wait()
found["told"] = [(step, reason[:10]) for step, reason in told]
found["steps"] = checkpoints.steps()
together("saved")
real = manifest._hash_file
if rank == 1:  # its storage gives nothing
    manifest.RETRY_SECONDS = ()
    manifest._hash_file = lambda path, *, sync: os.close(-1)
try:
    checkpoints.newest_verified()
except manifest.UndecidedCheckpoint as error:
    found["undecided"] = "checkpoints/40 cannot be read" in str(error) and "Bad file descriptor" in str(error)
found["untouched"] = names()
manifest._hash_file = real
together("undecided")
if rank == 0:  # of the files that each process wrote and hashed, one is damaged
    for step, writer in ((40, 1), (30, 0)):
        data = sorted(folder.glob(f"{step}/params/ocdbt.process_{writer}/d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(data[-1].read_bytes())
        content[5] ^= 1
        data[-1].write_bytes(content)
together("damaged")
real_rename = manager.folder.set_aside
if rank == 0:  # its folder is read-only
    manager.folder.set_aside = lambda *_: os.close(-1)
try:
    checkpoints.newest_verified()
except manifest.UnusableCheckpoint as error:
    found["stuck"] = str(error).partition("checkpoints/")[2].partition(";")[0]
manager.folder.set_aside = real_rename
found["good"] = checkpoints.newest_verified()
restored, _ = checkpoints.restore(10, abstract)
for shard in restored["params"]["kernel"].addressable_shards:
    np.testing.assert_array_equal(shard.data, values[shard.index])
found["names"] = names()
try:
    checkpoints.restore(10, {"params": {"kernel": abstract["params"]["kernel"].update(shape=(32, 64))}})
except DamagedCheckpoint as error:
    found["shape"] = "(32, 64)" in str(error)
checkpoints.close()
together("end")
print("FOUND", json.dumps(found))
"""


READERS = """
import json, pathlib, sys
import jax
from clipjax.checkpoints import manifest
from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.config import MeshConfig
from clipjax.runtime import processes, sharding
from jax.sharding import NamedSharding, PartitionSpec

workdir, address, rank = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
processes.start({"coordinator": address, "num_processes": "2", "process_id": str(rank)})
real, hashed = manifest._hash_file, []

def hash_file(path, *, sync):
    hashed.append(path.relative_to(workdir / "checkpoints").as_posix())
    return real(path, sync=sync)

manifest._hash_file = hash_file
everywhere = NamedSharding(sharding.make_mesh(MeshConfig()), PartitionSpec())
abstract = {"kernel": jax.ShapeDtypeStruct((64, 64), "float32", sharding=everywhere)}
opened = SavedCheckpoint(workdir)
found = {"opened": [opened.step, sorted({name.partition("/")[2] for name in hashed})]}
del hashed[:]
params = opened.params(abstract)
found["read"], found["hashed"] = [opened.step, float(params["kernel"][0, 0])], sorted(hashed)
print("FOUND", json.dumps(found))
"""


@pytest.mark.process
def test_two_processes_that_read_parameters_share_the_examination_and_fall_back_together(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    for step in (10, 20):
        arrays = {name: {"kernel": jax.numpy.full((64, 64), step, "float32")} for name in ("params", "train")}
        checkpoints.save(step, arrays, make_records(Config(), build_tokenizer("bytes"), {"step": step}))
    checkpoints.wait()
    data = next(path for path in sorted((tmp_path / "checkpoints" / "20").glob("params/d/*")) if path.is_file())
    data.write_bytes(bytes(data.stat().st_size))
    (first, second), errors = run_two(tmp_path, READERS)
    assert first["opened"] == second["opened"] == [20, [f"{name}/metadata" for name in sorted(RECORDS)]]
    assert first["read"] == second["read"] == [10, 10.0]
    assert not set(first["hashed"]) & set(second["hashed"]), "each file is read by one of them"
    folder = tmp_path / "checkpoints"
    of_params = {path.relative_to(folder).as_posix() for path in folder.glob("*/params/**/*") if path.is_file()}
    both = [*first["hashed"], *second["hashed"]]
    assert {name for name in both if "/params/" in name} == of_params and not any("/train/" in name for name in both)
    warning = f"warning: checkpoint {folder}/20 is damaged (params/d/{data.name}: another content); going on from"
    assert [err.count(warning) for err in errors] == [1, 0]


@pytest.mark.process
def test_two_processes_agree_on_every_outcome(tmp_path):
    (first, second), errors = run_two(tmp_path, PROGRAM)
    assert first == second
    assert first == {
        "wait": "the last checkpoint is not saved; step 20: process 1: File too large",
        "told": [[20, "process 1:"]],
        "steps": [10, 30, 40],
        "undecided": True,
        "untouched": ["10", "30", "40"],
        "stuck": "40 must not be restored (damaged), but cannot be renamed: Bad file descriptor",
        "good": 10,
        "names": ["10", "30.damaged", "40.damaged"],
        "shape": True,
    }
    warnings = [[line for line in err.splitlines() if "warning: checkpoint" in line] for err in errors]
    assert [len(lines) for lines in warnings] == [3, 0]  # the first process alone talks
    assert "ocdbt.process_1/d/" in warnings[0][0]
