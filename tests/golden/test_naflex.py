"""SigLIP 2 of variable aspect against what the peer computed of the same pictures, with the same weights by rule.

Tolerance: float32 in another order moves these embeddings by 1e-6 and the file keeps seven digits. A position that is
resized without antialiasing moves them by more than 1e-3 (tested).
"""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

import clipjax
from clipjax.cli.convert import main_convert, main_export
from clipjax.config import Interpolation, ViTConfig
from clipjax.data.patches import fit_grid
from clipjax.models import vit
from tests.commands import exit_code
from tests.golden import naflex
from tests.golden.peer_variants import make_weights

TOLERANCE = 2e-6
EXPECTED = json.loads(pathlib.Path(__file__).with_name("naflex.json").read_text())
PATCHES = EXPECTED["grids"]


@pytest.fixture(scope="module")
def peer(tmp_path_factory) -> pathlib.Path:
    """Their directory."""
    folder = tmp_path_factory.mktemp("naflex")
    weights = make_weights({name: tuple(shape) for name, shape in EXPECTED["shapes"].items()})
    safetensors.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(naflex.CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(naflex.PREPROCESSING))
    return folder


@pytest.fixture(scope="module")
def ours(peer, tmp_path_factory) -> pathlib.Path:
    """The checkpoint that conversion makes."""
    path = tmp_path_factory.mktemp("ours") / "converted"
    assert exit_code(main_convert, ["--from=huggingface", f"--input={peer}", f"--output={path}"]) == 0
    return path


@pytest.fixture(scope="module")
def model(ours):
    found = clipjax.load(ours)
    config = dataclasses.replace(found.config.model, compute_dtype=clipjax.config.Dtype.FLOAT32)
    return clipjax.inference.Model(
        dataclasses.replace(found.config, model=config), found.params, found.tokenizer, batch_size=4
    )


def test_pictures_of_any_aspect_have_the_peers_embeddings(model):
    found = model.encode_image(naflex.pictures())
    np.testing.assert_allclose(found, EXPECTED["image_embed"], atol=TOLERANCE)
    texts = model.embed_tokens(naflex.tokens().astype(np.int32))
    np.testing.assert_allclose(texts, EXPECTED["text_embed"], atol=TOLERANCE)
    logits = model.logit_scale * found @ texts.T + float(model.params["logit_bias"])
    np.testing.assert_allclose(logits, EXPECTED["logits_per_image"], atol=2e-5)


def test_it_would_notice_positions_that_are_not_antialiased(model, monkeypatch):
    def plain(table, place, grid):
        """Bilinear, with a triangle as wide as a place of the table whatever the grid."""
        centre = (place + 0.5) * (4 / grid)
        distance = jnp.abs((jnp.arange(4) + 0.5).reshape(1, 1, 1, -1) - centre[..., None])
        found = jnp.maximum(0.0, 1.0 - distance)
        found = found / found.sum(-1, keepdims=True)
        return jnp.einsum("rty,rtx,yxw->rtw", found[:, :, 0], found[:, :, 1], table.reshape(4, 4, -1))

    monkeypatch.setattr(vit, "positions_of_patches", plain)
    other = clipjax.inference.Model(model.config, model.params, model.tokenizer, batch_size=4)
    assert np.abs(other.encode_image(naflex.pictures()) - EXPECTED["image_embed"]).max() > 1000 * TOLERANCE


def test_grids_are_the_peers():
    assert [list(fit_grid(*size, 20, 4)) for size in naflex.SIZES] == PATCHES
    assert [list(fit_grid(*size, 256, 16)) for size in naflex.GRIDS] == EXPECTED["more_grids"]


def test_config_and_preprocessing_are_read(model):
    image, data = model.config.model.image, model.config.data
    assert isinstance(image, ViTConfig)
    assert (image.image_size, image.patch_size, image.max_patches) == (16, 4, 20)
    assert (data.interpolation, data.mean, data.std) == (Interpolation.BILINEAR, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_export_gives_back_what_came(peer, ours, tmp_path):
    assert exit_code(main_export, ["--to=huggingface", f"--checkpoint={ours}", f"--output={tmp_path / 'out'}"]) == 0
    before, after = (safetensors.load_file(folder / "model.safetensors") for folder in (peer, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "siglip2"
    assert written["vision_config"]["num_patches"] == 16
    picture = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert {name: picture[name] for name in naflex.PREPROCESSING} == naflex.PREPROCESSING
    again = [f"--input={tmp_path / 'out'}", f"--output={tmp_path / 'again'}"]
    assert exit_code(main_convert, ["--from=huggingface", *again]) == 0


@pytest.mark.parametrize("target", ["open_clip", "stablehlo"])
def test_others_have_no_such_model(ours, tmp_path, capsys, target):
    assert exit_code(main_export, [f"--to={target}", f"--checkpoint={ours}", f"--output={tmp_path / 'out'}"]) == 2
    assert "model.image.max_patches=20" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("config.json", "vision_config.num_patches", 15, "vision_config.num_patches=15 must be the square"),
        ("config.json", "vision_config.image_size", 16, "image_size"),
        ("config.json", "vision_config.vision_use_head", False, "no embedding"),
        ("preprocessor_config.json", "patch_size", 8, "patch_size=8 must be the model's 4"),
        ("preprocessor_config.json", "resample", 1, "resample=1"),
        ("preprocessor_config.json", "max_num_patches", 0, "max_num_patches=0"),
    ],
)
def test_what_would_be_another_model_is_refused(peer, tmp_path, capsys, file, path, value, message):
    for each in peer.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    content = json.loads((tmp_path / file).read_text())
    *outer, name = path.split(".")
    inside = content[outer[0]] if outer else content
    inside[name] = value
    (tmp_path / file).write_text(json.dumps(content))
    assert exit_code(main_convert, ["--from=huggingface", f"--input={tmp_path}", f"--output={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
