"""Every config in configs/ can be read, is valid, and its state has a place on a mesh; nothing is allocated."""

import pathlib
import runpy

import jax
import pytest

from clipjax.config import Config, MeshConfig, Remat, total_steps
from clipjax.config.serialization import from_dict, to_dict
from clipjax.config.validation import validate
from clipjax.models.clip import abstract_params, build_clip
from clipjax.runtime import sharding
from clipjax.sweeps import Sweep
from clipjax.training import optimizer
from clipjax.training.step import STATE_RULES, make_init_state

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
CLIP_SIZES = ("vit_b32", "vit_b16", "vit_l14", "vit_l14_336", "vit_h14", "so400m", "tiny,batch=32768")


def configs() -> list[str]:
    """`FILE` or `FILE:ARGUMENT`, as `--config` takes them."""
    files = sorted(path.name for path in CONFIGS.glob("*.py"))
    return files + [f"clip.py:{size}" for size in CLIP_SIZES]


def load(name: str) -> Config:
    file, _, argument = name.partition(":")
    if not (CONFIGS / file).exists():
        pytest.skip(f"configs/{file} is not written yet")
    get_config = runpy.run_path(str(CONFIGS / file))["get_config"]
    return get_config(argument) if argument else get_config()


@pytest.mark.parametrize("name", configs())
def test_config_is_valid_and_its_state_has_a_place(name):
    config = load(name)
    validate(config)
    assert total_steps(config) > 0
    assert from_dict(to_dict(config)) == config  # what a checkpoint keeps of it

    tx = optimizer.make_tx(config, abstract_params(config.model))
    init = make_init_state(config, build_clip(config.model).init, tx, num_samples=1)
    state = jax.eval_shape(lambda: init(jax.random.key(0)))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.with_shardings(state, sharding.state_shardings(mesh, state, STATE_RULES))
    for leaf in jax.tree.leaves(placed):
        leaf.sharding.shard_shape(leaf.shape)  # raises where an axis does not divide a dimension
    largest = max(jax.tree.leaves(placed.params), key=lambda leaf: leaf.size)
    assert not largest.sharding.is_fully_replicated


def test_every_clip_size_is_another_model():
    models = [load(f"clip.py:{size}").model for size in CLIP_SIZES]
    assert all(a != b for i, a in enumerate(models) for b in models[:i])


@pytest.mark.parametrize(
    ("argument", "remat"),
    [
        ("vit_l14", Remat.MLP),
        ("vit_l14,batch=16384", Remat.DOTS),
        ("vit_l14,batch=65536", Remat.FULL),
        ("vit_b16,batch=65536", Remat.DOTS),
        ("vit_h14", Remat.FULL),
    ],
)
def test_a_larger_batch_keeps_less_for_the_backward_pass(argument, remat):
    assert load(f"clip.py:{argument}").model.remat is remat


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.py")), ids=lambda path: path.name)
def test_sweep_can_be_read(path):
    assert isinstance(runpy.run_path(str(path))["get_sweep"](), Sweep)


def test_clip_takes_another_batch_and_refuses_what_it_does_not_know():
    assert load("clip.py:vit_b16,batch=4096").global_batch_size == 4096
    for argument in ("vit_b16,4096", "vit_b16,batch=many", "vit_q1"):
        with pytest.raises(ValueError, match=argument):
            load(f"clip.py:{argument}")
