"""The compiled part of a run: one config and one mesh become the step that trains, and the shapes that it takes.

Training runs what `build_program` makes; planning compiles the same for machines that are not here.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clipjax.config import Config, LossKind, ResizeOn, SamePair, ViTConfig, patch_menu
from clipjax.losses import build_loss
from clipjax.losses.moving_averages import MovingAveragesAccess
from clipjax.models.clip import Clip, abstract_params, build_clip
from clipjax.models.device_resize import BOX
from clipjax.models.towers import PARAMETER_RULES
from clipjax.runtime import sharding
from clipjax.runtime.compilation import compiler_options
from clipjax.training import optimizer
from clipjax.training.device_resize import build_device_resize
from clipjax.training.gradients import Microbatches, TeacherForward, build_gradients
from clipjax.training.step import STATE_RULES, TrainState, TrainStep, make_init_state
from clipjax.typing import Batch, Key, Metrics, Params


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """The functions of a run that are compiled, and the shapes that they take.

    Attributes:
        config: the run.
        mesh: the devices.
        clip: the model.
        tx: the optimizer.
        num_samples: size of the training source.
        train_step: state, batch, teacher's parameters -> the next state, metrics.
        teacher: the config of the frozen model to learn from, if there is one.
    """

    config: Config
    mesh: Mesh
    clip: Clip
    tx: optax.GradientTransformationExtraArgs
    num_samples: int
    train_step: TrainStep
    teacher: Config | None

    def init_state(self, key: Key) -> TrainState:
        """Return a fresh state."""
        clip = self.clip
        init = make_init_state(
            self.config, clip.init, self.tx, num_samples=self.num_samples, init_batch_stats=clip.init_batch_stats
        )
        return init(key)

    def jit(self, state: Any) -> Any:
        """Return the step, jitted for a state with the shardings of this one, whose buffers it takes over."""
        return jax.jit(
            self.train_step,
            out_shardings=(sharding.shardings_of(state), sharding.replicated(self.mesh)),
            donate_argnums=0,
            compiler_options=compiler_options(list(self.mesh.devices.flat)),
        )

    def compile_all(self, say: Callable[[str], None]) -> Callable[..., tuple[TrainState, Metrics]]:
        """Compile the step for each budget of the run; return it, for the shape of the batch that it gets.

        Args:
            say: gets a line on each shape, and one on all.
        """
        state, teacher, steps, start = self.abstract_state, self.abstract_teacher(), {}, time.monotonic()
        per_row, menu = self.config.data.images_per_row, sorted(patch_menu(self.config))
        for number, patches in enumerate(menu, 1):
            begun = time.monotonic()
            step = self.jit(state).lower(state, self.abstract_batch(patches), teacher).compile()
            steps[per_row * patches] = step
            say(
                f"compiled shape {number} of {len(menu)}, {patches} patches per image, in "
                f"{time.monotonic() - begun:.1f} s"
            )
        say(f"compiled {len(menu)} shapes of the step in {time.monotonic() - start:.1f} s")

        def train_step(state: TrainState, batch: Batch, teacher: Params | None = None) -> tuple[TrainState, Metrics]:
            places = batch["patches"].shape[1]
            if places not in steps:  # else it would be compiled now, on some processes perhaps and not on others
                known = ", ".join(map(str, steps))
                raise RuntimeError(f"a batch has {places} patches a row, none of the compiled {known}")
            return steps[places](state, batch, teacher)

        return train_step

    @functools.cached_property
    def _init(self) -> Callable[[], TrainState]:
        return lambda: self.init_state(jax.random.key(self.config.seed))  # traced once, as it is one function

    def fresh_state(self) -> TrainState:
        """Return the state in which the run begins; every array is created on its shards."""
        return jax.jit(self._init, out_shardings=sharding.shardings_of(self.abstract_state))()

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        state = jax.eval_shape(self._init)
        return sharding.with_shardings(state, sharding.state_shardings(self.mesh, state, STATE_RULES))

    def abstract_teacher(self) -> Params | None:
        """Return shapes, dtypes and shardings of the teacher's parameters."""
        if self.teacher is None:
            return None
        params = abstract_params(self.teacher.model)
        return sharding.with_shardings(params, sharding.state_shardings(self.mesh, params, PARAMETER_RULES))

    def _pixel_shapes(self, patches: int | None) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return shapes and dtypes of the arrays of a batch's pictures; see `abstract_batch`."""
        data, image, n = self.config.data, self.config.model.image, self.config.global_batch_size
        if (menu := patch_menu(self.config)) and isinstance(image, ViTConfig):
            rows, places = n // data.images_per_row, data.images_per_row * (patches or max(menu))
            return {
                "patches": ((rows, places, 3 * image.patch_size**2), jnp.uint8),
                "segment": ((rows, places), jnp.int32),
                "place": ((rows, places, 2), jnp.int32),
                "grid": ((rows, data.images_per_row, 2), jnp.int32),
            }
        on_device = data.resize_on is ResizeOn.DEVICE
        side = data.canvas_size if on_device else image.image_size
        crop: dict[str, tuple[tuple[int, ...], Any]] = {"crop": ((n, BOX), jnp.float32)} if on_device else {}
        return {"image": ((n, side, side, 3), jnp.uint8), **crop}

    def abstract_batch(self, patches: int | None = None) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Return shapes, dtypes and shardings of a batch.

        Args:
            patches: budget of the step, where images are of variable aspect; None: the largest.
        """
        config, n = self.config, self.config.global_batch_size
        length = config.model.text.context_length
        count = config.data.captions_per_image
        several = () if count == 1 else (count,)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            **self._pixel_shapes(patches),
            "tokens": ((n, *several, length), jnp.int32),
            "skip_reason": ((n,), jnp.int32),
        }
        if config.loss.same_pair is not SamePair.NONE:
            by_text = config.loss.same_pair is SamePair.CAPTION
            shapes["group"] = ((n, *several) if by_text else (n,), jnp.int32)
        if config.loss.kind is LossKind.GLOBAL:
            shapes["index"] = ((n,), jnp.int32)
        split = sharding.batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in shapes.items()}


def build_program(
    config: Config,
    mesh: Mesh,
    *,
    num_samples: int,
    tx: optax.GradientTransformationExtraArgs | None = None,
    teacher: Config | None = None,
) -> Program:
    """Return the program of a run on a mesh.

    Args:
        config: the run.
        mesh: the devices.
        num_samples: size of the training source.
        tx: the optimizer, where it exists already.
        teacher: the config of the frozen model to learn from.
    """
    clip = build_clip(config.model, data=config.data, frozen=config.optim.freeze)
    tx = optimizer.make_tx(config, abstract_params(config.model)) if tx is None else tx
    averages = MovingAveragesAccess(mesh) if config.loss.kind is LossKind.GLOBAL else None
    gradients = build_gradients(config, clip, build_loss(config.loss, mesh), mesh)
    resize = build_device_resize(config, mesh)
    train_step = TrainStep(config, gradients, tx, averages, _build_teacher(config, teacher, mesh), resize)
    return Program(
        config=config,
        mesh=mesh,
        clip=clip,
        tx=tx,
        num_samples=num_samples,
        train_step=train_step,
        teacher=teacher,
    )


def _build_teacher(config: Config, teacher: Config | None, mesh: Mesh) -> TeacherForward | None:
    if teacher is None:
        return None
    clip, size = build_clip(teacher.model, data=teacher.data), config.microbatch_size
    return TeacherForward(clip, None if size is None else Microbatches(size, sharding.batch_devices(mesh)))
