"""First weights of another run: positions of longer texts, of which the first may stay."""

import copy
import io
import re
import tarfile

import jax
import numpy as np
import pytest

from clipjax.checkpoints.saved import SavedCheckpoint, load_params
from clipjax.config import CbowConfig, Config, DataConfig, MeshConfig
from clipjax.data.index_file import FORMAT
from clipjax.data.sources import build_training_source
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.runtime import sharding
from clipjax.training.inputs import Inputs, check_same_shapes
from clipjax.training.program import build_program
from clipjax.training.resume import _take_params
from tests.golden.test_checkpoint import FOLDER

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def saved() -> SavedCheckpoint:
    return SavedCheckpoint(FOLDER / "checkpoint_format_2")


def longer(saved: SavedCheckpoint, keep: int, length: int = 32) -> Config:
    config = copy.deepcopy(saved.config)
    config.init_from, config.init_keep_positions, config.model.text.context_length = "x", keep, length
    return config


def test_a_run_begins_with_the_positions_that_it_keeps(saved):
    """20 positions become 32: 8 stay, 12 become 24."""
    config, mesh = longer(saved, keep=8), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    check_same_shapes(config, saved)
    with jax.set_mesh(mesh):
        state = build_program(config, mesh, num_samples=100).fresh_state()
        table = np.asarray(load_params(saved, mesh)["text"]["pos_embed"], np.float64)
        found = np.asarray(_take_params(state, saved, config, mesh).params["text"]["pos_embed"])
    assert table.shape[0] == 20 and found.shape[0] == 32
    np.testing.assert_array_equal(found[:8], table[:8])
    np.testing.assert_array_equal(found[8::2], table[8:])
    np.testing.assert_allclose(found[9:-1:2], (table[8:-1] + table[9:]) / 2, atol=1e-6)  # one rounding of float32
    np.testing.assert_allclose(found[-1], table[-1] + (table[-1] - table[-2]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.model.text, "context_length", 20), "context_length=20 is not longer than the 20 of init"),
        (lambda c: setattr(c, "init_keep_positions", 19), "it must leave at least 2 of the 20 positions"),
        (lambda c: setattr(c, "init_match", ("image/.*",)), "does not take text/pos_embed from init_from; leave it 0"),
        (lambda c: setattr(c.model, "text", CbowConfig(context_length=32)), "a bag of words has no positions"),
    ],
)
def test_positions_that_cannot_be_kept_are_refused(saved, change, message):
    config = longer(saved, keep=18)
    check_same_shapes(config, saved)
    change(config)
    with pytest.raises(ValueError, match="^init_keep_positions=.*" + re.escape(message)):
        check_same_shapes(config, saved)


def test_the_formats_of_indexes_go_into_checkpoints(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.jpg", "a.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    (tmp_path / "table.csv").write_text("filepath,title\na.jpg,a\n")
    formats = {"a.tar": FORMAT, "table.csv": None}
    for name, expected in formats.items():
        source = build_training_source(DataConfig(train=str(tmp_path / name)))
        assert Inputs(source, BytesTokenizer(), {}, None).index_formats() == [expected]
