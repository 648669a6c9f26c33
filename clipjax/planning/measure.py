"""Measurement of a planned step on the accelerators of this machine, to compare with the prediction."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.planning.report import Compiled

WARM_UP, ROUNDS = 3, 10


def measure(compiled: Compiled, init_state: Any) -> dict[str, Any]:
    """Run a compiled step on made-up pairs.

    Args:
        compiled: for the devices of this machine.
        init_state: key -> a fresh state.

    Returns:
        `step_seconds`, the median of `ROUNDS` steps, each of which ends before the next begins; `all_step_seconds`;
        `peak_hbm_bytes`, the most that one device ever held, and `device`.
    """
    with jax.set_mesh(compiled.mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, compiled.state)
        state = jax.jit(init_state, out_shardings=places)(jax.random.key(0))
        batch = make_batch(compiled.batch)
        teacher = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), compiled.teacher)
        seconds = []
        for _ in range(WARM_UP + ROUNDS):
            start = time.perf_counter()
            state, metrics = compiled.executable(state, batch, teacher)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
    device = compiled.mesh.local_devices[0]
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "step_seconds": statistics.median(seconds[WARM_UP:]),
        "all_step_seconds": seconds[WARM_UP:],
        "peak_hbm_bytes": stats.get("peak_bytes_in_use"),
        "loss": float(metrics["loss"]),
    }


def make_batch(shapes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Make pairs of noise in the shapes that a step takes."""
    keys = jax.random.split(jax.random.key(1), len(shapes))
    made = {}
    for key, (name, leaf) in zip(keys, sorted(shapes.items()), strict=True):
        match name:
            case "image" | "patches":
                array = jax.random.bits(key, leaf.shape, jnp.uint8)
            case "tokens":
                array = jax.random.randint(key, leaf.shape, 1, 256, jnp.int32)
            case "skip_reason":
                array = jnp.full(leaf.shape, -1, jnp.int32)
            case "crop":  # all of the canvas
                side = shapes["image"].shape[1]
                array = jnp.broadcast_to(jnp.array([0, 0, side, side, side, side, 0], leaf.dtype), leaf.shape)
            case "segment" | "place" | "grid":  # images of one row of patches, without padding
                per_row = shapes["grid"].shape[1]
                columns = shapes["segment"].shape[1] // per_row
                number, column = jnp.divmod(jnp.arange(columns * per_row, dtype=jnp.int32), columns)
                place = jnp.stack([jnp.zeros_like(column), column], axis=-1)
                grid = jnp.broadcast_to(jnp.array([1, columns], jnp.int32), (per_row, 2))
                array = jnp.broadcast_to({"segment": number, "place": place, "grid": grid}[name], leaf.shape)
            case _:
                array = jnp.arange(leaf.size, dtype=jnp.int32).reshape(leaf.shape)
        made[name] = jax.device_put(array, leaf.sharding)
    return made
