"""The rule of the watchdog: how long a run may make no progress."""

import pytest

from clipjax.runtime.deadline import READING, Deadline

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


def test_the_first_steps_may_compile_and_their_time_is_no_steps():
    deadline = Deadline(5.0, 0.0)
    assert deadline.limit == 5  # nothing runs on a device yet
    deadline.worked(100.0)
    assert deadline.phases and deadline.waited(101.0) == 1
    for now in (150.0, 250.0, 350.0, 351.0, 352.0):
        deadline.beat(now)
        assert deadline.starting and deadline.limit == 50
    deadline.beat(353.0)
    assert not deadline.phases and deadline.limit == 10  # ten steps of a second


def train(deadline: Deadline, now: float, steps: range, *, seconds: float, save_every: int) -> float:
    """Beat as the loop does, whose host is two steps ahead; return the time.

    A device takes `seconds` for a step. The loop waits for the step before last, and before a save for the last one.
    """
    free, done = now, {}
    for step in steps:
        deadline.beat(now)
        assert deadline.waited(now) < deadline.limit
        waited = max(now, done.get(step - 2, now))
        assert waited - now < deadline.limit, f"false alarm at step {step}"
        now = waited
        reading = deadline.starting
        if reading:
            deadline.enter(READING, now)
        now += 0.01
        if reading:
            deadline.leave(now)
        free = done[step] = max(free, now) + seconds
        if step % save_every == 0:
            assert free - now < deadline.limit, f"false alarm before the save of step {step}"
            now = free
            deadline.enter("a save", now)
            now += 30
            deadline.leave(now)
    return now


@pytest.mark.parametrize("save_every", [1, 2, 3, 4, 5, 1000])
def test_steps_longer_than_the_limit_raise_no_alarm_whenever_the_pipeline_fills(save_every):
    deadline = Deadline(60.0, 0.0)
    train(deadline, 500.0, range(1, 41), seconds=70.0, save_every=save_every)
    assert not deadline.starting and 400 < deadline.limit < 1200


def test_data_gets_no_more_time_in_the_first_steps_than_later():
    deadline = Deadline(60.0, 0.0)
    deadline.beat(10.0)
    assert deadline.limit == 600
    deadline.enter(READING, 20.0)
    assert deadline.limit == 60 and deadline.waited(50.0) == 30
    deadline.leave(50.0)
    assert deadline.limit == 600
    for now in (110.0, 170.0, 230.0, 290.0, 350.0):
        deadline.enter(READING, now - 60)
        deadline.leave(now)
        deadline.beat(now)
    assert deadline.limit == 600  # ten steps, whose time is that of their data


def test_phases_do_not_count_as_steps_and_wait_for_the_last_sign_of_work():
    deadline, now = running()
    deadline.enter("evaluation", now)
    deadline.worked(now + 1000)
    assert deadline.phases == ["evaluation"] and deadline.waited(now + 1059) == 59
    deadline.enter("saving", now + 1060)
    deadline.leave(now + 1090)
    deadline.leave(now + 1100)
    assert not deadline.phases and deadline.waited(now + 1100) == 0
    now += 1100
    for _ in range(64):
        deadline.enter("a save", now + 1)
        now += 1000
        deadline.leave(now)
        deadline.beat(now)
    assert deadline.limit == 60


def test_steps_that_wait_for_another_process_in_a_phase_are_not_timed():
    deadline, now = running()
    for _ in range(64):
        deadline.worked(now + 100)
        now += 200
        deadline.beat(now)
    assert deadline.limit == 60


def test_a_pause_of_the_machine_does_not_count():
    deadline, now = running(stuck_seconds=15)
    deadline.shift(20.0)
    assert deadline.waited(now + 21) == 1
    now += 20
    for _ in range(64):
        now += 1
        deadline.beat(now)
        deadline.shift(20.0)
        now += 20
    assert deadline.limit == 15
