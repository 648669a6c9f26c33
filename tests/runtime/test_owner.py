"""One owner of a workdir: whoever comes second is refused and told whom to look for; a dead owner blocks nobody."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from clipjax.cli.main import main
from clipjax.runtime import owner

HOLD = """
import os, pathlib, sys, time
from clipjax.runtime import owner
owner.take(pathlib.Path(sys.argv[1]))
if "fork" in sys.argv and os.fork():
    os._exit(0)
print("held", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def holder(workdir: pathlib.Path, *more: str) -> Iterator[subprocess.Popen]:
    """Another process that holds the workdir; it is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(workdir), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its child too
        process.communicate(timeout=60)


def test_the_second_is_refused_without_a_trace_until_the_first_is_dead(tmp_path, capsys):
    workdir = tmp_path / "deep" / "run"
    with holder(workdir) as other:
        before = (workdir / ".owner").read_bytes()
        message = (
            rf"--workdir={workdir}: another run holds it: process {other.pid} on host {socket.gethostname()}, since "
            rf"20\S+, command `-c {workdir}`; wait for it, stop it \(`kill {other.pid}` .*, or use another workdir"
        )
        for refused in (owner.take, owner.refuse_held):
            with pytest.raises(ValueError, match=message):
                refused(workdir)
        # The command looks before it reads its config, and before it imports JAX.
        with pytest.raises(SystemExit) as left:
            main(["train", "--config=nothing.py", f"--workdir={workdir}"])
        assert left.value.code == 2
        assert f"process {other.pid} on host" in capsys.readouterr().err
        assert [path.name for path in workdir.iterdir()] == [".owner"]
        assert (workdir / ".owner").read_bytes() == before
        (workdir / ".owner").write_bytes(b"{")  # as if the holder had not got so far
        with pytest.raises(ValueError, match=r"another process holds it, and .*\.owner does not say which"):
            owner.take(workdir)
        (workdir / ".owner").write_bytes(before)
    owner.refuse_held(workdir)
    assert owner.take(workdir) == owner.take(workdir) == ""  # what a killed process left says nothing
    assert json.loads((workdir / ".owner").read_bytes())["pid"] == os.getpid()
    owner.release(workdir)
    assert (workdir / ".owner").exists()


def test_a_lock_file_that_somebody_deletes_lets_nobody_in(tmp_path):
    with holder(tmp_path):
        (tmp_path / ".owner").unlink()
        for refused in (owner.refuse_held, owner.take):
            with pytest.raises(ValueError, match="another process holds this folder, and there is no .owner in it"):
                refused(tmp_path)
        assert not (tmp_path / ".owner").exists()
    descriptors = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    assert owner.take(tmp_path) == ""
    owner.release(tmp_path)
    assert len(list(pathlib.Path("/proc/self/fd").iterdir())) == descriptors


def test_a_flock_around_the_command_keeps_it_out_of_no_workdir_that_has_an_owner(tmp_path):
    owner.take(tmp_path)
    owner.release(tmp_path)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        owner.refuse_held(tmp_path)
        assert owner.take(tmp_path) == ""
        owner.release(tmp_path)
    finally:
        os.close(folder)


def test_a_pipe_in_the_place_of_the_file_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / ".owner")
    owner.refuse_held(tmp_path)


def test_a_forked_child_does_not_hold(tmp_path):
    with holder(tmp_path, "fork") as parent:  # the child goes on
        parent.wait(timeout=60)
        assert owner.take(tmp_path) == ""
    owner.release(tmp_path, delete=True)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "has no locks (No locks available)" in owner.take(tmp_path)
    owner.refuse_held(tmp_path)
    owner.release(tmp_path)


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--workdir=.*file/run: cannot be written to \(Not a directory\)"):
        owner.take(tmp_path / "file" / "run")
