"""The order of things in the loop: nothing is saved before the updates in it have been judged."""

import signal
import types
from unittest import mock

import jax
import pytest

from clipjax.config import CheckpointConfig, Config, EvalConfig, LogConfig, TaskConfig
from clipjax.data.sample import UnreadableData
from clipjax.data.training_batches import NoUsableSample, TooManyBadSamples
from clipjax.runtime.shutdown import Shutdown
from clipjax.training import loop
from clipjax.training.recovery import RunStopped
from clipjax.training.resume import Position
from tests.runtime.test_shutdown import handlers  # noqa: F401
from tests.waiting import wait_for


class Recorded:
    """A run that computes nothing and records what the loop asks of it."""

    def __init__(self, *, stop_at: int | None) -> None:
        self.config = Config(
            total_examples=6,
            warmup_examples=0,
            global_batch_size=1,
            checkpoint=CheckpointConfig(every_examples=2),
            eval=EvalConfig(every_examples=3, tasks={"val": TaskConfig()}),
            log=LogConfig(every_examples=1),
        )
        self.asked: list[tuple] = []
        self.evaluated: dict[int, list[str]] = {}
        self.place, self.state, self.start = "run", 0, types.SimpleNamespace(step=0, evaluated=False)
        nothing = types.SimpleNamespace(wait_seconds=0.0)
        self.logger = types.SimpleNamespace(message=print, flush=int, log_step=lambda *_: None)
        self.stream, self.signal = nothing, types.SimpleNamespace(due=self.due, error=None, number=15)
        self._step, self._stop_at = 0, stop_at

    def due(self) -> bool:
        return self._step == self._stop_at

    def next_batch(self, step: int) -> int:
        self._step = step
        return step

    def train_step(self, state: int, batch: int) -> tuple[int, None]:
        return batch, None

    def follow(self, step: int, state: int, metrics: None) -> None:
        self.asked.append(("follow", step))

    def settle(self) -> None:
        self.asked.append(("settle", self._step))

    def evaluate(self, state: int, step: int, names: list[str]) -> str:
        self.asked.append(("evaluate", step))
        self.evaluated[step] = names
        return f"of {step}"

    def add_evaluation(self, step: int, evaluation: str) -> None:
        self.asked.append(("add", step, evaluation))

    def save(self, state: int, step: int, evaluation: str | None = None, *, last: bool = False) -> None:
        assert state == step
        self.asked.append(("save", step, evaluation, last))

    def wait_for_saves(self) -> None:
        pass

    def finish(self, state: int, last: int, evaluation: str) -> None:
        self.asked.append(("finish", last, evaluation))


def test_what_is_saved_was_judged_before():
    run = Recorded(stop_at=None)
    assert loop._train(run) is None
    assert [each for each in run.asked if each[0] != "follow"] == [
        ("settle", 2),
        ("save", 2, None, False),
        ("settle", 3),
        ("evaluate", 3),
        ("save", 3, "of 3", False),
        ("settle", 4),
        ("save", 4, None, False),
        ("settle", 6),
        ("evaluate", 6),
        ("save", 6, "of 6", False),
        ("finish", 6, "of 6"),
    ]


def with_intervals(run: Recorded, every: int | None, **intervals: int | None) -> Recorded:
    """Give a run of 12 steps tasks with intervals of their own."""
    tasks = {name: TaskConfig(every_examples=own) for name, own in intervals.items()}
    run.config.total_examples, run.config.eval = 12, EvalConfig(every_examples=every, tasks=tasks)
    return run


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (4, {3: ["b"], 4: ["a"], 5: ["c"], 6: ["b"], 8: ["a"], 9: ["b"], 10: ["c"], 12: ["a", "b", "c"]}),
        (3, {3: ["a", "b"], 5: ["c"], 6: ["a", "b"], 9: ["a", "b"], 10: ["c"], 12: ["a", "b", "c"]}),
        (None, {3: ["b"], 5: ["c"], 6: ["b"], 9: ["b"], 10: ["c"], 12: ["a", "b", "c"]}),
    ],
)
@pytest.mark.parametrize("stop_at", [None, 3, 4, 5, 7])
def test_each_task_is_evaluated_at_its_own_interval_also_by_a_run_that_was_stopped(every, expected, stop_at):
    run = with_intervals(Recorded(stop_at=stop_at), every, a=None, b=3, c=5)
    number = loop._train(run)
    if stop_at is None:
        assert run.evaluated == expected and number is None
        return
    ((_, step, evaluation, last),) = [each for each in run.asked if each[0] == "save"][-1:]
    assert (number, step, evaluation, last) == (15, stop_at, None, True)
    again = with_intervals(Recorded(stop_at=None), every, a=None, b=3, c=5)
    again.start = types.SimpleNamespace(step=step, evaluated=False)
    loop._train(again)
    assert not run.evaluated.keys() & again.evaluated.keys() and {**run.evaluated, **again.evaluated} == expected
    added = [each for each in again.asked if each[0] == "add"]
    assert added == ([("add", stop_at, f"of {stop_at}")] if stop_at in expected else [])


def test_a_step_that_was_evaluated_before_it_was_saved_is_not_evaluated_again():
    run = with_intervals(Recorded(stop_at=None), None, a=None, b=3)
    run.start = types.SimpleNamespace(step=3, evaluated=True)
    loop._train(run)
    assert run.evaluated == {6: ["b"], 9: ["b"], 12: ["a", "b"]}


def test_a_stop_saves_what_was_judged_and_leaves_the_evaluation_to_the_next_start():
    run = Recorded(stop_at=3)
    assert loop._train(run) == 15
    assert run.asked[-3:] == [("follow", 3), ("settle", 3), ("save", 3, None, True)]


def test_trouble_of_a_process_saves_and_stops_all_with_its_reason():
    run = Recorded(stop_at=3)
    run.signal.error = "a loader worker died again"
    run.wait_for_saves = lambda: run.asked.append(("wait",))
    with pytest.raises(RunStopped, match="a loader worker died again"):
        loop._train(run)
    assert run.asked[-2:] == [("save", 3, None, True), ("wait",)]


class Signalled(Recorded):
    """A run that gets one SIGTERM while it evaluates or saves."""

    def __init__(self, during: tuple[str, int]) -> None:
        super().__init__(stop_at=None)
        self.signal, self._during = Shutdown(), during

    def _raise_signal(self, what: str, step: int) -> None:
        if (what, step) == self._during:
            signal.raise_signal(signal.SIGTERM)
            wait_for(lambda: self.signal.number)

    def evaluate(self, state: int, step: int, names: list[str]) -> str:
        self._raise_signal("evaluate", step)
        return super().evaluate(state, step, names)

    def save(self, state: int, step: int, evaluation: str | None = None, *, last: bool = False) -> None:
        self._raise_signal("save", step)
        super().save(state, step, evaluation, last=last)


@pytest.mark.parametrize(
    ("during", "ends"),
    [
        (("evaluate", 3), [("evaluate", 3), ("save", 3, "of 3", False), ("save", 4, None, True)]),
        (("save", 2), [("save", 2, None, False), ("save", 3, None, True)]),  # the evaluation is the next start's
        (("evaluate", 6), [("evaluate", 6), ("save", 6, "of 6", False), ("finish", 6, "of 6")]),
        (("save", 6), [("evaluate", 6), ("save", 6, "of 6", False), ("finish", 6, "of 6")]),
    ],
)
def test_a_signal_during_an_evaluation_or_a_save_lets_it_end_and_stops_after_the_next_step(handlers, during, ends):  # noqa: F811
    run = Signalled(during)
    number = loop._train(run)
    run.signal.close()
    assert number == (None if during[1] == 6 else signal.SIGTERM)
    done = [each for each in run.asked if each[0] not in ("follow", "settle")]
    assert done[-len(ends) :] == ends


@pytest.mark.parametrize(
    ("error", "processes", "step", "saved"),
    [
        (TooManyBadSamples("above the limit"), 1, 3, [2]),
        (TooManyBadSamples("above the limit"), 4, 3, [2]),  # all of them find so
        (NoUsableSample("100 in a row"), 1, 3, [2]),
        (NoUsableSample("100 in a row"), 4, 3, []),  # the others are in the step, and would not join in a save
        (UnreadableData("shard a.tar cannot be read"), 1, 3, [2]),
        (UnreadableData("shard a.tar cannot be read"), 4, 3, []),
        (NoUsableSample("100 in a row"), 1, 1, []),  # a corrected config is not refused for a step 0
    ],
)
def test_the_state_before_unusable_data_is_saved_where_all_can(monkeypatch, error, processes, step, saved):
    def next_batch(number: int) -> dict:
        if number == step:
            raise error
        return {}

    run = mock.MagicMock(config=Config(), start=Position(), next_batch=next_batch)
    run.train_step.return_value = ("state", {})
    run.signal.due.return_value = False
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(type(error), match=str(error)):
        loop._train(run)
    assert [call.args[1] for call in run.save.call_args_list] == saved
    assert not run.wait_for_saves.called
