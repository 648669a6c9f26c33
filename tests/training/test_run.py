"""What the parts of a run do together, with parts that compute nothing."""

import collections
import errno
from unittest import mock

import numpy as np
import pytest

from clipjax.config import Config
from clipjax.data.training_stream import WorkersDie
from clipjax.evals import results
from clipjax.evals.runner import Evaluation
from clipjax.training import run as run_module
from clipjax.training.recovery import RunStopped
from clipjax.training.run import Run


def test_a_request_for_a_profile_reaches_the_profiler_and_each_step_asks_it(monkeypatch):
    monkeypatch.setattr(run_module, "device_batch", mock.Mock())
    run = mock.MagicMock(_in_flight=collections.deque())
    run.signal.take_profile_request.side_effect = [False, True]
    run.session.replicas = None
    for step in (1, 2):
        Run.next_batch(run, step)
        Run.follow(run, step, mock.Mock(), {"loss": step})
        assert run.session.profile.request.called == (step == 2)
    assert run.session.profile.maybe_start.mock_calls == [mock.call(1), mock.call(2)]
    assert run.session.profile.maybe_stop.mock_calls == [mock.call(1, {"loss": 1}), mock.call(2, {"loss": 2})]


def test_copies_are_compared_when_due_and_judged_with_their_step():
    run = mock.MagicMock(_in_flight=collections.deque())
    run.session.replica_check_every = 2
    run.session.replicas.find_differing.return_value = "device 1 differs"
    for step in (1, 2, 3):
        Run.follow(run, step, f"state {step}", dict.fromkeys(run_module.JUDGED, np.float32(0)))
    assert run.session.replicas.check.mock_calls == [mock.call("state 2")]
    for _ in range(3):
        Run._judge_oldest(run)
    run.session.replicas.find_differing.assert_called_once_with(run.session.replicas.check.return_value)
    assert run.recovery.judge_replicas.mock_calls == [mock.call(2, "device 1 differs")]


def test_workers_that_die_too_often_stop_the_run_and_the_batches_up_to_then_are_read_without_them():
    run, read = mock.MagicMock(), []

    class Stream:
        def __next__(self) -> str:
            if not read:
                raise WorkersDie("a loader worker died again")
            return "batch"

        def read_here(self) -> None:
            read.append("here")

    run.stream = Stream()
    assert Run._read(run) == "batch" and read == ["here"]
    run.signal.request.assert_called_once_with("a loader worker died again")


def test_the_log_is_on_the_disk_before_a_checkpoint_is_complete(monkeypatch):
    for name in ("make_records", "to_items", "Position", "asdict", "steps_of"):
        monkeypatch.setattr(run_module, name, mock.MagicMock())
    run = mock.MagicMock(config=Config())
    Run.save(run, mock.MagicMock(step=np.int32(3)), 3)
    order = [name for name, *_ in run.mock_calls]
    assert order.index("logger.flush") < order.index("checkpoints.save")
    assert run.checkpoints.save.call_args.kwargs["before_commit"] is run._sync_logs
    Run._sync_logs(run)
    assert [name for name, *_ in run.mock_calls][-2:] == ["logger.sync", "session.events.sync"]


def test_a_full_disk_at_the_end_shows_the_results_and_names_what_is_missing(monkeypatch, tmp_path):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.storage, "write", full)
    run = mock.MagicMock(config=Config(), workdir=tmp_path)
    with pytest.raises(
        RunStopped, match=r"all 6 steps are done and saved, but .*results.json cannot be written: .*No sp"
    ):
        Run.finish(run, mock.Mock(), 6, Evaluation({"val": {"top1": 0.5}}, {}))
    assert run.wait_for_saves.called and run.logger.finish.called
    assert "top1" in run.logger.message.call_args.args[0], "the results are shown"


def test_the_tasks_that_are_due_are_run_alone_and_their_results_are_the_steps(monkeypatch):
    run, asked = mock.MagicMock(), []
    run.inputs.tasks = {"a": "task a", "b": "task b", "c": "task c"}
    evaluation = Evaluation({"c": {"top1": 0.5}}, {"a": "no images"})
    monkeypatch.setattr(run_module, "run_tasks", lambda tasks, encoder: asked.append(tasks) or evaluation)
    assert Run.evaluate(run, mock.Mock(step=np.zeros(())), 7, ["a", "c"]) is evaluation
    assert asked == [{"a": "task a", "c": "task c"}]
    run.logger.results.assert_called_once_with(7, evaluation.results, evaluation.failures)
    run.config.checkpoint.best_metric = "b:top1"  # which was not due: the step has no value, and is not the best
    assert Run._best_value(run, evaluation) is None
    run.config.checkpoint.best_metric = "c:top1"
    assert Run._best_value(run, evaluation) == 0.5
