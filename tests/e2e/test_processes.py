"""Several processes over loopback: they train as one does, stop together, refuse together, and restore each other's.

The processes of one test share compiled steps with those of the others through JAX's cache: the same executable gives
the same bits. A run whose length matters compiles anew.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

import clipjax
from clipjax.checkpoints.saved import find_checkpoint
from clipjax.monitoring.run_logger import sample_digest
from tests.e2e.conftest import environment, run, start
from tests.e2e.test_run import make_tar
from tests.faults.storage import BrokenStorage

pytestmark = pytest.mark.process

LAST_STEP = 12


def train_arguments(config: pathlib.Path, workdir: pathlib.Path) -> tuple[str, ...]:
    return ("train", f"--config={config}", f"--workdir={workdir}")


def devices(count: int) -> dict[str, str]:
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def processes(
    count: int, *arguments: str, of_last: tuple[tuple[str, ...], dict[str, str]] = ((), {}), **environment: str
) -> Iterator[list[subprocess.Popen]]:
    """All processes of one run; whatever is left of them is killed at the end.

    Args:
        count: how many.
        arguments: of all of them.
        of_last: arguments and environment that only the last one gets besides, or instead of those of the same name.
        environment: of all of them.
    """
    address = f"localhost:{free_port()}"
    started = []
    for index in range(count):
        more, changes = of_last if index == count - 1 else ((), {})
        words = (f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}")
        names = {argument.partition("=")[0] for argument in more}
        kept = [argument for argument in arguments if argument.partition("=")[0] not in names]
        started.append(start(*kept, *words, *more, **{**environment, **changes}))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def outputs(processes: Sequence[subprocess.Popen], expect: int) -> list[str]:
    """What all of them printed, once they have left with the expected code."""
    texts = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [expect] * len(processes), "\n\n".join(texts)
    return texts


def log_lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: pathlib.Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_lines(workdir) if "loss" in line}


def rank_log(workdir: pathlib.Path, rank: int) -> str:
    return (workdir / "logs" / f"rank-{rank:05d}.log").read_text()


def sample_digests(workdir: pathlib.Path, rank: int) -> dict[int, int]:
    """What a process fed into each step, from its log."""
    found = re.findall(r"step (\d+): .* samples ([0-9a-f]{16})$", rank_log(workdir, rank), re.MULTILINE)
    return {int(step): int(digest, 16) for step, digest in found}


def results(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    return json.loads((workdir / "results.json").read_text())["tasks"]


@pytest.fixture(scope="module")
def alone(tiny_config, tmp_path_factory, cache) -> pathlib.Path:
    """The workdir of one process with two devices."""
    workdir = tmp_path_factory.mktemp("one")
    run(*train_arguments(tiny_config, workdir), **devices(2), **cache)
    return workdir


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory, cache) -> pathlib.Path:
    """The workdir of an undisturbed run of two processes with one device each."""
    workdir = tmp_path_factory.mktemp("two")
    with processes(2, *train_arguments(tiny_config, workdir), **cache) as both:
        first, second = outputs(both, expect=0)
    assert f"step {LAST_STEP}/{LAST_STEP}" in first
    assert "waiting for 2 processes at localhost:" in first
    assert "step" not in second  # only the first process talks
    table = next(line for line in first.splitlines() if line.startswith("rank"))
    assert table.split("  ")[-1] == "kept others waiting"
    return workdir


@pytest.fixture(scope="module")
def four(tiny_config, tmp_path_factory, cache) -> pathlib.Path:
    """The workdir of four processes with one device each."""
    workdir = tmp_path_factory.mktemp("four")
    with processes(4, *train_arguments(tiny_config, workdir), **cache) as all_four:
        outputs(all_four, expect=0)
    return workdir


def assert_same_run(ours: pathlib.Path, theirs: pathlib.Path, count: int) -> None:
    """A run of so many processes saw the samples, and got the losses, of another of one process."""
    whole = sample_digests(theirs, 0)
    parts = [sample_digests(ours, rank) for rank in range(count)]
    assert list(whole) == list(range(1, LAST_STEP + 1))
    for step, digest in whole.items():
        assert sum(part[step] for part in parts) % 2**64 == digest
        assert len({part[step] for part in parts}) == count
    first, second = losses(ours), losses(theirs)
    assert list(first) == list(second) == list(whole)
    # The same pairs at the same weights: only the order of sums differs.
    assert first[1] == pytest.approx(second[1], rel=1e-6)
    # Later, Adam's first steps turn the rounding of a tiny gradient's sign into a full step.
    np.testing.assert_allclose(list(first.values()), list(second.values()), rtol=2e-3)
    assert results(ours).keys() == results(theirs).keys() == {"scenes/val", "scenes/pairs"}
    for task in results(ours):
        for name, value in results(theirs)[task].items():
            if name.startswith("num_"):
                assert results(ours)[task][name] == value
    assert find_checkpoint(ours)[1] == LAST_STEP


@pytest.mark.newest
def test_two_processes_train_as_one_with_two_devices(finished, alone):
    assert_same_run(finished, alone, 2)


@pytest.mark.slow
def test_four_processes_train_as_one_with_two_devices(four, alone):
    assert_same_run(four, alone, 4)


@pytest.mark.parametrize(
    ("count", "each"),
    [pytest.param(*layout, marks=pytest.mark.slow) for layout in ((1, 1), (1, 4), (2, 2), (2, 4), (4, 2), (4, 4))],
)
def test_other_layouts_train_as_one_with_two_devices(tiny_config, alone, tmp_path, cache, count, each):
    with processes(count, *train_arguments(tiny_config, tmp_path), **devices(each), **cache) as all_of_them:
        outputs(all_of_them, expect=0)
    assert_same_run(tmp_path, alone, count)


def test_each_process_keeps_a_log_and_the_start_is_recorded(finished):
    for rank in range(2):
        text = rank_log(finished, rank)
        assert f"process: {rank} of 2" in text and "local_devices: ['cpu:" in text
        assert f"--process_id={rank}" in text and "versions: {'python'" in text
        assert f"step 0 of {LAST_STEP}" in text and "done: 12 steps" in text
    (record,) = json.loads((finished / "run.json").read_text())["starts"]
    assert (record["num_processes"], record["num_devices"], record["process"]) == (2, 2, "0 of 2")
    assert record["digests"].keys() == {"config", "code", "checkpoint", "data", "class list"}
    ranks = [line["ranks"] for line in log_lines(finished) if "ranks" in line]
    assert ranks and all(len(values) == 2 for values in ranks[0].values() if isinstance(values, list))
    assert int(ranks[0]["samples"][1], 16) == sample_digests(finished, 1)[ranks[0]["step"]]


SLOW = """
import os, runpy, time
from clipjax.config import CheckpointConfig, EvalConfig
from clipjax.data import sources

def get_config():
    if os.environ.get("SLOW"):
        read = sources.TfdsSource.__getitem__

        def slowly(self, index):
            time.sleep(0.1)
            return read(self, index)

        sources.TfdsSource.__getitem__ = slowly
    config = runpy.run_path(CONFIG)["get_config"]()
    config.eval, config.checkpoint, config.log.every_examples = EvalConfig(), CheckpointConfig(), 64
    return config
"""


@pytest.mark.slow  # tests/monitoring names the slow, too
def test_a_process_that_reads_slowly_is_named(tiny_config, tmp_path, cache):
    config = tmp_path / "config.py"
    config.write_text(SLOW.replace("CONFIG", repr(str(tiny_config))))
    with processes(2, *train_arguments(config, tmp_path), of_last=((), {"SLOW": "1"}), **cache) as both:
        text, _ = outputs(both, expect=0)
    assert set(re.findall(r"straggler: process (\d)", text)) == {"1"}
    rows = [line.split() for line in text.splitlines() if re.match(r" +[01]  ", line)]
    waits = {row[0]: float(row[3]) for row in rows}
    assert waits.keys() == {"0", "1"}
    assert waits["1"] > 0.1 > waits["0"]  # 16 samples of 0.1 seconds a step, some of them read at the same time


RESTORE = """
import hashlib, sys
import jax, numpy as np
from clipjax.checkpoints.saved import SavedCheckpoint, load_params
from clipjax.config import MeshConfig
from clipjax.runtime import processes, sharding

processes.start(dict(word.removeprefix("--").split("=") for word in sys.argv[2:]))
mesh = sharding.make_mesh(MeshConfig())
for path in sys.argv[1].split(","):
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(load_params(SavedCheckpoint(path), mesh)):
        digest.update(np.asarray(leaf).tobytes())
    print("restored", jax.process_count(), digest.hexdigest())
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_save_what_one_restores_and_back(request, tiny_config, tmp_path, cache, count):
    several = request.getfixturevalue("finished" if count == 2 else "four")
    shutil.copytree(several, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(LAST_STEP))
    (tmp_path / "run" / "results.json").unlink()
    output = run(*train_arguments(tiny_config, tmp_path / "run"), **devices(count), **cache)
    assert f"step 9 of {LAST_STEP}" in output
    ours, theirs = losses(tmp_path / "run"), losses(several)
    assert [ours[step] for step in range(1, 10)] == [theirs[step] for step in range(1, 10)]
    # The next loss is of the same pairs at the same bits of the parameters: only the order of its sums differs.
    assert ours[10] == pytest.approx(theirs[10], rel=1e-6)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-3)  # Adam and roundings, as above
    # The bits of what several processes saved, and of what one did, read by one and by several.
    (tmp_path / "restore.py").write_text(RESTORE)
    paths = f"{several},{tmp_path / 'run'}"
    script = (sys.executable, str(tmp_path / "restore.py"), paths)
    one = subprocess.run(script, env={**os.environ, **devices(1), **cache}, capture_output=True, text=True, check=True)
    digests = re.findall("restored 1 ([0-9a-f]{64})", one.stdout)
    assert len(digests) == 2
    address = f"localhost:{free_port()}"
    started = [
        subprocess.Popen(
            (*script, f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"),
            env={**os.environ, **devices(1), **cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    for text in outputs(started, expect=0):
        assert re.findall(rf"restored {count} ([0-9a-f]{{64}})", text) == digests


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_evaluation_gives_the_same_on_several_processes(finished, tmp_path, cache, count):
    places = {"output": "results.json", "csv": "results.csv", "report": ""}
    arguments = ("eval", f"--checkpoint={finished}", *(f"--{name}={tmp_path}/{file}" for name, file in places.items()))
    with processes(count, *arguments, **cache) as all_of_them:
        first, *others = outputs(all_of_them, expect=0)
    assert "scenes/val" in first and not any("scenes/val" in text for text in others)
    assert results(tmp_path) == results(finished)
    assert "zeroshot_classification" in (tmp_path / "results.csv").read_text()
    assert (tmp_path / "index.html").read_text().count("<figure>") > 1


@pytest.mark.slow
def test_two_processes_share_a_memory_and_a_teacher(tiny_config, finished, tmp_path, cache):
    make_tar(tmp_path / "pairs.tar", corrupt=0)  # 64 pairs: each is remembered and recalled six times
    options = (
        f"--config.data.train={tmp_path}/pairs.tar",
        "--config.loss.kind=global",
        f"--config.loss.distill_from={finished}",
    )
    arguments = (*train_arguments(tiny_config, tmp_path / "two"), *options)
    with processes(2, *arguments, **cache) as both:
        outputs(both, expect=0)
    first = losses(tmp_path / "two")
    # An epoch is two steps, in which the two processes together see every pair once and none twice.
    parts = [sample_digests(tmp_path / "two", rank) for rank in range(2)]
    for step in range(1, LAST_STEP, 2):
        epoch = sum(part[step] + part[step + 1] for part in parts) % 2**64
        assert epoch == sample_digest(np.arange(64))
    shutil.rmtree(tmp_path / "two" / "checkpoints" / str(LAST_STEP))
    with processes(2, *arguments, **cache) as both:
        outputs(both, expect=0)
    assert losses(tmp_path / "two") == first  # the last three steps from a memory that was restored in halves
    one = train_arguments(tiny_config, tmp_path / "one")
    run(*one, *options, **devices(2), **cache)
    again = losses(tmp_path / "one")
    assert again[1] == pytest.approx(first[1], rel=1e-6)
    np.testing.assert_allclose(list(again.values()), list(first.values()), rtol=5e-3)  # Adam and roundings, as above


def children(pid: int) -> list[int]:
    """Processes that any thread of a process has started."""
    lists = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


@pytest.mark.parametrize(
    ("signalled", "times"),
    [pytest.param((0, 1), 1, id="both", marks=pytest.mark.slow), pytest.param((1,), 2, id="second-twice-with-worker")],
)
def test_a_signal_stops_both_at_one_step_and_the_run_goes_on(tiny_config, finished, tmp_path, cache, signalled, times):
    """A launcher signals every process, a preempted machine only its own: either way all save the same step.

    Loader workers get the signals too, and the second one comes while the first is being acted upon.
    """
    arguments = (*train_arguments(tiny_config, tmp_path), f"--config.data.num_workers={times - 1}")
    with processes(2, *arguments) as both:  # without the cache
        log = tmp_path / "metrics.jsonl"
        # Compiling the step comes next.
        while not log.exists():
            assert all(process.poll() is None for process in both)
            time.sleep(0.01)
        for index in signalled:
            for pid in [both[index].pid, *children(both[index].pid)] * times:
                os.kill(pid, signal.SIGTERM)
        first, second = outputs(both, expect=128 + signal.SIGTERM)
    assert "Traceback" not in first + second
    _, step = find_checkpoint(tmp_path)
    assert step < LAST_STEP
    assert f"after step {step}" in first
    with processes(2, *arguments, **cache) as both:
        first, _ = outputs(both, expect=0)
    assert f"step {step} of {LAST_STEP}" in first
    assert losses(tmp_path) == losses(finished)
    assert (tmp_path / "results.json").exists()


@pytest.mark.slow  # test_run stops on bad data, too
def test_bad_data_of_one_process_stops_both_and_is_counted_over_both(tiny_config, tmp_path, cache):
    make_tar(tmp_path / "pairs.tar", corrupt=1)  # one process meets it in each epoch
    arguments = (
        *train_arguments(tiny_config, tmp_path / "run"),
        f"--config.data.train={tmp_path}/pairs.tar",
        "--config.data.max_bad_fraction=0",
    )
    with processes(2, *arguments, **cache) as both:
        texts = outputs(both, expect=3)
    assert all("(corrupt_image 1)" in text and "Traceback" not in text for text in texts)
    assert sum("the latest: corrupt_image in shard" in text and "key 000" in text for text in texts) == 1
    with processes(2, *arguments[:-1], "--config.data.max_bad_fraction=0.05", **cache) as both:
        outputs(both, expect=0)
    counts = [
        line["samples_skipped"]["corrupt_image"] for line in log_lines(tmp_path / "run") if "samples_skipped" in line
    ]
    assert counts[1::2] == [1, 2, 3, 4, 5, 6]  # once an epoch of two steps, whichever process meets it


def refused(texts: Sequence[str]) -> list[str]:
    """The lines of a refusal, which all processes gave alike, and nothing worse."""
    lines = [re.findall(r"^clipjax train: error: (.*)$", text, re.MULTILINE) for text in texts]
    assert lines[0] and all(each == lines[0] for each in lines)
    assert not any("Traceback" in text for text in texts)
    return lines[0]


TAR = """
import os, runpy
from clipjax.config import CheckpointConfig, EvalConfig

def get_config():
    config = runpy.run_path(CONFIG)["get_config"]()
    config.data.train, config.eval, config.checkpoint = "pairs.tar", EvalConfig(), CheckpointConfig()
    os.chdir(os.environ["FOLDER"])
    return config
"""


def test_another_config_code_and_data_are_refused_by_name_on_both(tiny_config, tmp_path):
    for corrupt, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        make_tar(tmp_path / folder / "pairs.tar", corrupt=corrupt)
    copy = tmp_path / "code" / "clipjax"
    shutil.copytree(pathlib.Path(clipjax.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "pytrees.py").open("a") as file:
        file.write("# changed\n")
    config = tmp_path / "config.py"
    config.write_text(TAR.replace("CONFIG", repr(str(tiny_config))))
    arguments = train_arguments(config, tmp_path / "run")
    of_last = (
        ("--config.optim.learning_rate=0.5",),
        # "safe": the folder that the test runs in does not come before PYTHONPATH.
        {"PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1", "FOLDER": str(tmp_path / "b")},
    )
    with processes(2, *arguments, of_last=of_last, FOLDER=str(tmp_path / "a")) as both:
        config_line, code_line, data_line = refused(outputs(both, expect=2))
    assert "process 1 (" in config_line and "another config than process 0" in config_line
    assert "optim.learning_rate=0.5 (process 0: 0.001); give every process the same config file" in config_line
    assert "another code than process 0" in code_line and "clipjax/pytrees.py=" in code_line
    assert "another data than process 0" in data_line and "pairs.tar contents=" in data_line
    assert not (tmp_path / "run").exists()  # a refused start takes the workdir that it made away, logs included


def test_a_workdir_that_is_not_shared_is_refused_on_both(tiny_config, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    with processes(
        2,
        *train_arguments(tiny_config, tmp_path / "a"),
        of_last=((f"--workdir={tmp_path / 'b'}",), {}),
    ) as both:
        (line,) = refused(outputs(both, expect=2))
    assert "steps in the workdir='none' (process 0: '9, 12'); the workdir" in line or "6, 9, 12" in line


def test_what_one_process_cannot_open_is_refused_on_both(tiny_config, tmp_path):
    arguments = train_arguments(tiny_config, tmp_path)
    with processes(2, *arguments, of_last=(("--config.data.tfds_dir=nowhere",), {})) as both:
        (line,) = refused(outputs(both, expect=2))
    assert line.startswith("process 1 (") and "no prepared data in nowhere (data.tfds_dir)" in line
    with processes(2, *arguments, of_last=(("--workdri=elsewhere",), {})) as both:
        (line,) = refused(outputs(both, expect=2))
    assert line.startswith("process 1 (") and "unknown option --workdri; did you mean --workdir?" in line


@pytest.mark.parametrize(
    ("count", "victim"),
    [(2, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, 0), (4, 0), (4, 1), (4, 2), (4, 3)))],
)
def test_when_a_process_dies_the_others_end_within_the_heartbeat(tiny_config, tmp_path, cache, count, victim):
    arguments = (*train_arguments(tiny_config, tmp_path), "--config.total_examples=3200000")
    with processes(count, *arguments, **cache) as every:
        while "step 3" not in (rank_log(tmp_path, 1) if (tmp_path / "logs" / "rank-00001.log").exists() else ""):
            assert all(process.poll() is None for process in every)
            time.sleep(0.15)
        every[victim].kill()
        others = [process for process in every if process is not every[victim]]
        deadline = time.monotonic() + 60  # 56 of the heartbeat, where the collective itself does not notice
        texts = [process.communicate(timeout=max(0, deadline - time.monotonic()))[0] for process in others]
    named = rf"process {victim} \(.*\) (gives|has given) no sign of life"
    for process, text in zip(others, texts, strict=True):
        assert process.returncode != 0
        assert re.search(named if victim else "the leader task", text), text


LOCAL = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"


@pytest.mark.slow  # of the ten minutes of `make test` it would take one
@pytest.mark.parametrize("victim", range(4))
def test_a_killed_rank_of_four_ends_the_others_and_the_launcher_goes_on(tiny_config, four, tmp_path, cache, victim):
    """The launcher starts all again, and the result is that of the undisturbed run, bit for bit."""
    command = [str(LOCAL), "4", "--restarts=1", *train_arguments(tiny_config, tmp_path)[1:]]
    said = tmp_path / "output.txt"
    with said.open("w") as output:
        env = environment(CLIPJAX=f"{sys.executable} -m clipjax", **cache)
        launcher = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    log = tmp_path / "logs" / "rank-00001.log"
    try:
        while "step 4:" not in (log.read_text() if log.exists() else ""):
            assert launcher.poll() is None, said.read_text()
            time.sleep(0.01)
        (rank,) = [
            pid
            for pid in children(launcher.pid)
            if f"JAX_PROCESS_ID={victim}".encode() in pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ]
        os.kill(rank, signal.SIGKILL)
        start_time = time.monotonic()
        while "(restart 1 of 1)" not in said.read_text():
            assert launcher.poll() is None and time.monotonic() - start_time < 65, said.read_text()
            time.sleep(0.1)
        assert launcher.wait(timeout=240) == 0, said.read_text()
    finally:
        for pid in [launcher.pid, *children(launcher.pid)] if launcher.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        launcher.wait()
    assert f"rank {victim} left with exit code 137" in said.read_text()
    assert losses(tmp_path) == losses(four)
    assert results(tmp_path) == results(four)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_stopped_process_ends_the_others_with_stacks_and_is_named(tiny_config, tmp_path, cache, count):
    options = ("--config.total_examples=3200000", "--config.recovery.stuck_seconds=10")
    with processes(count, *train_arguments(tiny_config, tmp_path), *options, **cache) as every:
        while "step 8" not in (rank_log(tmp_path, 1) if (tmp_path / "logs" / "rank-00001.log").exists() else ""):
            assert all(process.poll() is None for process in every)
            time.sleep(0.1)
        every[1].send_signal(signal.SIGSTOP)
        others = {rank: process for rank, process in enumerate(every) if rank != 1}
        deadline = time.monotonic() + 60
        texts = {
            rank: process.communicate(timeout=max(0, deadline - time.monotonic()))[0]
            for rank, process in others.items()
        }
    assert "process 1 (" in texts[0] and "gives no sign of life" in texts[0]
    for rank, process in others.items():
        assert process.returncode == 1, texts[rank]
        assert "is stuck after step" in texts[rank]
        assert "most recent call first" in rank_log(tmp_path, rank)


@pytest.mark.slow
@pytest.mark.skipif(not BrokenStorage.is_possible(), reason="no C compiler is here, which faults of storage need")
def test_storage_that_never_answers_a_save_ends_both_with_3(tiny_config, tmp_path, cache):
    storage = BrokenStorage(tmp_path / "run" / "checkpoints", tmp_path)
    storage.start("fsync hangs")
    options = ("--config.recovery.max_failed_saves=1", "--config.checkpoint.every_examples=320")
    arguments = (*train_arguments(tiny_config, tmp_path / "run"), "--config.total_examples=3200000", *options)
    with processes(2, *arguments, **cache, **storage.environment()) as both:
        outputs(both, expect=3)
    storage.end()


FAILING = """
import os, runpy
from clipjax.data import training_stream

def get_config():
    if os.environ.get("FAILING"):
        def fail(self):
            raise KeyError("defect of one process")

        training_stream.TrainStream.__next__ = fail
    return runpy.run_path(CONFIG)["get_config"]()
"""


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_other_too_and_is_in_its_log(tiny_config, tmp_path, cache):
    config = tmp_path / "config.py"
    config.write_text(FAILING.replace("CONFIG", repr(str(tiny_config))))
    with processes(2, *train_arguments(config, tmp_path), of_last=((), {"FAILING": "1"}), **cache) as both:
        text = both[1].communicate(timeout=120)[0]
        start_time = time.monotonic()
        both[0].communicate(timeout=60)
        assert time.monotonic() - start_time < 20
    assert both[1].returncode == 1 and both[0].returncode != 0
    assert "KeyError: 'defect of one process'" in text
    assert "KeyError: 'defect of one process'" in rank_log(tmp_path, 1)
