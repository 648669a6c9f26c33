"""The start of a source of 100 million samples, also with filters, and the memory of a worker that reads from it.

    python -m benchmarks.data.index_scale --output=benchmarks/results/index_scale.json

One real shard is indexed and stands under many names (hard links), each with an index file of its own, so that every
path, index file and place is real, and only the contents are the same. With filters, each shard has a result of its own
that keeps 30 % of the samples at random: the first start joins them, later ones map what it has written. A worker is a
process that gets the pickled source and reads samples at random.
"""

import argparse
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import describe, peak_bytes, reset_peak
from clipjax.config import DataConfig
from clipjax.data.filter_results import filter_source
from clipjax.data.index_file import pack
from clipjax.data.index_store import cache_folder, index_places
from clipjax.data.kept_format import ShardBits
from clipjax.data.sample import Source
from clipjax.data.shard_results import ShardResult, make_filters, pack_result, result_places
from clipjax.data.tar_index import index_shard
from clipjax.data.webdataset import TarSource, max_file_bytes
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import open_file

MAX_PIXELS = 2**20
SHARE = 0.3
"""Samples that the filters keep."""

STARTS = 3
WORKER = """
import json, pathlib, pickle, random, sys, time
start = time.perf_counter()
source = pickle.load(open(sys.argv[1], "rb"))
opened = time.perf_counter()
draw = random.Random(0)
for _ in range(int(sys.argv[2])):
    source[draw.randrange(len(source))]
status = pathlib.Path("/proc/self/status").read_text()
memory = {name: int(status.partition(name + ":")[2].split()[0]) / 1024 for name in ("VmHWM", "RssAnon", "RssFile")}
read = (time.perf_counter() - opened) / int(sys.argv[2])
print(json.dumps({"unpickle_seconds": opened - start, "read_seconds": read, "memory_mib": memory}))
"""


def make_shards(folder: pathlib.Path, shards: int, samples: int) -> list[str]:
    """Write a shard of small samples, link it to all names and write their indexes; return the paths."""
    first = folder / "shard-00000.tar"
    with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(samples):
            for extension, content in (("jpg", b"no picture"), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{i:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    os.utime(first, (1_000_000_000, 1_000_000_000))
    file = open_file(str(first))
    index = index_shard(file, str(first))
    paths = [folder / f"shard-{i:05d}.tar" for i in range(shards)]
    pathlib.Path(index_places(str(first))[0]).parent.mkdir()
    for path in paths:
        if path != first:
            path.hardlink_to(first)
        content = pack(index, file, name=path.name, limit=max_file_bytes(MAX_PIXELS))
        pathlib.Path(index_places(str(path))[0]).write_bytes(content)
    return [str(path) for path in paths]


def make_results(paths: list[str], samples: int, data: DataConfig) -> None:
    """Write for each shard what filters would keep of it."""
    rng, filters, file = np.random.default_rng(0), make_filters(data), open_file(paths[0])
    version = Listed(file.size, file.version)  # a link has the size and the time of its file
    for path in paths:
        shard = ShardBits.of_flags(rng.random(samples) < SHARE)
        result = ShardResult(shard, (samples - shard.kept,), version)
        result_places(path, filters)[0].write_bytes(pack_result(result, filters))


def open_shards(paths: list[str]) -> TarSource:
    """Open the source of all samples."""
    return TarSource(paths, max_caption_bytes=1000, max_image_pixels=MAX_PIXELS)


def timed_start(make: Callable[[], Source]) -> tuple[Source, float]:
    """Return a source, and the seconds until it and its digests are there."""
    begin = time.perf_counter()
    source = make()
    source.digests()
    return source, time.perf_counter() - begin


def measure_worker(source: Source, folder: pathlib.Path, reads: int) -> dict[str, Any]:
    """Return what a worker takes."""
    pickled = folder / "source.pickle"
    pickled.write_bytes(pickle.dumps(source))
    program = (sys.executable, "-c", WORKER, str(pickled), str(reads))
    worker = subprocess.run(program, capture_output=True, text=True, check=True)
    return {"pickled_bytes": pickled.stat().st_size, "worker": {"reads": reads, **json.loads(worker.stdout)}}


def measure(shards: int, samples: int, reads: int) -> dict[str, Any]:
    """Return times and memory."""
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        paths = make_shards(folder, shards, samples)
        reset_peak()
        starts = [timed_start(lambda: open_shards(paths)) for _ in range(STARTS)]
        source = starts[0][0]
        return {
            "shards": shards,
            "samples": len(source),
            "start_seconds": [seconds for _, seconds in starts],
            "index_bytes": sum(each.stat().st_size for each in (folder / ".clipjax-index").iterdir()),
            "peak_mib_of_this_process": peak_bytes() / 2**20,
            **measure_worker(source, folder, reads),
            "filtered": measure_filtered(paths, samples, folder, reads),
        }


def measure_filtered(paths: list[str], samples: int, folder: pathlib.Path, reads: int) -> dict[str, Any]:
    """Return times and memory with filters: the result of each shard is there, the bitmap of all is not."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    data = DataConfig(filters=("similarity>0.28",))
    make_results(paths, samples, data)
    reset_peak()
    starts = [timed_start(lambda: filter_source(open_shards(paths), data, "benchmark")) for _ in range(1 + STARTS)]
    (bitmap,) = cache_folder().glob("*.bitmap")
    source = starts[-1][0]
    return {
        "samples": len(source),
        "first_start_seconds": starts[0][1],
        "start_seconds": [seconds for _, seconds in starts[1:]],
        "bitmap_bytes": bitmap.stat().st_size,
        "peak_mib_of_this_process": peak_bytes() / 2**20,
        **measure_worker(source, folder, reads),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    found = {"machine": describe(), "sizes": []}
    for samples in sorted({100, options.samples}):
        found["sizes"].append(measure(options.shards, samples, options.reads))
        print(json.dumps(found["sizes"][-1], indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
