"""Worker processes of a training stream: they survive signals, start again after a death, and leave nothing behind."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from clipjax.data import workers
from clipjax.data.sample import UnreadableData
from clipjax.data.training_stream import TrainStream
from clipjax.data.workers import WorkersDie
from tests.data.test_training_stream import assert_same, jpeg, make_config, make_source, take, tokenize
from tests.data.test_webdataset import entry, write

ROOT = pathlib.Path(__file__).parents[2]
READ = """
from clipjax.data.training_stream import TrainStream
from tests.data.test_training_stream import make_config, make_source, tokenize

def fail(stream, batch):
    raise KeyError("defect")

if __name__ == "__main__":  # workers import this file
    stream = TrainStream(make_source(), tokenize=tokenize, config=make_config(num_workers=2, num_threads=1))
    batch = next(stream)
    next(stream)
    print("read", flush=True)
    ENDING
"""

pytestmark = pytest.mark.process


def start(folder, ending: str) -> "subprocess.Popen[str]":
    script = folder / "read.py"
    script.write_text(READ.replace("ENDING", ending))
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_stream_that_an_error_leaves_open_ends_without_a_warning(tmp_path):
    """The traceback keeps the stream, its workers and a batch up to the end of the program."""
    process = start(tmp_path, "fail(stream, globals().pop('batch'))")
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1
    assert error.startswith("Traceback") and error.endswith("KeyError: 'defect'\n")


def test_a_worker_that_dies_while_the_program_ends_is_no_crash(tmp_path):
    kill = "import multiprocessing\n    [os.kill(each.pid, 9) for each in multiprocessing.active_children()]"
    process = start(tmp_path, f"del batch\n    import os, time\n    {kill}\n    time.sleep(0.5)\n    stream.close()")
    output, error = process.communicate(timeout=100)
    assert (process.returncode, output) == (0, "read\n") and "Traceback" not in error, error


def test_workers_of_a_killed_process_end_with_it(tmp_path):
    process = start(tmp_path, "import time\n    time.sleep(1000)")
    assert process.stdout is not None and process.stdout.readline() == "read\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # the pipes close when the last worker, which has inherited them, has ended
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_changes_stops_the_stream_with_an_error_of_its_own_class(tmp_path, num_workers):
    """Commands tell by the class that a person has to look at the data."""
    path = tmp_path / "s.tar"
    members = [
        entry(f"{i:02d}.{kind}", jpeg() if kind == "jpg" else b"x") for i in range(32) for kind in ("jpg", "txt")
    ]
    config = make_config(8, num_workers=num_workers, num_threads=1, prefetch_batches=1)
    stream = TrainStream(write(path, members), tokenize=tokenize, config=config)
    next(stream)
    write(path, [entry("marker"), *members])
    with pytest.raises(UnreadableData, match=f"shard {path} cannot be read as it was opened: another program"):
        for _ in range(8):
            next(stream)
    stream.close()


def test_a_closed_stream_says_so():
    stream = TrainStream(make_source(), tokenize=tokenize, config=make_config())
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="the stream is closed"):
        next(stream)


def worker_pids() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid and "grain" in child.name]


def signal_starting_workers() -> None:
    """Send each of two workers the signals to stop as soon as it is there: it still imports."""
    signalled: set[int] = set()
    while len(signalled) < 2:
        for pid in set(worker_pids()) - signalled:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(pid, number)
            signalled.add(pid)
        time.sleep(0.001)


def test_dead_workers_start_again_where_they_were_until_their_limit():
    """Signals to stop do nothing, also to a worker that still imports; SIGKILL loses and doubles no batch."""
    config = make_config(num_workers=2, num_threads=1, prefetch_batches=2)
    config.recovery.max_worker_restarts = 1
    told: list[str] = []
    stream = TrainStream(make_source(), tokenize=tokenize, config=config, on_restart=told.append, left_out=[(2, 2)])
    try:
        signals = threading.Thread(target=signal_starting_workers)
        signals.start()
        batches = [next(stream)]
        signals.join()
        first = worker_pids()
        for pid in first:
            os.kill(pid, signal.SIGTERM)
        batches += [next(stream) for _ in range(2)]
        assert stream.worker_restarts == 0 and worker_pids() == first
        os.kill(first[1], signal.SIGKILL)
        while stream.worker_restarts == 0:  # batches that lay ready come first
            batches.append(next(stream))
        assert told == [
            f"a loader worker of process 0 died (signal 9): all of them start again at step {len(batches)}, "
            "restart 1 of 1"
        ]
        assert not set(worker_pids()) & set(first)
        os.kill(worker_pids()[0], signal.SIGKILL)
        with pytest.raises(WorkersDie, match="max_worker_restarts=1: a loader worker of process 0 died again"):
            while True:
                batches.append(next(stream))
        stream.read_here()
        batches += [next(stream) for _ in range(2)]
        assert worker_pids() == []
    finally:
        stream.close()
    assert_same(batches, take(len(batches), left_out=[(2, 2)]))


def test_another_error_is_no_death():
    assert workers.exit_code_of_death(RuntimeError("a defect of a source")) is None
