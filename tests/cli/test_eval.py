"""`clipjax eval`: what it does once everything is open."""

import re
import shutil
from unittest import mock

import pytest

from clipjax.cli import eval as evaluate
from clipjax.config import Config
from clipjax.evals.runner import Evaluation
from tests.golden.test_checkpoint import FOLDER, write_inputs


@pytest.fixture
def no_model(monkeypatch):
    """An evaluation that computes nothing."""
    for name in ("load_params", "Encoder", "build_clip"):
        monkeypatch.setattr(evaluate, name, mock.MagicMock())
    monkeypatch.setattr(evaluate, "run_tasks", lambda *_: Evaluation({"val": {"top1": 0.5}}, {}))


def test_results_that_cannot_be_written_are_shown_and_the_exit_code_is_3(no_model, tmp_path, capsys):
    (tmp_path / "results.json").mkdir()  # no file can replace it
    opened = evaluate.Opened(mock.MagicMock(), Config(), mock.Mock(), {}, tmp_path / "results.json")
    assert evaluate._evaluate(opened) == 3
    shown = capsys.readouterr()
    assert "top1" in shown.out and "results: " not in shown.out
    assert shown.err.count("\n") == 1 and "results.json: the results, which are shown, cannot be written" in shown.err


def test_a_compile_cache_in_a_folder_of_the_tasks_data_is_refused(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_inputs(tmp_path / "data")
    shutil.copytree(FOLDER / "checkpoint_format_2", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "data")
    refused = f"compile_cache='{tmp_path}/data/xla' lies in ., a folder of data or checkpoints"
    with pytest.raises(ValueError, match=re.escape(refused)):
        evaluate._open_here([f"--checkpoint={tmp_path}/run", f"--config.compile_cache={tmp_path}/data/xla"])
    assert not (tmp_path / "data" / "xla").exists()
