"""The compiled heart of a run: one config and one mesh become the step that trains, and the shapes that it takes.

`train` runs what `build_program` makes; `plan` compiles the same for machines that are not here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clipjax.config import Config, LossKind, SamePair
from clipjax.losses import build_loss
from clipjax.losses.moving_averages import make_moving_averages_access
from clipjax.models.clip import Clip, abstract_params, build_clip, make_encode, make_frozen_encode
from clipjax.models.towers import PARAMETER_RULES
from clipjax.runtime import sharding
from clipjax.runtime.compilation import compiler_options
from clipjax.training import gradients, optimizer
from clipjax.training.step import STATE_RULES, Forward, TrainState, TrainStep, make_init_state, make_train_step
from clipjax.typing import Key, Params

BATCH = ("image", "tokens", "reason")
"""What of a batch every step takes."""


@dataclass(frozen=True)
class Program:
    """What is compiled for a run.

    Attributes:
        config: the run.
        mesh: what it runs on.
        clip: the model.
        init_state: key -> a fresh state.
        train_step: state, batch, teacher's parameters -> the next state, metrics.
        teacher: the config of the frozen model to learn from, if there is one.
    """

    config: Config
    mesh: Mesh
    clip: Clip
    init_state: Any
    train_step: TrainStep
    teacher: Config | None

    def jit(self, state: Any) -> Any:
        """The step, to be compiled for a state that lies as this one does, which it takes over."""
        return jax.jit(
            self.train_step,
            out_shardings=(sharding.shardings_of(state), sharding.replicated(self.mesh)),
            donate_argnums=0,
            compiler_options=compiler_options(list(self.mesh.devices.flat)),
        )

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and places of the state."""
        key: Key = jax.eval_shape(lambda: jax.random.key(0))  # type: ignore[assignment]
        state = jax.eval_shape(self.init_state, key)
        return sharding.with_shardings(state, sharding.state_shardings(self.mesh, state, STATE_RULES))

    def abstract_teacher(self) -> Params | None:
        """Shapes, dtypes and places of the teacher's parameters."""
        if self.teacher is None:
            return None
        params = abstract_params(self.teacher.model)
        return sharding.with_shardings(params, sharding.state_shardings(self.mesh, params, PARAMETER_RULES))

    def abstract_batch(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and places of a batch."""
        config, n = self.config, self.config.global_batch_size
        side, length = config.model.image.image_size, config.model.text.context_length
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "image": ((n, side, side, 3), jnp.uint8),
            "tokens": ((n, length), jnp.int32),
            "reason": ((n,), jnp.int32),
        }
        if config.loss.same_pair is not SamePair.NONE:
            shapes["group"] = ((n,), jnp.int32)
        if config.loss.kind is LossKind.GLOBAL:
            shapes["index"] = ((n,), jnp.int32)
        where = sharding.batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(*of_array, sharding=where) for name, of_array in shapes.items()}


def build_program(
    config: Config,
    mesh: Mesh,
    *,
    num_samples: int,
    tx: optax.GradientTransformation | None = None,
    teacher: Config | None = None,
) -> Program:
    """The step of a run on a mesh.

    Args:
        config: the run.
        mesh: what it runs on.
        num_samples: size of the training source.
        tx: the optimizer, where it exists already.
        teacher: the config of the frozen model to learn from.
    """
    clip = build_clip(config.model, frozen=config.optim.freeze)
    tx = optimizer.make_tx(config, abstract_params(config.model)) if tx is None else tx
    train_step = make_train_step(
        config,
        gradients.make_grads(config, make_encode(clip, config.data), build_loss(config.loss, mesh), mesh),
        tx,
        optimizer.make_schedule(config),
        memory=make_moving_averages_access(mesh) if config.loss.kind is LossKind.GLOBAL else None,
        teach=_make_teach(config, teacher, mesh),
    )
    init_state = make_init_state(config, clip.init, tx, num_samples=num_samples, init_batch_stats=clip.init_batch_stats)
    return Program(config, mesh, clip, init_state, train_step, teacher)


def _make_teach(config: Config, teacher: Config | None, mesh: Mesh) -> Forward | None:
    """How the frozen teacher embeds a batch; None where there is none."""
    if teacher is None:
        return None
    return gradients.make_forward(config, make_frozen_encode(build_clip(teacher.model), teacher.data), mesh)
