"""Soak: a long run grows in nothing, compiles nothing again, and its steps take the same time to the end.

    python -m benchmarks.soak --minutes=30 --output=benchmarks/results/soak.json

72 hours are `--minutes=4320`; the workdir then takes about 3 GB, below `--folder` if that is given.

A small run with two loader workers, a save every 1,000 steps and an evaluation every 2,000 trains in a process of its
own. Every few seconds its memory, descriptors and threads are counted, and those of its workers; and in the run itself
what it has allocated and not freed: the C library's heap (`mallinfo2`, where it has it) and Python's blocks. The growth
of memory is the least-squares slope over the second half of the time: in the first, allocators and caches fill, which
takes longer than a few minutes; fewer than 30 only try this program out. The first evaluation may compile its own
programs.
Exit code 1: a bound is broken.
"""

import argparse
import contextlib
import json
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import machine
from tests.faults.tiny_run import TinyRun, ended

SAMPLE_SECONDS, KEPT_SAMPLES = 2.0, 200
BATCH, SAVE_STEPS, EVAL_STEPS = 32, 1000, 2000
LARGEST_SLOPE = 20.0
"""Growth in MB per hour of the heap that is in use, and of all memory of the workers; a run of few minutes shows more,
as its slope is noise."""
LARGEST_PER_SAVE = 1.0
"""Growth of all memory of the run in MB per save: a save starts threads, and the C library keeps what their arenas once
held (16 arenas on two cores, which take hundreds of saves to fill)."""
SLACK = 2
"""By which the median number of descriptors or threads may be larger in the second half."""
LARGEST_RATIO = 1.5
"""Of the 99th percentile of step times to the median."""
OPTIONS = {
    "total_examples": BATCH * 10**9,
    "global_batch_size": BATCH,
    "model.image.width": 64,
    "model.image.depth": 3,
    "model.text.width": 64,
    "model.text.depth": 3,
    "data.num_workers": 2,
    "recovery.spike_sigmas": "none",  # so few pairs are learned by heart, and then any slip is a jump of the loss
    "eval.every_examples": BATCH * EVAL_STEPS,
    "checkpoint.every_examples": BATCH * SAVE_STEPS,
    "log.every_examples": BATCH,
}
DRIVER = """
import ctypes, json, sys, threading, time
import jax

class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

def count_held():
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Mallinfo2
    while True:
        heap = library.mallinfo2()
        held = {"time": time.time(), "heap_mb": (heap.uordblks + heap.hblkhd) / 2**20, "free_mb": heap.fordblks / 2**20}
        with open(HELD, "a") as file:
            print(json.dumps({**held, "python_blocks": sys.getallocatedblocks()}), file=file)
        time.sleep(SECONDS)

def compiled(event, seconds, **about):
    if event.endswith("/backend_compile_duration"):
        with open(COMPILED, "a") as file:
            print(json.dumps({"time": time.time(), "program": about.get("fun_name", "?")}), file=file)

if __name__ == "__main__":  # and not in loader workers
    jax.monitoring.register_event_duration_secs_listener(compiled)
    threading.Thread(target=count_held, daemon=True).start()
    from clipjax.cli.main import main

    sys.exit(main(sys.argv[1:]))
"""


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope over the second half of the time."""
    half = (times[0] + times[-1]) / 2
    late = [i for i, t in enumerate(times) if t >= half]
    return float(np.polyfit([times[i] - half for i in late], [values[i] for i in late], 1)[0])


def find_recompilations(
    compiled: Sequence[dict[str, Any]], *, second_step: float, first_evaluation: float
) -> list[str]:
    """Return the programs that were compiled after step 2, but for those of the first evaluation.

    Args:
        compiled: `time` and `program` of each compilation, in order.
        second_step: time at which step 2 was done.
        first_evaluation: time at which the first evaluation had ended.
    """
    known: set[str] = set()
    found = []
    for each in compiled:
        again = each["program"] in known or each["time"] > first_evaluation
        if again and each["time"] > second_step:
            found.append(each["program"])
        known.add(each["program"])
    return found


def _sample(pid: int) -> dict[str, float]:
    """Return what a process and its workers hold now."""
    counted = {f"{who}_{what}": 0.0 for who in ("run", "workers") for what in ("mb", "descriptors", "threads")}
    for process in (pid, *_descendants(pid)):
        who = "run" if process == pid else "workers"
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            status = pathlib.Path(f"/proc/{process}/status").read_text()
            counted[f"{who}_descriptors"] += len(list(pathlib.Path(f"/proc/{process}/fd").iterdir()))
            counted[f"{who}_mb"] += int(status.partition("VmRSS:")[2].split()[0]) / 1024
            counted[f"{who}_threads"] += int(status.partition("Threads:")[2].split()[0])
    return counted


def _descendants(pid: int) -> Iterator[int]:
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def _watch(process: subprocess.Popen, seconds: float) -> list[dict[str, float]]:
    """Return the samples of a run while it trains, and stop it at the end."""
    samples, began = [], time.time()
    while (now := time.time()) < began + seconds:
        if process.poll() is not None:
            break
        samples.append({"time": now, **_sample(process.pid)})
        time.sleep(SAMPLE_SECONDS)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=300)
    return samples


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        yield from map(json.loads, file)


def _read_steps(path: pathlib.Path) -> tuple[list[float], dict[str, float]]:
    """Return the time of each step after step 2, and the moments that tell what may be compiled when."""
    took, before = [], None
    moments = {"second_step": float("inf"), "first_evaluation": float("inf")}
    for event in _lines(path):
        if event["event"] != "ledger":
            continue
        seconds = event["seconds"]
        spent = seconds.get("steps", 0.0) + seconds.get("waiting_for_data", 0.0)
        if event["step"] >= 2:
            moments["second_step"] = min(moments["second_step"], event["time"])
        if seconds.get("evaluation"):
            moments["first_evaluation"] = min(moments["first_evaluation"], event["time"])
        if before is not None and before[0] >= 2 and event["step"] == before[0] + 1:
            took.append(spent - before[1])
        before = event["step"], spent
    return took, moments


def summarize(
    samples: Sequence[dict[str, float]],
    held: Sequence[dict[str, float]],
    took: Sequence[float],
    recompiled: Sequence[str],
) -> dict[str, Any]:
    """Return the figures, and the bounds that are broken.

    Args:
        samples: by `_sample`, in order.
        held: `time`, `heap_mb` in use, `free_mb` of the heap and `python_blocks` of the run, in order.
        took: seconds of each step.
        recompiled: programs.
    """
    times = [sample["time"] for sample in samples]
    half = (times[0] + times[-1]) / 2
    result: dict[str, Any] = {"minutes": round((times[-1] - times[0]) / 60, 2), "steps": len(took)}
    broken = []
    hours_per_save = (times[-1] - times[0]) / 3600 / max(1.0, len(took) / SAVE_STEPS)
    in_use = 3600 * slope([each["time"] for each in held], [each["heap_mb"] for each in held])
    blocks = 3600 * slope([each["time"] for each in held], [each["python_blocks"] for each in held])
    result["heap_in_use_mb"] = {"last": round(held[-1]["heap_mb"], 1), "growth_per_hour": round(in_use, 1)}
    result["python_blocks_per_save"] = round(blocks * hours_per_save)
    if in_use > LARGEST_SLOPE:
        broken.append(f"run: the heap in use grows by {in_use:.1f} MB per hour, more than {LARGEST_SLOPE:g}")
    for who in ("run", "workers"):
        values = [sample[f"{who}_mb"] for sample in samples]
        per_hour = 3600 * slope(times, values)
        per_save = per_hour * hours_per_save
        result[f"{who}_mb"] = {
            "last": round(values[-1], 1),
            "growth_per_hour": round(per_hour, 1),
            "growth_per_save": round(per_save, 2),
        }
        if who == "run" and per_save > LARGEST_PER_SAVE:
            broken.append(f"run: memory grows by {per_save:.2f} MB per save, more than {LARGEST_PER_SAVE:g}")
        if who == "workers" and per_hour > LARGEST_SLOPE:
            broken.append(f"workers: memory grows by {per_hour:.1f} MB per hour, more than {LARGEST_SLOPE:g}")
        for what in ("descriptors", "threads"):
            halves = [
                [sample[f"{who}_{what}"] for sample in samples if (sample["time"] >= half) == late]
                for late in (False, True)
            ]
            first, second = map(statistics.median, halves)  # a save has some more for a moment
            result[f"{who}_{what}"] = {
                name: {"median": statistics.median(values), "most": max(values)}
                for name, values in zip(("first_half", "second_half"), halves, strict=True)
            }
            if second > first + SLACK:
                broken.append(f"{who}: {what} grow from {first:.0f} to {second:.0f}")
    median, high = statistics.median(took), float(np.percentile(took, 99))
    result["step_seconds"] = {"p50": round(median, 4), "p99": round(high, 4), "ratio": round(high / median, 3)}
    if high > LARGEST_RATIO * median:
        broken.append(f"step time: p99/p50 is {high / median:.2f}, more than {LARGEST_RATIO:g}")
    result["recompilations"] = list(recompiled)
    if recompiled:
        broken.append(f"compiled again after step 2: {', '.join(recompiled)}")
    return {**result, "broken": broken}


def soak(folder: pathlib.Path, minutes: float) -> dict[str, Any]:
    """Train in a folder for so long; return the figures."""
    run = TinyRun(folder, tuple(f"--config.{name}={value}" for name, value in OPTIONS.items()))
    run.write()
    compiled, driver = folder / "compiled.jsonl", folder / "driver.py"
    held = folder / "held.jsonl"
    places = {"COMPILED": repr(str(compiled)), "HELD": repr(str(held)), "SECONDS": str(SAMPLE_SECONDS)}
    text = DRIVER
    for name, place in places.items():
        text = text.replace(name, place)
    driver.write_text(text)
    process = run.start("run", prefix=(str(driver),))
    with ended(process):
        samples = _watch(process, 60 * minutes)
    output = run.output("run")
    if process.returncode != 128 + signal.SIGTERM:
        raise RuntimeError(f"the run left with exit code {process.returncode}: {output[-2000:]}")
    took, moments = _read_steps(run.workdir("run") / "events.jsonl")
    first = moments["first_evaluation"]
    if len(took) < EVAL_STEPS or first == float("inf"):
        raise RuntimeError(f"{minutes} minutes were too few: {len(took)} steps; an evaluation needs {EVAL_STEPS}")
    result = summarize(samples, list(_lines(held)), took, find_recompilations(list(_lines(compiled)), **moments))
    kept = samples[:: max(1, len(samples) // KEPT_SAMPLES)]
    rows = [{name: round(value, 1) for name, value in sample.items()} for sample in kept]
    warnings = re.findall(r"^clipjax: warning.*", output, re.MULTILINE)
    return {**result, "warnings": warnings[:20], "samples": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--folder", type=pathlib.Path, help="of the run, which is kept; a temporary one without it")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args()
    from clipjax.monitoring.run_record import versions

    with tempfile.TemporaryDirectory() as temporary:
        result = soak(args.folder or pathlib.Path(temporary), args.minutes)
    record = {"date": time.strftime("%Y-%m-%d"), **machine.describe(), **versions(), **result}
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name != "samples"}, indent=1))
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
