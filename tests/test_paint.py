"""The example that paints a picture: the model likes it better than where it began."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import clipjax
from benchmarks import paint
from tests.commands import exit_code
from tests.golden.test_checkpoint import FOLDER


@pytest.fixture
def place(tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "checkpoint_format_2", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.heavy
def test_the_painting_is_nearer_to_the_prompt_than_grey(place, capsys):
    argv = ["red over blue", "--checkpoint=run", "--output=made/a.png", "--steps=60", "--crops=4"]
    assert exit_code(paint.main, argv) == 0
    picture = np.asarray(Image.open(place / "made" / "a.png"))
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    out = capsys.readouterr().out
    assert "step 6/60  similarity" in out and "step 60/60  similarity" in out
    model = clipjax.load("run")
    text = model.encode_text("red over blue")[0]
    grey, painted = model.encode_image([np.full_like(picture, 128), picture]) @ text
    assert painted > grey + 0.1
    assert f"made/a.png: similarity {painted:.3f}, of a grey picture {grey:.3f}" in out


def test_the_pyramid_doubles_up_to_the_whole_and_begins_grey():
    for size, sides in ((32, [4, 8, 16, 32]), (36, [4, 9, 18, 36]), (3, [3])):
        levels = paint.blank(size)
        assert [level.shape for level in levels] == [(1, side, side, 3) for side in sides]
        np.testing.assert_array_equal(paint.compose(levels), np.full((1, size, size, 3), 0.5))
    pixels = jax.random.uniform(jax.random.key(0), (1, 5, 5, 3))
    rows, columns = (np.abs(np.diff(np.asarray(pixels, float), axis=axis)).mean() for axis in (1, 2))
    assert float(paint.roughness(pixels)) == pytest.approx(rows + columns, rel=1e-5)
    assert float(paint.roughness(jnp.ones((1, 4, 4, 3)))) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint=run", "--output=a.png"], "0 prompts are given; give one"),
        (["a", "b", "--checkpoint=run", "--output=a.png"], "2 prompts are given; give one, in quotes: 'a b'"),
        (["a", "--output=a.png"], "--checkpoint is missing"),
        (["a", "--checkpoint=run"], "--output is missing"),
        (["a", "--checkpoint=run", "--output=a.jpg"], "--output=a.jpg must end in .png"),
        (["a", "--checkpoint=none", "--output=a.png"], "none"),
        (["a", "--checkpoint=run", "--output=a.png", "--steps=0"], "--steps=0 must be a whole number of at least 1"),
    ],
)
def test_what_is_refused(place, capsys, argv, message):
    assert exit_code(paint.main, argv) == 2
    assert message in capsys.readouterr().err
    assert not (place / "a.png").exists()
