"""open_clip's config and names: every model of ours that it can describe goes there and back; others are refused."""

import dataclasses

import jax
import numpy as np
import pytest

from clipjax.config import (
    Activation,
    BagOfWordsConfig,
    CbowConfig,
    DecoderConfig,
    ImagePool,
    ModelConfig,
    Projection,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
    presets,
)
from clipjax.convert import huggingface, open_clip, open_clip_config, open_clip_limits
from clipjax.convert.rules import to_ours, to_theirs
from clipjax.models.clip import abstract_model
from clipjax.pytrees import to_flat

VIT = {"image_size": 16, "patch_size": 8, "width": 128, "depth": 2, "num_heads": 2}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "depth": 2, "num_heads": 2}


def tiny_siglip() -> ViTConfig:
    image = presets.model("SigLIP-B/16@224px").image
    assert isinstance(image, ViTConfig)
    return dataclasses.replace(image, **VIT, activation=Activation.GELU)


@pytest.fixture(autouse=True)
def tiny_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower of timm's that is small; all of theirs have 86 million parameters and more."""
    monkeypatch.setitem(open_clip_limits.SIGLIP_TRUNKS, "vit_tiny_16", (16, (8, 128, 2, 2, None, Activation.GELU)))


def model_config(name: str) -> ModelConfig:
    image, text = ViTConfig(**VIT), TextTransformerConfig(**TEXT)
    config = ModelConfig(embed_dim=64, image=image, text=text)
    match name:
        case "average, an odd MLP, tanh, no first norm":
            image.pool, image.mlp_dim, image.ln_pre = ImagePool.AVERAGE, 383, False
            image.activation = text.activation = Activation.GELU_TANH
            image.layer_norm_epsilon = 1e-6
        case "bidirectional text":
            text.causal, text.pool, text.projection = False, TextPool.LAST, Projection.AFFINE
        case "resnet":
            config.image = ResNetConfig(image_size=32, layers=(1, 2, 1, 3), width=8, num_heads=4)
        case "average, then the norm":
            image.pool, image.ln_post_after_pool, image.patch_dropout = ImagePool.AVERAGE, True, 0.25
        case "queries without a decoder":
            image.pool, image.num_queries, image.query_heads = ImagePool.QUERIES, 5, 4
        case "a token behind the text without a decoder":
            text.pool = TextPool.CLASS
        case "end of text without a causal mask":
            text.causal = False
        case "siglip with a projection":
            text.causal, text.pool, config.embed_dim, config.init_logit_scale = False, TextPool.LAST, 32, 1.0
            config.image, config.init_logit_bias = tiny_siglip(), -10.0
            config.image.projection, config.image.patch_dropout = Projection.AFFINE, 0.5
        case "coca over patches":
            image.width, image.ln_post_after_pool, config.embed_dim = 64, True, 32
            text.activation = image.activation = Activation.GELU_TANH
            text.pool, config.caption = TextPool.CLASS, DecoderConfig(depth=3, num_heads=4, activation=Activation.GELU)
        case "coca" | "coca as wide as its embedding":
            image.pool, image.num_queries, image.query_heads = ImagePool.QUERIES, 5, 4
            text.pool, config.caption = TextPool.CLASS, DecoderConfig(depth=3, num_heads=4)
            if name != "coca":
                image.width = 64
    return config


NAMES = (
    "plain",
    "average, an odd MLP, tanh, no first norm",
    "bidirectional text",
    "resnet",
    "average, then the norm",
    "queries without a decoder",
    "a token behind the text without a decoder",
    "end of text without a causal mask",
    "siglip with a projection",
    "coca over patches",
    "coca",
    "coca as wide as its embedding",
)


@pytest.mark.parametrize("name", NAMES)
def test_config_and_weights_go_there_and_back(name: str):
    config = model_config(name)
    written = open_clip_config.write_config(config)
    assert open_clip_config.read_config({"model_cfg": written}) == config
    shapes = {path: leaf.shape for path, leaf in to_flat(abstract_model(config)).items()}
    rng = np.random.default_rng(0)
    ours = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    table = open_clip.table(config, custom_text=open_clip_config.is_custom(config))
    theirs = to_theirs(table, ours)
    assert written["custom_text"] == any(path.startswith("text.") for path in theirs)
    back = to_ours(table, theirs, shapes)
    for path, array in ours.items():
        np.testing.assert_array_equal(back[path], array, err_msg=path)


@pytest.mark.parametrize("name", presets.MODELS)
def test_presets_have_their_counterparts(name: str):
    """Every CLIP and CoCa goes to open_clip and back; of SigLIPs those whose non-linearity timm's towers share."""
    config = presets.model(name)
    if not name.startswith("SigLIP"):
        assert open_clip_config.read_config(open_clip_config.write_config(config)) == config
    if not name.startswith(("RN", "CoCa")):
        again = huggingface.read_config(huggingface.write_config(config))
        same = dataclasses.replace(again, init_logit_scale=config.init_logit_scale)
        assert same == config and again.init_logit_scale == pytest.approx(config.init_logit_scale)


def test_variants_of_names_and_shapes_hold_the_same_model():
    """timm's classifier as projection, and scalars as arrays of one."""
    config = model_config("siglip with a projection")
    shapes = {path: leaf.shape for path, leaf in to_flat(abstract_model(config)).items()}
    rng = np.random.default_rng(0)
    ours = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    theirs = to_theirs(open_clip.table(config, custom_text=True), ours)
    for name in ("weight", "bias"):
        theirs[f"visual.trunk.head.{name}"] = theirs.pop(f"visual.head.proj.{name}")
    theirs |= {name: theirs[name].reshape(1) for name in ("logit_scale", "logit_bias")}
    back = to_ours(open_clip.table(config, custom_text=True, weights=theirs), theirs, shapes)
    assert all(np.array_equal(back[path], array) for path, array in ours.items())


@pytest.mark.parametrize(("size", "activation"), [(384, Activation.GELU), (512, Activation.GELU_TANH)])
def test_a_tower_of_timms_is_known_by_its_whole_name(size: int, activation: Activation):
    """The L/16 at 512 pixels has another non-linearity than those at 256 and 384; its name sets the image's size."""
    vision = {"image_size": size, "timm_model_name": f"vit_large_patch16_siglip_{size}", "timm_pool": "map"}
    peer = {"embed_dim": 1024, "vision_cfg": vision | {"timm_proj": "none"}, "text_cfg": {}}
    config = open_clip_config.read_config(peer)
    assert isinstance(config.image, ViTConfig) and config.image.activation is activation
    assert open_clip_config.write_config(config)["vision_cfg"]["timm_model_name"] == vision["timm_model_name"]
    vision["image_size"] = 256
    with pytest.raises(ValueError, match=f"image_size=256 must be that of timm_model_name={vision['timm_model_name']}"):
        open_clip_config.read_config({**peer, "vision_cfg": vision})


def bag_of_words(config: ModelConfig) -> None:
    config.text = CbowConfig(context_length=8, vocab_size=64, width=16)


def coca_over_other_widths(config: ModelConfig) -> None:
    config.text.pool, config.caption = TextPool.CLASS, DecoderConfig(depth=1, num_heads=2)


def queries_with_an_epsilon(config: ModelConfig) -> None:
    config.image.pool, config.image.layer_norm_epsilon = ImagePool.QUERIES, 1e-6


def siglip_of_another_size(config: ModelConfig) -> None:
    config.image = dataclasses.replace(tiny_siglip(), image_size=24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bag_of_words, "a bag of words"),
        (lambda c: setattr(c.image, "num_registers", 2), "model.image.num_registers=2 has no counterpart"),
        (lambda c: setattr(c.image, "patch_bias", True), "model.image.patch_bias=True has no counterpart with"),
        (lambda c: setattr(c.image, "activation", Activation.GELU), "quick_gelu is for both or none"),
        (lambda c: setattr(c, "caption", DecoderConfig(depth=1, num_heads=2)), "theirs needs model.text.pool=class"),
        (coca_over_other_widths, "the image's tokens are 128 wide, but must be as model.text.width=64"),
        (queries_with_an_epsilon, "model.image.layer_norm_epsilon must be 1e-05 with model.image.pool=queries"),
        (lambda c: setattr(c, "caption", BagOfWordsConfig()), "model.caption is a BagOfWordsConfig, which has no"),
        (siglip_of_another_size, "only timm's named towers have a counterpart, with their own sizes"),
    ],
)
def test_what_open_clip_cannot_compute_is_refused(change, message: str):
    config = model_config("plain")
    change(config)
    with pytest.raises(ValueError, match=message):
        open_clip_config.write_config(config)


def test_every_weight_of_a_coca_is_named_as_open_clip_names_it():
    config = model_config("coca")
    theirs = to_theirs(
        open_clip.table(config, custom_text=True),
        {path: np.zeros(leaf.shape, np.float32) for path, leaf in to_flat(abstract_model(config)).items()},
    )
    assert jax.tree.map(np.shape, {name: theirs[name] for name in theirs if "attn_pool" in name or "cls" in name}) == {
        "text.cls_emb": (64,),
        "visual.attn_pool.query": (5, 64),
        "visual.attn_pool.attn.q_proj_weight": (64, 64),
        "visual.attn_pool.attn.k_proj_weight": (64, 128),
        "visual.attn_pool.attn.v_proj_weight": (64, 128),
        "visual.attn_pool.attn.in_proj_bias": (192,),
        "visual.attn_pool.attn.out_proj.weight": (64, 64),
        "visual.attn_pool.attn.out_proj.bias": (64,),
        "visual.attn_pool.ln_q.weight": (64,),
        "visual.attn_pool.ln_q.bias": (64,),
        "visual.attn_pool.ln_k.weight": (128,),
        "visual.attn_pool.ln_k.bias": (128,),
    }
