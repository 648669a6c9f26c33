"""A sweep whose folder is an address: killed and gone on with elsewhere, held by one sweep at a time, refusals.

Another machine is another staging folder: nothing of the sweep but the store is there.
"""

import contextlib
import csv
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from clipjax.runtime import objects, staging
from clipjax.runtime.lease import Lease
from tests.runtime.stores import BUCKET
from tests.sweeps.test_sweep import GRID, Bench

# Stands in for training: holds the workdir, score = 1 - |learning_rate - 0.002| * 100.
TRIAL = """
import json, os, signal, sys, time
from clipjax.runtime import objects
from clipjax.runtime.lease import Lease
flags = dict(argument.removeprefix("--").partition("=")[::2] for argument in sys.argv[1:])
place, rate = flags["workdir"], float(flags["config.optim.learning_rate"])
lease = Lease(place)
print("training", flush=True)
if "SLOW" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: (lease.release(), sys.exit(143)))
    objects.write_bytes(f"{place}/ready", str(os.getpid()).encode())
    time.sleep(60)
if os.environ.get("FAIL_RATE") == str(rate):
    lease.release()
    sys.exit("ValueError: no such shard")
objects.write_bytes(f"{place}/metrics.jsonl", json.dumps({"step": 2, "loss": 1 / rate}).encode() + b"\\n{")
results = {"checkpoint": "x", "tasks": {"scenes/val": {"top1": 1 - abs(rate - 0.002) * 100, "examples": 8}}}
objects.write_bytes(f"{place}/results.json", json.dumps(results).encode())
lease.release()
"""
NAMES = [f"trial-000{i}-learning-rate-0.00{2**i}" for i in range(3)]


class StoreBench(Bench):
    """A bench whose sweep has its folder on a store."""

    def __init__(self, folder: pathlib.Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder)
        self.place, self.monkeypatch = place, monkeypatch
        self.command = [sys.executable, "-c", TRIAL]
        self.move_to("machine-0")

    def move_to(self, machine: str) -> None:
        self.monkeypatch.setenv(staging.VARIABLE, str(self.folder / machine))

    def arguments(self, *more: str) -> list[str]:
        own = () if any("--workdir=" in one for one in more) else (f"--workdir={self.place}",)
        return super().arguments(*own, *more)

    def text(self, path: str) -> str:
        return objects.read_bytes(f"{self.place}/{path}", 2**24).decode()

    def starts(self) -> list[int]:
        """Starts of each trial so far, by the logs on the store."""
        return [self.text(f"{name}/log.txt").count("$ ") for name in NAMES]

    def leaderboard(self) -> list[dict[str, str]]:
        return rows_of(self.text("leaderboard.csv"))

    def call(self, *more: str) -> str:
        """The code of a process that runs the sweep."""
        call = f"main({self.arguments(*more)}, command={self.command})"
        return f"import sys; from clipjax.cli.sweep import main; sys.exit({call})"


def rows_of(text: str) -> list[dict[str, str]]:
    """Rows of a leaderboard, without what depends on the clock."""
    rows = list(csv.DictReader(io.StringIO(text)))
    assert all(float(row.pop("seconds")) >= 0 for row in rows)
    return rows


@pytest.fixture(params=["gs", "s3"])
def bench(request, tmp_path, monkeypatch):
    request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    monkeypatch.setenv("CLIPJAX_LEASE_SECONDS", "2")
    found = StoreBench(tmp_path, f"{request.param}://{BUCKET}/sweeps/{request.node.originalname}", monkeypatch)
    yield found
    for path in objects.list_folder(found.place):
        objects.delete(f"{found.place}/{path}")


@pytest.fixture
def gs_bench(gcs, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPJAX_LEASE_SECONDS", "2")
    found = StoreBench(tmp_path, f"gs://{BUCKET}/sweeps/one", monkeypatch)
    yield found
    gcs.reset()
    for path in objects.list_folder(found.place):
        objects.delete(f"{found.place}/{path}")


# Running


@pytest.mark.process
def test_another_machine_runs_only_what_is_not_finished_and_ranks_as_on_a_disk(bench, tmp_path, capsys, monkeypatch):
    (tmp_path / "disk").mkdir()
    on_disk = Bench(tmp_path / "disk")
    assert on_disk.run() == 0
    monkeypatch.setenv("FAIL_RATE", "0.002")
    capsys.readouterr()
    assert bench.run("--jobs=2") == 1
    out = capsys.readouterr().out
    assert f"exit code 1: ValueError: no such shard [{bench.place}/{NAMES[1]}/log.txt]" in out
    assert f"wrote {bench.place}/leaderboard.csv and {bench.place}/sweep.png" in out
    assert [row["status"] for row in bench.leaderboard()] == ["done", "done", "failed"]
    record = json.loads(bench.text(f"{NAMES[1]}/trial.json"))
    assert record["status"] == "failed" and f"--workdir={bench.place}/{NAMES[1]}" in record["arguments"]

    monkeypatch.delenv("FAIL_RATE")
    bench.move_to("machine-1")
    assert bench.run() == 0
    assert "3 trials in" in (out := capsys.readouterr().out) and "1 to run" in out
    assert bench.starts() == [1, 2, 1]
    log = bench.text(f"{NAMES[1]}/log.txt")
    assert log.index("no such shard") < log.rindex("$ ") < log.rindex("training")  # it goes on in the same file
    assert bench.leaderboard() == rows_of((on_disk.workdir / "leaderboard.csv").read_text())
    assert objects.read_bytes(f"{bench.place}/sweep.png", 2**24).startswith(b"\x89PNG")
    assert f"best: {bench.place}/{NAMES[1]}" in out and not pathlib.Path(bench.place.partition("/")[0]).exists()

    objects.delete(f"{bench.place}/{NAMES[2]}/results.json")
    bench.move_to("machine-2")
    assert bench.run() == 0 and bench.run() == 0
    assert bench.starts() == [1, 2, 2]


@pytest.mark.process
def test_changed_definitions_are_noticed_before_anything_is_written(gs_bench, capsys):
    assert gs_bench.run() == 0
    before = objects.list_folder(gs_bench.place)
    gs_bench.move_to("machine-1")
    for search, more, message in (
        (GRID.replace("0.002", "0.003"), (), f"{gs_bench.place}/{NAMES[1]} is a trial of another sweep definition"),
        (GRID, ("--config.seed=1",), f"{gs_bench.place}/{NAMES[0]} was trained by another definition"),
    ):
        gs_bench.define(search)
        assert gs_bench.run(*more) == 2
        assert message in capsys.readouterr().err
    after = objects.list_folder(gs_bench.place)
    assert before.pop(".owner") != after.pop(".owner") and before == after
    objects.write_bytes(f"{gs_bench.place}/{NAMES[0]}/trial.json", b"[]")
    assert gs_bench.run() == 2
    assert f"{gs_bench.place}/{NAMES[0]}/trial.json must hold a JSON object" in capsys.readouterr().err


# One at a time


@contextlib.contextmanager
def slow_sweep(bench: StoreBench, *more: str):
    """A sweep in another process, whose trials wait; they are gone after the block."""
    output = bench.folder / "slow.out"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", bench.call(*more)], env={**os.environ, "SLOW": "1"}, stdout=file, stderr=file
        )
    try:
        with ended_alone(process):
            deadline = time.monotonic() + 120
            while not pids(bench):
                assert process.poll() is None and time.monotonic() < deadline, output.read_text()
                time.sleep(0.05)
            yield process
    finally:
        for pid in pids(bench):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def pids(bench: StoreBench) -> list[int]:
    return [int(bench.text(path)) for path in objects.list_folder(bench.place) if path.endswith("/ready")]


@pytest.mark.process
def test_a_second_sweep_is_refused_while_the_first_or_its_trial_lives(bench, capsys):
    bench.define("Grid({'optim.learning_rate': [0.001, 0.002]})")
    with slow_sweep(bench) as process:
        record = bench.text(f"{NAMES[0]}/trial.json")
        for machine in ("machine-0", "machine-1"):
            bench.move_to(machine)
            assert bench.run() == 2
        bench.move_to("machine-1")
        error = capsys.readouterr().err
        assert error.count(f"error: --workdir={bench.place}: another run holds it: process {process.pid} ") == 2
        assert bench.run("--trial=1") == 2  # nor one trial of it
        assert f"--workdir={bench.place}: another run holds it: process {process.pid} " in capsys.readouterr().err
        process.kill()  # and its trial lives on
        process.wait()
        assert bench.run() == 2
        error = capsys.readouterr().err
        assert f"--workdir={bench.place}/{NAMES[0]}: another run holds it: process {pids(bench)[0]} " in error
        bench.move_to("machine-0")
        assert bench.run() == 2
        assert f"{bench.place}/{NAMES[0]} is still being trained by another process" in capsys.readouterr().err
        assert bench.text(f"{NAMES[0]}/trial.json") == record
    bench.move_to("machine-1")
    assert bench.run() == 0
    assert len(bench.leaderboard()) == 2


@pytest.mark.process
def test_a_refused_start_leaves_nothing(gs_bench, capsys):
    lease = Lease(f"{gs_bench.place}/{NAMES[1]}")
    assert gs_bench.run() == 2
    assert f"--workdir={gs_bench.place}/{NAMES[1]}: another run holds it" in capsys.readouterr().err
    assert list(objects.list_folder(gs_bench.place)) == [f"{NAMES[1]}/.owner"]
    lease.release()
    assert gs_bench.run() == 0


@pytest.mark.process
def test_an_interrupt_while_it_waits_for_an_owner(gs_bench):
    gs_bench.monkeypatch.setenv("CLIPJAX_LEASE_SECONDS", "30")
    lease = Lease(gs_bench.place)
    holder = gs_bench.text(".owner")
    process = subprocess.Popen([sys.executable, "-c", gs_bench.call()], stderr=subprocess.PIPE, text=True)
    with ended_alone(process):
        assert process.stderr is not None
        assert "has an owner; waiting up to 30 s" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (130, "interrupted: no trial was started\n")
    assert list(objects.list_folder(gs_bench.place)) == [".owner"] and gs_bench.text(".owner") == holder
    lease.release()


@contextlib.contextmanager
def ended_alone(process: subprocess.Popen):
    """The process, which is gone after the block."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.process
def test_single_trials_side_by_side_then_ranked(gs_bench, capsys):
    """As the jobs of an array of a cluster do."""
    with slow_sweep(gs_bench, "--trial=1") as process:
        gs_bench.move_to("machine-1")
        assert gs_bench.run("--trial=0") == 0
        assert gs_bench.run("--trial=1") == 2
        told = f"--workdir={gs_bench.place}/{NAMES[1]}/sweep: another run holds it: process {process.pid} "
        assert told in capsys.readouterr().err
        assert gs_bench.run() == 2  # by the lease of that sweep, or of its trial
        assert re.search(f"--workdir={gs_bench.place}/{NAMES[1]}.*: another run holds it", capsys.readouterr().err)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130
    assert json.loads(gs_bench.text(f"{NAMES[1]}/trial.json"))["status"] == "interrupted"
    assert not objects.exists(f"{gs_bench.place}/leaderboard.csv")
    assert gs_bench.run("--trial=1") == gs_bench.run("--trial=2") == 0
    before = gs_bench.starts()
    assert gs_bench.run() == 0 and gs_bench.starts() == before == [1, 2, 1]
    assert [row["trial"] for row in gs_bench.leaderboard()] == ["trial-0001", "trial-0000", "trial-0002"]


@pytest.mark.process
def test_a_sweep_that_is_taken_over_stops_and_writes_no_more(gs_bench, capsys):
    gs_bench.monkeypatch.setenv("SLOW", "1")
    taken: list[dict] = []

    def take_over():
        while not pids(gs_bench):
            time.sleep(0.05)
        owner = f"{gs_bench.place}/.owner"
        holder = json.loads(objects.read_bytes(owner, 2**16))
        objects.write_bytes(owner, json.dumps({**holder, "token": "another", "host": "elsewhere"}).encode())
        taken.append(objects.list_folder(gs_bench.place))

    thread = threading.Thread(target=take_over)
    thread.start()
    assert gs_bench.run() == 3
    thread.join()
    error = capsys.readouterr().err
    assert f"{gs_bench.place} is not this run's any more (another run holds it: process" in error
    assert "on host elsewhere" in error and "Traceback" not in error
    after = objects.list_folder(gs_bench.place)
    changed = {path for path in after if taken[0].get(path) != after[path]}
    assert changed <= {f"{NAMES[0]}/.owner"}, changed  # that is the trial's own
    assert json.loads(gs_bench.text(f"{NAMES[0]}/trial.json"))["status"] == "running"
    with pytest.raises(ProcessLookupError):
        os.kill(pids(gs_bench)[0], 0)


# Trouble and mistakes


@pytest.mark.process
def test_trials_that_cannot_be_started_or_recorded_have_failed_and_run_again(gs_bench, gcs, impatient, capsys):
    gcs.plant(rf"PUT .*{NAMES[0]}/log.txt", status=503)
    gcs.plant(rf"PUT .*{NAMES[1]}/trial.json", status=503)
    assert gs_bench.run() == 1
    out = capsys.readouterr().out
    assert re.search(r"trial-0000  failed .* cannot be recorded: .*the server answers 503", out)
    assert re.search(r"trial-0001  failed .*cannot be started: .*the server answers 503", out)
    assert [(row["trial"], row["status"]) for row in gs_bench.leaderboard()][:1] == [("trial-0002", "done")]
    gcs.reset()
    assert gs_bench.run() == 0
    assert [row["status"] for row in gs_bench.leaderboard()] == ["done"] * 3
    gcs.plant("PUT .*leaderboard.csv", status=503)
    assert gs_bench.run() == 3
    captured = capsys.readouterr()
    assert "clipjax sweep: error: " in captured.err and "leaderboard.csv" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--workdir=https://host/sweep"], "nothing here opens an address of https:// for this, which takes gs://"),
        (["--workdir=http://host/sweep"], "nothing here opens an address of http:// for this, which takes gs://"),
        (["--workdir=gs://none-such/sweep"], "--workdir=gs://none-such/sweep: there is no bucket none-such"),
        (["--launcher=slurm"], "--launcher=slurm needs a folder on a disk"),
        (["--trial=3"], "--trial=3 must be from 0 to 2"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(gs_bench, capsys, gcs, more, message):
    assert gs_bench.run(*more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not objects.list_folder(gs_bench.place) and not gcs.count("^PUT .*trial")
