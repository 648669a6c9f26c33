"""A sweep runs, resumes, ranks and survives failures, changes, mistakes and signals."""

import csv
import fcntl
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from clipjax.cli import sweep
from clipjax.config import Config
from clipjax.config.serialization import check_override
from clipjax.sweeps import plan
from tests.commands import exit_code
from tests.waiting import wait_for

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

# Stands in for training: score = 1 - |learning_rate - 0.002| * 100, and what the environment asks for.
TRIAL = """
import json, os, pathlib, signal, sys, time
flags = dict(argument.removeprefix("--").partition("=")[::2] for argument in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
with (workdir / "runs.txt").open("a") as runs:
    runs.write("run\\n")
rate = float(flags["config.optim.learning_rate"])
(workdir / "metrics.jsonl").write_text(
    json.dumps({"step": 1, "loss": 9.0}) + "\\n" + json.dumps({"step": 2, "loss": 1 / rate}) + "\\n"
    + json.dumps({"step": 2, "eval": {}}) + "\\n{"
)
if "SLOW" in os.environ:
    def stop(*_):
        (workdir / "stopped").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ["SLOW"] == "stubborn" else stop)
    (workdir / "ready.tmp").write_text(str(os.getpid()))
    (workdir / "ready.tmp").rename(workdir / "ready")
    time.sleep(30)
if os.environ.get("FAIL_RATE") == str(rate):
    print("reading data", flush=True)
    print("\\x1b[31mValueError: no such shard\\x1b[0m\\n\\n", file=sys.stderr)
    sys.exit(3)
if "MEET" in os.environ:
    meet = workdir.parent / "meet"
    meet.mkdir(exist_ok=True)
    (meet / workdir.name).touch()
    deadline = time.monotonic() + 120
    while len(list(meet.iterdir())) < 2:
        assert time.monotonic() < deadline, "never two at a time"
        time.sleep(0.01)
score = float("nan") if "NAN" in os.environ else 1 - abs(rate - 0.002) * 100
text = "{" if "BROKEN" in os.environ else json.dumps(
    {"checkpoint": "x", "tasks": {"scenes/val": {"top1": None if score != score else score, "examples": 8}}}
)
if "NO_RESULTS" not in os.environ:
    (workdir / "results.json").write_text(text)
"""
GRID = 'Grid({"optim.learning_rate": [0.001, 0.002, 0.004]})'


class Bench:
    """A folder with a config, a sweep file and the stand-in for training."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.workdir = folder / "work"
        self.command = [sys.executable, "-I", "-S", str(folder / "trial.py")]
        (folder / "trial.py").write_text(TRIAL)
        (folder / "config.py").write_text("# a config\n")
        self.define(GRID)

    def define(self, search: str, *, metric: str = "scenes/val:top1", rest: str = "") -> None:
        (self.folder / "sweep.py").write_text(
            "from clipjax.sweeps import *\n"
            f"def get_sweep():\n    return Sweep(search={search}, metric={metric!r}{rest})\n"
        )

    def arguments(self, *more: str) -> list[str]:
        """Those of a sweep, but for what `more` says itself."""
        names = {"config": self.folder / "config.py", "sweep": self.folder / "sweep.py", "workdir": self.workdir}
        own = [f"--{name}={path}" for name, path in names.items() if not any(f"--{name}=" in one for one in more)]
        return [*own, *more]

    def run(self, *more: str) -> int | str | None:
        return exit_code(lambda argv: sweep.main(argv, command=self.command), self.arguments(*more))

    def trials(self) -> list[pathlib.Path]:
        return sorted(self.workdir.glob("trial-*"))

    def runs(self) -> list[int]:
        return [len((folder / "runs.txt").read_text().splitlines()) for folder in self.trials()]

    def leaderboard(self) -> list[dict[str, str]]:
        with (self.workdir / "leaderboard.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


# Running


@pytest.mark.process
def test_grid_runs_ranks_and_is_not_run_again(bench, capsys):
    assert bench.run("--config.seed=3") == 0
    out = capsys.readouterr().out
    assert [folder.name for folder in bench.trials()] == [
        "trial-0000-learning-rate-0.001",
        "trial-0001-learning-rate-0.002",
        "trial-0002-learning-rate-0.004",
    ]
    rows = bench.leaderboard()
    assert [row["optim.learning_rate"] for row in rows] == ["0.002", "0.001", "0.004"]
    assert [float(row["scenes/val:top1"]) for row in rows] == pytest.approx([1.0, 0.9, 0.8])
    assert rows[0]["loss"] == "500.0" and {row["status"] for row in rows} == {"done"}
    assert "trial-0001  done" in out and "scenes/val:top1 1.0000" in out
    assert f"best: {bench.trials()[1]}" in out and "--config.optim.learning_rate=0.002" in out
    record = json.loads((bench.trials()[0] / "trial.json").read_text())
    assert record["status"] == "done" and record["overrides"] == {"optim.learning_rate": "0.001"}
    assert record["arguments"][0] == f"--config={bench.folder / 'config.py'}"
    assert record["arguments"][2:] == ["--config.seed=3", "--config.optim.learning_rate=0.001"]
    picture = (bench.workdir / "sweep.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000

    assert bench.run("--config.seed=3") == 0
    assert bench.runs() == [1, 1, 1]
    assert bench.leaderboard() == rows
    assert "0 to run" in capsys.readouterr().out


@pytest.mark.process
def test_another_metric_ranks_anew_without_training(bench):
    assert bench.run() == 0
    bench.define(GRID, metric="loss", rest=", maximize=False")
    assert bench.run() == 0
    assert bench.runs() == [1, 1, 1]
    assert [row["optim.learning_rate"] for row in bench.leaderboard()] == ["0.004", "0.002", "0.001"]


@pytest.mark.process
def test_failed_trial_is_reported_and_run_again(bench, capsys, monkeypatch):
    monkeypatch.setenv("FAIL_RATE", "0.002")
    assert bench.run() == 1
    out = capsys.readouterr().out
    assert "exit code 3: [31mValueError: no such shard[0m" in out  # escape characters are gone
    assert [(row["trial"], row["status"], row["rank"]) for row in bench.leaderboard()] == [
        ("trial-0000", "done", "1"),
        ("trial-0002", "done", "2"),
        ("trial-0001", "failed", ""),
    ]
    monkeypatch.delenv("FAIL_RATE")
    assert bench.run() == 0
    assert bench.runs() == [1, 2, 1]
    assert bench.leaderboard()[0]["trial"] == "trial-0001"


@pytest.mark.process
def test_done_without_results_is_run_again(bench):
    assert bench.run() == 0
    (bench.trials()[2] / "results.json").unlink()
    assert bench.run() == 0
    assert bench.runs() == [1, 1, 2]


@pytest.mark.parametrize(
    ("variable", "status", "message"),
    [
        ("NO_RESULTS", "failed", "exit code 0"),
        ("NAN", "done", "has no scenes/val:top1; the sweep's metric may be loss, scenes/val:examples, step"),
        ("BROKEN", "done", "results.json cannot be read"),
    ],
)
@pytest.mark.process
def test_trials_without_the_metric(bench, capsys, monkeypatch, variable, status, message):
    monkeypatch.setenv(variable, "1")
    assert bench.run() == 1
    assert message in capsys.readouterr().out
    assert [(row["status"], row["rank"]) for row in bench.leaderboard()] == [(status, "")] * 3
    assert (bench.workdir / "sweep.png").stat().st_size > 5000


@pytest.mark.process
def test_two_jobs_run_side_by_side(bench, monkeypatch):
    monkeypatch.setenv("MEET", "1")
    assert bench.run("--jobs=2") == 0


@pytest.mark.process
def test_random_sweep_with_every_kind_of_field(bench):
    bench.define(
        'RandomSearch({"optim.learning_rate": LogUniform(1e-4, 3e-3), "optim.beta2": Choice([0.95, 0.98]),'
        '"warmup_examples": IntUniform(0, 9), "data.train": Choice(["$\\\\frac$.tar", "$b"])}, num_trials=4)'
    )
    assert bench.run("--jobs=2") == 0
    assert len(bench.leaderboard()) == 4


# Changes and mistakes


def error_of(bench: Bench, capsys, *more: str) -> str:
    before = bench.trials()
    assert bench.run(*more) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("clipjax sweep: error: ") and captured.err.count("\n") == 1
    assert captured.out == "" and bench.trials() == before
    return captured.err


@pytest.mark.process
def test_changed_definitions_are_noticed(bench, capsys):
    assert bench.run() == 0
    capsys.readouterr()
    bench.define(GRID.replace("0.002", "0.003"))
    error = error_of(bench, capsys)
    assert "trial-0001-learning-rate-0.002 is a trial of another sweep definition" in error and "--workdir" in error
    bench.define(GRID)
    error = error_of(bench, capsys, "--config.seed=1")
    assert "trial-0000" in error and "arguments differ in --config.seed=1;" in error
    (bench.folder / "config.py").write_text("# another config\n")
    assert "the config file has changed since" in error_of(bench, capsys)


@pytest.mark.process
def test_a_grown_sweep_goes_on_and_a_shrunk_one_is_noticed(bench, capsys):
    assert bench.run() == 0
    bench.define(GRID.replace("]", ", 0.008]"))
    assert bench.run() == 0
    assert bench.runs() == [1, 1, 1, 1]
    capsys.readouterr()
    bench.define(GRID)
    assert "trial-0003-learning-rate-0.008" in error_of(bench, capsys)


@pytest.mark.process
def test_a_trial_in_use_is_not_started(bench, capsys, monkeypatch):
    monkeypatch.setenv("FAIL_RATE", "0.001")
    assert bench.run() == 1
    capsys.readouterr()
    with (bench.trials()[0] / "log.txt").open("rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "trial-0000-learning-rate-0.001 is still being trained" in error_of(bench, capsys)


@pytest.mark.parametrize(
    ("search", "more", "message"),
    [
        ('Grid({"optim.lr": [1], "sed": [2]})', (), "optim has no field 'lr'; it has learning_rate, "),
        ('Grid({"optim.lr": [1], "sed": [2]})', (), "the config has no field 'sed'; did you mean 'seed'?"),
        ('Grid({"seed": [1, 2.5]})', (), "seed=2.5 is float and must be int"),
        ('Grid({"seed": []})', (), "sweep.py:3: ValueError: Grid: seed=[] must be a list"),
        ("undefined", (), "sweep.py:3: NameError: name 'undefined' is not defined"),
        ("(", (), "SyntaxError"),
        (GRID, ("--config.optim.learning_rate=1",), "is both in the sweep and on the command line"),
        (GRID, ("--config.optim.lr=1",), "optim has no field 'lr'"),
        (GRID, ("--config.seed",), "--config.seed has no value; write --config.seed=VALUE"),
        (GRID, ("--config.seed=3", "--config.seed", "4"), "--config.seed is given twice, '3' and '4'"),
        (GRID, ("--config.data.train=gs:/b/a.tar",), "--config.data.train=gs:/b/a.tar: an address of gs begins"),
        ('Grid({"data.train": ["hdfs://b/a.tar"]})', (), "data.train=hdfs://b/a.tar: nothing here opens"),
        (
            """Grid({"eval.tasks['t'].source": ["a"]})""",
            ('--config.eval.tasks["t"].source=b',),
            "is both in the sweep and on the command line",
        ),
        (
            """Grid({"eval.tasks['t'].source": ["a"], 'eval.tasks["t"].source': ["b"]})""",
            (),
            "is in the sweep twice, as eval.tasks['t'].source too",
        ),
        (GRID, ("--job=2",), "unknown option --job; did you mean --jobs?"),
        (GRID, ("--jobs=0",), "--jobs=0 must be a whole number of at least 1"),
        (GRID, ("--jobs=two",), "--jobs=two must be a whole number of at least 1"),
        (GRID, ("--launcher=slrm",), "--launcher=slrm must be one of local, slurm; did you mean slurm?"),
        (GRID, ("--sweep=/nowhere.py",), "--sweep=/nowhere.py must be a Python file"),
        (GRID, ("--config=/nowhere.py:large",), "--config=/nowhere.py:large must be a Python file, or FILE:ARG"),
        (GRID, ("--workdir=/dev/null/x",), "Not a directory"),
    ],
)
def test_mistakes_are_one_line_before_any_trial(bench, capsys, search, more, message):
    bench.define(search)
    assert message in error_of(bench, capsys, *more)


def test_missing_flags_and_wrong_sweep_files(bench, capsys):
    assert exit_code(sweep.main, []) == 2
    assert "error: --config=FILE[:ARG] is missing" in capsys.readouterr().err
    (bench.folder / "sweep.py").write_text("get_sweep = dict\n")
    assert "must define get_sweep() that returns a Sweep; it gave dict" in error_of(bench, capsys)
    (bench.folder / "sweep.py").write_text("")
    assert "must define get_sweep() that returns a Sweep; it gave NoneType" in error_of(bench, capsys)


@pytest.mark.process
def test_a_trial_is_trained_by_the_command_that_is_asked_for(bench, capsys):
    script = bench.folder / "two words.sh"
    script.write_text(f'#!/bin/sh\n[ "$1" = 4 ] && shift && exec {shlex.join(bench.command)} "$@"\n')
    script.chmod(0o755)
    command = shlex.join([str(script), "4"])
    assert sweep.main(bench.arguments(f"--train_command={command}")) == 0
    assert len(bench.trials()) == 3 and bench.runs() == [1, 1, 1]
    assert (bench.trials()[0] / "log.txt").read_text().startswith(f"$ {command} --config=")
    capsys.readouterr()
    assert "there is no command 'nosuch'" in error_of(bench, capsys, "--train_command=nosuch train")
    assert "No closing quotation" in error_of(bench, capsys, "--train_command='x")


# Signals


def test_a_sweep_that_several_processes_would_run_is_refused(bench, capsys, monkeypatch):
    bench.define("Grid({'optim.learning_rate': (1e-3, 2e-3)})")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    error = error_of(bench, capsys)
    assert "Open MPI started this sweep as one of 2 processes" in error and "start clipjax sweep once" in error
    assert bench.trials() == []


def start_slow_sweep(bench: Bench, *, slow: str = "gently") -> subprocess.Popen:
    call = f"main({bench.arguments('--jobs=2')}, command={bench.command})"
    code = f"import sys; from clipjax.cli.sweep import main; sys.exit({call})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "SLOW": slow},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(list(bench.workdir.glob("*/ready"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.process
def test_signals_stop_the_trials_and_the_sweep_goes_on_later(bench, number):
    process = start_slow_sweep(bench)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err and "run the same command to go on" in err
    assert len(list(bench.workdir.glob("*/stopped"))) == 2 and len(bench.trials()) == 2
    assert [json.loads((folder / "trial.json").read_text())["status"] for folder in bench.trials()] == [
        "interrupted"
    ] * 2
    assert bench.run() == 0
    assert bench.runs() == [2, 2, 1]


@pytest.mark.process
def test_a_second_signal_kills_stubborn_trials(bench):
    process = start_slow_sweep(bench, slow="stubborn")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # waits for its trials
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130 and not list(bench.workdir.glob("*/stopped"))
    for ready in bench.workdir.glob("*/ready"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(ready.read_text()), 0)


@pytest.mark.process
def test_a_killed_sweep_leaves_its_trials_locked(bench, capsys):
    process = start_slow_sweep(bench)
    process.kill()
    process.communicate()
    try:
        assert "is still being trained by another process" in error_of(bench, capsys)
    finally:
        for ready in bench.workdir.glob("*/ready"):
            os.kill(int(ready.read_text()), signal.SIGTERM)
    wait_for(lambda: len(list(bench.workdir.glob("*/stopped"))) == 2)
    time.sleep(0.1)
    assert bench.run() == 0


def test_example_sweep_fits_the_config():
    trials = plan.load_sweep(REPOSITORY / "configs" / "sweeps" / "quickstart_lr.py").trials()
    assert len(trials) == 6
    for trial in trials:
        for path, value in trial.items():
            check_override(Config, path, value)
