"""Worker processes of a training stream leave nothing behind: no warning, no shared memory, no process."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from clipjax.data.training_stream import TrainStream
from tests.data.test_training_stream import make_config, make_source, tokenize

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


def test_workers_of_a_killed_process_end_with_it(tmp_path):
    process = start(tmp_path, "import time\n    time.sleep(1000)")
    assert process.stdout is not None and process.stdout.readline() == "read\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # the pipes close when the last worker, which has inherited them, has ended
    assert process.returncode == -signal.SIGKILL


def test_a_closed_stream_says_so():
    stream = TrainStream(make_source(), tokenize=tokenize, config=make_config())
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="the stream is closed"):
        next(stream)
