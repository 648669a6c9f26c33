"""`clipjax eval`: what it does once everything is open."""

import json
import re
import shutil
from unittest import mock

import pytest

from clipjax.cli import eval as evaluate
from clipjax.config import Config, TaskConfig
from clipjax.evals.runner import Evaluation
from tests.golden.test_checkpoint import FOLDER, write_inputs


@pytest.fixture
def no_model(monkeypatch):
    """An evaluation that computes nothing."""
    for name in ("load_params", "Encoder", "build_clip"):
        monkeypatch.setattr(evaluate, name, mock.MagicMock())
    monkeypatch.setattr(evaluate, "run_tasks", lambda *_, **options: Evaluation({"val": {"top1": 0.5}}, {}))


def with_task() -> Config:
    config = Config()
    config.eval.tasks["val"] = TaskConfig(source="a", classes="x", templates="y")
    return config


def test_results_are_written_in_both_forms_and_nothing_is_left_of_the_progress(no_model, tmp_path, capsys):
    saved = mock.MagicMock(place="runs/a", step=3)
    places = tmp_path / "results.json", tmp_path / "results.csv"
    opened = evaluate.Opened(saved, with_task(), mock.Mock(), {}, places[0], csv=places[1], key="key")
    assert evaluate._evaluate(opened) == 0
    assert json.loads(places[0].read_text()) == {"checkpoint": "runs/a", "tasks": {"val": {"top1": 0.5}}}
    assert places[1].read_text().splitlines()[1].startswith("0.5,val,clipjax,runs/a,zeroshot_classification,en,")
    assert sorted(tmp_path.iterdir()) == sorted(places)
    assert f"results: {places[0]}, {places[1]}" in capsys.readouterr().out


def test_columns_for_tasks_that_clip_benchmark_has_not_are_refused(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    shutil.copytree(FOLDER / "checkpoint_format_2", tmp_path / "run")
    config = tmp_path / "tasks.py"
    config.write_text(
        "from clipjax.config import *\ndef get_config():\n"
        "    task = TaskConfig(kind=TaskKind.IMAGE_RETRIEVAL, source='pairs.tar', gallery='pairs.tar')\n"
        "    return Config(eval=EvalConfig(tasks={'same': task}))\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"--csv=x.csv: CLIP_benchmark has columns for zero_shot, multi_label, retrieval, and no"
    ):
        evaluate._open_here(["--checkpoint=run", f"--tasks_from={config}", "--csv=x.csv"])


def test_results_that_cannot_be_written_are_shown_and_the_exit_code_is_3(no_model, tmp_path, capsys):
    (tmp_path / "results.json").mkdir()  # no file can replace it
    opened = evaluate.Opened(mock.MagicMock(), with_task(), mock.Mock(), {}, tmp_path / "results.json")
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
