"""One step: the same on every mesh, the clamp, freezing, decay and the moving average."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import Config, Dtype, MeshConfig, ModelConfig, TextTransformerConfig, ViTConfig
from clipjax.data.sample import NUM_COUNTERS
from clipjax.losses import LossInputs, LossResults, TrainingLoss, make_loss, softmax_loss
from clipjax.models.clip import abstract_params, build_clip
from clipjax.models.towers import PARAMETER_RULES
from clipjax.pytrees import leaf_paths, map_with_path
from clipjax.runtime import sharding
from clipjax.training import optimizer
from clipjax.training.gradients import DirectGradients
from clipjax.training.step import TrainStep, eval_params, from_items, make_gamma, make_init_state, to_items
from clipjax.typing import Encoded

MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2), (1, 4, 2)]
HEAVY_MESHES = [pytest.param(sizes, marks=pytest.mark.heavy) for sizes in MESHES[1:]]
MORE_MESHES = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((4, 1, 1), (8, 1, 1))]  # as (2, 1, 1)

pytestmark = pytest.mark.newest


def small_config(**optim_fields) -> Config:
    config = Config(total_examples=1600, warmup_examples=0, global_batch_size=16)
    config.model = ModelConfig(
        embed_dim=32,
        image=ViTConfig(image_size=16, patch_size=8, width=64, depth=2, num_heads=4),
        text=TextTransformerConfig(context_length=8, vocab_size=64, width=64, depth=2, num_heads=4),
        compute_dtype=Dtype.FLOAT32,
    )
    for name, value in optim_fields.items():
        setattr(config.optim, name, value)
    return config


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 62, (16, 8)).astype(np.int32)
    tokens[:, -1] = 63
    image = rng.integers(0, 256, (16, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "tokens": tokens, "skip_reason": np.full(16, -1, np.int32)}


class ReferenceLoss(TrainingLoss):
    """The plain softmax loss of whole arrays."""

    def __call__(self, encoded: Encoded, inputs: LossInputs) -> LossResults:
        return LossResults(*softmax_loss(*encoded[:4]))


def build(config: Config, loss: TrainingLoss = ReferenceLoss(None)):  # noqa: B008
    """Functions of one config: `init(key)`, `grads_fn(params, batch, key)`, the step."""
    clip = build_clip(config.model, data=config.data)
    tx = optimizer.make_tx(config, abstract_params(config.model))
    gradients = DirectGradients(clip, loss)
    grads_fn = lambda params, batch, key: gradients(params, {}, batch, LossInputs(), key)  # noqa: E731
    init = make_init_state(config, clip.init, tx, num_samples=1)
    return init, grads_fn, TrainStep(config, gradients, tx)


@functools.cache
def single_device():
    """State, gradients and what comes with them on one device, from whole arrays and the reference loss."""
    init, grads_fn, _ = build(small_config())
    state = jax.jit(init)(jax.random.key(0))
    return state, *jax.jit(grads_fn)(state.params, batch(), state.key)


@pytest.mark.parametrize("sizes", [MESHES[0], *HEAVY_MESHES, *MORE_MESHES], ids=str)
def test_loss_and_gradients_are_the_same_on_every_mesh(sizes):
    """Tolerance: sums of a few thousand float32 products in another order; 1e-5 of a leaf's norm."""
    data, fsdp, tensor = sizes
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: math.prod(sizes)])
    state, expected, expected_aux = single_device()
    with jax.set_mesh(mesh):
        _, grads_fn, _ = build(small_config(), TrainingLoss(make_loss(mesh=mesh)))
        params = jax.device_put(state.params, sharding.state_shardings(mesh, state.params, PARAMETER_RULES))
        grads_here, aux = jax.jit(grads_fn)(params, sharding.global_batch(mesh, batch()), jax.random.key(0))
    assert float(aux.loss) == pytest.approx(float(expected_aux.loss), rel=1e-6)
    # A bias of the keys has no gradient but rounding, so errors are measured against the largest norm in the tower.
    size = max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(expected))
    errors = jax.tree.map(
        lambda a, b: float(np.linalg.norm(np.asarray(a) - np.asarray(b))) / size, grads_here, expected
    )
    assert max(jax.tree.leaves(errors)) < 1e-5


@pytest.mark.heavy
def test_gradients_agree_with_finite_differences_in_a_random_direction():
    state, expected, _ = single_device()
    grads_fn = jax.jit(build(small_config())[1])
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    direction = tree.unflatten([jax.random.normal(k, x.shape) * 1e-3 for k, x in zip(keys, leaves, strict=True)])

    def loss_at(t: float) -> float:
        params = jax.tree.map(lambda p, d: p + t * d, state.params, direction)
        return float(grads_fn(params, jax.device_put(batch()), state.key)[1].loss)

    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (expected, direction)), strict=True))
    # Central difference: curvature and float32 rounding of a loss near 3 leave about 1 %.
    assert (loss_at(1.0) - loss_at(-1.0)) / 2 == pytest.approx(slope, rel=0.03)


class RaisesScale(TrainingLoss):
    """A loss that falls with the logit scale, without end."""

    def __call__(self, encoded: Encoded, inputs: LossInputs) -> LossResults:
        return LossResults(-encoded.logit_scale, {})


def test_logit_scale_is_clamped():
    init, _, train_step = build(small_config(learning_rate=10.0), RaisesScale(None))
    state, metrics = jax.jit(train_step)(jax.jit(init)(jax.random.key(0)), jax.device_put(batch()))
    assert float(metrics["logit_scale"]) == pytest.approx(1 / 0.07)
    assert float(jnp.exp(state.params["log_logit_scale"])) == pytest.approx(100.0, rel=1e-6)
    assert int(state.step) == 1
    assert np.isfinite(float(metrics["param_norm"]))


def test_frozen_parameters_stay_and_carry_no_moments():
    config = small_config(freeze=("image/.*",))
    init, _, train_step = build(config)
    state = jax.jit(init)(jax.random.key(0))
    after, _ = jax.jit(train_step)(state, batch())
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), state.params, after.params)
    assert all(jax.tree.leaves(same["image"]))
    assert not any(jax.tree.leaves(same["text"]["transformer"]["blocks"]["mlp"]["fc_in"]["kernel"]))
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params["text"])) + 1
    assert sum(moments) <= 2 * trained + 4  # and a few step counters


def test_a_freeze_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=re.escape("optim.freeze='visual/.*' matches no parameter")):
        build(small_config(freeze=("visual/.*",)))
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        build(small_config(freeze=(".*",)))


def test_weight_decay_touches_matrices_and_embeddings_only():
    mask = optimizer.decay_mask(abstract_params(small_config().model))
    decayed, kept = set(), set()
    map_with_path(lambda name, on: (decayed if on else kept).add(name.rpartition("/")[2]), mask)
    assert decayed == {"kernel", "token_embed", "pos_embed"}
    assert kept == {"scale", "bias", "class_embed", "log_logit_scale"}


def test_moving_average_follows_the_parameters():
    config = small_config(ema_decay=0.75)
    init, _, train_step = build(config)
    state = jax.jit(init)(jax.random.key(0))
    after, _ = jax.jit(train_step)(state, batch())
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, state.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), after.ema, expected)
    assert eval_params(after) is after.ema


def test_schedule_warms_up_and_ends_at_the_final_rate():
    config = small_config(learning_rate=1.0, final_learning_rate=0.1)
    config.warmup_examples = 160
    schedule = optimizer.make_schedule(config)
    assert float(schedule(0)) == 0.0
    assert float(schedule(5)) == pytest.approx(0.5)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(55)) == pytest.approx(0.55, abs=0.01)
    assert float(schedule(100)) == pytest.approx(0.1)


def test_groups_hold_the_whole_state():
    init, _, _ = build(small_config(ema_decay=0.9))
    state = jax.jit(init)(jax.random.key(0))
    again = from_items(to_items(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (state, again)), strict=True))


@pytest.mark.heavy
def test_unusable_samples_are_counted_by_reason_over_the_global_batch():
    init, _, train_step = build(small_config())
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    reasons = np.full(16, -1, np.int32)
    reasons[[0, 5, 15]] = 2, 0, 2
    with jax.set_mesh(mesh):
        state = jax.jit(init)(jax.random.key(0))
        step = jax.jit(train_step, out_shardings=sharding.replicated(mesh), donate_argnums=0)
        state, _ = step(state, sharding.global_batch(mesh, {**batch(), "skip_reason": reasons}))
        state, metrics = step(state, sharding.global_batch(mesh, batch()))
        step(state, sharding.global_batch(mesh, batch()))  # donates the state: the metrics have buffers of their own
    assert metrics["samples_skipped"].tolist() == [1, 0, 2] + [0] * (NUM_COUNTERS - 3)


def test_gamma_falls_from_one_by_a_cosine():
    config = small_config()
    config.loss.gamma, config.loss.gamma_decay_examples = 0.2, 160
    gamma = make_gamma(config)
    assert [round(float(gamma(jnp.int32(step))), 6) for step in (0, 5, 10, 99)] == [1.0, 0.6, 0.2, 0.2]
    config.loss.gamma_decay_examples = 0
    assert float(make_gamma(config)(jnp.int32(0))) == pytest.approx(0.2)


def test_gradients_are_sums_in_float32_with_bfloat16_activations_too():
    """A gradient that was summed over the batch, or across devices, in bfloat16 would have 16 trailing zeros."""
    config = small_config()
    config.model.compute_dtype = Dtype.BFLOAT16
    _, grads_fn, _ = build(config)
    found, _ = jax.jit(grads_fn)(single_device()[0].params, batch(), jax.random.key(0))
    for name, leaf in zip(leaf_paths(found), jax.tree.leaves(found), strict=True):
        if name == "text/token_embed":  # most of these tokens occur once: a sum of one term is that term
            continue
        bits = np.asarray(leaf).view(np.uint32)
        rounded = (bits[bits != 0] & 0xFFFF) == 0
        assert rounded.mean() < 0.5, name  # a key's bias has no gradient: what is left there are a few roundings
