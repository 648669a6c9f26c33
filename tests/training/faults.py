"""Small programs on 8 simulated devices, into whose steps a batch brings broken numbers on one device."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clipjax.config import (
    Config,
    Dtype,
    LossKind,
    MeshConfig,
    ModelConfig,
    ResNetConfig,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.runtime import sharding
from clipjax.training.program import Program, build_program
from clipjax.training.step import STATE_RULES, TrainState

PAIRS, DEVICES, NUM_SAMPLES = 16, 8, 40


class Faulty:
    """Gradients to which the batch adds its `fault` [b, 2] on each device: to one gradient's copy and to the loss's."""

    def __init__(self, gradients: Any, mesh: Mesh) -> None:
        self._gradients = gradients
        self._add = jax.shard_map(
            lambda x, fault: x + fault.sum(),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(sharding.batch_axes(mesh))),
            out_specs=PartitionSpec(),
            check_vma=False,
        )

    def __call__(self, params, batch_stats, batch, inputs, key):
        grads, aux = self._gradients(params, batch_stats, batch, inputs, key)
        grads = {**grads, "log_logit_scale": self._add(grads["log_logit_scale"], batch["fault"][:, 0])}
        return grads, aux._replace(loss=self._add(aux.loss, batch["fault"][:, 1]))


class Setting(NamedTuple):
    """A program, its compiled step and what makes its state."""

    program: Program
    step: Any
    init: Any

    def run(self, state: TrainState, *batches: dict[str, np.ndarray]) -> tuple[TrainState, dict[str, Any]]:
        """Return the state after some steps, and the last metrics. The state's buffers are taken over."""
        metrics: dict[str, Any] = {}
        for batch in batches:
            state, metrics = self.step(state, sharding.global_batch(self.program.mesh, batch), None)
        return state, metrics


def small_config(variant: str) -> Config:
    """`everything`: BatchNorm, moving averages of parameters and of samples; `cached`: GradCache with a softmax."""
    config = Config(total_examples=1600, warmup_examples=0, global_batch_size=PAIRS)
    config.model = ModelConfig(
        embed_dim=8,
        image=ViTConfig(image_size=16, patch_size=8, width=8, depth=1, num_heads=2),
        text=TextTransformerConfig(context_length=8, vocab_size=64, width=8, depth=1, num_heads=2),
        compute_dtype=Dtype.FLOAT32,
    )
    config.optim.learning_rate = 1e-3
    if variant == "everything":
        config.model.image = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=4, num_heads=4)
        config.loss.kind = LossKind.GLOBAL
        config.optim.ema_decay = 0.9
        config.mesh = MeshConfig(data=8)
    else:
        config.microbatch_size = 8
        config.mesh = MeshConfig(data=4, fsdp=2)
    return config


@functools.cache
def setting(variant: str) -> Setting:
    """Return the program of a variant; its step is compiled once."""
    config = small_config(variant)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build_program(config, mesh, num_samples=NUM_SAMPLES)
        faulty = Faulty(program.train_step.gradients, mesh)
        program = dataclasses.replace(
            program,
            train_step=dataclasses.replace(program.train_step, gradients=faulty),  # type: ignore[arg-type]
        )
        abstract = program.abstract_state
        shardings = sharding.state_shardings(mesh, abstract, STATE_RULES)
        init_state = jax.jit(program.init_state)  # on one device: that compiles in half the time
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in make_batch(variant).items()}
        split = sharding.batch_sharding(mesh)
        step = program.jit(abstract).lower(
            abstract, sharding.with_shardings(shapes, dict.fromkeys(shapes, split)), None
        )
        return Setting(program, step.compile(), lambda key: jax.device_put(init_state(key), shardings))


def make_batch(variant: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a batch of normalised pixels, without faults."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 62, (PAIRS, 8)).astype(np.int32)
    tokens[:, -1] = 63
    side = small_config(variant).model.image.image_size
    batch = {
        "image": rng.normal(size=(PAIRS, side, side, 3)).astype(np.float32),
        "tokens": tokens,
        "skip_reason": np.full(PAIRS, -1, np.int32),
        "fault": np.zeros((PAIRS, 2), np.float32),
    }
    if variant == "everything":
        batch["index"] = rng.choice(NUM_SAMPLES, PAIRS, replace=False).astype(np.int32)
    return batch


def bits(x: jax.Array) -> list[bytes]:
    """Return the bytes of every device's part."""
    raw = jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(shard.data).tobytes() for shard in raw.addressable_shards]
