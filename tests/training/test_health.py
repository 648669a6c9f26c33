"""The rule for loss spikes, and the counts of skipped updates."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import MeshConfig, RecoveryConfig
from clipjax.runtime import sharding
from clipjax.training.health import WINDOW, Health, agreed_norm, init_health, is_finite, observe

pytestmark = pytest.mark.newest

SIGMAS = RecoveryConfig().spike_sigmas


@jax.jit
def follow(health: Health, losses: jax.Array) -> tuple[Health, jax.Array]:
    """Observe one loss after the other; return the spikes among them."""
    return jax.lax.scan(lambda health, loss: observe(health, loss, jnp.isfinite(loss), SIGMAS), health, losses)


def noisy(mean: float, spread: float, count: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).lognormal(np.log(mean), spread, count), jnp.float32)


@pytest.mark.parametrize(("mean", "spread"), [(9.0, 0.01), (2.0, 0.1), (0.4, 0.5)])
def test_ten_times_the_loss_is_a_spike_at_once_and_noise_is_none(mean, spread):
    health, spikes = follow(init_health(), noisy(mean, spread, 1000))
    assert not spikes.any()
    after, spikes = follow(health, jnp.float32([10 * mean, mean]))
    assert spikes.tolist() == [True, False]
    assert int(after.num_losses) == 1001  # a spike does not enter
    assert not jnp.any(after.recent_losses == 10 * mean)


def test_a_window_that_is_not_full_a_floor_and_none_raise_no_alarm():
    health, _ = follow(init_health(), jnp.full(WINDOW - 1, 2.0))
    assert not follow(health, jnp.float32([200.0]))[1].any()
    flat, _ = follow(init_health(), jnp.full(WINDOW, 2.0))
    assert follow(flat, jnp.float32([2.4, 2.6]))[1].tolist() == [False, True]  # the deviation is 0
    small, _ = follow(init_health(), jnp.full(WINDOW, 0.001))
    assert follow(small, jnp.float32([0.05, 0.2]))[1].tolist() == [False, True]
    assert not observe(flat, jnp.float32(200.0), jnp.bool_(True), None)[1]


def test_losses_that_are_not_finite_are_counted_and_do_not_enter():
    health, spikes = follow(init_health(), jnp.float32([1, np.nan, np.inf, 2, np.nan]))
    assert not spikes.any()
    assert (int(health.skipped), int(health.skipped_in_a_row), int(health.num_losses)) == (3, 1, 2)
    assert health.recent_losses[:3].tolist() == [1, 2, 0]


def test_the_ring_keeps_the_newest():
    health, _ = follow(init_health(), jnp.arange(WINDOW + 3) / WINDOW)
    assert sorted((health.recent_losses * WINDOW).tolist()) == list(range(3, WINDOW + 3))
    assert all(x.dtype == y.dtype for x, y in zip(*map(jax.tree.leaves, (health, init_health())), strict=True))


def test_moving_averages_of_pairs_without_negatives_are_no_fault():
    rows = jnp.asarray([[0.0, -jnp.inf], [1.0, 2.0]])
    one = jnp.float32(1)
    assert is_finite(one, one, {}, rows)
    assert not is_finite(one, one, {}, rows.at[1, 1].set(jnp.inf))
    assert not is_finite(one, one, {}, rows.at[1, 1].set(jnp.nan))
    assert not is_finite(one, one, {"mean": jnp.float32([0, jnp.nan])})
    assert not is_finite(one, jnp.inf)
    assert dataclasses.fields(Health)[0].name == "skipped"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_norm_that_one_device_alone_finds_not_finite_is_so_on_all(value):
    """Else the processes would not all go back."""
    mesh = sharding.make_mesh(MeshConfig(data=8))
    copies = [jax.device_put(jnp.float32(value if i == 5 else 2), device) for i, device in enumerate(mesh.devices.flat)]
    norm = jax.make_array_from_single_device_arrays((), sharding.replicated(mesh), copies)
    good = jax.device_put(jnp.float32(2), sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        agree = jax.jit(agreed_norm, out_shardings=sharding.replicated(mesh))
        assert [float(shard.data) for shard in agree(norm).addressable_shards] == [np.inf] * 8
        assert float(agree(good)) == 2


def test_the_recorded_runs_raise_no_alarm():
    """Runs that had no spike, recorded by `python -m benchmarks.spike_alarms`, by the rule of today."""
    from benchmarks.spike_alarms import count_alarms

    recorded = json.loads((pathlib.Path(__file__).parents[2] / "benchmarks/results/spike_alarms.json").read_text())
    assert SIGMAS is not None and sum(map(len, recorded["losses"].values())) == 6000
    for name, losses in recorded["losses"].items():
        assert count_alarms(losses, SIGMAS) == 0, name
        assert count_alarms([*losses, 10 * losses[-1] + 1], SIGMAS) == 1, name
