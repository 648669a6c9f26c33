"""A run with pictures of variable aspect: killed, it goes on exactly with other workers; its steps can be replayed."""

import json
import pathlib

import pytest

from tests.e2e.conftest import run, start
from tests.e2e.test_run import assert_same_run, kill_after_lines, log_lines, train_arguments

SQUARE = "image=ViTConfig(image_size=16, patch_size=8,"
PATCHES = "image=ViTConfig(image_size=32, patch_size=8, max_patches=24, class_token=False, pool=ImagePool.AVERAGE,"
MENU = 'tokenizer="bytes", patch_menu=(6, 12), images_per_row=4, enlarge=False'

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory) -> pathlib.Path:
    text = tiny_config.read_text()
    assert text.count(SQUARE) == text.count('tokenizer="bytes"') == 1
    path = tmp_path_factory.mktemp("patches") / "config.py"
    path.write_text(text.replace(SQUARE, PATCHES).replace('tokenizer="bytes"', MENU))
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory, cache) -> pathlib.Path:
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    output = run(*train_arguments(config, workdir), **cache)
    assert "compiled shape 1 of 2, 6 patches per image" in output and "compiled 2 shapes of the step in" in output
    return workdir


def test_the_log_tells_the_padding_of_each_step(finished):
    shares = [line["padding_share"] for line in log_lines(finished) if "loss" in line]
    assert len(shares) == 12 and all(0 <= share < 1 for share in shares) and len(set(shares)) > 1


def test_a_killed_run_goes_on_exactly_with_other_workers(config, finished, tmp_path, cache):
    kill_after_lines(start(*train_arguments(config, tmp_path), **cache), tmp_path, 7)
    output = run(*train_arguments(config, tmp_path, "--config.data.num_workers=2"), **cache)
    assert "step 12/12" in output
    assert_same_run(tmp_path, finished)


def test_a_replayed_step_is_that_of_the_log(config, finished, cache):
    output = run(*train_arguments(config, finished, "--replay=8"), **cache)
    loss = next(line["loss"] for line in log_lines(finished) if line["step"] == 8)
    assert f"step 8: loss {json.dumps(loss)}; every number is bit for bit that of the log" in output


def test_zero_shot_and_retrieval_of_a_checkpoint_give_what_training_gave(finished, tmp_path, cache):
    run("eval", f"--checkpoint={finished}", f"--output={tmp_path}/results.json", **cache)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == json.loads((finished / "results.json").read_text())
    assert set(found["tasks"]) == {"scenes/val", "scenes/pairs"}
    assert all(task["num_examples"] > 0 == task["num_skipped"] for task in found["tasks"].values())
