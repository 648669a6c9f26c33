"""Health of a run's numbers: which updates are skipped, and which losses are spikes; all of it on the devices.

`is_finite` decides, `select` skips, `observe` counts and compares the loss with the window of those before it; whether
an update that looked finite has left finite parameters is seen by their norm alone, `agreed_norm`.
"""

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

WINDOW = 128
"""Losses with which a loss is compared."""
FLOOR = 0.25
"""Least excess of a spike over the median, as a share of the median: the deviation alone would do for a loss that
hardly varies, and is then a few roundings."""
FLOOR_ABSOLUTE = 0.1
"""Least excess of a spike over the median, as a loss: for losses near 0, whose share says nothing."""
TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution whose median absolute deviation is 1."""

Tree = TypeVar("Tree")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("skipped", "skipped_in_a_row", "recent_losses", "num_losses"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Health:
    """Counts and losses that a run remembers from step to step.

    Attributes:
        skipped: updates skipped so far, int32 scalar.
        skipped_in_a_row: updates skipped since the last one that was not, int32 scalar.
        recent_losses: the last losses of updates that were applied, without spikes, float32 [WINDOW], as a ring.
        num_losses: losses that have entered the ring so far, int32 scalar; the next one's place is the remainder.
    """

    skipped: jax.Array
    skipped_in_a_row: jax.Array
    recent_losses: jax.Array
    num_losses: jax.Array


def init_health() -> Health:
    """Return the health of a run that begins."""
    skipped, in_a_row, num_losses = (jnp.zeros((), jnp.int32) for _ in range(3))
    return Health(skipped, in_a_row, jnp.zeros(WINDOW, jnp.float32), num_losses)


def is_finite(
    loss: jax.Array, grad_norm: jax.Array, batch_stats: Any = None, log_mean: jax.Array | None = None
) -> jax.Array:
    """Return True, on all devices alike, if an update may be applied.

    Args:
        loss: over the global batch.
        grad_norm: of all gradients; infinite too where the sum of their squares overflows, which would leave Adam's
            second moment infinite.
        batch_stats: new running statistics of BatchNorm.
        log_mean: new moving averages of the `global` loss; -inf is one of a pair that has had no negatives yet.

    Cost:
        One number of 4 bytes is reduced over all devices: a value of which each device holds its own copy may be broken
        in one of them, and without agreement that one alone would skip.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    for leaf in jax.tree.leaves(batch_stats):
        finite &= jnp.all(jnp.isfinite(leaf))
    if log_mean is not None:
        finite &= jnp.all(log_mean < jnp.inf)
    return _on_all_devices(finite)


def agreed_norm(norm: jax.Array) -> jax.Array:
    """Return a norm, or infinity on all devices alike if it is not finite on one.

    Cost:
        One number of 4 bytes is reduced over all devices, as in `is_finite`.
    """
    return jnp.where(_on_all_devices(jnp.isfinite(norm)), norm, jnp.inf)


def _on_all_devices(finite: jax.Array) -> jax.Array:
    """Return True if a flag of which each device has its own copy is true on all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return finite
    agree = jax.shard_map(
        lambda x: jax.lax.pmin(x, mesh.axis_names),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return agree(finite.astype(jnp.int32)) == 1


def select(finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """Return the new tree, or the old one bit for bit: never a product, as 0 * NaN is NaN."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def observe(health: Health, loss: jax.Array, finite: jax.Array, spike_sigmas: float | None) -> tuple[Health, jax.Array]:
    """Return the health after a step, and True if its loss is a spike.

    Args:
        health: before the step.
        loss: of the step.
        finite: the update is applied.
        spike_sigmas: `config.recovery.spike_sigmas`; None: no loss is a spike.
    """
    spike = jnp.zeros((), bool) if spike_sigmas is None else finite & is_spike(health, loss, spike_sigmas)
    enters = finite & ~spike  # `finite` is the same on all devices, the loss may be broken on one
    place = health.num_losses % WINDOW
    entered = health.recent_losses.at[place].set(jnp.where(enters, loss, health.recent_losses[place]))
    skipped = (~finite).astype(jnp.int32)
    after = Health(
        skipped=health.skipped + skipped,
        skipped_in_a_row=(health.skipped_in_a_row + 1) * skipped,
        recent_losses=entered,
        num_losses=health.num_losses + enters,
    )
    return after, spike


def is_spike(health: Health, loss: jax.Array, sigmas: float) -> jax.Array:
    """Return True if a loss stands out from the full window of those before it.

    The excess over the window's median must exceed `sigmas` standard deviations, estimated by the median absolute
    deviation, which a few outliers do not move, and the floors. A spike does not enter the window.

    Ten times the median of positive losses is a spike if the deviation is below 9 / `sigmas` medians: 1.1 by default;
    the largest in the runs below is 0.5. Three runs of the quickstart's model, 6,000 losses without a spike, were
    replayed by `python -m benchmarks.spike_alarms`: no false alarm from 7 sigmas on, 1 at 6, 3 at 5 and 14 at 4.
    """
    center = _median(health.recent_losses)
    deviation = TO_SIGMA * _median(jnp.abs(health.recent_losses - center))
    least = jnp.maximum(sigmas * deviation, jnp.maximum(FLOOR_ABSOLUTE, FLOOR * jnp.abs(center)))
    return (health.num_losses >= WINDOW) & (loss - center > least)


def _median(losses: jax.Array) -> jax.Array:
    ordered = jnp.sort(losses)
    return (ordered[(WINDOW - 1) // 2] + ordered[WINDOW // 2]) / 2
