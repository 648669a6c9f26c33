"""Checkpoints of older formats become states of this one."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from clipjax.config import MeshConfig
from clipjax.config.serialization import from_dict
from clipjax.pytrees import leaf_paths
from clipjax.runtime import sharding
from clipjax.training.health import init_health
from clipjax.training.migrations import FORMAT, MIGRATIONS, abstract_items, migrate
from clipjax.training.program import build_program
from clipjax.training.step import from_items, to_items

pytestmark = pytest.mark.newest

OLD = pathlib.Path(__file__).parents[1] / "golden" / "checkpoint_before_layout" / "checkpoints" / "9"


def restore(abstract) -> dict:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        wanted = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
        return dict(reader.restore(OLD.absolute(), args=ocp.args.Composite(**wanted)).items())


def test_the_state_of_format_1_becomes_one_of_today():
    config = from_dict(json.loads((OLD / "config" / "metadata").read_text()))
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    abstract = build_program(config, mesh, num_samples=64).abstract_state
    newest = to_items(abstract)
    old = restore(abstract_items(1, newest))
    assert any(name.endswith("2/count") for name in leaf_paths(old["train"]["opt_state"]))
    state = from_items(migrate(1, old, init_health()))
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for name, ours, asked in zip(leaf_paths(state), jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype) == (asked.shape, asked.dtype), name
    assert int(state.step) == 9
    assert old["train"]["samples_skipped"].shape == (11,)
    np.testing.assert_array_equal(state.samples_skipped[:11], old["train"]["samples_skipped"])
    assert not np.any(state.samples_skipped[11:])
    assert [int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32] == [9]  # Adam's
    with pytest.raises(ValueError, match=r"(?i)structure|mismatch|tree"):
        restore(newest)


def test_the_newest_format_stays_as_it_is_and_frozen_parameters_migrate():
    config = from_dict(json.loads((OLD / "config" / "metadata").read_text()))
    config.optim.freeze = ("image/.*",)
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    items = to_items(build_program(config, mesh, num_samples=64).abstract_state)
    assert abstract_items(FORMAT, items) is items
    assert migrate(FORMAT, items, init_health()) is items
    again = jax.eval_shape(lambda old: migrate(1, old, init_health()), abstract_items(1, items))
    assert jax.tree.structure(again) == jax.tree.structure(items)
    assert set(MIGRATIONS) == set(range(1, FORMAT))


@pytest.mark.parametrize("format_", [0, FORMAT + 1, "2", None, True])
def test_a_format_that_is_not_known_is_refused(format_):
    with pytest.raises(
        ValueError, match=re.escape(f"data.format={format_!r} must be a whole number from 1 to {FORMAT}")
    ):
        abstract_items(format_, {})
