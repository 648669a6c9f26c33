"""Two captions of each image: the loss is the mean of two over the global batch, its gradients on meshes, GradCache."""

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import (
    Config,
    DataConfig,
    Dtype,
    GroupRole,
    LossConfig,
    LossKind,
    LossMethod,
    MeshConfig,
    ModelConfig,
    SamePair,
    TextTransformerConfig,
    ViTConfig,
    flops_per_pair,
)
from clipjax.data.sources import ArraySource
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.data.tokenizers.protocol import TextToTokens
from clipjax.data.training_stream import TrainStream
from clipjax.losses import LossInputs, build_loss, describe_loss
from clipjax.models.clip import build_clip
from clipjax.models.towers import PARAMETER_RULES
from clipjax.planning import memory, traffic
from clipjax.planning.measure import make_batch
from clipjax.pytrees import leaf_paths
from clipjax.runtime import sharding
from clipjax.training.gradients import build_gradients
from clipjax.training.program import build_program
from clipjax.training.replay import _finite_rows
from clipjax.training.stream import device_batch
from clipjax.typing import Encoded

PAIRS, EMBED = 16, 16

pytestmark = pytest.mark.newest

LOSSES = {
    "softmax": {},
    "sigmoid": {"kind": LossKind.SIGMOID},
    "smoothed": {"label_smoothing": 0.1},
    "groups": {"same_pair": SamePair.CAPTION},
    "positives": {"same_pair": SamePair.CAPTION, "group_role": GroupRole.POSITIVE},
    "sigmoid groups by image": {"kind": LossKind.SIGMOID, "same_pair": SamePair.INDEX},
}


def make_config(loss: str = "softmax", **changes) -> Config:
    options = LOSSES[loss]
    return Config(
        total_examples=10 * PAIRS,
        global_batch_size=PAIRS,
        loss=LossConfig(**options),
        model=ModelConfig(
            embed_dim=EMBED,
            image=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
            text=TextTransformerConfig(context_length=8, vocab_size=260, width=16, depth=1, num_heads=2),
            compute_dtype=Dtype.FLOAT32,
            init_logit_bias=-3.0 if "sigmoid" in loss else None,
        ),
        data=DataConfig(train="x", captions_per_image=2),
        **changes,
    )


def make_group(loss: str) -> np.ndarray | None:
    """Groups of two pairs by image, or groups that differ between the two captions."""
    match LOSSES[loss].get("same_pair"):
        case SamePair.INDEX:
            return np.arange(PAIRS, dtype=np.int32) // 2
        case SamePair.CAPTION:
            return np.stack([np.arange(PAIRS) // 2, np.arange(PAIRS) % 5], axis=1).astype(np.int32)
    return None


def batch(loss: str = "softmax") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 250, (PAIRS, 2, 8)).astype(np.int32)
    tokens[..., -1] = 258
    image = rng.integers(0, 256, (PAIRS, 16, 16, 3)).astype(np.uint8)
    group = make_group(loss)
    return {"image": image, "tokens": tokens} | ({} if group is None else {"group": group})


def reference(image, text, scale: float, bias: float, loss: str, group: np.ndarray | None) -> float:
    """One contrastive loss in float64, pair by pair, as the papers write it."""
    options, n = LOSSES[loss], len(image)
    logits = scale * image @ text.T
    group = np.arange(n) if group is None else group
    same, own = group[:, None] == group[None, :], np.eye(n, dtype=bool)
    positive = same if options.get("group_role") is GroupRole.POSITIVE else own
    if options.get("kind") is LossKind.SIGMOID:
        logits = logits + bias
        terms = np.where(positive, np.log1p(np.exp(-logits)), np.where(same, 0, np.log1p(np.exp(logits))))
        return terms.sum() / n
    counted = positive | ~same
    total = 0.0
    for table, targets, seen in ((logits, positive, counted), (logits.T, positive.T, counted.T)):
        for i in range(n):
            target = targets[i] / targets[i].sum()
            smoothing = options.get("label_smoothing", 0)
            target = (1 - smoothing) * target + smoothing / n
            log_sum = math.log(np.exp(table[i][seen[i]]).sum())
            total += -(target * (table[i] - log_sum))[seen[i]].sum()
    return total / (2 * n)


@functools.cache
def unit_rows(seed: int, *shape: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("method", [LossMethod.GATHERED, LossMethod.RING])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_mean_of_two_references(loss, method, devices):
    config = make_config(loss)
    config.loss.method = method
    image, text = unit_rows(0, PAIRS, EMBED), unit_rows(1, PAIRS, 2, EMBED)
    scale, bias, group = 7.0, -2.0, make_group(loss)
    by_text = [None if group is None else group if group.ndim == 1 else group[:, k] for k in (0, 1)]
    expected = np.mean([reference(image, text[:, k], scale, bias, loss, by_text[k]) for k in (0, 1)])
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        encoded = Encoded(
            *sharding.global_batch(mesh, (image.astype(np.float32), text.astype(np.float32))),
            jnp.float32(scale),
            jnp.float32(bias),
        )
        inputs = LossInputs(None if group is None else sharding.global_batch(mesh, group))
        results = jax.jit(build_loss(config.loss, mesh).__call__)(encoded, inputs)
    # Embeddings rounded to float32 and sums of 16 float32 terms.
    assert float(results.loss) == pytest.approx(expected, rel=2e-6)
    if loss == "softmax":
        similarity = [np.einsum("ne,ne->n", image, text[:, k]).mean() for k in (0, 1)]
        found = [float(value) for value in results.metrics.values()]
        assert any(value == pytest.approx(np.mean(similarity), rel=1e-5) for value in found)


@functools.cache
def init_params(has_bias: bool):
    config = make_config("sigmoid" if has_bias else "softmax")
    return jax.device_get(jax.jit(build_clip(config.model).init)(jax.random.key(1)))


def gradients_of(config: Config, devices: int, loss: str):
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    clip = build_clip(config.model, data=config.data)
    params = init_params("sigmoid" in loss)
    with jax.set_mesh(mesh):
        gradients = build_gradients(config, clip, build_loss(config.loss, mesh), mesh)
        placed = jax.device_put(params, sharding.state_shardings(mesh, params, PARAMETER_RULES))
        run = jax.jit(lambda params, data, key: gradients(params, {}, data, LossInputs(data.get("group")), key))
        found, aux = run(placed, sharding.global_batch(mesh, batch(loss)), jax.random.key(0))
        return jax.device_get(found), float(aux.loss)


def single_term(config: Config, k: int, loss: str):
    """Gradients of the ordinary loss with caption k alone, by the code for one caption."""
    config = copy.deepcopy(config)
    config.data.captions_per_image = 1
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    clip, data = build_clip(config.model, data=config.data), batch(loss)
    data["tokens"] = data["tokens"][:, k]
    if "group" in data and data["group"].ndim == 2:
        data["group"] = data["group"][:, k]
    with jax.set_mesh(mesh):
        gradients = build_gradients(config, clip, build_loss(config.loss, mesh), mesh)
        run = jax.jit(lambda params, data, key: gradients(params, {}, data, LossInputs(data.get("group")), key))
        found, aux = run(jax.device_put(init_params("sigmoid" in loss)), data, jax.random.key(0))
    return jax.device_get(found), float(aux.loss)


DIRECT, ON_A_MESH = (None, MeshConfig()), (8, MeshConfig(data=2, fsdp=2, tensor=2))
"""Ways to the gradients: pairs of a microbatch, and a mesh."""


@pytest.mark.parametrize(
    ("loss", "ways"),
    [
        ("softmax", [DIRECT, (4, MeshConfig())]),
        ("groups", [ON_A_MESH]),
        pytest.param("sigmoid", [DIRECT, ON_A_MESH], marks=pytest.mark.slow),
    ],
)
@pytest.mark.heavy
def test_gradients_are_the_mean_of_two_ordinary_ones_in_every_way(loss, ways):
    config = make_config(loss)
    terms = [single_term(config, k, loss) for k in (0, 1)]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, terms[0][0], terms[1][0])
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected))
    for microbatch, mesh in ways:
        config.microbatch_size, config.mesh = microbatch, mesh
        devices = 8 if mesh.fsdp > 1 else 1
        found, value = gradients_of(config, devices, loss)
        assert value == pytest.approx((terms[0][1] + terms[1][1]) / 2, rel=1e-6)
        for name, ours, theirs in zip(leaf_paths(expected), *map(jax.tree.leaves, (found, expected)), strict=True):
            # Sums of sixteen float32 terms in another order, through two layers.
            assert np.linalg.norm(ours - theirs) <= 1e-5 * largest, name


@pytest.mark.heavy
def test_a_run_takes_the_batches_of_its_stream():
    config = make_config("groups")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 20, 20, 3), dtype=np.uint8)
    source = ArraySource(images, [(f"a{i // 2}", f"b{i}") for i in range(32)])
    stream = TrainStream(source, tokenize=TextToTokens(BytesTokenizer(), 8), config=config)
    mesh = sharding.make_mesh(MeshConfig())
    try:
        with jax.set_mesh(mesh):
            program = build_program(config, mesh, num_samples=32)
            shapes, state = program.abstract_batch(), program.fresh_state()
            data = device_batch(config, mesh, next(stream))
            assert {name: (x.shape, x.dtype, x.sharding) for name, x in data.items()} == {
                name: (x.shape, x.dtype, x.sharding) for name, x in shapes.items()
            }
            assert {name: x.shape for name, x in make_batch(shapes).items()} == {n: x.shape for n, x in data.items()}
            step = program.jit(program.abstract_state)
            losses = []
            for _ in range(8):
                state, metrics = step(state, data, None)
                losses.append(float(metrics["loss"]))
    finally:
        stream.close()
    assert shapes["tokens"].shape == (PAIRS, 2, 8) and shapes["group"].shape == (PAIRS, 2)
    assert losses[-1] < losses[0] - 0.1  # the same batch again and again is learned


def test_a_text_that_is_not_finite_is_found_among_two():
    text = jnp.ones((4, 2, 3)).at[2, 1, 0].set(jnp.nan)
    assert _finite_rows(text).tolist() == [True, True, False, True]
    assert _finite_rows(text[:, 1]).tolist() == [True, True, False, True]


def test_the_log_tells_of_two_captions():
    config, mesh = make_config(), sharding.make_mesh(MeshConfig())
    assert describe_loss(config, mesh).endswith(", mean over 2 captions of each image")
    config.data.captions_per_image = 1
    assert "captions" not in describe_loss(config, mesh)


def test_the_text_tower_counts_twice():
    config = make_config()
    model = config.model
    assert flops_per_pair(config) == model.image.flops(EMBED) + 2 * model.text.flops(EMBED)
    embeddings = memory._loss_bytes(config)
    with jax.set_mesh(mesh := sharding.make_mesh(MeshConfig())):
        bytes_of_two = traffic.min_traffic_bytes(config, {}, mesh)
        config.data.captions_per_image = 1
        bytes_of_one = traffic.min_traffic_bytes(config, {}, mesh)
    assert flops_per_pair(config) == model.flops()
    assert 2 * embeddings == 3 * memory._loss_bytes(config)
    assert 2 * bytes_of_two["data"] == 3 * bytes_of_one["data"] > 0
