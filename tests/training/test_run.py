"""What the parts of a run do together, with parts that compute nothing."""

import errno
import pathlib
from unittest import mock

import pytest

from clipjax.config import Config
from clipjax.evals.runner import Evaluation
from clipjax.training import run as run_module
from clipjax.training.recovery import RunStopped
from clipjax.training.run import Run


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
