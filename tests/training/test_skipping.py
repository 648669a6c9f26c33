"""Updates that are not finite are skipped on all devices; nothing is lost on saving; two runs are one."""

import contextlib
import gc
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.checkpoints.manager import Checkpoints, DamagedCheckpoint
from clipjax.checkpoints.records import RECORDS
from clipjax.config import CheckpointConfig, MeshConfig
from clipjax.losses import LossInputs
from clipjax.pytrees import leaf_paths, to_flat
from clipjax.runtime import sharding
from clipjax.training.program import build_program
from clipjax.training.step import STATE_RULES, from_items, to_items
from tests.training.faults import DEVICES, PAIRS, bits, make_batch, setting, small_config

pytestmark = [pytest.mark.newest, pytest.mark.heavy]

BROKEN = 3  # the device
ROWS = slice(BROKEN * PAIRS // DEVICES, (BROKEN + 1) * PAIRS // DEVICES)
GO_ON = {"step", "samples_skipped", "health/skipped", "health/skipped_in_a_row"}
"""Leaves that a skipped update changes."""
FAULTS = (
    *(("pixels", value) for value in (np.nan, np.inf)),
    *(("gradient", value) for value in (np.nan, -np.inf, 1e30)),  # the last one's square overflows
    *(("loss", value) for value in (np.nan, np.inf)),
)


def broken_batch(variant: str, place: str, value: float) -> dict[str, np.ndarray]:
    """Return a batch with a value that is not finite in the rows of one device."""
    batch = make_batch(variant)
    batch["skip_reason"][0] = 1  # counted although the update is skipped
    if place == "pixels":
        batch["image"][ROWS, 0, 0, 0] = value
    else:
        batch["fault"][ROWS.start, ["gradient", "loss"].index(place)] = value
    return batch


def differing(before: dict, after: dict) -> set[str]:
    return {name for name in before if before[name] != bits(after[name])}


@pytest.mark.parametrize("variant", ["everything", "cached"])
def test_an_update_that_is_not_finite_changes_nothing_but_the_counters(variant):
    made = setting(variant)
    state, _ = made.run(made.init(jax.random.key(0)), make_batch(variant))
    for count, (place, value) in enumerate(FAULTS, start=1):
        before = {name: bits(leaf) for name, leaf in to_flat(state).items()}
        state, metrics = made.run(state, broken_batch(variant, place, value))
        changed = differing(before, to_flat(state))
        assert changed == GO_ON, (place, value)
        assert int(metrics["skipped_updates"]) == int(metrics["skipped_in_a_row"]) == count
    assert int(state.step) == 1 + count
    before = {name: bits(leaf) for name, leaf in to_flat(state).items()}
    state, metrics = made.run(state, make_batch(variant, seed=1))
    assert differing(before, to_flat(state)) >= set(before) - {"key", "samples_skipped", "health/skipped"}
    assert (int(metrics["skipped_updates"]), int(metrics["skipped_in_a_row"])) == (count, 0)
    counts = [int(leaf) for name, leaf in to_flat(state.opt_state).items() if name.endswith("count")]
    assert counts == [2]  # Adam's own, of the updates that were applied
    rate = made.program.config.optim.learning_rate * (1 + np.cos(np.pi * (1 + count) / 100)) / 2
    assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-5)


def test_every_leaf_changes_and_comes_back_bit_for_bit(tmp_path):
    made = setting("everything")
    state = made.init(jax.random.key(0))
    before = {name: bits(leaf) for name, leaf in to_flat(state).items()}
    batches = [make_batch("everything", seed) for seed in (1, 2)]
    state, _ = made.run(state, *batches, broken_batch("everything", "loss", np.nan))
    assert set(before) - differing(before, to_flat(state)) == {"key"}  # the run's, for ever
    items = to_items(state)
    again = from_items(items)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert len(jax.tree.leaves(items)) == len(jax.tree.leaves(state))
    checkpoints, abstract = save(tmp_path, items), abstract_of(items)
    restored, _ = checkpoints.restore(1, abstract)
    assert {name: bits(leaf) for name, leaf in to_flat(from_items(restored)).items()} == {
        name: bits(leaf) for name, leaf in to_flat(state).items()
    }
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for group, tree in jax.tree.map(lambda x: x.update(sharding=one), abstract).items():
        for leaf in leaf_paths(tree):
            checkpoints._verified = 1  # as a start has found it before it restores
            with without(checkpoints.path(1) / group, leaf), pytest.raises(DamagedCheckpoint) as refused:
                checkpoints.restore(1, {group: tree})
            assert "checkpoints/1 cannot be restored into this config" in str(refused.value)
            assert leaf.rpartition("/")[2] in str(refused.value)
    assert checkpoints.restore(1, abstract)[0].keys() == items.keys()  # nothing else was wrong with it
    gc.collect()


def save(workdir: pathlib.Path, items: dict) -> Checkpoints:
    """Save items as step 1."""
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    checkpoints.save(1, items, {name: {"format": 2} for name in RECORDS})
    checkpoints.wait()
    return checkpoints


def abstract_of(items: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)


@contextlib.contextmanager
def without(group: pathlib.Path, leaf: str) -> Iterator[None]:
    """Let a saved group lack one leaf in the `with` block."""
    path = group / "_METADATA"
    content = path.read_bytes()
    record = json.loads(content)
    (key,) = [key for key, entry in record["tree_metadata"].items() if _path(entry) == leaf]
    del record["tree_metadata"][key]
    path.write_text(json.dumps(record))
    try:
        yield
    finally:
        path.write_bytes(content)


def _path(entry: dict) -> str:
    return "/".join(part["key"] for part in entry["key_metadata"])


@pytest.mark.filterwarnings("ignore:.*[Ss]harding:UserWarning")
def test_a_state_of_8_devices_goes_on_with_1_2_and_4_and_on_other_axes(tmp_path):
    made = setting("cached")
    state, _ = made.run(made.init(jax.random.key(0)), make_batch("cached"))
    items, batch = to_items(state), make_batch("cached", seed=1)
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(items["params"])]
    checkpoints = save(tmp_path, items)
    _, metrics = made.run(state, batch)
    for sizes in ({"data": 1}, {"fsdp": 2}, {"data": 2, "tensor": 2}):
        config = small_config("cached")
        config.microbatch_size = None
        mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
        with jax.set_mesh(mesh):
            program = build_program(config, mesh, num_samples=1)
            abstract = to_items(program.abstract_state)
            restored = from_items(checkpoints.restore(1, abstract)[0])
            names = leaf_paths(restored)
            for name, ours, asked in zip(
                names,
                jax.tree.leaves(restored),
                jax.tree.leaves(sharding.state_shardings(mesh, program.abstract_state, STATE_RULES)),
                strict=True,
            ):
                assert ours.sharding.is_equivalent_to(asked, ours.ndim), name
            for ours, theirs in zip(jax.tree.leaves(restored.params), expected, strict=True):
                assert np.asarray(ours).tobytes() == theirs.tobytes()
            gradients = program.train_step.gradients
            loss = jax.jit(lambda params, batch: gradients(params, {}, batch, LossInputs(), jax.random.key(0))[1].loss)  # noqa: B023
            here = loss(restored.params, sharding.global_batch(mesh, batch))
        assert float(here) == pytest.approx(float(metrics["loss"]), abs=1e-6), sizes


def test_the_same_run_twice_is_equal_to_the_bit_over_100_steps():
    made = setting("cached")
    batches = [make_batch("cached", seed) for seed in range(100)]

    def run() -> tuple[list[float], dict[str, list[bytes]]]:
        state, losses = made.init(jax.random.key(0)), []
        for batch in batches:
            state, metrics = made.run(state, batch)
            losses.append(float(metrics["loss"]))
        return losses, {name: bits(leaf) for name, leaf in to_flat(state).items()}

    first, second = run(), run()
    assert first == second
    assert len(set(first[0])) > 90
    assert np.isfinite(first[0]).all()


@pytest.mark.parametrize("forced", [np.log(1e4), np.inf])
def test_a_logit_scale_above_its_maximum_is_used_and_left_at_the_maximum(forced):
    made = setting("cached")
    state = made.init(jax.random.key(0))
    scale = jax.device_put(jnp.float32(forced), state.params["log_logit_scale"].sharding)
    state = jax.tree.unflatten(
        jax.tree.structure(state),
        [scale if name == "params/log_logit_scale" else x for name, x in to_flat(state).items()],
    )
    state, metrics = made.run(state, make_batch("cached"))
    assert float(metrics["logit_scale"]) == pytest.approx(100.0, rel=1e-6)
    assert np.isfinite(float(metrics["loss"])) and int(metrics["skipped_updates"]) == 0
    assert 90 < float(jnp.exp(state.params["log_logit_scale"])) <= 100.0001
