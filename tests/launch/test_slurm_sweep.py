"""`clipjax sweep --launcher=slurm`: refusals without a cluster, and an array job with one leaderboard on a real one."""

import csv
import sys

import pytest

from clipjax.cli import sweep
from tests.commands import exit_code

SWEEP = """
from clipjax.sweeps import *
def get_sweep():
    return Sweep(search=Grid({"optim.learning_rate": [0.001, 0.002]}), metric="scenes/val:top1")
"""


def arguments(folder, config, *more):
    (folder / "sweep.py").write_text(SWEEP)
    return [f"--config={config}", f"--sweep={folder}/sweep.py", f"--workdir={folder}/work", "--launcher=slurm", *more]


def test_without_slurm_it_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.py").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert exit_code(sweep.main, arguments(tmp_path, tmp_path / "config.py")) == 2
    assert "--launcher=slurm needs Slurm's sbatch, squeue, scontrol, not found in PATH" in capsys.readouterr().err


def test_dry_run_prints_the_command_and_options_are_checked(tmp_path, capsys):
    (tmp_path / "config.py").write_text("")
    asked = arguments(tmp_path, tmp_path / "config.py", "--dry-run", "--sbatch_options=--time=60 --gpus=1")
    assert sweep.main(asked) == 0
    out = capsys.readouterr().out
    assert out.startswith("+ sbatch --parsable --array=0,1 ") and "--time=60 --gpus=1" in out
    for more, message in (
        (["--launcher=local", "--wait"], "need --launcher=slurm"),
        (["--launcher=slurm", "--jobs=2"], "need --launcher=local"),
        (["--launcher=local", "--trial=2"], "--trial=2 must be from 0 to 1"),
    ):
        assert exit_code(sweep.main, [*arguments(tmp_path, tmp_path / "config.py")[:3], *more]) == 2
        assert message in capsys.readouterr().err


def test_the_array_runs_trials_with_the_sweeps_own_arguments(tmp_path, monkeypatch):
    (tmp_path / "config.py").write_text("")
    submitted = []
    monkeypatch.setattr(sweep, "require_slurm", lambda: None)
    monkeypatch.setattr(sweep, "submit_array", lambda *_, command, **__: submitted.append(command) or "7")
    more = ["--launcher", "slurm", "--sbatch_options=--time=60", "--config.total_examples=64"]
    asked = [argument for argument in arguments(tmp_path, tmp_path / "config.py") if "launcher" not in argument]
    assert sweep.main([*asked, *more, "--train_command=env"]) == 0
    ((python, *_, command), given) = submitted[0][:4], submitted[0][4:]
    assert (python, command) == (sys.executable, "sweep")
    options, passed = sweep._parse([*given, "--trial=1"])  # as the script of the array calls it
    assert (options.launcher, options.trial, options.train_command) == ("local", 1, "env")
    assert passed == ["--config.total_examples=64"] and str(options.workdir) == f"{tmp_path}/work"


@pytest.mark.slow
@pytest.mark.process
def test_an_array_job_with_one_leaderboard(slurm, tiny_config, tmp_path):
    command = (
        sys.executable,
        "-m",
        "clipjax",
        "sweep",
        *arguments(tmp_path, tiny_config, "--config.total_examples=64"),
    )
    out = slurm.call(*command, "--wait", "--sbatch_options=--ntasks=1", cwd=tmp_path)
    assert "+ sbatch --parsable --array=0,1" in out and "best: " in out
    with (tmp_path / "work" / "leaderboard.csv").open(newline="") as file:
        assert {(row["trial"], row["status"]) for row in csv.DictReader(file)} == {
            ("trial-0000", "done"),
            ("trial-0001", "done"),
        }
    again = slurm.call(*command, cwd=tmp_path)
    assert "2 trials in" in again and "2 finished" in again and "sbatch" not in again
    (tmp_path / "work" / "trial-0001-learning-rate-0.002" / "results.json").unlink()
    third = slurm.call(*command, "--dry-run", cwd=tmp_path)
    assert "--array=1 " in third
