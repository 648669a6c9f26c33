"""The training state and the pure step from one state to the next.

`TrainState` is all that training needs to go on; `init_state` makes one, `make_train_step` the function that updates
it. All choices are made while building the step; nothing branches inside it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipjax.config import Config, LossKind, steps_of
from clipjax.data.sample import REASONS
from clipjax.losses import MovingAverages, Teacher
from clipjax.losses.moving_averages import MovingAveragesAccess, init_moving_averages
from clipjax.models.towers import PARAMETER_RULES
from clipjax.pytrees import global_norm
from clipjax.runtime.sharding import Rules
from clipjax.typing import Batch, Key, Metrics, Params

TrainStep = Callable[["TrainState", Batch, Params | None], tuple["TrainState", Metrics]]
Forward = Callable[[Params, Batch, Key], tuple[Any, ...]]

STATE_RULES: Rules = (*PARAMETER_RULES, (r"samples_skipped", (None,)), (r"memory", ("batch", None)))
"""Dimensions of every array of a training state."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "opt_state", "ema", "key", "samples_skipped", "memory", "batch_stats"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """What one step hands to the next.

    Attributes:
        step: completed updates, int32 scalar.
        params: the model's parameters, float32.
        opt_state: the optimizer's state.
        ema: moving average of `params`, or None where none is kept.
        key: the run's PRNG key; step s draws from `fold_in(key, s)`.
        samples_skipped: unusable samples so far, of all processes, int32 by reason (`data.sources.REASONS`).
        memory: what the `global` loss knows of every sample (`losses.memory`), or None with other losses.
        batch_stats: running statistics of BatchNorm, or None in models without.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None
    key: Key
    samples_skipped: jax.Array
    memory: jax.Array | None = None
    batch_stats: Params | None = None


def make_init_state(
    config: Config,
    init_params: Callable[[Key], Params],
    tx: optax.GradientTransformation,
    *,
    num_samples: int,
    init_batch_stats: Callable[[], Params] = dict,
) -> Callable[[Key], TrainState]:
    """`init_state(key)`: a fresh state. Jit it with shardings, so that no device ever holds more than its part.

    Args:
        config: the run.
        init_params: key -> parameters.
        tx: the optimizer.
        num_samples: size of the training source.
        init_batch_stats: the model's running statistics to start with.
    """

    def init_state(key: Key) -> TrainState:
        params_key, run_key = jax.random.split(key)
        params = init_params(params_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            ema=None if config.optim.ema_decay is None else jax.tree.map(jnp.copy, params),
            key=run_key,
            samples_skipped=jnp.zeros(len(REASONS), jnp.int32),
            memory=init_moving_averages(num_samples) if config.loss.kind is LossKind.GLOBAL else None,
            batch_stats=init_batch_stats() or None,
        )

    return init_state


def make_train_step(
    config: Config,
    grads_fn: Callable[[Params, Batch, Key], tuple[Params, Metrics]],
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    memory: MovingAveragesAccess | None = None,
    teach: Forward | None = None,
) -> TrainStep:
    """One update: gradients, optimizer, clamp of the logit scale, moving average.

    Args:
        config: gives the clamp and the decay of the average.
        grads_fn: `(params, batch, key) -> (grads, metrics)` over the global batch.
        tx: the optimizer that `schedule` belongs to.
        schedule: learning rate by step, for the metrics.
        memory: access to the state's memory; the `global` loss needs it.
        teach: the frozen teacher's embeddings of a batch, from the step's third argument, the teacher's parameters.
    """
    max_log_scale = math.log(config.model.max_logit_scale)
    update_ema, gamma = _make_ema(config.optim.ema_decay), make_gamma(config)

    def train_step(state: TrainState, batch: Batch, teacher: Params | None = None) -> tuple[TrainState, Metrics]:
        key, remembered = jax.random.fold_in(state.key, state.step), state.memory
        if memory is not None and remembered is not None:
            batch = {**batch, "memory": MovingAverages(memory.gather(remembered, batch["index"]), gamma(state.step))}
        if teach is not None:
            assert teacher is not None
            batch = {**batch, "teacher": Teacher(*teach(teacher, batch, key)[:3])}
        grads, metrics = grads_fn(state.params, {**batch, "batch_stats": state.batch_stats or {}}, key)
        batch_stats = metrics.pop("batch_stats", None) or None
        if memory is not None and remembered is not None:
            remembered = memory.scatter(remembered, batch["index"], metrics.pop("memory"))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: dict[str, Any] = {**optax.apply_updates(state.params, updates)}  # type: ignore[arg-type]
        params["log_logit_scale"] = jnp.minimum(params["log_logit_scale"], max_log_scale)
        by_reason = jax.nn.one_hot(batch["reason"], len(REASONS), dtype=jnp.int32)
        samples_skipped = state.samples_skipped + jnp.sum(by_reason, axis=0)
        metrics = {
            **metrics,
            "logit_scale": jnp.exp(state.params["log_logit_scale"]),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            **_norms(grads, params),
            "samples_skipped": samples_skipped,
        }
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=update_ema(state.ema, params),
            key=state.key,
            samples_skipped=samples_skipped,
            memory=remembered,
            batch_stats=batch_stats,
        )
        return state, metrics

    return train_step


def _norms(grads: Params, params: Params) -> Metrics:
    return {
        "grad_norm": global_norm(grads),
        "grad_norm_image": global_norm(grads["image"]),
        "grad_norm_text": global_norm(grads["text"]),
        "param_norm": global_norm(params),
    }


def make_gamma(config: Config) -> Callable[[jax.Array], jax.Array]:
    """Weight of a sample's newest value in its moving average, by step (arXiv 2407.01445, section 4)."""
    last, steps = config.loss.gamma, steps_of(config.loss.gamma_decay_examples, config)

    def gamma(step: jax.Array) -> jax.Array:
        done = jnp.minimum(step / steps, 1) if steps else jnp.ones(())
        return last + (1 - last) * (1 + jnp.cos(jnp.pi * done)) / 2

    return gamma


def _make_ema(decay: float | None) -> Callable[[Params | None, Params], Params | None]:
    if decay is None:
        return lambda ema, params: None
    return lambda ema, params: jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def eval_params(state: TrainState) -> Params:
    """The parameters to evaluate: the moving average where there is one; BatchNorm's statistics among them."""
    params = state.params if state.ema is None else state.ema
    return params if state.batch_stats is None else {**params, "batch_stats": state.batch_stats}


def to_items(state: TrainState) -> dict[str, Any]:
    """The state as the groups of arrays that a checkpoint keeps apart, so that `params` can be read alone."""
    names = ("step", "opt_state", "key", "samples_skipped", "memory")
    train = {name: value for name in names if (value := getattr(state, name)) is not None}
    groups = {"params": state.params, "train": train, "ema": state.ema, "batch_stats": state.batch_stats}
    return {name: group for name, group in groups.items() if group is not None}


def from_items(groups: Mapping[str, Any]) -> TrainState:
    """The state that `to_items` took apart."""
    others = {name: groups.get(name) for name in ("params", "ema", "batch_stats")}
    return TrainState(**others, **groups["train"])
