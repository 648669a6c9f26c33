"""Two processes of which the first alone sees the workdir: it writes and reads everything, bit for bit."""

import jax
import numpy as np
import pytest

from clipjax.checkpoints.manager import Checkpoints
from clipjax.config import CheckpointConfig
from tests.checkpoints.conftest import run_two

ARRAYS = """
values = np.random.default_rng(0).standard_normal((64, 64), np.float32)
values.view(np.uint32)[0, :3] = (0x80000000, 0x7FC00001, 0xFF800000)  # -0.0, a NaN with content, -infinity
numpy_arrays = {
    "kernel": values,
    "half": np.asarray(values, jnp.bfloat16),
    "flags": values > 0,
    "step": np.int32(7),
    "bytes": np.arange(13, dtype=np.uint8),
}
"""

PROGRAM = (
    """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from clipjax.checkpoints.manager import Checkpoints, DamagedCheckpoint
from clipjax.config import CheckpointConfig, MeshConfig
from clipjax.runtime import processes, sharding
from jax.sharding import NamedSharding, PartitionSpec

rank = int(sys.argv[3])
workdir = pathlib.Path(sys.argv[1]) / f"host-{rank}"
processes.start({"coordinator": sys.argv[2], "num_processes": "2", "process_id": str(rank)})
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2))
split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
"""
    + ARRAYS
    + """
def place(name, value):
    where = split if name in ("kernel", "half") else whole
    return jax.make_array_from_callback(value.shape, where, lambda index: np.asarray(value)[index])

arrays = {"params": {name: place(name, value) for name, value in numpy_arrays.items()}}
arrays["train"] = {"key": jax.jit(lambda: jax.random.key(5), out_shardings=whole)()}
records = {name: {"format": 2, "name": name} for name in ("config", "data", "tokenizer", "preprocessing")}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
told = []
checkpoints = Checkpoints(
    workdir, CheckpointConfig(keep_last=1), on_failure=lambda *each: told.append(each), apart=True
)
for step in (10, 20, 30):
    checkpoints.save(step, arrays, records)
    checkpoints.wait()
    checkpoints.mark_good(step)
checkpoints.wait()  # deletes the older ones
found = {"told": told, "steps": checkpoints.steps(), "newest": checkpoints.newest_verified()}
restored, read = checkpoints.restore(30, abstract)
found["records"] = [read["data"]["name"], checkpoints.read_record(30, "config")["name"]]
found["equal"] = True
for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(arrays), strict=True):
    assert ours.sharding == theirs.sharding and ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
        ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
    for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
        found["equal"] &= np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
wrong = {"params": dict(abstract["params"], more=abstract["params"]["kernel"])}
try:
    checkpoints.restore(30, wrong)
except DamagedCheckpoint as error:
    found["wrong"] = "cannot be restored" in str(error)
if rank == 0:
    largest = max((workdir / "checkpoints" / "30").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[5] ^= 1
    largest.write_bytes(content)
try:
    checkpoints.newest_verified()
except DamagedCheckpoint as error:
    found["damaged"] = "another content" in str(error)
found["files"] = sorted(path.name for path in workdir.glob("checkpoints/*"))
checkpoints.close()
print("FOUND " + json.dumps(found), flush=True)
"""
)


@pytest.mark.process
def test_the_first_process_alone_writes_and_reads(tmp_path):
    found, _ = run_two(tmp_path, PROGRAM)
    same = {"told": [], "steps": [30], "newest": 30, "records": ["data", "config"], "equal": True}
    assert found[0] == {**same, "wrong": True, "damaged": True, "files": ["30"]}
    assert found[1] == {**same, "wrong": True, "damaged": True, "files": []}


@pytest.mark.process
def test_a_single_process_reads_what_was_written_so(tmp_path):
    run_two(tmp_path, PROGRAM.partition("if rank == 0:\n    largest")[0] + 'print("FOUND 0")\n')
    namespace: dict = {"np": np, "jnp": jax.numpy}
    exec(ARRAYS, namespace)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        "params": {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)
            for name, value in namespace["numpy_arrays"].items()
        },
        "train": {"key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=where)},
    }
    restored, _ = Checkpoints(tmp_path / "host-0", CheckpointConfig()).restore(30, abstract)
    for name, value in namespace["numpy_arrays"].items():
        assert np.asarray(restored["params"][name]).tobytes() == value.tobytes()
    assert jax.random.key_data(restored["train"]["key"]).tolist() == jax.random.key_data(jax.random.key(5)).tolist()
