"""When the watchdog ends a process, and when not."""

import os
import subprocess
import sys
import threading
import time

import jax
import pytest

from clipjax.runtime import watchdog
from clipjax.runtime.watchdog import Deadline, Watchdog

pytestmark = pytest.mark.newest


def running(stuck_seconds: float = 60.0, step: float = 1.0) -> tuple[Deadline, float]:
    """A deadline after ten steps, and the time."""
    deadline, now = Deadline(stuck_seconds, 0.0), 0.0
    for _ in range(10):
        now += step
        deadline.beat(now)
    return deadline, now


def test_the_limit_is_ten_median_steps_if_those_are_longer():
    assert running(step=1.0)[0].limit == 60
    deadline, now = running(step=20.0)
    assert deadline.limit == 200
    deadline.beat(now + 190)  # one slow step
    assert deadline.limit == 200


def test_the_first_steps_may_compile():
    deadline = Deadline(5.0, 0.0)
    deadline.worked(100.0)
    assert deadline.phases and deadline.waited(101.0) == 1
    deadline.beat(150.0)
    assert deadline.phases
    deadline.beat(250.0)
    assert not deadline.phases and deadline.limit == 5  # their time is no step's


def test_phases_do_not_count_as_steps_and_wait_for_the_last_sign_of_work():
    deadline, now = running()
    deadline.enter("evaluation", now)
    deadline.worked(now + 1000)
    assert deadline.phases == ["evaluation"] and deadline.waited(now + 1059) == 59
    deadline.leave(now + 1100)
    assert not deadline.phases and deadline.waited(now + 1100) == 0
    deadline.beat(now + 1130)
    assert deadline.limit == 60


def test_a_pause_of_the_machine_does_not_count():
    deadline, now = running(stuck_seconds=15)
    deadline.shift(20.0)
    assert deadline.waited(now + 21) == 1


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

    def used() -> tuple[float, int]:
        done[0] += work
        return done[0], 0

    monkeypatch.setattr(watchdog, "_work", used)
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
    before = watchdog._work()
    (tmp_path / "file").write_bytes(bytes(100_000))
    after = watchdog._work()
    assert watchdog._is_work(before, after, 100.0)
    assert not watchdog._is_work(after, (after[0] + 0.01, after[1] + 100), 2.0)
    assert watchdog._is_work(after, (after[0] + 0.2, after[1]), 2.0)


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


class Store:
    """The texts of a coordinator."""

    def __init__(self, monkeypatch, count: int) -> None:
        self.texts: dict[str, str] = {}
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(
            watchdog.processes, "kv_set", lambda key, value, overwrite=False: self.texts.update({key: value})
        )
        monkeypatch.setattr(watchdog.processes, "kv_list", self.list)

    def list(self, folder: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: text for key, text in dict(self.texts).items() if key.startswith(f"{folder}/")}


def test_silent_processes_are_named_and_those_that_left_say_why(monkeypatch):
    store = Store(monkeypatch, 3)
    store.texts["alive/1"] = '{"host": "node-1", "beats": 7, "busy": 0}'
    store.texts["alive/2"] = '{"host": "node-2", "beats": 7, "busy": 0}'
    store.texts["left/2"] = "KeyError('defect')"
    peers = watchdog.Peers(0.05)
    threading.Timer(0.02, peers.tell, kwargs={"busy": False, "watching": False}).start()  # of a watchdog that goes on
    assert peers.explain() == [
        "process 2 (node-2) ended with KeyError('defect')",
        "process 1 (node-1) gives no sign of life: it is dead or stopped",
    ]
    peers.close()


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
