"""`clipjax presets`: its arithmetic agrees with the models that are built, and it needs no JAX."""

import math
import subprocess
import sys

import jax
import pytest

from clipjax.cli import presets as command
from clipjax.config import BagOfWordsConfig, ModelConfig, presets
from clipjax.models.clip import abstract_params
from tests.commands import exit_code
from tests.models.test_variants import MODELS, model_config

QUICK = ("RN50", "ViT-B/32", "CoCa-B/32", "SigLIP-So400m/14@224px")
"""One of each structure; the others differ in sizes, and run in `make test-all`."""


def count(config: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in presets.MODELS]
)
def test_the_parameters_of_a_preset_are_those_of_its_model(name):
    assert presets.model(name).num_params() == count(presets.model(name))


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_of_every_variant_are_counted(name):
    config = model_config(name, init_logit_bias=-10.0, caption=BagOfWordsConfig())
    assert config.num_params() == count(config)


def test_the_table_lists_every_preset(capsys):
    assert exit_code(command.main, []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(presets.MODELS)
    row = "CoCa-B/32 253.6 9.19 5.96 18.19 224 76 mlfoundations/open_clip, src/open_clip/model_configs"
    assert row in [" ".join(line.split()) for line in lines]


def test_what_it_does_not_know_is_refused(capsys):
    assert exit_code(command.main, ["--all"]) == 2
    assert "clipjax presets: error: unknown option --all" in capsys.readouterr().err


def test_the_table_is_made_without_jax():
    code = (
        "import sys; from clipjax.cli.presets import main; main([]); "
        "heavy = {'jax', 'numpy', 'flax', 'orbax', 'grain'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
