"""Updates that are not finite, up to the rollback, a kill behind it, and the replay that finds the sample."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket

import numpy as np
import pytest

from clipjax.monitoring import events
from tests.faults.tiny_run import TinyRun, complete_steps, ended, final_arrays, losses, wait_until

pytestmark = pytest.mark.process
ONE, THREE = ("-m", "tests.faults.poison", "nan", "60"), ("-m", "tests.faults.poison", "nan", "60,61,62")
OPTIONS = (
    "--config.recovery.max_skipped_in_a_row=3",
    "--config.eval.every_examples=None",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = TinyRun(tmp_path_factory.mktemp("poison"), OPTIONS)
    run.write()
    return run


def train(run: TinyRun, name: str, prefix: tuple[str, ...], *options: str, examples: int = 800) -> int:
    process = run.start(name, f"--config.total_examples={examples}", *options, prefix=prefix)
    with ended(process):
        return process.wait(300)


@pytest.fixture(scope="module")
def rolled_back(run: TinyRun) -> str:
    """The name of a run with three batches in a row that are not finite."""
    assert train(run, "rolled-back", THREE) == 0, run.output("rolled-back")
    return "rolled-back"


def test_one_bad_batch_is_skipped_and_nothing_else(run):
    assert train(run, "skipped", ONE) == 0, run.output("skipped")
    lines = {line["step"]: line for line in losses(run.workdir("skipped")) if "loss" in line}
    assert lines[61]["loss"] is None and lines[61]["skipped_updates"] == 1
    assert lines[60]["param_norm"] == lines[61]["param_norm"] != lines[62]["param_norm"]
    assert [event["step"] for event in events.read(run.workdir("skipped")) if event["event"] == "skipped_update"] == [
        61
    ]
    assert not (run.workdir("skipped") / "decisions.jsonl").exists()


def test_three_in_a_row_go_back_to_a_good_checkpoint_without_their_batches(run, rolled_back):
    workdir = run.workdir(rolled_back)
    (decision,) = [json.loads(line) for line in (workdir / "decisions.jsonl").read_text().splitlines()]
    assert (decision["to_step"], decision["first_batch"], decision["last_batch"]) == (40, 59, 62)
    lines = [line for line in losses(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 101)), "step numbers repeat, lines do not"
    assert all(line["loss"] is not None for line in lines)
    assert "rollback: 3 updates in a row, up to step 63, were not finite" in run.output(rolled_back)
    listed = next((workdir / "left_out").iterdir()).read_text().splitlines()
    assert len(listed) == 4 * 8 and "train.tar, key 0" in listed[0]
    assert (workdir / "checkpoints" / "60.rejected").is_dir() and (workdir / "results.json").exists()


def train_two(run: TinyRun, name: str, prefix: tuple[str, ...]) -> list[int]:
    """Train with two processes; return their exit codes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    many = ("--config.total_examples=800", f"--coordinator={address}", "--num_processes=2")
    with contextlib.ExitStack() as stack:
        both = [run.start(name, *many, f"--process_id={rank}", prefix=prefix) for rank in range(2)]
        for process in both:
            stack.enter_context(ended(process))
        return [process.wait(300) for process in both]


@pytest.mark.slow
def test_data_that_one_of_two_processes_cannot_use_ends_both_and_is_named(run):
    first, second = train_two(run, "unusable", ("-m", "tests.faults.poison", "unusable", "25"))
    output = run.output("unusable")
    assert second == 3 and first != 0, output
    assert "clipjax train: error: 100 samples in a row are unusable" in output
    assert "ended with NoUsableSample(" in output and "is stuck" not in output
    assert complete_steps(run.workdir("unusable")) == [20], "not saved: the other process is in the next step"


def test_two_processes_go_back_together(run, rolled_back):
    assert train_two(run, "two", THREE) == [0, 0], run.output("two")
    ours, theirs = ((run.workdir(name) / "decisions.jsonl").read_text() for name in ("two", rolled_back))
    (decision,) = [json.loads(line) for line in ours.splitlines()]
    (other,) = [json.loads(line) for line in theirs.splitlines()]
    assert [decision[key] for key in ("to_step", "first_batch", "last_batch")] == [
        other[key] for key in ("to_step", "first_batch", "last_batch")
    ]
    mine, alone = (
        {line["step"]: line["loss"] for line in losses(run.workdir(name)) if "loss" in line}
        for name in ("two", rolled_back)
    )
    assert sorted(mine) == sorted(alone)
    # Other sums in float32; steps after a rollback with the wrong batches differ by tenths.
    np.testing.assert_allclose([mine[step] for step in sorted(mine)], [alone[step] for step in sorted(mine)], rtol=1e-3)


def test_a_kill_behind_the_rollback_changes_nothing(run, rolled_back):
    process = run.start("killed", "--config.total_examples=800", prefix=THREE)
    with ended(process):
        decisions = run.workdir("killed") / "decisions.jsonl"
        assert wait_until(decisions.exists, seconds=240, process=process)
        os.kill(process.pid, signal.SIGKILL)
    assert train(run, "killed", THREE) == 0, run.output("killed")
    assert losses(run.workdir("killed")) == losses(run.workdir(rolled_back))
    ours, theirs = (next((run.workdir(name) / "left_out").iterdir()) for name in ("killed", rolled_back))
    assert ours.name == theirs.name and ours.read_text() == theirs.read_text()
    ours, theirs = (final_arrays(run.workdir(name), 100) for name in ("killed", rolled_back))
    assert [path for path in theirs if ours[path].tobytes() != theirs[path].tobytes()] == []


def files_of(workdir: pathlib.Path) -> dict[str, bytes]:
    """Every file of a run but the logs of its processes."""
    files = (path for path in workdir.rglob("*") if path.is_file() and path.parent.name != "logs")
    return {str(path): path.read_bytes() for path in files if path.name != ".owner"}


def test_a_replay_tells_the_sample_and_writes_nothing(run, rolled_back):
    before = files_of(run.workdir(rolled_back))
    assert train(run, rolled_back, THREE, "--replay=61", "--rollback=1") == 0
    output = run.output(rolled_back)
    assert "step 61: loss nan, the update is skipped" in output
    assert "image embeddings: 1 of 8 not finite: shard" in output and "parameters: all" in output
    assert train(run, rolled_back, THREE, "--replay=61", "--rollback=2") == 2
    assert "must be one of the run's 1 rollbacks" in run.output(rolled_back)
    assert files_of(run.workdir(rolled_back)) == before, "a replay writes nothing"


@pytest.mark.slow
def test_a_replay_of_a_logged_step_equals_the_log(run, rolled_back):
    assert train(run, rolled_back, THREE, "--replay=95") == 0
    assert "every number is bit for bit that of the log" in run.output(rolled_back)


@pytest.mark.slow
def test_a_loss_spike_goes_back_too(run):
    prefix = ("-m", "tests.faults.poison", "spike", "150")
    assert train(run, "spike", prefix, "--config.optim.learning_rate=1e-4", examples=1360) == 0, run.output("spike")
    (decision,) = [json.loads(line) for line in (run.workdir("spike") / "decisions.jsonl").read_text().splitlines()]
    assert decision["reason"].startswith("the loss jumped to") and decision["last_batch"] == 150


def test_blown_up_from_the_start_there_is_no_way_back(run):
    code = train(run, "blown", ("-m", "clipjax"), "--config.optim.learning_rate=1e30", "--config.warmup_examples=0")
    assert code == 3
    assert "no good checkpoint" in run.output("blown") and not (run.workdir("blown") / "results.json").exists()
    told = re.search(r"--replay=\d+", run.output("blown"))
    assert told
    before = files_of(run.workdir("blown"))
    options = ("--config.optim.learning_rate=1e30", "--config.warmup_examples=0", told[0])
    assert train(run, "blown", ("-m", "clipjax"), *options) == 0
    assert "from step 0, " in run.output("blown")
    assert "step 1: loss " in run.output("blown") and "the norm of the parameters after it is not" in run.output(
        "blown"
    )
    assert files_of(run.workdir("blown")) == before, "a replay writes nothing"


def test_a_last_update_that_spoils_the_parameters_is_no_success(run):
    options = ("--config.optim.learning_rate=1e30", "--config.warmup_examples=0")
    assert train(run, "one-step", ("-m", "clipjax"), *options, examples=8) == 3, run.output("one-step")
    assert "the parameters after step 1 were not finite" in run.output("one-step")
    assert "done" not in run.output("one-step") and complete_steps(run.workdir("one-step")) == []
