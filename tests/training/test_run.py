"""What the parts of a run do together, with parts that compute nothing."""

import errno
import pathlib
from unittest import mock

import numpy as np
import pytest

from clipjax.config import Config
from clipjax.evals.runner import Evaluation
from clipjax.training import run as run_module
from clipjax.training.recovery import RunStopped
from clipjax.training.run import Run


def test_the_log_is_on_the_disk_before_a_checkpoint_is_saved(monkeypatch):
    for name in ("make_records", "to_items", "Position", "asdict", "steps_of"):
        monkeypatch.setattr(run_module, name, mock.MagicMock())
    run = mock.MagicMock(config=Config())
    Run.save(run, mock.MagicMock(step=np.int32(3)), 3)
    order = [name for name, *_ in run.mock_calls]
    saved = order.index("checkpoints.save")
    assert order.index("logger.flush") < order.index("logger.sync") < saved
    assert order.index("session.events.sync") < saved


def test_a_full_disk_at_the_end_shows_the_results_and_names_what_is_missing(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module, "write_results", full)
    run = mock.MagicMock(config=Config(), workdir=pathlib.Path("run"))
    with pytest.raises(
        RunStopped, match=r"all 6 steps are done and saved, but .*results.json cannot be written: .*No sp"
    ):
        Run.finish(run, mock.Mock(), 6, Evaluation({"val": {"top1": 0.5}}, {}))
    assert run.wait_for_saves.called and run.logger.finish.called
    assert "top1" in run.logger.message.call_args.args[0], "the results are shown"
