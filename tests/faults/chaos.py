"""All faults, many times: `make chaos`, or a part of it by `make chaos PART=2/5`.

    python -m tests.faults.chaos [--part=I/N] [--only=FAULT] [--again] [--table]

The work is cut into units that take a minute or so. Each unit's outcome is added to `benchmarks/results/chaos.json` as
soon as it is there, with the commit, and a unit that is there already is not done again, so the command can be stopped
and goes on; `--again` does those of other commits anew. `--table` prints the table of all units so far; the exit code
is 1 if anything was wrong.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import machine
from clipjax.monitoring.run_record import versions
from clipjax.runtime.files import write_atomic
from clipjax.runtime.terminal import format_table
from tests.faults.checkpoint_damage import damage_run
from tests.faults.crash import UNDISTURBED, crash_run
from tests.faults.fuzz import FUZZERS, fuzz
from tests.faults.signals import hang_workers_run, kill_workers_run, stop_run
from tests.faults.storage import FAULTS, storage_run
from tests.faults.tiny_run import LAST_STEP, ROOT, TinyRun

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "chaos.json"
WORKERS = ("--config.data.num_workers=2",)
TESTS = {
    "ranks killed, stopped, signalled, failing": ("slow", "tests/e2e/test_processes.py"),
    "one process killed, signalled, on other meshes": ("slow", "tests/e2e/test_run.py"),
    "updates not finite, spikes, replays": ("slow", "tests/faults/test_rollback.py"),
    "ranks killed under the launchers": ("slow", "tests/launch"),
    "each way to lose a run of the table above": ("slow", "tests/faults/test_rows.py"),
    "saves and restores that fail in the middle": ("not slow", "tests/checkpoints"),
    "NaN on one of 8 devices, copies that differ": (
        "not slow",
        "tests/training/test_skipping.py",
        "tests/training/test_replicas.py",
        "tests/training/test_recovery.py",
    ),
    "starts on other data, without checkpoints, on a full disk": (
        "not slow",
        "tests/training/test_resume.py",
        "tests/training/test_preflight.py",
        "tests/monitoring/test_writers.py",
    ),
    "processes that hang, second owners, ports, devices that compute wrongly": ("not slow", "tests/runtime"),
}
"""Tests that break one thing each: what they break, which of them, and where they are."""


class Bench:
    """The undisturbed run, made when the first unit needs it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._ready = False

    def run(self) -> TinyRun:
        """Return the files of the run that is broken."""
        run = TinyRun(self._folder)
        if not self._ready:
            run.write()
            run.finish(UNDISTURBED)
            self._ready = True
        return run


Unit = Callable[[Bench], dict[str, Any]]


def make_units() -> dict[str, Unit]:
    """Return every unit by `FAULT/NUMBER`."""
    units: dict[str, Unit] = {}
    for seed in range(50):
        units[f"kill -9, every other start with loader workers/{seed}"] = _killed(seed)
    for seed in range(10):
        options = WORKERS if seed % 2 else ()
        kind = "SIGTERM, with loader workers" if seed % 2 else "SIGTERM"
        units[f"{kind}/{seed}"] = _broken(stop_run, f"stop{seed}", seed, 8, options)
    for seed in range(5):
        limit = "--config.recovery.max_worker_restarts=100"
        units[f"kill -9 of a loader worker/{seed}"] = _broken(
            kill_workers_run, f"workers{seed}", seed, 8, (*WORKERS, limit)
        )
        units[f"loader workers that hang/{seed}"] = _broken(hang_workers_run, f"hang{seed}", seed, 3, WORKERS)
    for seed in range(12):
        units[f"storage that fails or is slow for a while/{seed}"] = _stored(seed)
    for fault, (marker, *paths) in TESTS.items():
        units[f"{fault}/0"] = _tests(marker, paths)
    for part in range(20):
        units[f"checkpoint damaged/{part}"] = _damaged(part)
    for name in FUZZERS:
        for part in range(10):
            units[f"hostile {name}/{part}"] = _fuzzed(name, part)
    return units


def _killed(seed: int) -> Unit:
    return lambda bench: crash_run(bench.run(), f"crash{seed}", seed=seed, count=10, every_other=WORKERS).record()


def _broken(work: Callable[..., Any], name: str, seed: int, count: int, options: tuple[str, ...]) -> Unit:
    return lambda bench: work(bench.run(), name, seed=seed, count=count, options=options).record()


def _stored(seed: int) -> Unit:
    faults = tuple(random.Random(seed).sample(sorted(FAULTS), 3))
    return lambda bench: storage_run(bench.run(), f"storage{seed}", seed=seed, faults=faults).record()


def _tests(marker: str, paths: Sequence[str]) -> Unit:
    def work(bench: Bench) -> dict[str, Any]:
        pytest = (sys.executable, "-m", "pytest", "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider")
        done = subprocess.run((*pytest, "-m", marker, *paths), cwd=ROOT, capture_output=True, text=True)
        passed = re.search(r"(\d+) passed", done.stdout)
        wrong = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if (done.returncode or not passed) and not wrong:
            wrong = [f"pytest left with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"]
        return {"tries": int(passed[1]) + len(wrong) if passed else len(wrong), "wrong": wrong}

    return work


def _damaged(part: int) -> Unit:
    def work(bench: Bench) -> dict[str, Any]:
        step = bench.run().workdir(UNDISTURBED) / "checkpoints" / str(LAST_STEP)
        with tempfile.TemporaryDirectory() as folder:
            return damage_run(step, pathlib.Path(folder), first=100 * part, count=100).record()

    return work


def _fuzzed(name: str, part: int) -> Unit:
    return lambda bench: fuzz(name, first=1000 + 1000 * part, count=1000).record()


def read_results() -> dict[str, Any]:
    """Return the outcomes so far, by unit."""
    return json.loads(RESULTS.read_text())["units"] if RESULTS.exists() else {}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep other parts, which may run at the same time, from the results."""
    folder = os.open(RESULTS.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _commit() -> str:
    """Return the commit of this checkout, with a "+" if files of the code have been changed since."""
    git = ("git", "-C", str(ROOT))
    head = subprocess.run((*git, "rev-parse", "--short=7", "HEAD"), capture_output=True, text=True, check=False)
    changed = subprocess.run((*git, "status", "--porcelain", "clipjax", "tests"), capture_output=True, check=False)
    return (head.stdout.strip() or "unknown") + "+" * bool(changed.stdout)


def run_units(part: int, parts: int, only: str, *, again: bool) -> None:
    """Do what is not done yet of a part of the units; with `again`, what this commit has not done."""
    commit = _commit()
    wanted = [name for i, name in enumerate(make_units()) if i % parts == part and name.startswith(only)]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pathlib.Path(folder))
        for number, name in enumerate(wanted, 1):
            done = read_results().get(name)
            if done and (not again or done.get("commit") == commit):
                continue
            start = time.monotonic()
            outcome = make_units()[name](bench)
            outcome["seconds"] = round(time.monotonic() - start, 1)
            about = {**machine.describe(), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
            outcome |= {"machine": about["processor"], "date": about["date"], "commit": commit}
            with _alone():
                units = read_results() | {name: outcome}
                write_atomic(RESULTS, json.dumps({"about": about, "units": units}, indent=1) + "\n")
            state = "WRONG" if outcome["wrong"] else "ok"
            print(f"{number} of {len(wanted)}: {name}: {state}, {outcome['seconds']} s", flush=True)
            for line in outcome["wrong"]:
                print(f"    {line}", flush=True)


def table(units: dict[str, Any]) -> str:
    """Return a line per fault: how often tried, the most that was lost, and what went wrong."""
    rows = []
    for fault in dict.fromkeys(name.partition("/")[0] for name in units):
        mine = [outcome for name, outcome in units.items() if name.partition("/")[0] == fault]
        tries = sum(each.get("tries", len(each.get("kills", []))) for each in mine)
        lost = [step for each in mine for step in each.get("lost_steps", [])]
        wrong = sum(len(each["wrong"]) for each in mine)
        rows.append([fault, str(tries), str(max(lost)) if lost else "-", str(wrong)])
    return format_table(rows, ("fault", "tried", "most steps done again", "wrong"))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--only", default="", help="units whose name begins so")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--again", action="store_true", help="units that another commit has done, too")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    if not 1 <= part <= parts:
        parser.error(f"--part={options.part} must be I/N with I from 1 to N")
    warnings.simplefilter("ignore")
    logging.disable()
    if not options.table:
        run_units(part - 1, parts, options.only, again=options.again)
    units = read_results()
    print(table(units))
    print(f"Done by the commits {', '.join(sorted({each.get('commit', 'unknown') for each in units.values()}))};")
    print(f"this is {_commit()}. `make chaos AGAIN=1` does anew what another one has done.")
    return int(any(outcome["wrong"] for outcome in units.values()))


if __name__ == "__main__":
    sys.exit(main())
