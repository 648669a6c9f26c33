"""Cost of a checkpoint: how long a save blocks the loop, and what verification adds to a restore.

    python -m benchmarks.checkpoint_cost --output=benchmarks/results/checkpoint_cost.json

A state of 100 million random float32 numbers in 24 arrays, on the CPU. Each time is the least of several, as other
programs only add to it. Files are read from the page cache: from a disk, verification reads them first, and the restore
after it finds them in the cache.
"""

import argparse
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.manifest import examine
from clipjax.checkpoints.reading import restore_arrays
from clipjax.config import CheckpointConfig
from clipjax.monitoring.run_record import versions

ARRAYS, NUMBERS, TRIES = 24, 100_000_000, 5


def seconds(work: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(folder: pathlib.Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    device = jax.devices()[0]
    shape = (NUMBERS // ARRAYS // 1000, 1000)
    arrays = {"train": {f"{i}": jax.device_put(rng.standard_normal(shape, np.float32), device) for i in range(ARRAYS)}}
    jax.block_until_ready(arrays)
    where = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arrays)
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=1))
    copy, block, write, verify, read = [], [], [], [], []
    for step in range(1, TRIES + 1):
        copy.append(seconds(lambda: jax.tree.map(np.array, arrays)))
        block.append(seconds(lambda step=step: checkpoints.save(step, arrays, {"data": {"format": 2}})))
        write.append(seconds(checkpoints.wait))
        checkpoints.mark_good(step)
        path = checkpoints.path(step)
        verify.append(seconds(lambda path=path: examine(path)))
        read.append(seconds(lambda path=path: jax.block_until_ready(restore_arrays(path, abstract))))
    checkpoints.close()
    return {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)),
        "copy_to_host_seconds": min(copy),
        "save_blocks_seconds": min(block),
        "save_blocks_seconds_most": max(block),
        "blocking_over_copy": min(block) / min(copy),
        "written_and_hashed_seconds": min(write),
        "restore_without_verification_seconds": min(read),
        "verification_seconds": min(verify),
        "restore_with_verification_seconds": min(map(sum, zip(read, verify, strict=True))),
        "verification_over_reading": min(verify) / min(read),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument(
        "--folder", type=pathlib.Path, help="where to write the checkpoints; a temporary one if left out"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(pathlib.Path(folder))
    about = {**machine.describe(), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    text = json.dumps({"about": about, "state_on_cpu": found}, indent=1) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
