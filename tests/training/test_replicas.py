"""Copies of the state on several devices: one flipped bit is found, and its device named."""

import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clipjax.config import Config, MeshConfig
from clipjax.runtime import sharding
from clipjax.training.replicas import ReplicaCheck, digest, steps_between_checks

pytestmark = pytest.mark.newest


def make_state(mesh) -> dict:
    """Arrays that are replicated, split over `fsdp`, and split over all; a scalar, a key, bfloat16."""
    axes = ("slice", "data", "fsdp", "tensor")
    values = {
        "scale": (jnp.arange(24, dtype=jnp.float32), PartitionSpec()),
        "kernel": (jnp.ones((8, 6), jnp.float32), PartitionSpec("fsdp")),
        "rows": (jnp.arange(64, dtype=jnp.float32), PartitionSpec(axes)),
        "half": (jnp.ones(5, jnp.bfloat16), PartitionSpec()),
        "count": (jnp.int32(3), PartitionSpec()),
        "key": (jax.random.key(1), PartitionSpec()),
    }
    return {name: jax.device_put(x, NamedSharding(mesh, spec)) for name, (x, spec) in values.items()}


def corrupt(x: jax.Array, device: jax.Device) -> jax.Array:
    """Return the array with the lowest bit of one element flipped on one device."""
    buffers = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(f"u{data.itemsize}")[-1] ^= 1
        buffers.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, buffers)


@pytest.mark.parametrize(("sizes", "uncovered"), [((8, 1), ["rows"]), ((4, 2), ["rows"]), ((1, 8), ["kernel", "rows"])])
def test_a_flipped_bit_is_found_and_its_device_named(sizes, uncovered):
    mesh = sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1]))
    state = make_state(mesh)
    replicas = ReplicaCheck(mesh, state)
    assert replicas.not_covered == uncovered
    assert replicas.find_differing(replicas.check(state)) is None
    device = jax.devices()[5]
    for name in {"scale", "kernel", "half", "count"} - set(uncovered):
        message = replicas.find_differing(replicas.check({**state, name: corrupt(state[name], device)}))
        assert message is not None
        assert message.startswith("copies of the state differ between devices: device 5 (")
        assert message.endswith(f"on host {socket.gethostname()} differs from the others in {name}")
    two = {**state, "scale": corrupt(state["scale"], device), "half": corrupt(state["half"], jax.devices()[0])}
    message = replicas.find_differing(replicas.check(two))
    assert message is not None and message.index("device 0 (") < message.index("device 5 (")


def test_of_two_copies_neither_is_blamed():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    state = make_state(mesh)
    replicas = ReplicaCheck(mesh, state)
    message = replicas.find_differing(replicas.check({**state, "kernel": corrupt(state["kernel"], jax.devices()[5])}))
    assert message is not None
    assert message.count("is one of a tie in kernel") == 2
    assert "device 1 (" in message and "device 5 (" in message


def test_every_single_bit_changes_the_digest_and_so_does_the_order():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    flipped = np.repeat(x[None], 32 * x.size, axis=0)
    bits = flipped.reshape(len(flipped), -1).view(np.uint32)
    for i in range(len(flipped)):
        bits[i, i // 32] ^= np.uint32(1 << i % 32)
    found = jax.jit(jax.vmap(digest))(flipped)
    assert int(digest(jnp.asarray(x))) not in found.tolist()
    assert int(digest(jnp.asarray(x[::-1].copy()))) != int(digest(jnp.asarray(x)))
    assert int(digest(jnp.asarray([True, False]))) != int(digest(jnp.asarray([False, True])))


@pytest.mark.parametrize(
    ("batch", "examples", "steps"), [(32768, 1_000_000, 125), (1000, 1_000_000, 1000), (8, 8, 125)]
)
def test_checks_cost_a_thousandth_whatever_the_batch(batch, examples, steps):
    config = Config(global_batch_size=batch)
    config.recovery.replica_check_examples = examples
    assert steps_between_checks(config) == steps
