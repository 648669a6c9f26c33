"""The towers: how they start, what they may see, and that nothing but speed depends on scan, remat and dtype."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import Config, DataConfig, Dtype, ModelConfig, Remat, TextTransformerConfig, ViTConfig, presets
from clipjax.losses import softmax_loss
from clipjax.models.clip import abstract_params, build_clip, normalise_pixels
from clipjax.models.vit import patchify

END = 63
SMALL = ModelConfig(
    embed_dim=32,
    image=ViTConfig(image_size=16, patch_size=8, width=64, depth=2, num_heads=4),
    text=TextTransformerConfig(context_length=8, vocab_size=64, width=64, depth=2, num_heads=4),
    compute_dtype=Dtype.FLOAT32,
)
WIDE = ModelConfig(
    embed_dim=96,
    image=ViTConfig(image_size=64, patch_size=8, width=128, depth=4, num_heads=4, mlp_dim=256),
    text=TextTransformerConfig(context_length=64, vocab_size=256, width=96, depth=4, num_heads=4),
)

pytestmark = pytest.mark.newest


def pixels(batch: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (batch, 16, 16, 3))


def tokens(*rows: list[int]) -> jax.Array:
    return jnp.asarray(rows or [[1, 2, END, 0, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3, END]], jnp.int32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(build_clip(SMALL).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def fresh():
    """Parameters wide enough for statistics: at least 6,000 numbers in every kernel."""
    return jax.jit(build_clip(WIDE).init)(jax.random.key(1))


def leaf(params: Any, name: str) -> np.ndarray:
    for part in name.split("/"):
        params = params[part]
    return np.asarray(params)


BLOCKS = "transformer/blocks"
NORMAL = {
    "text/token_embed": 0.02,
    "text/pos_embed": 0.01,
    f"text/{BLOCKS}/attn/qkv/kernel": 96**-0.5,
    f"text/{BLOCKS}/attn/out/kernel": 96**-0.5 * 8**-0.5,
    f"text/{BLOCKS}/mlp/fc_in/kernel": (2 * 96) ** -0.5,
    f"text/{BLOCKS}/mlp/fc_out/kernel": 96**-0.5 * 8**-0.5,
    "text/proj/kernel": 96**-0.5,
    "image/pos_embed": 128**-0.5,
    "image/proj/kernel": 128**-0.5,
}
UNIFORM = {  # bounds: PyTorch's 1/sqrt(fan in), and Xavier for the query, key and value kernels
    f"image/{BLOCKS}/attn/qkv/kernel": (6 / (128 + 3 * 128)) ** 0.5,
    f"image/{BLOCKS}/attn/out/kernel": 128**-0.5,
    f"image/{BLOCKS}/mlp/fc_in/kernel": 128**-0.5,
    f"image/{BLOCKS}/mlp/fc_out/kernel": 256**-0.5,
    "image/patch_embed/kernel": (8 * 8 * 3) ** -0.5,
    f"image/{BLOCKS}/mlp/fc_in/bias": 128**-0.5,
    f"image/{BLOCKS}/mlp/fc_out/bias": 256**-0.5,
    f"text/{BLOCKS}/mlp/fc_in/bias": 96**-0.5,
    f"text/{BLOCKS}/mlp/fc_out/bias": (4 * 96) ** -0.5,
}


@pytest.mark.parametrize("name", NORMAL)
def test_kernels_start_normal_with_openais_deviation(fresh, name):
    """6,000 draws know their deviation to 1 %; 4 % is four times that, and the factors here differ by 40 %."""
    value = leaf(fresh, name)
    assert value.std() == pytest.approx(NORMAL[name], rel=0.04)
    assert abs(value.mean()) < 5 * NORMAL[name] / value.size**0.5
    assert abs(value).max() > 3 * NORMAL[name]  # not truncated, not uniform


@pytest.mark.parametrize("name", UNIFORM)
def test_kernels_and_mlp_biases_start_uniform_as_in_pytorch(fresh, name):
    value, bound = leaf(fresh, name), UNIFORM[name]
    assert 0.97 * bound < abs(value).max() <= bound
    # A bias has as few as 384 draws, whose deviation is known to 2.3 %.
    assert value.std() == pytest.approx(bound / 3**0.5, rel=0.03 if value.ndim > 2 else 0.12)


def test_the_rest_starts_at_zero_one_and_the_papers_scale(fresh):
    for tower, norms in (("image", ("ln_pre", "ln_post")), ("text", ("ln_final",))):
        for part in ("qkv", "out"):
            assert not leaf(fresh, f"{tower}/{BLOCKS}/attn/{part}/bias").any()
        for norm in (*norms, f"{BLOCKS}/ln_1", f"{BLOCKS}/ln_2"):
            assert not leaf(fresh, f"{tower}/{norm}/bias").any()
            assert (leaf(fresh, f"{tower}/{norm}/scale") == 1).all()
    assert leaf(fresh, "image/class_embed").std() == pytest.approx(128**-0.5, rel=0.25)  # 128 draws
    assert math.exp(fresh["log_logit_scale"]) == pytest.approx(1 / 0.07)


def test_layers_and_towers_draw_different_numbers(fresh, params):
    kernel = leaf(fresh, f"image/{BLOCKS}/mlp/fc_in/kernel")
    assert len({float(layer.sum()) for layer in kernel}) == 4
    assert leaf(params, f"image/{BLOCKS}/mlp/fc_in/bias").sum() != leaf(params, f"text/{BLOCKS}/mlp/fc_in/bias").sum()


def outputs_and_gradients(config: ModelConfig, params: Any) -> tuple[Any, Any]:
    clip = build_clip(config)

    def loss(params):
        image, text = clip.encode_image(params, pixels(2)), clip.encode_text(params, tokens())
        return softmax_loss(image, text, jnp.exp(params["log_logit_scale"]), None)[0], (image, text)

    (value, embeds), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return (value, *embeds), grads


@pytest.fixture(scope="module")
def reference(params):
    return outputs_and_gradients(dataclasses.replace(SMALL, scan_layers=False), params)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("remat", Remat)
def test_scan_and_remat_change_neither_outputs_nor_gradients(params, reference, scan, remat):
    """Only fusion may differ, which reorders float32 sums of at most a few hundred terms: 1e-5 of the largest entry."""
    config = dataclasses.replace(SMALL, scan_layers=scan, remat=remat)
    outputs, grads = outputs_and_gradients(config, params)
    for ours, theirs in zip(outputs, reference[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(reference[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * size), grads, reference[1])


def test_remat_recomputes_and_a_scan_has_one_block(params):
    def primitives(**changes) -> list[str]:
        clip = build_clip(dataclasses.replace(SMALL, **changes))
        grad = jax.grad(lambda params: clip.encode_image(params, pixels(1)).sum())
        return [eqn.primitive.name for eqn in equations(jax.make_jaxpr(grad)(params).jaxpr)]

    none, dots, mlp, full = (primitives(remat=remat) for remat in Remat)
    assert none.count("logistic") < dots.count("logistic") == mlp.count("logistic") == full.count("logistic")
    assert none.count("dot_general") <= dots.count("dot_general")
    assert dots.count("dot_general") < mlp.count("dot_general") < full.count("dot_general")


def test_the_text_tower_does_not_look_past_the_end_of_text(params):
    encode = jax.jit(build_clip(SMALL).encode_text)
    short = encode(params, tokens([1, 2, 3, END, 0, 0, 0, 0]))
    np.testing.assert_array_equal(encode(params, tokens([1, 2, 3, END, 9, 8, 7, 6])), short)
    for changed in ([5, 2, 3, END], [1, 2, 5, END]):
        assert float(jnp.abs(encode(params, tokens([*changed, 0, 0, 0, 0])) - short).max()) > 1e-3


def test_text_is_read_out_at_the_first_maximum(params):
    encode = jax.jit(build_clip(SMALL).encode_text)
    first = encode(params, tokens([1, END, 3, 4, 5, 6, 7, 8]))
    np.testing.assert_array_equal(encode(params, tokens([1, END, 3, 4, END, 6, 7, 8])), first)
    later = encode(params, tokens([1, 2, 3, 4, END, 6, 7, 8]))
    assert float(jnp.abs(later - first).max()) > 1e-3
    # The largest id of the row decides, whichever it is: a truncated vocabulary needs no other rule.
    np.testing.assert_array_equal(
        encode(params, tokens([1, 30, 3, 4, 5, 6, 7, 8])), encode(params, tokens([1, 30, 9, 9, 9, 9, 9, 9]))
    )


def test_the_image_tower_sees_every_pixel_and_each_image_alone(params):
    encode = jax.jit(build_clip(SMALL).encode_image)
    images = pixels()
    before = encode(params, images)
    for row, column in ((0, 0), (0, 15), (15, 0), (15, 15)):
        after = encode(params, images.at[1, row, column].add(1.0))
        assert float(jnp.abs(after[1] - before[1]).max()) > 1e-5
        np.testing.assert_array_equal(after[jnp.asarray([0, 2])], before[jnp.asarray([0, 2])])


@pytest.mark.parametrize("dtype", Dtype)
def test_embeddings_are_float32_of_unit_norm(params, dtype):
    clip = build_clip(dataclasses.replace(SMALL, compute_dtype=dtype))
    for embed in (jax.jit(clip.encode_image)(params, pixels(2)), jax.jit(clip.encode_text)(params, tokens())):
        assert embed.shape == (2, 32)
        assert embed.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(embed, axis=-1), 1, atol=1e-6)


def test_bfloat16_computes_near_float32_with_float32_parameters(params):
    config = dataclasses.replace(SMALL, compute_dtype=Dtype.BFLOAT16)
    assert {x.dtype for x in jax.tree.leaves(abstract_params(config))} == {jnp.dtype("float32")}
    half, single = build_clip(config), build_clip(SMALL)
    for ours, theirs, inputs in (
        (half.encode_image, single.encode_image, pixels()),
        (half.encode_text, single.encode_text, tokens()),
    ):
        # 8 bits of mantissa are 0.4 % per rounding; some 20 roundings in a row of blocks stay within 2 %.
        error = jnp.linalg.norm(jax.jit(ours)(params, inputs) - jax.jit(theirs)(params, inputs), axis=-1)
        assert 1e-5 < float(error.max()) < 0.02
    grads = jax.eval_shape(lambda params: outputs_and_gradients(config, params)[1], params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner functions included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_logits_and_exponentials_are_float32_even_in_bfloat16(params):
    clip = build_clip(dataclasses.replace(SMALL, compute_dtype=Dtype.BFLOAT16), data=DataConfig())

    def loss(params, batch):
        return softmax_loss(*clip.encode_batch(params, {}, batch, jax.random.key(0))[:4])[0]

    batch = {"image": jnp.zeros((2, 16, 16, 3), jnp.uint8), "tokens": tokens()}
    found = list(equations(jax.make_jaxpr(loss)(params, batch).jaxpr))
    exponentials = [eqn for eqn in found if eqn.primitive.name in ("exp", "log", "log1p", "rsqrt")]
    assert len(exponentials) >= 4  # softmax of each tower, the loss, the logit scale
    assert {eqn.outvars[0].aval.dtype for eqn in exponentials} == {jnp.dtype("float32")}
    products = [eqn.outvars[0].aval for eqn in found if eqn.primitive.name == "dot_general"]
    square = [aval for aval in products if aval.shape in ((2, 2), (2, 4, 5, 5), (2, 4, 8, 8))]
    assert {aval.shape for aval in square} == {(2, 2), (2, 4, 5, 5), (2, 4, 8, 8)}  # loss, image and text attention
    assert {aval.dtype for aval in square} == {jnp.dtype("float32")}
    assert jnp.dtype("bfloat16") in {aval.dtype for aval in products}  # and the towers do use bfloat16


def test_patches_run_row_by_row():
    image = jnp.arange(2.0 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 2, 2, 3)
    for index, (row, column) in enumerate((row, column) for row in range(2) for column in range(3)):
        expected = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(patches[:, index], expected)


def test_pixels_are_normalised_per_channel():
    data = DataConfig(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    image = jnp.asarray([0, 0, 0, 255, 255, 255], jnp.uint8).reshape(1, 1, 2, 3)
    expected = np.asarray([0, -1, -0.5, 1, 1, 0], np.float32).reshape(1, 1, 2, 3)
    np.testing.assert_allclose(normalise_pixels(image, data), expected, atol=1e-7)


def test_a_model_takes_pixels_before_and_after_normalisation(params):
    data = DataConfig(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    image = jax.random.bits(jax.random.key(3), (2, 16, 16, 3), jnp.uint8)
    encode = jax.jit(build_clip(SMALL, data=data).encode_image)
    expected = jax.jit(build_clip(SMALL).encode_image)(params, normalise_pixels(image, data))
    np.testing.assert_allclose(encode(params, image), expected, atol=1e-6)  # the same in one program and in two
    np.testing.assert_array_equal(encode(params, normalise_pixels(image, data)), expected)
    with pytest.raises(ValueError, match="uint8 pixels need a mean and a standard deviation"):
        build_clip(SMALL).encode_image(params, image)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("ViT-B/32", 151.3), ("ViT-B/16", 149.6), ("ViT-L/14", 427.6), ("ViT-L/14@336px", 427.9)],
)
def test_parameter_counts_are_those_of_the_clip_model_table(name, millions):
    before = sum(array.nbytes for array in jax.live_arrays())
    shapes = jax.tree.leaves(abstract_params(presets.model(name)))
    assert sum(leaf.size for leaf in shapes) / 1e6 == pytest.approx(millions, abs=0.05)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes)
    assert sum(array.nbytes for array in jax.live_arrays()) <= before + 1e6  # nothing of the model was allocated


def test_the_default_model_is_vit_b_32():
    assert Config().model == presets.model("ViT-B/32")
