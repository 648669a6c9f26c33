"""Attention in one kernel: the same as plain array code, run operation by operation where there is no TPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import AttentionMethod, Config, Dtype, MeshConfig, ModelConfig, TextTransformerConfig, ViTConfig
from clipjax.config.model_validation import model_errors
from clipjax.config.validation import validate_devices
from clipjax.models.clip import build_clip
from clipjax.models.fused_attention import fused_attention, is_supported, main_columns
from clipjax.models.towers import PARAMETER_RULES
from clipjax.runtime import sharding


def reference(qkv: np.ndarray, heads: int, causal: bool, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention and its gradient in float64 NumPy."""
    b, length, w3 = qkv.shape
    d = w3 // 3 // heads
    q, k, v = qkv.astype(np.float64).reshape(b, length, 3, heads, d).transpose(2, 0, 3, 1, 4)
    g = grad.astype(np.float64).reshape(b, length, heads, d).transpose(0, 2, 1, 3)
    logits = q @ k.transpose(0, 1, 3, 2) * d**-0.5
    if causal:
        logits = np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = g @ v.transpose(0, 1, 3, 2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * d**-0.5
    parts = np.stack([ds @ k, ds.transpose(0, 1, 3, 2) @ q, p.transpose(0, 1, 3, 2) @ g])
    out = (p @ v).transpose(0, 2, 1, 3).reshape(b, length, -1)
    return out, parts.transpose(1, 3, 0, 2, 4).reshape(b, length, w3)


CASES = [
    # length, heads, head dim, causal: tiles of 128 lanes hold two heads, part of one, several parts, or one
    (37, 4, 64, False),
    (20, 2, 64, True),
    (129, 2, 64, False),  # a key beyond a whole tile of columns
    (129, 2, 64, True),
    (11, 8, 80, False),
    (9, 16, 72, False),
    (17, 1, 128, True),
]


@pytest.mark.parametrize(("length", "heads", "dim", "causal"), CASES)
def test_the_kernel_is_exact(length, heads, dim, causal):
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((2, length, 3 * heads * dim), np.float32)
    grad = rng.standard_normal((2, length, heads * dim), np.float32)

    def run(qkv, grad):
        out, pull = jax.vjp(lambda x: fused_attention(x, num_heads=heads, causal=causal, interpret=True), qkv)
        return out, *pull(grad)

    out, found = jax.jit(run)(qkv, grad)
    expected, of_qkv = reference(qkv, heads, causal, grad)
    # Sums of at most 129 float32 products, and the exponentials of logits of order 10.
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(found, of_qkv, atol=2e-5)


def test_one_column_beyond_whole_tiles_stands_apart():
    assert [main_columns(n) for n in (50, 77, 129, 197, 256, 257, 577)] == [50, 77, 128, 197, 256, 256, 577]


MODEL = ModelConfig(
    embed_dim=32,
    image=ViTConfig(image_size=16, patch_size=8, width=256, depth=2, num_heads=4),
    text=TextTransformerConfig(context_length=8, vocab_size=260, width=256, depth=2, num_heads=4),
    compute_dtype=Dtype.FLOAT32,
)


@functools.cache
def start():
    """Parameters, which are the same whatever computes attention."""
    return jax.jit(build_clip(MODEL).init)(jax.random.key(0))


def lower(method: AttentionMethod, mesh_config: MeshConfig):
    """A loss and its gradients, lowered, and what to call them with."""
    clip = build_clip(dataclasses.replace(MODEL, attention=method))
    mesh, params = sharding.make_mesh(mesh_config), start()
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.state_shardings(mesh, params, PARAMETER_RULES))
        places = sharding.batch_sharding(mesh)
        pixels = jax.device_put(jax.random.normal(jax.random.key(1), (8, 16, 16, 3)), places)
        tokens = jax.device_put(jax.random.randint(jax.random.key(2), (8, 8), 1, 259), places)

        def loss(params, pixels, tokens):
            return jnp.sum(clip.encode_image(params, pixels) * jnp.roll(clip.encode_text(params, tokens), 1, 0))

        return jax.jit(jax.value_and_grad(loss)).lower(params, pixels, tokens), (params, pixels, tokens)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(), id="data", marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), id="all axes"),
    ],
)
@pytest.mark.heavy
def test_a_model_does_not_depend_on_what_computes_attention(mesh):
    (plain, arguments), (fused, _) = (lower(method, mesh) for method in (AttentionMethod.XLA, AttentionMethod.FUSED))
    assert plain.as_text() != fused.as_text()
    value, grads = jax.device_get(plain.compile()(*arguments))
    fused_value, fused_grads = jax.device_get(fused.compile()(*arguments))
    assert fused_value == pytest.approx(value, rel=1e-5)
    # float32 sums in another order, through two blocks and two normalisations.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), fused_grads, grads)


@pytest.mark.heavy
def test_auto_is_plain_code_without_a_tpu():
    auto, plain = (lower(method, MeshConfig())[0] for method in (AttentionMethod.AUTO, AttentionMethod.XLA))
    assert auto.as_text() == plain.as_text()


def test_what_the_kernel_can_do():
    assert is_supported(8, 197, 12, 64)
    assert not is_supported(8, 197, 3, 64)  # 192 lanes
    assert not is_supported(8, 40_000, 16, 64)  # more than a chip's own memory


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention": AttentionMethod.FUSED, "image": ViTConfig(width=192, num_heads=3)}, "multiple of 128"),
        ({"attention": AttentionMethod.CUDNN}, "needs model.compute_dtype=bfloat16"),
        (
            {
                "attention": AttentionMethod.CUDNN,
                "compute_dtype": Dtype.BFLOAT16,
                "image": ViTConfig(width=1024, num_heads=4),
            },
            "heads of a multiple of 8 up to 128",
        ),
    ],
)
def test_what_a_model_does_not_allow_is_refused(changes, expected):
    errors = model_errors(Config(model=dataclasses.replace(MODEL, **changes)))
    assert any(expected in error for error in errors), errors


@pytest.mark.parametrize(("method", "platform"), [(AttentionMethod.FUSED, "gpu"), (AttentionMethod.CUDNN, "cpu")])
def test_what_a_machine_does_not_have_is_refused(method, platform):
    config = Config(model=dataclasses.replace(MODEL, attention=method), global_batch_size=8)
    with pytest.raises(ValueError, match=f"attention={method.value} is not for devices of platform {platform}"):
        validate_devices(config, num_devices=1, num_processes=1, batch_fields=(), platform=platform)
