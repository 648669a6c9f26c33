"""The numbers of one evaluation on 1, 2, 4 and 8 simulated devices and in 2 processes: the same.

    python -m benchmarks.parity.sharded --checkpoint=runs/quickstart --tfds_dir=data \\
        [--output=benchmarks/results/parity_sharded.json]

Data sets and precision are those of `benchmarks.parity.clip_benchmark`; no batch divides their numbers of examples.
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.parity import layouts
from benchmarks.parity.clip_benchmark import MOST, about, write, write_sets
from clipjax.monitoring import run_record
from clipjax.runtime import storage

RESULTS = pathlib.Path("benchmarks/results/parity_sharded.json")
LAYOUTS = ((2, 1), (4, 1), (8, 1), (1, 2))
"""Devices of a process, and processes; the first is 1 and 1."""

TASKS = ("labelled", *MOST)


def main() -> int:
    """Compare, print and write; return 1 if a metric differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a workdir or a step")
    parser.add_argument("--tfds_dir", type=pathlib.Path, required=True, help="where `clipjax data scenes` has put them")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    storage.require_writable(options.output, "--output")
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        write_sets(options.tfds_dir, folder, num_train=1_000)  # nothing learns from them here
        record = about("benchmarks.parity.sharded") | {"versions": run_record.versions()}
        record |= compare(options.checkpoint, folder)
    write(options.output, record)
    return 0 if record["agrees"] else 1


def compare(checkpoint: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Return the numbers of one device, and of each layout the metrics that are others."""
    first, rows = layouts.evaluate(checkpoint, folder, tuple(MOST), tasks=TASKS)["tasks"], []
    for devices, count in LAYOUTS:
        other = layouts.evaluate(checkpoint, folder, tuple(MOST), tasks=TASKS, devices=devices, processes=count)
        rows.append(layout_row(first, other["tasks"], devices, count))
        print(rows[-1], flush=True)
    return {"batch": layouts.BATCH, "tasks": first, "rows": rows, "agrees": all(row["agrees"] for row in rows)}


def layout_row(
    first: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]], devices: int, count: int
) -> dict[str, Any]:
    """Return how many metrics there are, and those that are not the same number."""
    differ = layouts.different_metrics(first, other)
    shown = {name: [side[task].get(metric) for side in (first, other)] for name, task, metric in map(_split, differ)}
    row = {"devices_of_a_process": devices, "processes": count, "num_metrics": sum(map(len, first.values()))}
    return row | {"differ": shown, "agrees": not differ}


def _split(name: str) -> tuple[str, str, str]:
    task, _, metric = name.rpartition(":")
    return name, task, metric


if __name__ == "__main__":
    sys.exit(main())
