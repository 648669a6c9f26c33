"""What the commands that use a model share: the digest of a checkpoint, and batches."""

import shutil

import pytest

from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.cli.opened_model import batch_size_of, digest_of, place_of
from tests.golden.test_checkpoint import FOLDER, NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_is_that_of_the_files_wherever_they_lie(tmp_path, monkeypatch, name):
    shutil.copytree(FOLDER / name, tmp_path / "run")
    (step,) = (FOLDER / name / "checkpoints").iterdir()
    shutil.copytree(step, tmp_path / "renamed")
    monkeypatch.chdir(tmp_path)
    run, copy = SavedCheckpoint("run"), SavedCheckpoint("renamed")
    assert digest_of(run) == digest_of(copy)
    assert place_of(run) == str(tmp_path / "run" / "checkpoints" / step.name)
    assert digest_of(run) != digest_of(SavedCheckpoint(FOLDER / next(each for each in NAMES if each != name)))


def test_few_rows_get_a_small_batch():
    sizes = {0: 1, 1: 1, 2: 2, 3: 4, 200: 256, 257: 300, 5000: 300}
    assert {count: batch_size_of(count, 300) for count in sizes} == sizes
