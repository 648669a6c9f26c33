"""The optimizer: schedule, masks for weight decay and freezing, and the optax chain.

The path of a parameter decides whether it is decayed or frozen, never the model.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax.config import Config, OptimConfig, steps_of, total_steps
from clipjax.pytrees import leaf_paths, map_with_path, match_any
from clipjax.training.health import select
from clipjax.typing import Params

DECAYED = ("kernel", "token_embed", "pos_embed", "registers", "probe", "queries")
"""Last names of the parameters that decay: those with two or more dimensions, as in open_clip (no gain or bias)."""


def make_schedule(config: Config) -> optax.Schedule:
    """Return the learning rate by step: linear over `warmup_examples`, then half a cosine down to the final rate."""
    warmup, steps = steps_of(config.warmup_examples, config), total_steps(config)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.optim.learning_rate,
        peak_value=config.optim.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.optim.final_learning_rate,
    )


class ScaleByStepState(NamedTuple):
    """The empty state of `scale_by_step`; its own type, so that `training.migrations` finds the place."""


def scale_by_step(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Return the multiplication of updates by minus the learning rate of the step that `update(..., step=)` gives.

    `optax.scale_by_learning_rate` counts its own calls: a skipped update, whose state is not kept, would shift the
    schedule.
    """

    def init(params: optax.Params) -> ScaleByStepState:
        del params
        return ScaleByStepState()

    def update(
        updates: optax.Updates,
        state: ScaleByStepState,
        params: optax.Params | None = None,
        *,
        step: jax.Array,
        **_: Any,
    ) -> tuple[optax.Updates, ScaleByStepState]:
        del params
        factor = -1 * schedule(step)
        return jax.tree.map(lambda update: jnp.array(factor, dtype=update.dtype) * update, updates), state

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Return `optax.scale_by_adam`, whose moments and count stay as they are if `update(..., finite=)` is false.

    The moments are selected before the updates are made of them, so that the new and the old moments are never both in
    memory; the updates of a skipped step mean nothing.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(
        updates: optax.Updates,
        state: optax.ScaleByAdamState,
        params: optax.Params | None = None,
        *,
        finite: jax.Array,
        **_: Any,
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        state = select(finite, adam.update(updates, state, params)[1], state)  # type: ignore[arg-type]
        mean = optax.tree.bias_correction(state.mu, b1, state.count)
        square = optax.tree.bias_correction(state.nu, b2, state.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), state

    return optax.GradientTransformationExtraArgs(adam.init, update)  # type: ignore[arg-type]


def decay_mask(params: Params) -> Any:
    """Return True for every parameter to which weight decay applies."""
    return map_with_path(lambda name, _: name.rpartition("/")[2] in DECAYED, params)


def frozen_labels(optim: OptimConfig, params: Params) -> Any:
    """Return "frozen" or "trained" for every parameter.

    Raises:
        ValueError: a pattern of `optim.freeze` that no parameter matches, or patterns that leave nothing to train.
    """
    known = leaf_paths(params)
    for pattern in optim.freeze:
        if not any(match_any([pattern], name) for name in known):
            raise ValueError(f"optim.freeze={pattern!r} matches no parameter; paths look like {known[0]!r}")
    labels = map_with_path(lambda name, _: "frozen" if match_any(optim.freeze, name) else "trained", params)
    if "trained" not in jax.tree.leaves(labels):
        raise ValueError(f"optim.freeze={optim.freeze} leaves no parameter to train")
    return labels


def make_tx(config: Config, params: Params) -> optax.GradientTransformationExtraArgs:
    """Return AdamW with gradient clipping by global norm; frozen parameters get no update and no moments.

    Its `update` takes the run's `step`, from which the learning rate follows, and `finite`: false keeps the state.

    Args:
        config: the run; `params` (arrays or their shapes) only give their paths.

    Source:
        arXiv 1711.05101 (AdamW); arXiv 2103.00020, tables 18 and 19 (defaults).
    """
    optim = config.optim
    clip = optax.identity() if optim.max_grad_norm is None else optax.clip_by_global_norm(optim.max_grad_norm)
    adamw = optax.chain(
        scale_by_adam(optim.beta1, optim.beta2, optim.epsilon),
        optax.add_decayed_weights(optim.weight_decay, decay_mask),
        scale_by_step(make_schedule(config)),
    )
    chain = optax.chain(clip, adamw)  # nested as `optax.adamw` is: checkpoints hold these paths
    if not optim.freeze:
        return chain
    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, frozen_labels(optim, params))
