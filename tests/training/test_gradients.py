"""GradCache: the gradients of the direct way, for every loss, on meshes, with randomness in the towers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import Config, Dtype, MeshConfig, ModelConfig, TextTransformerConfig, ViTConfig
from clipjax.losses import LossInputs, TrainingLoss, make_loss
from clipjax.models.clip import Clip, build_clip
from clipjax.models.towers import PARAMETER_RULES
from clipjax.pytrees import leaf_paths
from clipjax.runtime import sharding
from clipjax.training.gradients import CachedGradients, DirectGradients, Gradients, Microbatches
from clipjax.typing import Encoded

PAIRS = 16

pytestmark = pytest.mark.newest


def small_config(kind: str) -> Config:
    return Config(
        model=ModelConfig(
            embed_dim=16,
            image=ViTConfig(image_size=16, patch_size=8, width=16, depth=2, num_heads=2),
            text=TextTransformerConfig(context_length=8, vocab_size=64, width=16, depth=1, num_heads=2),
            compute_dtype=Dtype.FLOAT32,
            init_logit_bias=-3.0 if kind == "sigmoid" else None,
        )
    )


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 62, (PAIRS, 8)).astype(np.int32)
    tokens[:, -1] = 63
    image = rng.integers(0, 256, (PAIRS, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "tokens": tokens, "group": np.arange(PAIRS, dtype=np.int32) // 2}


@functools.cache
def setting(kind: str):
    config = small_config(kind)
    clip = build_clip(config.model, data=config.data)
    return clip.init(jax.random.key(1)), clip


def function_of(gradients: Gradients):
    """`run(params, batch, key)` with the batch's groups as the loss's inputs."""
    return lambda params, batch, key: gradients(params, {}, batch, LossInputs(batch.get("group")), key)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), pytest.param((8, 1, 1), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("kind", "method"), [("softmax", "gathered"), ("sigmoid", "ring")])
@pytest.mark.heavy
def test_cached_gradients_are_the_direct_ones(kind, method, sizes):
    params, clip = setting(kind)
    data, fsdp, tensor = sizes
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])
    key = jax.random.key(0)
    whole = function_of(DirectGradients(clip, TrainingLoss(make_loss(kind=kind))))
    direct, aux = jax.jit(whole)(params, batch(), key)
    loss = TrainingLoss(make_loss(kind=kind, method=method, mesh=mesh))
    cached = function_of(CachedGradients(clip, loss, Microbatches(PAIRS // 2, data * fsdp)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.state_shardings(mesh, params, PARAMETER_RULES))
        found, found_aux = jax.jit(cached)(placed, sharding.global_batch(mesh, batch()), key)
    assert aux.metrics.keys() == found_aux.metrics.keys()
    assert float(found_aux.loss) == pytest.approx(float(aux.loss), rel=1e-5)
    for name, ours, theirs in zip(leaf_paths(direct), jax.tree.leaves(found), jax.tree.leaves(direct), strict=True):
        # Sums of sixteen float32 terms in another order, through three layers.
        size = np.linalg.norm(theirs)
        assert np.linalg.norm(np.asarray(ours) - theirs) <= 1e-4 * size + 1e-7, name


def test_both_passes_draw_the_same_random_numbers():
    """Noise by key in the tower: the gradient is that of the loss whose noise is drawn microbatch by microbatch."""
    params = {"weight": jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)}
    rng = np.random.default_rng(1)
    data = {name: rng.normal(size=(PAIRS, 4)).astype(np.float32) for name in ("image", "tokens")}
    key, size = jax.random.key(3), 4

    class Noisy(Clip):
        """Two products, with noise by key."""

        def __init__(self):
            pass

        def encode_batch(self, params, batch_stats, batch, key):
            keep = jax.random.bernoulli(key, 0.5, batch["image"].shape)
            embeds = [jnp.where(keep, batch[name], 0) @ params["weight"] for name in ("image", "tokens")]
            unit = [x / jnp.linalg.norm(x + 1e-3, axis=1, keepdims=True) for x in embeds]
            return Encoded(*unit, jnp.float32(5.0), None)

    class InParts(Noisy):
        """The same for a whole batch, whose noise is that of its parts."""

        def encode_batch(self, params, batch_stats, batch, key):
            encoded = [
                super(InParts, self).encode_batch(
                    params,
                    batch_stats,
                    {name: x[i * size : (i + 1) * size] for name, x in batch.items()},
                    jax.random.fold_in(key, i),
                )
                for i in range(PAIRS // size)
            ]
            image, text = (jnp.concatenate([part[j] for part in encoded]) for j in (0, 1))
            return Encoded(image, text, jnp.float32(5.0), None)

    loss = TrainingLoss(make_loss())
    expected, _ = function_of(DirectGradients(InParts(), loss))(params, data, key)
    found, _ = function_of(CachedGradients(Noisy(), loss, Microbatches(size, 1)))(params, data, key)
    np.testing.assert_allclose(found["weight"], expected["weight"], rtol=2e-5, atol=1e-6)


@pytest.mark.heavy
def test_the_activations_of_one_microbatch_are_held_at_a_time():
    params, clip = setting("softmax")
    many = {name: np.concatenate([x] * 64) for name, x in batch().items()}

    def temporaries(grads_fn) -> int:
        memory = jax.jit(grads_fn).lower(params, many, jax.random.key(0)).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    loss = TrainingLoss(make_loss())
    direct = temporaries(function_of(DirectGradients(clip, loss)))
    assert temporaries(function_of(CachedGradients(clip, loss, Microbatches(64, 1)))) < direct / 4
