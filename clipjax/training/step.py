"""The training state and the pure step from one state to the next.

`TrainState` is all that training needs to go on; `make_init_state` gives the function that makes one, `TrainStep` is
the function that updates it.
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
from clipjax.data.sample import NUM_COUNTERS
from clipjax.losses import LossInputs, MovingAverages, Teacher
from clipjax.losses.moving_averages import MovingAveragesAccess, init_moving_averages
from clipjax.models.towers import PARAMETER_RULES
from clipjax.runtime.sharding import Rules
from clipjax.training.device_resize import DeviceResize
from clipjax.training.gradients import Gradients, TeacherForward
from clipjax.training.health import Health, agreed_norm, init_health, is_finite, observe, select
from clipjax.training.optimizer import make_schedule
from clipjax.typing import Batch, Key, Metrics, Params, Patches

STATE_RULES: Rules = (
    *PARAMETER_RULES,
    (r"samples_skipped|health/recent_losses", (None,)),
    (r"memory", ("batch", None)),
)
"""Dimensions of every array of a training state."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "opt_state", "ema", "key", "samples_skipped", "health", "memory", "batch_stats"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """State of training between two steps.

    Attributes:
        step: completed updates, skipped ones among them, int32 scalar.
        params: the model's parameters, float32.
        opt_state: the optimizer's state.
        ema: moving average of `params`, or None where none is kept.
        key: the run's PRNG key; step s draws from `fold_in(key, s)`.
        samples_skipped: unusable samples so far, of all processes, int32 by source and reason (`data.sample`).
        health: skipped updates and recent losses.
        memory: every sample's moving averages for the `global` loss (`losses.moving_averages`), or None.
        batch_stats: running statistics of BatchNorm, or None in models without.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None
    key: Key
    samples_skipped: jax.Array
    health: Health
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
    """Return `init_state(key)`, which makes a fresh state. Jit it with shardings, so that no device holds all of it.

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
            samples_skipped=jnp.zeros(NUM_COUNTERS * config.data.num_sources, jnp.int32),
            health=init_health(),
            memory=init_moving_averages(num_samples) if config.loss.kind is LossKind.GLOBAL else None,
            batch_stats=init_batch_stats() or None,
        )

    return init_state


@dataclass(frozen=True, eq=False)
class TrainStep:
    """One update: gradients, optimizer, clamp of the logit scale, moving average. All choices are made by its parts.

    An update that is not finite is skipped: only `step`, `samples_skipped` and `health` go on. One that overflows the
    parameters is not, which would take both copies at once: `param_norm` is infinite then, and the run goes back.

    Attributes:
        config: gives the clamp, the decay of the average, the rule for spikes, and the learning rate for the metrics.
        gradients: of the loss over the global batch.
        tx: the optimizer.
        averages: access to the state's memory; the `global` loss needs it.
        teacher_forward: the frozen teacher, whose parameters are the third argument of the step; None: without.
        device_resize: crops and resizes the pictures; None: they come so.
    """

    config: Config
    gradients: Gradients
    tx: optax.GradientTransformationExtraArgs
    averages: MovingAveragesAccess | None = None
    teacher_forward: TeacherForward | None = None
    device_resize: DeviceResize | None = None

    __name__ = "train_step"  # profiles and compiler dumps call the compiled program so

    def __call__(
        self, state: TrainState, batch: Batch, teacher_params: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        """Return the next state, and metrics by name."""
        batch = self.with_images(batch)
        key = jax.random.fold_in(state.key, state.step)
        inputs = self.loss_inputs(state, batch, key, teacher_params)
        used = self._clamp(state.params)  # a checkpoint's scale may be above the maximum
        grads, aux = self.gradients(used, state.batch_stats or {}, batch, inputs, key)
        grad_norms = _grad_norms(grads)
        finite = is_finite(aux.loss, grad_norms["grad_norm"], aux.batch_stats, aux.log_mean)
        updates, opt_state = self.tx.update(grads, state.opt_state, used, step=state.step, finite=finite)
        params = select(finite, self._clamp(optax.apply_updates(used, updates)), state.params)  # type: ignore[arg-type]
        health, spike = observe(state.health, aux.loss, finite, self.config.recovery.spike_sigmas)
        by_reason = jax.nn.one_hot(batch["skip_reason"], state.samples_skipped.size, dtype=jnp.int32)
        samples_skipped = state.samples_skipped + jnp.sum(by_reason, axis=0)
        metrics = {
            "loss": aux.loss,
            **aux.metrics,
            "logit_scale": jnp.exp(used["log_logit_scale"]),
            "learning_rate": jnp.asarray(make_schedule(self.config)(state.step), jnp.float32),
            **grad_norms,
            "param_norm": agreed_norm(optax.tree.norm(params)),
            "samples_skipped": samples_skipped,
            "skipped_updates": health.skipped,
            "skipped_in_a_row": health.skipped_in_a_row,
            "loss_spike": spike.astype(jnp.int32),
        }
        if "segment" in batch:
            metrics["padding_share"] = jnp.mean(batch["segment"] < 0, dtype=jnp.float32)
        next_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=select(finite, _update_ema(self.config.optim.ema_decay, state.ema, params), state.ema),
            key=state.key,
            samples_skipped=samples_skipped,
            health=health,
            memory=self._update_memory(state.memory, batch, inputs.memory, aux.log_mean, finite),
            batch_stats=select(finite, aux.batch_stats or None, state.batch_stats),
        )
        return next_state, metrics

    def with_images(self, batch: Batch) -> Batch:
        """Return the batch with the pictures that the model gets as its `image`."""
        if "patches" in batch:
            return {**batch, "image": Patches(*(batch[name] for name in Patches._fields))}
        return batch if self.device_resize is None else self.device_resize(batch)

    def _update_memory(
        self,
        memory: jax.Array | None,
        batch: Batch,
        before: MovingAverages | None,
        log_mean: jax.Array | None,
        finite: jax.Array,
    ) -> jax.Array | None:
        """Return the memory with the new rows of this batch, or with the old ones where the update is skipped."""
        if self.averages is None or memory is None or before is None or log_mean is None:
            return memory
        return self.averages.scatter(memory, batch["index"], select(finite, log_mean, before.log_mean))

    def loss_inputs(self, state: TrainState, batch: Batch, key: Key, teacher_params: Params | None) -> LossInputs:
        """Return groups of pairs, the teacher's embeddings and the moving averages, as far as this run has them."""
        teacher, memory = None, None
        if self.averages is not None and state.memory is not None:
            log_mean = self.averages.gather(state.memory, batch["index"])
            memory = MovingAverages(log_mean, make_gamma(self.config)(state.step))
        if self.teacher_forward is not None:
            assert teacher_params is not None
            teacher = Teacher(*self.teacher_forward(teacher_params, batch, key)[:3])
        return LossInputs(batch.get("group"), teacher, memory)

    def _clamp(self, params: Params) -> Params:
        """Return parameters whose logit scale does not exceed its maximum."""
        most = math.log(self.config.model.max_logit_scale)
        return {**params, "log_logit_scale": jnp.minimum(params["log_logit_scale"], most)}


def _grad_norms(grads: Params) -> Metrics:
    return {
        "grad_norm": optax.tree.norm(grads),
        "grad_norm_image": optax.tree.norm(grads["image"]),
        "grad_norm_text": optax.tree.norm(grads["text"]),
    }


def make_gamma(config: Config) -> Callable[[jax.Array], jax.Array]:
    """Return `gamma(step)`: weight of a sample's newest value in its moving average (arXiv 2407.01445, section 4)."""
    last, steps = config.loss.gamma, steps_of(config.loss.gamma_decay_examples, config)

    def gamma(step: jax.Array) -> jax.Array:
        done = jnp.minimum(step / steps, 1) if steps else jnp.ones(())
        return last + (1 - last) * (1 + jnp.cos(jnp.pi * done)) / 2

    return gamma


def _update_ema(decay: float | None, ema: Params | None, params: Params) -> Params | None:
    if decay is None:
        return None
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def eval_params(state: TrainState) -> Params:
    """Return the parameters to evaluate: the moving average where there is one; BatchNorm's statistics among them."""
    params = state.params if state.ema is None else state.ema
    return params if state.batch_stats is None else {**params, "batch_stats": state.batch_stats}


def to_items(state: TrainState) -> dict[str, Any]:
    """Return the state as the items of a checkpoint, which keeps them apart, so that `params` can be read alone."""
    names = ("step", "opt_state", "key", "samples_skipped", "memory")
    train = {name: value for name in names if (value := getattr(state, name)) is not None}
    train["health"] = vars(state.health)
    items = {"params": state.params, "train": train, "ema": state.ema, "batch_stats": state.batch_stats}
    return {name: item for name, item in items.items() if item is not None}


def from_items(items: Mapping[str, Any]) -> TrainState:
    """Return the state that `to_items` took apart."""
    others = {name: items.get(name) for name in ("params", "ema", "batch_stats")}
    return TrainState(**others, **{**items["train"], "health": Health(**items["train"]["health"])})
