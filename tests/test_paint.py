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
@pytest.mark.parametrize("generator", paint.GENERATORS)
def test_the_painting_is_nearer_to_the_prompt_than_grey(place, capsys, generator):
    argv = ["red over blue", "--checkpoint=run", "--output=made/a.png", f"--generator={generator}"]
    assert exit_code(paint.main, [*argv, "--steps=60", "--crops=4", "--starts=2"]) == 0
    picture = np.asarray(Image.open(place / "made" / "a.png"))
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    out = capsys.readouterr().out
    assert "step 6/60  similarity" in out and "step 60/60  similarity" in out
    model = clipjax.load("run")
    text = model.encode_text("red over blue")[0]
    grey, painted = model.encode_image([np.full_like(picture, 128), picture]) @ text
    assert painted > grey + {"pixels": 0.1, "figure": 0.05}[generator]  # a figure can show less of two colours
    assert f"made/a.png: similarity {painted:.3f}, of a grey picture {grey:.3f}" in out


def test_the_pyramid_doubles_up_to_the_whole_and_begins_grey():
    for size, sides in ((32, [4, 8, 16, 32]), (36, [4, 9, 18, 36]), (3, [3])):
        canvas = paint.Pixels(size)
        levels = canvas.start(jax.random.key(0), 2)
        assert [level.shape for level in levels] == [(2, side, side, 3) for side in sides]
        np.testing.assert_array_equal(canvas.compose(levels), np.full((2, size, size, 3), 0.5))
    pixels = jax.random.uniform(jax.random.key(0), (1, 5, 5, 3))
    rows, columns = (np.abs(np.diff(np.asarray(pixels, float), axis=axis)).mean() for axis in (1, 2))
    assert float(paint.roughness(pixels)) == pytest.approx(rows + columns, rel=1e-5)
    assert float(paint.roughness(jnp.ones((1, 4, 4, 3)))) == 0


def test_a_figure_has_its_colour_inside_and_its_ground_outside():
    canvas = paint.Figure(64)
    params = jax.tree.map(jnp.zeros_like, canvas.start(jax.random.key(0), 1))
    params |= {
        "ground": jnp.full((1, 3), -9.0),
        "colour": jnp.asarray([[9.0, -9.0, -9.0]]),
        "centre": jnp.asarray([[0.1, -0.1]]),
        "log_radius": jnp.log(jnp.asarray([0.25])),
        "hole": jnp.asarray([-20.0]),
    }
    picture = np.asarray(canvas.compose(params))[0]
    place = (np.arange(64) + 0.5) / 64 - 0.5
    distance = np.hypot(place[:, None] - 0.1, place[None, :] + 0.1)
    inside, outside = (distance < 0.15) & (distance > 0.1), distance > 0.4
    np.testing.assert_allclose(picture[inside], np.broadcast_to([1.0, 0.0, 0.0], picture[inside].shape), atol=0.01)
    np.testing.assert_allclose(picture[outside], 0.0, atol=0.01)
    ring = np.asarray(canvas.compose(params | {"hole": jnp.asarray([0.0])}))[0]  # of half the radius
    np.testing.assert_allclose(ring[distance < 0.04], 0.0, atol=0.02)
    assert ring[np.abs(distance - 0.19) < 0.01][:, 0].min() > 0.9
    gradient = jax.grad(lambda params: canvas.compose(params).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


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
