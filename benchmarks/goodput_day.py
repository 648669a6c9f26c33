"""Goodput of a day with a failure every 3 hours, from starts, saves and losses that are measured here.

    python -m benchmarks.goodput_day --output=benchmarks/results/goodput_day.json

A run of the quickstart's size is killed (`kill -9`) at random moments and started again, with a compile cache. Its
`events.jsonl` tells how long a start takes until the first step, how long a save blocks the loop, how long it takes
until the checkpoint is complete, and the goodput of this much disturbed run itself.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import runpy

def get_config():
    config = runpy.run_path(QUICKSTART)["get_config"]()
    config.total_examples = 64 * 1_000_000
    config.compile_cache = CACHE
    config.data.train, config.data.tfds_dir, config.data.tokenizer = "tfds:scenes/tiny/train", TFDS, "bytes"
    config.eval.tasks = {}
    config.checkpoint.every_examples, config.checkpoint.keep_last = 64 * 20, 1000
    config.log.every_examples, config.log.tensorboard = 64, False
    return config
"""
NOTICE_SECONDS = 60.0
"""Time until a failure is noticed and all processes are started again; the others end within it."""
SAVE_EVERY_SECONDS = (60, 120, 300)
TARGET = 0.97


def simulate_day(
    *,
    start_seconds: float,
    save_block_seconds: float,
    save_every_seconds: float,
    save_seconds: float,
    notice_seconds: float = NOTICE_SECONDS,
    failure_every_hours: float = 3.0,
) -> float:
    """Return the mean share of productive time between two failures, and so of any day made of them.

    Args:
        start_seconds: from the start of the process to the first step, the checkpoint restored and the step compiled.
        save_block_seconds: for which a save stops the loop.
        save_every_seconds: of training between two saves.
        save_seconds: from a save to the complete checkpoint: a failure within it loses the steps since the save before.
        notice_seconds: from a failure to the start of the processes.
        failure_every_hours: time between two failures, which come at any moment between two saves.
    """
    total = 3600 * failure_every_hours
    lost = save_every_seconds / 2 + save_seconds  # steps that are done again
    steps = (total - notice_seconds - start_seconds) * save_every_seconds / (save_every_seconds + save_block_seconds)
    return max(steps - lost, 0.0) / total


def _disturbed_run(folder: pathlib.Path, kills: int, rng: random.Random) -> pathlib.Path:
    """Train, and kill the process so many times; return the workdir."""
    config, workdir = folder / "config.py", folder / "run"
    places = {"QUICKSTART": ROOT / "configs/quickstart.py", "CACHE": folder / "cache", "TFDS": folder / "tfds"}
    text = CONFIG
    for name, place in places.items():
        text = text.replace(name, repr(str(place)))
    config.write_text(text)
    words = [sys.executable, "-m", "clipjax", "train", f"--config={config}", f"--workdir={workdir}"]
    for attempt in range(kills + 1):
        before = _complete(workdir)
        with (folder / f"output.{attempt}.txt").open("w") as output:
            process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            while _complete(workdir) == before:
                assert process.poll() is None, (folder / f"output.{attempt}.txt").read_text()
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 6))
            if attempt == kills:
                process.terminate()
                process.wait(timeout=300)
        finally:
            process.kill()
            process.wait()
    return workdir


def _complete(workdir: pathlib.Path) -> set[str]:
    """Return the steps whose checkpoints are complete."""
    return {path.name for path in workdir.glob("checkpoints/*") if path.name.isdigit()}


def _measure(workdir: pathlib.Path) -> dict[str, Any]:
    """Return the times of a disturbed run, from its events and its checkpoints."""
    from clipjax.monitoring import events
    from clipjax.monitoring.goodput import History

    found = events.read(workdir)
    places = [i for i, event in enumerate(found) if event["event"] == "start"] + [len(found)]
    starts, blocks, commits = [], [], []
    for first, end in itertools.pairwise(places):
        ledgers = [event for event in found[first:end] if event["event"] in ("ledger", "stop")]
        own = ledgers[-1]["seconds"]
        starts.append(own["initialisation"] + own["compile"])
        for before, after in itertools.pairwise(ledgers):
            block = after["seconds"].get("saving", 0.0) - before["seconds"].get("saving", 0.0)
            folder = workdir / "checkpoints" / str(after["step"])
            if block and after["event"] == "ledger" and folder.exists():
                blocks.append(block)
                done = max(path.stat().st_ctime for path in [folder, *folder.rglob("*")])
                commits.append(block + max(done - after["time"], 0.0))
    seconds = History.from_events(found).seconds
    return {
        "first_start_seconds": round(starts[0], 2),
        "start_seconds": [round(value, 2) for value in starts[1:]],
        "save_block_seconds": {"median": statistics.median(blocks), "max": max(blocks), "saves": len(blocks)},
        "save_seconds": {"median": round(statistics.median(commits), 3), "max": round(max(commits), 3)},
        "disturbed_run": {cause: round(value, 2) for cause, value in seconds.items()},
        "wall_clock_seconds": round(found[-1]["time"] - found[0]["began"], 2),
    }


def _day(measured: dict[str, Any], save_every_seconds: float) -> dict[str, Any]:
    """Return the goodput of a day by the largest start and the median save, and the slowest start that would do."""
    times = {
        "save_block_seconds": measured["save_block_seconds"]["median"],
        "save_seconds": measured["save_seconds"]["max"],
        "save_every_seconds": save_every_seconds,
    }
    goodput = simulate_day(start_seconds=max(measured["start_seconds"]), **times)
    slowest = max((s for s in range(0, 3600, 5) if simulate_day(start_seconds=s, **times) >= TARGET), default=None)
    return {"save_every_seconds": save_every_seconds, "goodput": round(goodput, 4), "slowest_start_seconds": slowest}


def main() -> None:
    from benchmarks.machine import describe
    from clipjax.data.scenes.builder import build_scenes
    from clipjax.monitoring.run_record import versions

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        build_scenes(folder / "tfds", "tiny")
        measured = _measure(_disturbed_run(folder, arguments.kills, random.Random(arguments.seed)))
    days = [_day(measured, seconds) for seconds in SAVE_EVERY_SECONDS]
    for day in days:
        print(
            f"| {day['save_every_seconds']} s | {100 * day['goodput']:.2f} % | {day['slowest_start_seconds']} s |",
            flush=True,
        )
    record = {
        "machine": {**describe(), "load_at_the_start": load[0], "load_at_the_end": os.getloadavg()[0]},
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "benchmarks.goodput_day", *sys.argv[1:]]),
        "notice_seconds": NOTICE_SECONDS,
        "measured": measured,
        "days": days,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if min(day["goodput"] for day in days) < TARGET:
        raise SystemExit(f"a day has less than {TARGET:.0%} of productive time: {days}")


if __name__ == "__main__":
    main()
