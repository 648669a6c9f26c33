"""Decisions on disk, and the judgement that takes them: goodness, rollbacks, and when there is no way back."""

import contextlib
import dataclasses
import errno
import json
import os

import pytest

from clipjax.checkpoints import exchange
from clipjax.checkpoints.manifest import UnusableCheckpoint
from clipjax.config import Config
from clipjax.monitoring import events
from clipjax.monitoring.events import Events
from clipjax.training import decisions as decisions_module
from clipjax.training.decisions import Decisions, Rollback, to_record
from clipjax.training.recovery import GOOD_AFTER, Recovery, RollBack, RunStopped

pytestmark = pytest.mark.newest

DECISION = Rollback(to_step=10, first_step=24, last_step=34, first_batch=23, last_batch=33, reason="not finite")


class Marks:
    """The checkpoints of a run, without files."""

    def __init__(self, *steps: int, good: tuple[int, ...] = ()) -> None:
        self.saved, self.good, self.aside = list(steps), set(good), {}
        self.being_saved: list[int] = []
        self.stuck: set[int] = set()

    def settle(self):
        self.saved += self.being_saved
        self.being_saved = []

    def steps(self):
        return sorted(self.saved)

    def good_steps(self):
        return sorted(self.good)

    def mark_good(self, step):
        self.good.add(step)

    def set_aside(self, step, reason):
        if step in self.stuck:
            raise UnusableCheckpoint(f"{step} cannot be renamed")
        self.saved.remove(step)
        self.aside[step] = reason


def make(tmp_path, marks, start=0, **limits):
    config = Config()
    for name, value in limits.items():
        setattr(config.recovery, name, value)
    return Recovery(
        config,
        checkpoints=marks,
        decisions=Decisions(tmp_path),
        events=Events(tmp_path, enabled=True),
        start_step=start,
        settle=marks.settle,
    )


def metrics(skipped=0, spike=0, loss=1.0, param_norm=3.0):
    return {"skipped_in_a_row": skipped, "loss_spike": spike, "loss": loss, "param_norm": param_norm}


def test_decisions_are_read_back_and_a_half_line_has_not_taken_effect(tmp_path):
    decisions = Decisions(tmp_path)
    assert decisions.take(lambda: DECISION) == DECISION
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(path.read_bytes() + path.read_bytes()[:-9])
    again = Decisions(tmp_path)
    assert again.taken == [DECISION]
    assert again.left_out == [(23, 33)]
    assert again.records() == [to_record(DECISION)]


def test_a_store_that_takes_a_decision_slowly_is_waited_for(tmp_path):
    def send(_):
        assert waiting == ["a decision"]

    @contextlib.contextmanager
    def patience(name):
        waiting.append(name)
        yield
        waiting.clear()

    waiting, decisions = [], Decisions(tmp_path, send)
    decisions.patience = patience
    assert decisions.take(lambda: DECISION) == DECISION and not waiting


def test_a_decision_that_does_not_reach_the_store_takes_no_effect(tmp_path):
    sent, away = [], OSError(5, "the store is away")

    def send(path):
        if away:
            raise away
        sent.append(path.read_bytes())

    decisions = Decisions(tmp_path, send)
    verdict = decisions.take(lambda: DECISION)
    assert isinstance(verdict, str) and "cannot be recorded" in verdict and "the store is away" in verdict
    assert not decisions.taken and not Decisions(tmp_path).taken  # nor for a start after a kill
    away = None
    assert decisions.take(lambda: DECISION) == DECISION
    assert sent == [(tmp_path / "decisions.jsonl").read_bytes()] and Decisions(tmp_path).taken == [DECISION]


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b'{"decision": "skip_shard"}',
        json.dumps(to_record(DECISION) | {"to_step": "10"}).encode(),
        json.dumps(to_record(DECISION) | {"last_batch": 3}).encode(),
        json.dumps(to_record(DECISION) | {"to_step": True}).encode(),
        json.dumps(to_record(DECISION) | {"to_step": float("nan")}).encode(),
        json.dumps(to_record(DECISION) | {"more": 3}).encode(),
    ],
)
def test_damaged_decisions_are_refused_with_their_line(tmp_path, line):
    (tmp_path / "decisions.jsonl").write_bytes(json.dumps(to_record(DECISION)).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"decisions.jsonl, line 2: .*bring back the file"):
        Decisions(tmp_path)


def test_a_lost_file_comes_back_from_the_copy_of_a_checkpoint(tmp_path):
    decisions = Decisions(tmp_path)
    decisions.adopt([DECISION])
    assert Decisions(tmp_path).taken == [DECISION]
    decisions.adopt([])
    assert decisions.taken == [DECISION]
    with pytest.raises(ValueError, match="contradict"):
        decisions.adopt([dataclasses.replace(DECISION, to_step=5)])


def test_a_checkpoint_belongs_to_the_run_unless_a_later_decision_went_back_behind_it(tmp_path):
    decisions = Decisions(tmp_path)
    decisions.take(lambda: DECISION)
    assert decisions.is_current(10, 0)
    assert not decisions.is_current(20, 0), "written before the rollback to 10"
    assert decisions.is_current(20, 1), "written again after it"


def test_a_checkpoint_is_good_once_ten_finite_updates_have_followed(tmp_path):
    marks = Marks(5)
    recovery = make(tmp_path, marks)
    for step in range(1, 5 + GOOD_AFTER):
        recovery.judge(step, metrics())
    assert not marks.good
    recovery.judge(5 + GOOD_AFTER, metrics())
    assert marks.good == {5}


def test_a_good_checkpoint_may_be_written_late(tmp_path):
    marks = Marks(10, good=(10,))
    recovery = make(tmp_path, marks, start=10)
    for step in range(11, 41):
        recovery.judge(step, metrics())
    marks.being_saved = [20]
    with pytest.raises(RollBack, match="back to the checkpoint of step 20"):
        recovery.judge(41, metrics(spike=1))


def test_a_skipped_update_puts_goodness_off_and_is_an_event(tmp_path):
    marks = Marks(5)
    recovery = make(tmp_path, marks)
    for step in range(1, 15):
        recovery.judge(step, metrics(skipped=step == 8))
    assert not marks.good
    for step in range(15, 8 + GOOD_AFTER + 1):
        recovery.judge(step, metrics())
    assert marks.good == {5}
    assert [event["step"] for event in events.read(tmp_path) if event["event"] == "skipped_update"] == [8]


def test_ten_skipped_in_a_row_roll_back_to_the_last_good_step_without_their_batches(tmp_path):
    marks = Marks(10, 20, 30, good=(10, 20))
    recovery = make(tmp_path, marks, start=30)
    for i in range(1, 10):
        recovery.judge(40 + i, metrics(skipped=i))
    with pytest.raises(
        RollBack, match="10 updates in a row, up to step 50, .*back to the checkpoint of step 20"
    ) as left:
        recovery.judge(50, metrics(skipped=10))
    decision = left.value.decision
    assert (decision.to_step, decision.first_batch, decision.last_batch) == (20, 39, 49)
    assert Decisions(tmp_path).taken == [decision], "on disk before it takes effect"
    assert events.read(tmp_path)[-1]["event"] == "rollback"


def test_batches_that_are_left_out_shift_those_of_later_rollbacks(tmp_path):
    Decisions(tmp_path).take(lambda: DECISION)  # batches 23 to 33
    recovery = make(tmp_path, Marks(10, 20, good=(10, 20)), start=20)
    with pytest.raises(RollBack) as left:
        recovery.judge(40, metrics(spike=1, loss=99.0))
    assert (left.value.decision.first_batch, left.value.decision.last_batch) == (38 + 11, 39 + 11)


def test_no_good_checkpoint_is_no_way_back_and_the_spoilt_ones_are_set_aside(tmp_path):
    marks = Marks(1, 2, 3)
    recovery = make(tmp_path, marks, max_skipped_in_a_row=3)
    for step in (2, 3):
        recovery.judge(step, metrics(skipped=step - 1))
    with pytest.raises(RunStopped, match="no good checkpoint.*--replay=2"):
        recovery.judge(4, metrics(skipped=3))
    assert marks.aside == {1: "rejected", 2: "rejected", 3: "rejected"}
    assert not Decisions(tmp_path).taken


def test_a_decision_that_cannot_be_written_takes_no_effect(tmp_path, monkeypatch):
    marks = Marks(10, 20, good=(10,))
    recovery = make(tmp_path, marks)

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(decisions_module, "write_atomic", fail)
    with pytest.raises(RunStopped, match=r"a rollback cannot be recorded in .*decisions.jsonl .No space left"):
        recovery.judge(25, metrics(skipped=10))
    assert not Decisions(tmp_path).taken and 10 in marks.saved


def test_a_save_in_progress_is_set_aside_with_those_before_it(tmp_path):
    """Else it would be complete once the run has ended, and be what the next start goes on from."""
    marks = Marks(10)
    marks.being_saved = [20]
    recovery = make(tmp_path, marks)
    recovery.judge_replicas(10, None)
    with pytest.raises(RunStopped, match="device 1 .* after step 20; all copies were equal at step 10"):
        recovery.judge_replicas(20, "device 1 differs")
    assert marks.aside == {20: "rejected"} and marks.saved == [10]
    marks = Marks()
    marks.being_saved = [20]
    with pytest.raises(RunStopped, match="no good checkpoint"):
        make(tmp_path, marks).judge(21, metrics(spike=1))
    assert marks.aside == {20: "rejected"}


def test_all_processes_set_aside_what_process_0_chooses(tmp_path, monkeypatch):
    """This one has not seen yet that the step 5 was deleted and 20 is complete."""
    monkeypatch.setattr(exchange, "publish", lambda key, make: [20, 30])
    marks = Marks(5, 10, 20, 30)
    monkeypatch.setattr(marks, "steps", lambda: [5, 10, 30])
    with pytest.raises(RunStopped, match="device 1"):
        make(tmp_path, marks).judge_replicas(40, "device 1 differs")
    assert marks.aside == {20: "rejected", 30: "rejected"}


def test_checkpoints_that_cannot_be_renamed_are_named_behind_the_trouble_and_the_others_are_renamed(tmp_path):
    marks = Marks(10, 20, 30)
    marks.stuck = {20}
    with pytest.raises(RunStopped, match=r"no good checkpoint.*--replay=\d+(?s:.*)20 cannot be renamed"):
        make(tmp_path, marks).judge(2, metrics(spike=1))
    assert marks.aside == {10: "rejected", 30: "rejected"}
    assert events.read(tmp_path)[-1]["event"] == "no_way_back"
    marks = Marks(10, 20, 30)
    marks.stuck = {20}
    recovery = make(tmp_path, marks)
    recovery.judge_replicas(10, None)
    with pytest.raises(RunStopped, match=r"device 1 differs.*equal at step 10(?s:.*)20 cannot be renamed"):
        recovery.judge_replicas(30, "device 1 differs")
    assert marks.aside == {30: "rejected"}
    assert events.read(tmp_path)[-1]["event"] == "replicas_differ"


def test_going_back_twice_without_progress_is_no_way_back_and_keeps_the_good_one(tmp_path):
    marks = Marks(10, 20, good=(10,))
    for _ in range(2):
        recovery = make(tmp_path, marks, start=10)
        with pytest.raises(RollBack):
            recovery.judge(25, metrics(skipped=10))
    with pytest.raises(RunStopped, match=r"recovery.max_rollbacks=2: going back to the checkpoint of step 10"):
        make(tmp_path, marks, start=10).judge(31, metrics(skipped=10))
    assert marks.steps() == [10, 20] and not marks.aside
    marks.mark_good(20)  # progress: another place to go back to
    with pytest.raises(RollBack):
        make(tmp_path, marks, start=20).judge(45, metrics(skipped=10))


def test_a_run_does_not_end_in_the_middle_of_skipped_updates(tmp_path):
    recovery = make(tmp_path, Marks(10, good=(10,)))
    recovery.end(50, metrics())
    with pytest.raises(RollBack, match="the last 2 updates, up to step 50"):
        recovery.end(50, metrics(skipped=2))


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_parameters_that_the_last_update_has_spoilt_are_no_good_end(tmp_path, norm):
    """Its loss and gradients were those of the parameters before it."""
    recovery = make(tmp_path, Marks(10, good=(10,)))
    with pytest.raises(
        RollBack, match="the parameters after step 50 were not finite.*back to the checkpoint of step 10"
    ):
        recovery.judge(50, metrics(param_norm=norm))
    with pytest.raises(RunStopped, match="the parameters after step 1 were not finite.*no good checkpoint"):
        make(tmp_path, Marks()).judge(1, metrics(param_norm=norm))


def test_events_are_never_trimmed_and_a_half_line_is_left_out(tmp_path):
    Events(tmp_path, enabled=True).add("start", step=3)
    Events(tmp_path, enabled=False).add("start", step=4)
    with (tmp_path / events.FILE).open("ab") as file:
        file.write(b'{"time": 1, "ev')
    assert [(event["event"], event["step"]) for event in events.read(tmp_path)] == [("start", 3)]
