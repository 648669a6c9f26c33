"""Two processes over loopback: they train as one process with two devices does, and stop together on a signal."""

import contextlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from clipjax.checkpoint import find_checkpoint
from tests.e2e.conftest import run, start
from tests.e2e.test_run import make_tar

LAST_STEP = 12


def train_arguments(config: pathlib.Path, workdir: pathlib.Path) -> tuple[str, ...]:
    return ("clipjax.train", f"--config={config}", f"--workdir={workdir}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def two_processes(*arguments: str) -> Iterator[list[subprocess.Popen]]:
    """Both processes of one run; whatever is left of them is killed at the end."""
    address = f"localhost:{free_port()}"
    processes = [
        start(*arguments, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index))
        for index in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def outputs(processes: Sequence[subprocess.Popen], expect: int) -> list[str]:
    """What both printed, once both have left with the expected code."""
    texts = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [expect, expect], "\n\n".join(texts)
    return texts


def losses(workdir: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory) -> pathlib.Path:
    """The workdir of an undisturbed run of two processes with one device each."""
    workdir = tmp_path_factory.mktemp("two")
    with two_processes(*train_arguments(tiny_config, workdir)) as processes:
        first, second = outputs(processes, expect=0)
    assert f"step {LAST_STEP}/{LAST_STEP}" in first
    assert "step" not in second  # only the first process talks
    return workdir


def test_two_processes_train_as_one_with_two_devices(tiny_config, finished, tmp_path):
    run(*train_arguments(tiny_config, tmp_path), XLA_FLAGS="--xla_force_host_platform_device_count=2")
    ours, theirs = losses(finished), losses(tmp_path)
    assert list(ours) == list(theirs) == list(range(1, LAST_STEP + 1))
    # The same pairs at the same weights: only the order of sums differs.
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
    # Later, Adam's first steps turn the rounding of a tiny gradient's sign into a full step.
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-3)
    results = [json.loads((workdir / "results.json").read_text())["tasks"] for workdir in (finished, tmp_path)]
    assert results[0].keys() == results[1].keys() == {"scenes/val", "scenes/pairs"}
    for name, value in results[1]["scenes/val"].items():
        if name.startswith("num_"):
            assert results[0]["scenes/val"][name] == value
    assert find_checkpoint(finished)[1] == LAST_STEP


def test_two_processes_share_a_memory_and_a_teacher(tiny_config, finished, tmp_path):
    make_tar(tmp_path / "pairs.tar", corrupt=0)  # 64 pairs: each is remembered and recalled six times
    options = (
        f"--config.data.train={tmp_path}/pairs.tar",
        "--config.loss.kind=global",
        f"--config.loss.distill_from={finished}",
    )
    arguments = (*train_arguments(tiny_config, tmp_path / "two"), *options)
    with two_processes(*arguments) as processes:
        outputs(processes, expect=0)
    first = losses(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / str(LAST_STEP))
    with two_processes(*arguments) as processes:
        outputs(processes, expect=0)
    assert losses(tmp_path / "two") == first  # the last three steps from a memory that was restored in halves
    one = train_arguments(tiny_config, tmp_path / "one")
    run(*one, *options, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    again = losses(tmp_path / "one")
    assert again[1] == pytest.approx(first[1], rel=1e-5)
    np.testing.assert_allclose(list(again.values()), list(first.values()), rtol=5e-3)  # Adam and roundings, as above


@pytest.mark.parametrize("signalled", [(0, 1), (1,)], ids=["both", "second"])
def test_a_signal_stops_both_at_one_step_and_the_run_goes_on(tiny_config, finished, tmp_path, signalled):
    """A launcher signals every process, a preempted machine only its own: either way all save the same step."""
    arguments = train_arguments(tiny_config, tmp_path)
    with two_processes(*arguments) as processes:
        log = tmp_path / "metrics.jsonl"
        # Compiling the step comes next, longer than the second in which JAX notices a signal.
        while not log.exists():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        for index in signalled:
            processes[index].send_signal(signal.SIGTERM)
        first, second = outputs(processes, expect=128 + signal.SIGTERM)
    assert "Traceback" not in first + second
    _, step = find_checkpoint(tmp_path)
    assert step < LAST_STEP
    assert f"after step {step}" in first
    with two_processes(*arguments) as processes:
        first, _ = outputs(processes, expect=0)
    assert f"step {step} of {LAST_STEP}" in first
    assert losses(tmp_path) == losses(finished)
    assert (tmp_path / "results.json").exists()


def test_bad_data_of_one_process_stops_both_and_is_counted_over_both(tiny_config, tmp_path):
    make_tar(tmp_path / "pairs.tar", corrupt=1)  # one process meets it in each epoch
    arguments = (
        *train_arguments(tiny_config, tmp_path / "run"),
        f"--config.data.train={tmp_path}/pairs.tar",
        "--config.data.max_bad_fraction=0",
    )
    with two_processes(*arguments) as processes:
        texts = outputs(processes, expect=1)
    assert all("(corrupt_image 1)" in text and "Traceback" not in text for text in texts)
    assert sum("the latest: corrupt_image in shard" in text and "key 000" in text for text in texts) == 1
    with two_processes(*arguments[:-1], "--config.data.max_bad_fraction=0.05") as processes:
        outputs(processes, expect=0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [line["samples_skipped"]["corrupt_image"] for line in lines if "loss" in line]
    assert counts[1::2] == [1, 2, 3, 4, 5, 6]  # once an epoch of two steps, whichever process meets it
