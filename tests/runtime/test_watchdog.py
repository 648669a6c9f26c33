"""When the watchdog ends a process, and when not."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from clipjax.runtime import watchdog
from clipjax.runtime.watchdog import Watchdog

pytestmark = pytest.mark.newest


class Clock:
    """A clock on which every sleep takes as long as the next pause says."""

    def __init__(self, sleeps: list[float]) -> None:
        self.now, self.sleeps = 0.0, sleeps

    def monotonic(self) -> float:
        return self.now

    def wait(self, _: float) -> bool:
        if not self.sleeps:
            return True
        self.now += self.sleeps.pop(0)
        return False


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """What the watchdog said before it would have ended this process."""
    said: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, text: said.append(text))
    return said


def watch(monkeypatch, sleeps: list[float], *, phase: str | None = None, work: float = 0.0) -> None:
    """Run the watchdog's thread over these sleeps, after ten steps; a limit of 15 seconds."""
    clock = Clock(sleeps)
    monkeypatch.setattr(watchdog, "time", clock)
    watched = Watchdog(15.0, tick_seconds=2.0)
    for step in range(10):
        clock.now += 1
        watched.beat(step)
    if phase is not None:
        watched._deadline.enter(phase, clock.now)
    done = [0.0]

    def used(_: object) -> tuple[float, int]:
        done[0] += work
        return done[0], 0

    monkeypatch.setattr(watchdog.WorkMeter, "read", used)
    monkeypatch.setattr(watched, "_closed", clock)
    watched._watch()


def test_a_stuck_run_is_ended_and_a_paused_machine_is_not(monkeypatch, ended):
    watch(monkeypatch, [2.0] * 6 + [22.0])
    assert not ended
    watch(monkeypatch, [2.0] * 8)
    assert len(ended) == 1
    assert "is stuck after step 9: no progress for 16 s (at most 15 s" in ended[0]
    assert "it waits in clipjax/runtime/watchdog.py:" in ended[0]


def test_an_evaluation_is_stuck_only_if_nobody_works(monkeypatch, ended):
    watch(monkeypatch, [2.0] * 100, phase="evaluation", work=0.2)
    assert not ended
    watch(monkeypatch, [2.0] * 8, phase="evaluation", work=0.01)
    assert "is stuck after step 9 in evaluation" in ended[0]


def test_work_is_processor_time_or_bytes_of_files_and_not_sleep(tmp_path):
    meter = watchdog.WorkMeter()
    before = meter.read()
    (tmp_path / "file").write_bytes(bytes(100_000))
    after = meter.read()
    assert watchdog.is_work(before, after, 100.0)
    assert not watchdog.is_work(after, (after[0] + 0.01, after[1] + 100), 2.0)
    assert watchdog.is_work(after, (after[0] + 0.2, after[1]), 2.0)


LOOKS = """
import itertools, multiprocessing, subprocess
from clipjax.runtime import watchdog

pipe = subprocess.PIPE
workers = [subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, bufsize=0) for _ in range(32)]
try:
    for worker in workers:  # what answers has read its libraries
        worker.stdin.write(b"x")
        worker.stdout.read(1)
    multiprocessing.active_children = lambda: workers
    meter = watchdog.WorkMeter()
    meter.read()
    looks = [meter.read() for _ in range(6)]
    for before, after in itertools.pairwise(looks):
        assert not watchdog.is_work(before, after, watchdog.TICK_SECONDS), (before, after)
finally:
    for worker in workers:
        worker.kill()
        worker.wait()
"""


def test_looking_at_many_idle_workers_is_no_work():
    """In a process of its own: threads that other tests have left behind do work in this one."""
    done = subprocess.run([sys.executable, "-c", LOOKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


STUCK = """
import sys, threading, time
from clipjax.runtime.watchdog import Watchdog

with open(sys.argv[1], "a") as log, Watchdog(0.5, log=log, tick_seconds=0.1) as watchdog:
    for step in range(20):
        watchdog.beat(step)
        time.sleep(0.01)
    def hang():
        threading.Event().wait()
    hang()
"""


@pytest.mark.process
def test_a_stuck_process_leaves_with_1_and_its_stacks(tmp_path):
    start = time.monotonic()
    command = [sys.executable, "-c", STUCK, str(tmp_path / "log")]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "is stuck after step 19" in done.stderr and time.monotonic() - start < 100
    assert "in hang" in (tmp_path / "log").read_text()


SLOW_STORAGE = """
import sys, threading, time
from clipjax.runtime import watchdog

watchdog.SLOW_READ_SECONDS = 0.2
with open(sys.argv[1], "a") as log, watchdog.Watchdog(0.5, log=log, tick_seconds=0.1, storage_seconds=3.0) as watched:
    for step in range(20):
        watched.beat(step)
        with watched.reading():
            time.sleep(2.0 if step == 10 else 0.01)
    print("went on", flush=True)
    start = time.monotonic()
    threading.Timer(2.5, lambda: print("waits", flush=True)).start()
    with watched.reading():
        threading.Event().wait()
"""


@pytest.mark.process
def test_reading_from_a_store_has_the_time_of_its_tries(tmp_path):
    command = [sys.executable, "-c", SLOW_STORAGE, str(tmp_path / "log")]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stdout == "went on\nwaits\n", done.stderr
    assert "is stuck after step 19 in the reading of data" in done.stderr


BLOCKED = """
import logging, os, sys, threading
from clipjax.runtime import process_log, watchdog

watchdog._SAY_SECONDS, watchdog.END_SECONDS = 0.3, 3.0
blocked = {name: threading.Event() for name in sys.argv[1:]}

class File(logging.Handler):
    def emit(self, record):
        "log" in blocked and blocked["log"].wait()

process_log._logger.addHandler(File())
process_log._logger.setLevel(logging.INFO)
read, write = os.pipe()  # nobody reads it: as full as a file system that hangs
os.set_blocking(write, False)
try:
    while os.write(write, bytes(65536)): pass
except BlockingIOError:
    os.set_blocking(write, True)
if "terminal" in blocked:
    os.dup2(write, 2)
with open(write, "w") as log, watchdog.Watchdog(0.5, log=log, tick_seconds=0.1) as watched:
    for step in range(20):
        watched.beat(step)
    def hang():
        threading.Event().wait()
    hang()
"""


@pytest.mark.process
@pytest.mark.parametrize(("blocked", "code"), [(["log"], 1), (["log", "terminal"], -signal.SIGALRM)])
def test_a_file_system_that_blocks_keeps_no_process(blocked, code):
    command = [sys.executable, "-c", BLOCKED, *blocked]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    if code == 1:
        assert "is stuck after step 19" in done.stderr and "in hang" in done.stderr


def test_the_others_are_told_before_anything_is_written_and_a_broken_terminal_is_no_matter(monkeypatch, tmp_path):
    order: list[str] = []

    class Others:
        def announce(self, text: str) -> None:
            order.append("others")

        def silent_lines(self) -> list[str]:
            return []

    monkeypatch.setattr(watchdog.process_log, "info", lambda text: order.append("log"))
    monkeypatch.setattr(watchdog.processes, "end_within", lambda *_: order.append("timer"))
    monkeypatch.setattr(os, "_exit", lambda code: order.append(f"exit {code}"))
    monkeypatch.setattr(sys, "stderr", Broken())
    with (tmp_path / "log").open("w") as log:
        watched = Watchdog(1.0, log=log, tick_seconds=0.0)
        watched._peers = Others()
        watched._end("stuck")
    assert order == ["timer", "others", "log", "exit 1"]
    assert "most recent call first" in (tmp_path / "log").read_text()


class Broken:
    """A terminal that is gone."""

    def write(self, text: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def flush(self) -> None:
        raise BrokenPipeError


class Store:
    """The texts of a coordinator."""

    def __init__(self, monkeypatch, count: int) -> None:
        self.texts: dict[str, str] = {}
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(
            watchdog.processes, "kv_set", lambda key, value, overwrite=False: self.texts.update({key: value})
        )
        monkeypatch.setattr(watchdog.processes, "kv_list", self.list)
        monkeypatch.setattr(watchdog.processes, "kv_delete", self.delete)

    def list(self, folder: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: text for key, text in dict(self.texts).items() if key.startswith(f"{folder}/")}

    def delete(self, folder: str) -> None:
        for name in self.list(folder):
            del self.texts[f"{folder}/{name}"]


def test_silent_processes_are_named_and_those_that_left_say_why(monkeypatch):
    store = Store(monkeypatch, 3)
    store.texts["alive/1"] = '{"host": "node-1", "beats": 7, "busy": 0}'
    store.texts["alive/2"] = '{"host": "node-2", "beats": 7, "busy": 0}'
    store.texts["left/2"] = "KeyError('defect')"
    peers = watchdog.Peers(0.2)
    threading.Timer(0.02, peers.tell, kwargs={"busy": False, "watching": False}).start()  # of a watchdog that goes on
    assert peers.explain() == [
        "process 2 (node-2) ended with KeyError('defect')",
        "process 1 (node-1) gives no sign of life: it is dead or stopped",
    ]
    peers.close()


def test_process_0_names_a_silent_process_to_all_and_none_that_has_left(monkeypatch):
    store, clock = Store(monkeypatch, 4), [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    ranks = iter((0, 3, 2, 3, 0))
    monkeypatch.setattr(jax, "process_index", lambda: next(ranks))
    first, last, left = (watchdog.Peers(1e6) for _ in range(3))  # their threads do nothing
    first._tick = 2.0

    def exchange(seconds: float, *peers: watchdog.Peers) -> list[list[str]]:
        """What they show of the others, looking every two seconds."""
        for _ in range(round(seconds / 2)):
            clock[0] += 2.0
            for each in peers:
                each._exchange()
                each._answered = clock[0]
        return [each.news() for each in peers]

    store.texts["alive/1"] = '{"host": "node-1", "beats": 7, "busy": 0}'
    assert exchange(10, first, last, left) == [[], [], []]
    left.close()
    assert store.texts["alive/2"] == "left"
    named, back = (
        "process 1 (node-1) has given no sign of life for 22 s",
        "process 1 (node-1) gives signs of life again",
    )
    assert exchange(10, first, last) == [[], []]
    assert exchange(12, first, last) == [[named], [named]]
    later = watchdog.Peers(1e6)  # of the next phase of the run
    assert exchange(30, first, last, later) == [[], [], [named]]
    for beats in (8, 9):
        store.texts["alive/1"] = f'{{"host": "node-1", "beats": {beats}, "busy": 0}}'
        shown = exchange(4, first, last, later)
        assert shown == [[f"{back}, or has left"]] * 3
        assert exchange(16, first, last, later) == [[], [], []]
        assert exchange(10, first, last, later) == [[named]] * 3
    clock[0] += 500  # process 0 itself is paused, and with it the machine
    store.texts["alive/1"] = '{"host": "node-1", "beats": 10, "busy": 0}'
    assert exchange(2, first) == [[f"{back}, or has left"]]
    clock[0] += 500
    assert exchange(2, first) == [[]]
    first.close()
    assert not store.list("silent")
    first = watchdog.Peers(1e6)  # of process 0 in the next phase: nothing is left of the one before
    assert exchange(20, first, last) == [[], []]
    assert exchange(4, first, last) == [[named], [named]]
    for each in (first, last, later):
        each.close()


def test_a_process_that_ends_for_want_of_memory_is_named(monkeypatch):
    store = Store(monkeypatch, 3)
    reasons = {1: "JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')", 2: "JaxRuntimeError('UNKNOWN: closed')"}
    peers = watchdog.Peers(0.2)
    for rank, reason in reasons.items():
        store.texts[f"left/{rank}"] = reason
    first, second = (f"process {rank} (host unknown) ended with {reason}" for rank, reason in reasons.items())
    assert peers.explain() == [first]
    del store.texts["left/1"]
    assert peers.explain() == [second]
    peers.close()


def test_a_death_that_one_process_meets_is_told_to_all(monkeypatch):
    store = Store(monkeypatch, 3)
    monkeypatch.setattr(watchdog, "_say", lambda text: True)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    store.texts["alive/1"] = '{"host": "node-1", "beats": 7, "busy": 0}'
    with pytest.raises(jax.errors.JaxRuntimeError), Watchdog(60.0, tick_seconds=0.05) as watched, watched.training():
        raise jax.errors.JaxRuntimeError("INTERNAL: Connection closed by peer")
    assert "process 1 (node-1) gives no sign of life: it is dead or stopped" in store.texts["stuck/2"]


def test_work_of_another_process_in_a_phase_is_seen_and_so_is_its_alarm(monkeypatch):
    store = Store(monkeypatch, 2)
    peers = watchdog.Peers(0.02)
    peers.tell(busy=False, watching=True)
    for busy in (0, 1):
        store.texts["alive/1"] = f'{{"host": "node-1", "beats": 7, "busy": {busy}}}'
        time.sleep(0.3)
        assert peers.others_worked() == bool(busy)
    assert not peers.others_worked() and not peers.stuck
    store.texts["stuck/1"] = "process 1 is stuck"
    time.sleep(0.3)
    assert peers.stuck == "process 1 is stuck"
    peers.close()
