"""Saves that fail: training goes on, what is there stays, and after some failures in a row it ends."""

import errno
import gc
import os
import pathlib
import resource
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.checkpoints import manager, saving
from clipjax.checkpoints.manager import Checkpoints, SavesFail
from clipjax.checkpoints.manifest import State, examine
from clipjax.checkpoints.records import RECORDS as RECORDS_OF_ALL
from clipjax.config import CheckpointConfig

# When one array cannot be written Orbax leaves the writes of others behind, which complain when they are collected.
pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
ARRAYS = {"params": {"kernel": jax.random.normal(jax.random.key(1), (64, 64))}, "train": {"step": jnp.int32(3)}}
RECORDS = {"data": {"format": 2}}


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


class Run:
    """A workdir with step 10, and what is told about saves."""

    def __init__(self, workdir: pathlib.Path, **options) -> None:
        self.told: list[tuple[int, str]] = []
        self.checkpoints = Checkpoints(
            workdir, CheckpointConfig(keep_last=1), on_failure=lambda *each: self.told.append(each), **options
        )
        self.folder = workdir / "checkpoints"
        self.save(10)
        self.checkpoints.wait()

    def save(self, step: int, **options) -> None:
        self.checkpoints.save(step, ARRAYS, RECORDS, **options)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def fail_while_full(save, *args) -> None:
    """Let the system refuse files of more than some bytes: writes fail inside TensorStore, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        save(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_and_settle(run: Run, step: int) -> None:
    run.save(step)
    run.checkpoints._join(60)


def test_a_write_that_fails_is_told_and_the_next_save_is_as_ever(run):
    fail_while_full(save_and_settle, run, 20)
    (told,) = run.told
    assert told[0] == 20
    assert told[1].startswith(f"{os.strerror(errno.EFBIG)}: {run.folder / '20'}")
    run.save(30)
    run.checkpoints.wait()
    assert len(run.told) == 1
    assert run.names() == ["10", "30"]
    assert all(examine(run.folder / name).state is State.VERIFIED for name in run.names())


def test_a_full_disk_fills_no_checkpoint(tmp_path):
    """A real file system without room, where this machine lets us mount one."""
    mounted = subprocess.run(("mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path), capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    try:
        run = Run(tmp_path)
        filler = tmp_path / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free - 8192))
        save_and_settle(run, 20)
        assert [step for step, _ in run.told] == [20]
        assert "No space left on device" in run.told[0][1]
        assert run.names() == ["10"]  # the attempt was cleaned up
        filler.unlink()
        run.save(30)
        run.checkpoints.wait()
        assert examine(run.folder / "30").state is State.VERIFIED
    finally:
        subprocess.run(("umount", tmp_path), check=True)


@pytest.mark.parametrize(
    ("broken", "number"),
    [
        ("Path.mkdir", errno.EROFS),
        ("Path.mkdir", errno.EACCES),
        ("write_record", errno.ENOSPC),
        ("hash_files", errno.EIO),
        ("manifest.write", errno.ENOSPC),
        ("Path.rename", errno.EIO),
    ],
)
def test_whatever_fails_old_checkpoints_stay(run, monkeypatch, broken, number):
    def fail(*args, **options):
        raise OSError(number, os.strerror(number), "somewhere")

    places = {
        "Path.mkdir": (pathlib.Path, "mkdir"),
        "Path.rename": (pathlib.Path, "rename"),
        "write_record": (saving, "write_record"),
        "hash_files": (saving.manifest, "hash_files"),
        "manifest.write": (saving.manifest, "write"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*places[broken], fail)
        save_and_settle(run, 20)
    assert run.told == [(20, f"{os.strerror(number)}: somewhere")]
    assert run.names() == ["10"]
    with pytest.raises(SavesFail, match=f"the last checkpoint is not saved; step 20: {os.strerror(number)}"):
        run.checkpoints.wait()


def test_failures_in_a_row_end_the_run_and_a_success_between_forgives_them(tmp_path, monkeypatch):
    run = Run(tmp_path, max_failed_saves=2)

    def fail(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    def save_badly(step):
        with monkeypatch.context() as patched:
            patched.setattr(saving, "write_record", fail)
            save_and_settle(run, step)

    save_badly(20)
    save_and_settle(run, 30)
    save_badly(40)
    save_badly(50)
    with pytest.raises(SavesFail, match="2 saves in a row have failed, the last one of step 50: Input/output error"):
        run.save(60)
    assert [step for step, _ in run.told] == [20, 40, 50]
    assert run.names() == ["10", "30"]


def test_training_goes_on_in_the_buffers_that_are_being_saved(tmp_path, monkeypatch):
    """The step takes its state's buffers over at once, while the disk has not begun to write."""
    slow = Slow(monkeypatch)
    state = {"params": {"x": jnp.arange(2**20, dtype=jnp.float32)}}
    update = jax.jit(lambda state: jax.tree.map(lambda x: -x - 1, state), donate_argnums=0)
    update(jax.tree.map(jnp.copy, state))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, {name: {"format": 2} for name in RECORDS_OF_ALL})
    for _ in range(5):
        state = update(state)
    jax.block_until_ready(state)
    slow.go.set()
    checkpoints.wait()
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
    restored, _ = checkpoints.restore(1, abstract)
    np.testing.assert_array_equal(restored["params"]["x"], np.arange(2**20, dtype=np.float32))


class Slow:
    """A disk that does nothing until it is let go."""

    def __init__(self, monkeypatch) -> None:
        self.go = threading.Event()
        write = saving.write_record

        def slowly(*args):
            self.go.wait(60)
            write(*args)

        monkeypatch.setattr(saving, "write_record", slowly)
        monkeypatch.setattr(manager, "WAIT_SECONDS", 0.05)
        monkeypatch.setattr(manager, "SILENT_SECONDS", 0.0)


def test_a_slow_disk_leaves_saves_out_and_loses_nothing(run, monkeypatch):
    slow = Slow(monkeypatch)
    run.save(20)
    run.save(20)  # it is under way
    assert run.told == []
    (run.folder / "20.orbax-checkpoint-tmp" / "grown").write_bytes(b"1")
    run.save(30)
    assert run.told == [(30, "left out, since step 20 is still being written")]
    assert run.checkpoints._failures == 0  # it does write
    slow.go.set()
    with pytest.raises(SavesFail, match="step 30: left out"):
        run.checkpoints.wait()
    assert run.checkpoints.steps() == [10, 20]
    run.save(40)
    run.checkpoints.wait()
    assert run.checkpoints.steps() == [10, 20, 40]


@pytest.mark.parametrize(("copying", "least", "most"), [(0.0, 0.05, 0.9), (1.0, 1.0, 1.9)])
def test_a_save_waits_for_the_one_before_no_longer_than_copying_takes(run, monkeypatch, copying, least, most):
    slow = Slow(monkeypatch)
    run.save(20)
    run.checkpoints._copy_seconds = copying
    started = time.monotonic()
    run.save(30)
    assert least <= time.monotonic() - started < most
    assert [step for step, _ in run.told] == [30]
    slow.go.set()
    run.checkpoints.settle()


def test_saves_left_out_in_quick_succession_are_no_failures_before_the_disk_is_silent_for_long(run, monkeypatch):
    slow = Slow(monkeypatch)
    monkeypatch.setattr(manager, "SILENT_SECONDS", 60.0)
    run.save(20)
    threading.Event().wait(0.5)  # until arrays are written
    for step in range(30, 80, 10):
        run.save(step)
    assert len(run.told) == 5 and run.checkpoints._failures == 0
    slow.go.set()
    run.checkpoints.settle()
    assert run.checkpoints.steps() == [10, 20]


def test_the_last_save_waits_for_the_one_before(run, monkeypatch):
    slow = Slow(monkeypatch)
    run.save(20)
    threading.Timer(0.5, slow.go.set).start()
    run.save(30, last=True)
    run.checkpoints.wait()
    assert run.told == []
    assert run.checkpoints.steps() == [10, 20, 30]


def test_a_disk_that_hangs_ends_the_run(run, monkeypatch):
    slow = Slow(monkeypatch)
    monkeypatch.setattr(manager, "STALLED_SECONDS", 0.2)
    run.save(20)
    threading.Event().wait(1)  # until arrays are written
    run.save(30)  # bytes have come since the save began
    run.save(40)
    run.save(50)
    started = time.monotonic()
    with pytest.raises(SavesFail, match="3 saves in a row have failed, the last one of step 60: left out"):
        run.save(60)
    monkeypatch.setattr(manager, "STALLED_SECONDS", 60.0)
    run.checkpoints.close()  # storage that was given up gets no more time: the watchdog would end the run
    with pytest.raises(SavesFail, match="step 60: left out, since step 20 is still being written"):
        run.checkpoints.wait()
    assert time.monotonic() - started < 30
    slow.go.set()
    run.checkpoints._join(60)


def test_a_last_save_that_hangs_is_given_up_once(run, monkeypatch):
    slow = Slow(monkeypatch)
    monkeypatch.setattr(manager, "STALLED_SECONDS", 0.2)
    run.save(20, last=True)
    with pytest.raises(SavesFail, match="step 20: nothing was written for"):
        run.checkpoints.wait()
    monkeypatch.setattr(manager, "STALLED_SECONDS", 60.0)
    started = time.monotonic()
    run.checkpoints.close()
    assert time.monotonic() - started < 30
    slow.go.set()
    run.checkpoints._join(60)


def test_unjudged_steps_are_kept_and_push_out_nothing(run):
    for step in (20, 30, 40):
        run.save(step)
        run.checkpoints.wait()
    assert run.names() == ["10", "20", "30", "40"]
    run.checkpoints.mark_good(20)
    run.checkpoints.close()
    assert run.names() == ["20", "30", "40"]
    run.checkpoints.set_aside(40, "rejected")
    run.checkpoints.set_aside(30, "rejected")
    run.save(30)
    run.checkpoints.wait()
    run.checkpoints.set_aside(30, "rejected")
    assert run.names() == ["20", "30.rejected", "30.rejected.2", "40.rejected"]
    assert run.checkpoints.latest_step() == 20


def test_a_step_may_be_found_good_before_it_is_written(run, monkeypatch):
    slow = Slow(monkeypatch)
    run.save(20)
    run.checkpoints.mark_good(20)
    assert run.checkpoints.good_steps() == []
    slow.go.set()
    run.checkpoints.wait()
    assert run.checkpoints.good_steps() == [20]
    assert (run.folder / "20" / "good").exists()


def test_what_a_killed_run_left_is_removed_by_the_next(run):
    (run.folder / "20.orbax-checkpoint-tmp").mkdir()
    (run.folder / "5.deleting" / "params").mkdir(parents=True)
    (run.folder / "30.rejected").mkdir()
    Checkpoints(run.folder.parent, CheckpointConfig())
    assert run.names() == ["10", "30.rejected"]


def test_the_best_step_is_kept_by_its_manifest(tmp_path):
    for step, best in ((1, 0.5), (2, 0.75), (3, float("nan")), (4, 0.6)):
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1, best_metric="val:top1"))
        checkpoints.save(step, ARRAYS, RECORDS, best)
        checkpoints.wait()
        checkpoints.mark_good(step)
        checkpoints.close()
    assert checkpoints.steps() == [2, 4]


def test_a_step_that_was_saved_before_it_was_evaluated_may_be_the_best(tmp_path):
    def opened() -> Checkpoints:
        return Checkpoints(tmp_path, CheckpointConfig(keep_last=1, best_metric="val:top1"))

    checkpoints = opened()
    for step, best in ((1, 0.5), (2, None)):
        checkpoints.save(step, ARRAYS, RECORDS, best)
        checkpoints.mark_good(step)
    checkpoints.wait()
    checkpoints = opened()
    checkpoints.add_best(2, 0.75)
    checkpoints.add_best(3, 0.99)  # there is none
    assert examine(tmp_path / "checkpoints" / "2").state is State.VERIFIED
    checkpoints = opened()
    for step in (3, 4):
        checkpoints.save(step, ARRAYS, RECORDS, 0.6)
        checkpoints.mark_good(step)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
