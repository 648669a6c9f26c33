"""What models may be made of beyond OpenAI's ViT: pooling, registers, positions, bags of words, ResNets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipjax.config import (
    CbowConfig,
    Config,
    DataConfig,
    Dtype,
    ImagePool,
    MeshConfig,
    ModelConfig,
    Positions,
    Projection,
    Remat,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
    presets,
)
from clipjax.config.validation import validate
from clipjax.models.clip import abstract_model, abstract_params, build_clip
from clipjax.models.positions import fit_positions, resize_grid, resize_text, sincos
from clipjax.models.towers import PARAMETER_RULES
from clipjax.models.vit import drop_patches, kept_patches
from clipjax.pytrees import to_flat
from clipjax.runtime.sharding import batch_sharding, make_mesh, replicated, state_shardings

VIT = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "num_heads": 4}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "depth": 2, "num_heads": 4}
SIGLIP_IMAGE = ViTConfig(
    **VIT,
    pool=ImagePool.ATTENTION,
    class_token=False,
    patch_bias=True,
    ln_pre=False,
    projection=Projection.NONE,
    mlp_dim=48,
)
RESNET = ResNetConfig(image_size=32, layers=(1, 2, 1, 3), width=8, num_heads=4)
IMAGES = {
    "class": ViTConfig(**VIT),
    "average": ViTConfig(**VIT, pool=ImagePool.AVERAGE),
    "average without a class token": ViTConfig(**VIT, pool=ImagePool.AVERAGE, class_token=False),
    "average, then the norm": ViTConfig(**VIT, pool=ImagePool.AVERAGE, ln_post_after_pool=True),
    "attention": SIGLIP_IMAGE,
    "registers": ViTConfig(**VIT, num_registers=3),
    "sincos": ViTConfig(**VIT, positions=Positions.SINCOS, projection=Projection.AFFINE),
    "resnet": RESNET,
}
TEXTS = {
    "end": TextTransformerConfig(**TEXT),
    "last": TextTransformerConfig(**TEXT, causal=False, pool=TextPool.LAST, projection=Projection.AFFINE),
    "attention": TextTransformerConfig(**TEXT, causal=False, pool=TextPool.ATTENTION),
    "bag of words": CbowConfig(context_length=8, vocab_size=64, width=16),
}
MODELS = {f"image {name}": (image, TEXTS["end"]) for name, image in IMAGES.items()} | {
    f"text {name}": (IMAGES["class"], text) for name, text in TEXTS.items() if name != "end"
}


def model_config(name: str, **options) -> ModelConfig:
    image, text = MODELS[name]
    return ModelConfig(embed_dim=32, image=dataclasses.replace(image), text=dataclasses.replace(text), **options)


def inputs(config: ModelConfig, batch: int = 4) -> tuple[jax.Array, jax.Array]:
    size = config.image.image_size
    tokens = jnp.asarray([[61, 5, 63, 0, 0, 0, 0, 0], [61, 7, 9, 63, 0, 0, 0, 0], [61, 63] + [0] * 6, [5] * 7 + [63]])
    return jax.random.normal(jax.random.key(3), (batch, size, size, 3)), tokens[:batch].astype(jnp.int32)


QUICK = ("image registers", "image attention", "image resnet", "text bag of words")
"""The others share their code with these; all of them run in `make test-all`."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
@pytest.mark.heavy
def test_every_parameter_matters_and_speed_options_change_nothing(name: str):
    config = model_config(name, compute_dtype=Dtype.FLOAT32)
    clip = build_clip(config)
    params, stats = jax.jit(clip.init)(jax.random.key(0)), clip.init_batch_stats()
    pixels, tokens = inputs(config)
    aim = jax.random.normal(jax.random.key(1), (4, 32))

    def run(clip):
        def objective(params):
            encoded = clip.train(params, stats, pixels, tokens, jax.random.key(2))
            image, text = encoded.image_embed, encoded.text_embed
            np.testing.assert_array_equal((image.shape, text.shape), ((4, 32), (4, 32)))
            return jnp.sum(image * aim) + jnp.sum(text * aim[::-1])

        return jax.jit(jax.value_and_grad(objective))(params)

    value, grads = run(clip)
    for path, grad in to_flat({tower: grads[tower] for tower in ("image", "text")}).items():
        assert np.isfinite(grad).all(), path
        # An attention's logits do not change when all keys are moved alike, so a key's bias has no effect.
        if not path.endswith(("attn/k/bias", "qkv/bias")) and "bn_3/scale" not in path:
            assert np.abs(np.asarray(grad)).max() > 0 or "stage" in path, path
    same, same_grads = run(build_clip(dataclasses.replace(config, scan_layers=False, remat=Remat.FULL)))
    assert float(same) == pytest.approx(float(value), rel=1e-5)
    for (path, grad), other in zip(to_flat(grads).items(), jax.tree.leaves(same_grads), strict=True):
        scale = np.linalg.norm(grad)
        assert np.linalg.norm(np.asarray(grad) - other) <= 1e-4 * scale + 1e-6, path  # sums in another order


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_has_a_rule(name: str):
    config = model_config(name)
    validate(Config(model=config, data=DataConfig(train="x")))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    abstract = abstract_model(config)
    shardings = to_flat(state_shardings(mesh, abstract, PARAMETER_RULES))
    for path, leaf in to_flat(abstract).items():
        shardings[path].shard_shape(leaf.shape)  # raises where an axis does not divide


@pytest.mark.parametrize(
    "name", ["image attention", pytest.param("image resnet", marks=pytest.mark.slow), "text bag of words"]
)
@pytest.mark.heavy
def test_bfloat16_stays_near(name: str):
    config = model_config(name, compute_dtype=Dtype.FLOAT32)
    clip, narrow = build_clip(config), build_clip(dataclasses.replace(config, compute_dtype=Dtype.BFLOAT16))
    params = {**jax.jit(clip.init)(jax.random.key(0)), "batch_stats": clip.init_batch_stats()}
    pixels, tokens = inputs(config)
    images = (jax.jit(model.encode_image)(params, pixels) for model in (clip, narrow))
    texts = (jax.jit(model.encode_text)(params, tokens) for model in (clip, narrow))
    for wide, short in (images, texts):
        assert short.dtype == jnp.float32
        assert np.abs(wide - short).max() < 0.03  # bfloat16 has 8 bits; a wrong cast or axis moves it by 0.1 and more


def test_bag_of_words_is_the_mean_of_its_tokens():
    clip = build_clip(model_config("text bag of words", compute_dtype=Dtype.FLOAT32))
    params = jax.jit(clip.init)(jax.random.key(0))
    _, tokens = inputs(model_config("text bag of words"))
    table, kernel = (
        (np.asarray(params["text"][a], np.float64) for a in ("token_embed",)),
        params["text"]["proj"]["kernel"],
    )
    [table] = table
    expected = np.stack([table[row[: list(row).index(63) + 1]].mean(0) for row in np.asarray(tokens)]) @ kernel
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(clip.encode_text(params, tokens), expected, atol=1e-6)


def test_padding_never_reaches_a_text():
    """What stands after the end changes nothing where texts are read at their end."""
    for name in ("image class", "text bag of words"):
        clip = build_clip(model_config(name, compute_dtype=Dtype.FLOAT32))
        params = jax.jit(clip.init)(jax.random.key(0))
        tokens = jnp.asarray([[61, 5, 63, 0, 0, 0, 0, 0], [61, 5, 63, 9, 9, 1, 2, 3]], jnp.int32)
        same = clip.encode_text(params, tokens)
        np.testing.assert_allclose(same[0], same[1], atol=1e-6)


@pytest.mark.heavy
def test_patch_dropout_keeps_a_fixed_number_and_only_in_training():
    config = model_config("image class", compute_dtype=Dtype.FLOAT32)
    half = dataclasses.replace(config, image=dataclasses.replace(config.image, patch_dropout=0.5))
    assert kept_patches(half.image) == 8 and kept_patches(config.image) == 16
    rows = jnp.arange(16.0)[None, :, None] + jnp.asarray([0.0, 100.0])[:, None, None]
    kept = np.asarray(drop_patches(rows, 8, jax.random.key(0)))[:, :, 0]
    assert kept.shape == (2, 8)
    assert all(len(set(row)) == 8 for row in kept) and set(kept[0]) != set(kept[1] - 100)
    counts = np.zeros(16)
    for seed in range(200):
        counts[np.asarray(drop_patches(rows[:1], 8, jax.random.key(seed)))[0, :, 0].astype(int)] += 1
    assert counts.min() > 65 and counts.max() < 135  # 100 each, five standard deviations
    clip, whole = build_clip(half), build_clip(config)
    params = jax.jit(clip.init)(jax.random.key(0))
    pixels, tokens = inputs(config)
    np.testing.assert_array_equal(clip.encode_image(params, pixels), whole.encode_image(params, pixels))
    one, other, again = (clip.train(params, {}, pixels, tokens, jax.random.key(seed)).image_embed for seed in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_sincos_positions_are_moco_v3s():
    side, width = 3, 16
    omega = 1 / 10_000 ** (np.arange(4) / 3)
    for row in range(side):
        for column in range(side):
            x, y = column * omega, row * omega
            expected = [*np.sin(x), *np.cos(x), *np.sin(y), *np.cos(y)]
            np.testing.assert_allclose(sincos(side, width)[row * side + column], expected, atol=1e-6)


@pytest.mark.parametrize("side", [3, 8, 11])
def test_positions_of_a_grid_are_resized_as_pillow_resizes(side: int):
    """Pillow's bicubic filter is the antialiased one that PyTorch's peers use too."""
    table = np.random.default_rng(0).normal(size=(2 + 36, 5)).astype(np.float32)
    ours = np.asarray(resize_grid(jnp.asarray(table), 2, side))
    np.testing.assert_array_equal(ours[:2], table[:2])
    for channel in range(5):
        picture = Image.fromarray(table[2:, channel].reshape(6, 6))
        theirs = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(ours[2:, channel].reshape(side, side), theirs, atol=1e-5)


def test_positions_of_texts_are_cut_or_stretched():
    table = jnp.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(resize_text(table, 3), table[:3])
    np.testing.assert_array_equal(resize_text(table, 4), table)
    longer = np.asarray(resize_text(table, 8))
    assert longer.shape == (8, 2) and (np.diff(longer[:, 0]) >= 0).all()
    np.testing.assert_allclose(longer.mean(0), table.mean(0), atol=1e-6)


def long_clip(table: np.ndarray, keep: int, times: int) -> np.ndarray:
    """The positions of beichenzbc/Long-CLIP, row by row: the first stay, the others get neighbours in between."""
    rows = [table[i] for i in range(keep)]
    for i in range(keep, len(table) - 1):
        rows += [((times - j) * table[i] + j * table[i + 1]) / times for j in range(times)]
    step = (table[-1] - table[-2]) / times
    rows += [table[-1] + j * step for j in range(times)]
    return np.stack(rows)


def test_the_first_positions_of_texts_may_stay():
    table = np.random.default_rng(0).normal(size=(77, 5))
    ours = np.asarray(resize_text(jnp.asarray(table, jnp.float32), 248, 20))
    assert ours.shape == (248, 5)
    np.testing.assert_array_equal(ours[:20], table[:20].astype(np.float32))
    np.testing.assert_array_equal(ours[20::4], table[20:].astype(np.float32))
    np.testing.assert_allclose(ours, long_clip(table, 20, 4), atol=1e-6)  # one rounding of float32
    places = np.concatenate([np.arange(3), 3 + np.arange(6) * 5 / 6])  # 8 places to 9, any ratio; all inside
    line = jnp.asarray(np.arange(8.0)[:, None] * [1.0, -2.0], jnp.float32)
    np.testing.assert_allclose(resize_text(line, 9, 3), places[:, None] * [1.0, -2.0], rtol=1e-6)
    np.testing.assert_array_equal(resize_text(line, 5, 3), line[:5])  # nothing is interpolated


def test_a_class_token_behind_a_text_keeps_its_position():
    old = ModelConfig(text=TextTransformerConfig(context_length=4, vocab_size=64, width=8, pool=TextPool.CLASS))
    new = dataclasses.replace(old, text=dataclasses.replace(old.text, context_length=6))
    table = jnp.arange(10.0).reshape(5, 2)
    for keep in (0, 2):
        fitted = fit_positions({"image": {}, "text": {"pos_embed": table}}, old, new, keep)["text"]["pos_embed"]
        np.testing.assert_array_equal(fitted[:-1], resize_text(table[:4], 6, keep))
        np.testing.assert_array_equal(fitted[-1], table[-1])


@pytest.mark.parametrize("name", ["image class", "image attention", "image resnet", "image registers"])
def test_a_model_sees_larger_pictures_and_longer_texts(name: str):
    old = model_config(name, compute_dtype=Dtype.FLOAT32)
    new = dataclasses.replace(
        old,
        image=dataclasses.replace(old.image, image_size=2 * old.image.image_size),
        text=dataclasses.replace(old.text, context_length=12),
    )
    params = abstract_params(old)
    fitted = jax.eval_shape(lambda params: fit_positions(params, old, new), params)
    assert jax.tree.map(lambda x: x.shape, fitted) == jax.tree.map(lambda x: x.shape, abstract_params(new))
    changed = {path for path, leaf in to_flat(params).items() if leaf.shape != to_flat(fitted)[path].shape}
    assert changed in ({"image/pos_embed", "text/pos_embed"}, {"image/pool/pos_embed", "text/pos_embed"})


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
@pytest.mark.heavy
def test_batch_norm_is_over_the_global_batch_on_any_mesh(devices: int):
    config = model_config("image resnet", compute_dtype=Dtype.FLOAT32)
    config.image = dataclasses.replace(RESNET, layers=(1, 1, 1, 1))
    clip = build_clip(config)
    params, stats = jax.jit(clip.init)(jax.random.key(0)), clip.init_batch_stats()
    pixels = jax.random.normal(jax.random.key(5), (8, 32, 32, 3)) * jnp.arange(1.0, 9.0).reshape(8, 1, 1, 1)

    tokens = jnp.tile(jnp.asarray([[61, 5, 63, 0, 0, 0, 0, 0]], jnp.int32), (8, 1))

    def train(pixels):
        encoded = clip.train(params, stats, pixels, tokens, jax.random.key(0))
        return encoded.image_embed, encoded.batch_stats

    expected = jax.jit(train)(pixels)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        split = jax.device_put(pixels, batch_sharding(mesh))
        found = jax.jit(train, out_shardings=replicated(mesh))(split)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # sums over devices in another order
    assert not np.allclose(found[1]["bn_1"]["mean"], stats["bn_1"]["mean"])


@pytest.mark.heavy
def test_a_locked_resnet_stays_what_it_is():
    config = model_config("image resnet", compute_dtype=Dtype.FLOAT32)
    locked = build_clip(config, frozen=("image/.*",))
    params, stats = jax.jit(locked.init)(jax.random.key(0)), locked.init_batch_stats()
    pixels = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    tokens = jnp.ones((4, config.text.context_length), jnp.int32)
    encoded = jax.jit(locked.train)(params, stats, pixels, tokens, jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, encoded.batch_stats, stats)
    expected = jax.jit(locked.encode_image)({**params, "batch_stats": stats}, pixels)
    np.testing.assert_allclose(encoded.image_embed, expected, atol=1e-6)


def test_a_resnet_in_microbatches_is_refused():
    config = Config(model=model_config("image resnet"), microbatch_size=64, data=DataConfig(train="x"))
    with pytest.raises(ValueError, match="BatchNorm takes its statistics over the batch that passes at once"):
        validate(config)


@pytest.mark.parametrize(
    ("name", "million_params", "of_image", "of_text", "of_pair"),
    [  # mlfoundations/open_clip, docs/model_profile.csv
        ("RN50", 102.01, 12.22, 5.96, 18.18),
        ("RN101", 119.69, 19.54, 5.96, 25.5),
        ("RN50x4", 178.3, 42.56, 9.27, 51.82),
        ("RN50x16", 290.98, 149.39, 13.3, 162.69),
        ("RN50x64", 623.26, 529.11, 23.55, 552.65),
        ("ViT-S/32", 63.09, 2.29, 3.38, 5.66),
        ("ViT-S/16", 62.26, 9.2, 3.38, 12.58),
        ("ViT-M/32", 103.12, 3.99, 5.96, 9.95),
        ("ViT-M/16", 102.02, 15.98, 5.96, 21.94),
        ("ViT-B/32", 151.28, 8.82, 5.96, 14.78),
        ("ViT-B/32@256px", 151.29, 11.5, 5.96, 17.46),
        ("ViT-B/16", 149.62, 35.13, 5.96, 41.09),
        ("ViT-L/16", 427.74, 123.11, 13.3, 136.41),
        ("ViT-L/14", 427.62, 162.03, 13.3, 175.33),
        ("ViT-L/14@336px", 427.94, 381.92, 13.3, 395.22),
        ("ViT-H/16", 986.26, 254.63, 47.09, 301.72),
        ("ViT-H/14", 986.11, 334.59, 47.09, 381.68),
        ("ViT-g/14", 1366.68, 534.06, 47.09, 581.15),
        ("ViT-bigG/14", 2539.57, 967.5, 97.86, 1065.36),
        ("ViT-e/14", 4581.09, 1981.35, 110.1, 2091.45),
        ("CoCa-B/32", 253.56, 9.19, 5.96, 33.34),
        ("CoCa-L/14", 638.45, 163.64, 13.3, 214.52),
        ("SigLIP-B/16@224px", 203.16, 35.42, 11.02, 46.44),
        ("SigLIP-B/16@256px", 203.2, 46.82, 11.02, 57.84),
        ("SigLIP-B/16@384px", 203.45, 112.13, 11.02, 123.15),
        ("SigLIP-B/16@512px", 203.79, 216.24, 11.02, 227.26),
        ("SigLIP-L/16@256px", 652.15, 162.56, 39.06, 201.62),
        ("SigLIP-L/16@384px", 652.48, 383.85, 39.06, 422.91),
        ("SigLIP-So400m/14@224px", 877.36, 220.35, 13.19, 233.54),
        ("SigLIP-So400m/14@384px", 877.96, 670.35, 53.13, 723.48),
    ],
)
def test_presets_have_the_published_counts(
    name: str, million_params: float, of_image: float, of_text: float, of_pair: float
):
    model = presets.model(name)
    assert model.num_params() / 1e6 == pytest.approx(million_params, abs=0.006)
    # Half of the last digit printed there, or a thousandth: the wanted agreement is half a percent.
    assert [tower.flops(model.embed_dim) / 1e9 for tower in (model.image, model.text)] == pytest.approx(
        [of_image, of_text], rel=1e-3, abs=0.006
    )
    assert model.flops() / 1e9 == pytest.approx(of_pair, rel=1e-3, abs=0.006)


def test_preset_counts_are_frozen():
    counts = {name: presets.model(name).num_params() for name in ("RN50x64", "ViT-e/14", "SigLIP2-g-opt/16@256px")}
    assert counts == {"RN50x64": 623258305, "ViT-e/14": 4581086465, "SigLIP2-g-opt/16@256px": 1871393906}
