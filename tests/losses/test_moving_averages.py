"""The memory of the `global` loss: every sample's own numbers, whatever devices keep them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import MeshConfig
from clipjax.config.validation import MEMORY_UNIT
from clipjax.losses.moving_averages import MovingAveragesAccess, init_moving_averages
from clipjax.runtime.sharding import batch_sharding, make_mesh, state_shardings
from clipjax.training.step import STATE_RULES

SAMPLES = MEMORY_UNIT + 5

pytestmark = pytest.mark.newest


def test_there_is_room_for_every_sample_and_nothing_is_known():
    memory = init_moving_averages(SAMPLES)
    assert memory.shape == (2 * MEMORY_UNIT, 2)
    assert (memory == -jnp.inf).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 3, 1)], ids=str)
def test_what_is_remembered_is_recalled(sizes):
    slices, data, fsdp = sizes
    mesh = make_mesh(MeshConfig(slice=slices, data=data, fsdp=fsdp), jax.devices()[: slices * data * fsdp])
    access, split = MovingAveragesAccess(mesh), batch_sharding(mesh)
    memory = jax.device_put(
        init_moving_averages(SAMPLES),
        state_shardings(mesh, {"memory": init_moving_averages(SAMPLES)}, STATE_RULES)["memory"],
    )
    rng, expected = np.random.default_rng(0), {}
    gather, scatter = jax.jit(access.gather), jax.jit(access.scatter, donate_argnums=0)
    for _ in range(3):
        index = rng.choice(SAMPLES, 24, replace=False).astype(np.int32)
        index[:4] = (0, SAMPLES - 1, MEMORY_UNIT, MEMORY_UNIT - 1)
        index[5] = index[20]  # twice in a batch: the first is kept
        rows = rng.normal(size=(24, 2)).astype(np.float32)
        where = jax.device_put(index, split)
        known = np.asarray(gather(memory, where))
        assert known.tolist() == [expected.get(i, [-np.inf, -np.inf]) for i in index.tolist()]
        memory = scatter(memory, where, jax.device_put(rows, split))
        expected |= dict(zip(index.tolist()[::-1], rows.tolist()[::-1], strict=True))
        assert memory.sharding.is_equivalent_to(split, 2)
    assert int(jnp.sum(jnp.isfinite(memory))) == 2 * len(expected)
