"""The ledger of time: every second of a run belongs to one cause, over kills, restarts and rollbacks."""

import pathlib
import time

import pytest

from benchmarks.goodput_day import simulate_day
from clipjax.monitoring import events
from clipjax.monitoring.events import Events
from clipjax.monitoring.goodput import CAUSES, Goodput, History, goodput_table, process_start


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def start(workdir: pathlib.Path, clock: Clock, *, devices: int = 1) -> Goodput:
    log = Events(workdir, enabled=True, clock=clock)
    return Goodput(log, events.read(workdir), began=clock.now, devices=devices, clock=clock)


def train(ledger: Goodput, clock: Clock, steps: range, seconds: float = 1.0) -> None:
    for step in steps:
        ledger.step(step)
        clock.wait(seconds)


def spent(ledger: Goodput) -> dict[str, float]:
    return {cause: round(seconds, 3) for cause, seconds in ledger.seconds().items() if seconds}


def test_every_second_has_one_cause_and_inner_phases_take_theirs_out(tmp_path):
    clock = Clock()
    ledger = start(tmp_path, clock)
    clock.wait(5)
    ledger.step(1)
    with ledger.phase("waiting_for_data"):
        clock.wait(2)
    with ledger.phase("compile"):
        clock.wait(30)
    train(ledger, clock, range(2, 12))
    with ledger.phase("evaluation"):
        clock.wait(4)
        with ledger.phase("saving"):
            clock.wait(1)
        clock.wait(4)
    expected = {
        "initialisation": 5, "waiting_for_data": 2, "compile": 30, "steps": 10, "evaluation": 8, "saving": 1
    }  # fmt: skip
    assert spent(ledger) == expected
    assert sum(ledger.seconds().values()) == clock.now - 1000
    assert ledger.fraction() == pytest.approx(10 / 56)


def test_a_phase_ends_with_an_error_too(tmp_path):
    clock = Clock()
    ledger = start(tmp_path, clock)
    ledger.step(1)
    with pytest.raises(OSError), ledger.phase("saving"):
        clock.wait(3)
        raise OSError
    clock.wait(1)
    assert spent(ledger) == {"saving": 3, "steps": 1}


def test_steps_that_are_done_again_after_a_kill_are_lost(tmp_path):
    clock = Clock()
    first = start(tmp_path, clock)
    clock.wait(10)
    train(first, clock, range(1, 31))
    first.record()  # at step 30; the checkpoint is of step 20
    train(first, clock, range(31, 36))
    Events(tmp_path, enabled=True, clock=clock).add("failed_save")  # the last sign of it
    train(first, clock, range(36, 38))  # and then kill -9
    clock.wait(60)
    second = start(tmp_path, clock)
    clock.wait(10)
    train(second, clock, range(21, 51))
    # 5 s between the ledger and the last sign, then steps 21 to 30 again. Steps 31 to 37 were never recorded: their
    # first try is a part of the time without a sign, their second one is productive.
    assert spent(second) == {"initialisation": 20, "steps": 30 + 20, "lost": 5 + 10, "stopped": 2 + 60}
    assert sum(second.seconds().values()) == pytest.approx(clock.now - 1000, rel=1e-6)


def test_steps_of_a_rollback_are_lost(tmp_path):
    clock = Clock()
    ledger = start(tmp_path, clock)
    train(ledger, clock, range(1, 11))
    train(ledger, clock, range(6, 15), seconds=2)
    assert spent(ledger) == {"steps": 10 + 4 * 2, "lost": 5 * 2}


def test_many_starts_add_up_to_wall_clock(tmp_path):
    clock = Clock(1e9 + 0.123456)
    began, devices_seconds, done = clock.now, 0.0, 0
    for attempt in range(1, 8):
        start_time = clock.now
        ledger = start(tmp_path, clock, devices=attempt)
        clock.wait(7.77777)
        train(ledger, clock, range(max(done - 10, 0) + 1, done + 20), seconds=0.98765)
        done += 19
        ledger.record("stop", reason="signal 15")
        devices_seconds += attempt * (clock.now - start_time)
        clock.wait(11.1111)
    history = History.from_events(events.read(tmp_path))
    assert sum(history.seconds.values()) == pytest.approx(clock.now - 11.1111 - began, abs=0.05)
    assert history.seconds["lost"] == pytest.approx(6 * 10 * 0.98765, abs=0.05)
    assert history.seconds["stopped"] == pytest.approx(6 * 11.1111, abs=0.05)
    assert history.device_seconds == pytest.approx(devices_seconds, abs=0.05)
    assert history.last_step == done


@pytest.mark.parametrize(
    "damaged",
    [
        {"event": "ledger"},
        {"time": "noon", "event": "ledger", "seconds": {"steps": 5}},
        {"time": 1005, "event": "ledger", "seconds": [1], "step": "x"},
        {"time": 1005, "event": "ledger", "seconds": {"steps": -3, "lost": "a"}},
        {"time": float("nan"), "event": "start"},
        {"time": 10**400, "event": "ledger"},
        {"time": -1e300, "event": "start"},
        {"time": 1005, "event": "ledger", "seconds": {"steps": 10**400, "lost": 1e308}, "step": 10**400},
    ],
)
def test_damaged_events_never_stop_a_start(damaged):
    past = [{"time": 1000, "event": "start", "began": 1000, "devices": 2}, damaged]
    history = History.from_events(past)
    assert history.end is not None
    assert sum(history.seconds.values()) == history.end - 1000 == history.device_seconds / 2


def test_causes_of_a_later_version_count_as_lost():
    past = [{"time": 0, "event": "start"}, {"time": 9, "event": "stop", "seconds": {"steps": 4, "coffee": 5}}]
    assert History.from_events(past).seconds == {**dict.fromkeys(CAUSES, 0.0), "steps": 4, "lost": 5}


def test_a_clock_that_goes_back_counts_nothing(tmp_path):
    clock = Clock()
    ledger = start(tmp_path, clock)
    clock.wait(10)
    ledger.record("stop")
    clock.wait(-100)
    again = start(tmp_path, clock)
    train(again, clock, range(1, 3))
    assert spent(again) == {"initialisation": 10}


def test_the_table_shows_hours_shares_and_the_price(tmp_path):
    clock = Clock()
    ledger = start(tmp_path, clock, devices=8)
    clock.wait(900)
    train(ledger, clock, range(1, 2), seconds=2700)
    lines = ledger.table(pairs=4_000_000, price_per_hour=2.5).splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["initialisation", "0.250", "25.0", "%"],
        ["compile", "0.000", "0.0", "%"],
        ["steps", "0.750", "75.0", "%"],
    ]
    assert lines[-1] == "cost: 20.00, which is 5.00 for a million pairs"
    assert "cost" not in goodput_table(ledger.seconds(), pairs=5)
    assert "cost" not in goodput_table(ledger.seconds(), pairs=0, price=1.0)


def test_the_start_of_this_process_is_in_the_past():
    assert time.time() - 24 * 3600 < process_start() <= time.time()


def test_a_day_of_failures_is_reckoned_from_starts_saves_and_losses():
    free = {"start_seconds": 0.0, "save_block_seconds": 0.0, "save_seconds": 0.0, "notice_seconds": 0.0}
    # Saved every 216 s, a failure costs 108 s of steps on average: 1 % of 3 hours.
    assert simulate_day(**free, save_every_seconds=216) == pytest.approx(0.99)
    assert simulate_day(**{**free, "start_seconds": 432.0}, save_every_seconds=216) == pytest.approx(0.95)
    assert simulate_day(**{**free, "save_block_seconds": 24.0}, save_every_seconds=216) == pytest.approx(0.89)
    assert simulate_day(**{**free, "start_seconds": 1e5}, save_every_seconds=216) == 0
