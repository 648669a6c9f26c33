"""Hugging Face's `CLIPModel`, `SiglipModel` and `Siglip2Model` (huggingface/transformers).

SigLIP 2 of fixed resolution is a `SiglipModel`; `Siglip2Model` is the one of variable aspect (NaFlex).

Read: `read_config` (their `config.json` to ours), `table` (their names to ours), `write_config`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clipjax.config import (
    Activation,
    ImagePool,
    ModelConfig,
    Positions,
    Projection,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
    most_patches,
)
from clipjax.convert.peer_config import MOST_LAYERS, PeerConfig
from clipjax.convert.peer_fields import HUGGING_FACE
from clipjax.convert.rules import Rule, Table, attention, heads_out, linear, norm, rule

ACTIVATIONS = {
    "quick_gelu": Activation.QUICK_GELU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_python": Activation.GELU,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), Activation.GELU_TANH),
}
"""Their names; several compute the same, and the first of them is written."""
LARGEST_ID = 2
"""As `eos_token_id`: their text tower reads where the largest id of a text stands, as ours and OpenAI's do. With any
other number it reads at the first token of that id, which is another place if the vocabulary has room beyond."""
MODEL_TYPES = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}


def read_config(peer: Mapping[str, Any]) -> ModelConfig:
    """Read the model that their `config.json` describes.

    Raises:
        ValueError: everything in it that clipjax has no model for.
    """
    siglip = peer.get("model_type") in ("siglip", "siglip2")
    kind = MODEL_TYPES[str(peer["model_type"])] if siglip else "CLIP"
    known = PeerConfig(peer if siglip else _resolve_old_form(peer), "config")
    known.choose("model_type", {name: name for name in MODEL_TYPES})
    known.check(HUGGING_FACE[f"{kind}Config"])
    vision, text = known.group("vision_config"), known.group("text_config")
    vision.check(HUGGING_FACE[f"{kind}VisionConfig"])
    text.check(HUGGING_FACE[f"{kind}TextConfig"])
    image_tower = _read_image(vision, siglip=siglip, variable_aspect=kind == "Siglip2")
    text_tower = _read_text(text, siglip=siglip)
    if siglip:
        embed_dim, scale, bias = image_tower.width, 10.0, -10.0
        if (width := text.size("projection_size", text_tower.width)) != embed_dim:
            text.refuse("projection_size", width, f"must be the width of the images' embedding, {embed_dim}")
    else:
        embed_dim, bias = known.size("projection_dim", 512), None
        scale = known.logit_scale("logit_scale_init_value", ModelConfig().init_logit_scale)
    known.finish()
    return ModelConfig(
        embed_dim=embed_dim, image=image_tower, text=text_tower, init_logit_scale=scale, init_logit_bias=bias
    )


def _resolve_old_form(peer: Mapping[str, Any]) -> dict[str, Any]:
    """Their `CLIPConfig` with `text_config_dict` and `vision_config_dict` put where they count.

    Where they are, their values win, and the defaults of what they leave out win too.
    """
    resolved = dict(peer)
    for name, kind in (("text_config", "CLIPTextConfig"), ("vision_config", "CLIPVisionConfig")):
        values, usual = resolved.pop(f"{name}_dict", None), resolved.get(name)
        if isinstance(values, Mapping):
            usual = usual if isinstance(usual, Mapping) else {}
            kept = {field: value for field, value in usual.items() if field not in HUGGING_FACE[kind].converted}
            resolved[name] = {**kept, **values}
        elif values is not None:
            resolved[name] = values
    return resolved


def _read_image(cfg: PeerConfig, *, siglip: bool, variable_aspect: bool) -> ViTConfig:
    patch_size = cfg.size("patch_size", 16 if siglip else 32)
    if variable_aspect:
        places = cfg.size("num_patches", 256)
        if (side := math.isqrt(places)) ** 2 != places:
            cfg.refuse("num_patches", places, "must be the square of a number: that of the grid of positions")
        pixels: dict[str, Any] = {"image_size": side * patch_size, "max_patches": places}
    else:
        size = cfg.size("image_size", 224)
        pixels = {"image_size": size, "crop_to_patches": size % patch_size > 0}
    common: dict[str, Any] = {
        **pixels,
        "patch_size": patch_size,
        **_read_blocks(cfg, siglip=siglip, width=768, mlp_dim=3072, num_heads=12),
    }
    if not siglip:
        return ViTConfig(**common)
    return ViTConfig(
        pool=ImagePool.ATTENTION,
        class_token=False,
        patch_bias=True,
        ln_pre=False,
        projection=Projection.NONE,
        **common,
    )


def _read_text(cfg: PeerConfig, *, siglip: bool) -> TextTransformerConfig:
    length = cfg.size("max_position_embeddings", 64 if siglip else 77)
    vocab_size = cfg.size("vocab_size", 32000 if siglip else 49408)
    if siglip:
        common: dict[str, Any] = _read_blocks(cfg, siglip=True, width=768, mlp_dim=3072, num_heads=12)
        common |= {"causal": False, "pool": TextPool.LAST, "projection": Projection.AFFINE}
    else:
        common = _read_blocks(cfg, siglip=False, width=512, mlp_dim=2048, num_heads=8)
        end = cfg.take("eos_token_id", int, 49407)
        if end not in (LARGEST_ID, vocab_size - 1):
            cfg.refuse("eos_token_id", end, f"must be {LARGEST_ID} (where the largest id stands) or {vocab_size - 1}")
    return TextTransformerConfig(context_length=length, vocab_size=vocab_size, **common)


def _read_blocks(cfg: PeerConfig, *, siglip: bool, width: int, mlp_dim: int, num_heads: int) -> dict[str, Any]:
    """Read the fields that both towers have; sizes are their defaults."""
    width, mlp_dim = cfg.size("hidden_size", width), cfg.size("intermediate_size", mlp_dim)
    return {
        "width": width,
        "depth": cfg.size("num_hidden_layers", 12, most=MOST_LAYERS),
        "num_heads": cfg.size("num_attention_heads", num_heads),
        "mlp_dim": None if mlp_dim == 4 * width else mlp_dim,
        "activation": cfg.choose("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh" if siglip else "quick_gelu"),
        "layer_norm_epsilon": cfg.take("layer_norm_eps", float, 1e-6 if siglip else 1e-5),
    }


def is_siglip(config: ModelConfig) -> bool:
    """Return true for their SigLIP classes, false for their CLIP."""
    return isinstance(config.image, ViTConfig) and config.image.pool is ImagePool.ATTENTION


def _kind(config: ModelConfig) -> str:
    """Return the first part of the name of their class."""
    if not is_siglip(config):
        return "CLIP"
    return "Siglip" if most_patches(config.image) is None else "Siglip2"


def check_known(config: ModelConfig) -> None:
    """Refuse what neither of their classes computes.

    Raises:
        ValueError: all of it, a line each.
    """
    kind = f"{_kind(config)}Model"
    theirs = _SIGLIP if is_siglip(config) else _CLIP
    errors = []
    for tower, wanted in (("image", ViTConfig), ("text", TextTransformerConfig)):
        if not isinstance(getattr(config, tower), wanted):
            found = type(getattr(config, tower)).__name__
            errors.append(f"model.{tower} is a {found}: {kind} has a {wanted.__name__} there")
    for path, wanted in {} if errors else theirs.items():
        tower, _, name = path.partition(".")
        found = getattr(getattr(config, tower), name)
        if found != wanted:
            errors.append(
                f"model.{path}={getattr(found, 'value', found)}: {kind} has {getattr(wanted, 'value', wanted)} there"
            )
    if config.caption is not None:
        errors.append(f"model.caption is a {type(config.caption).__name__}: {kind} has no decoder")
    if (config.init_logit_bias is not None) != is_siglip(config):
        errors.append(
            f"model.init_logit_bias={config.init_logit_bias}: {kind} has {'a' if is_siglip(config) else 'no'} bias"
        )
    if errors:
        raise ValueError("\n".join(errors))


_CLIP: dict[str, Any] = {
    "image.pool": ImagePool.CLASS,
    "image.class_token": True,
    "image.num_registers": 0,
    "image.positions": Positions.LEARNED,
    "image.patch_bias": False,
    "image.ln_pre": True,
    "image.projection": Projection.LINEAR,
    "image.max_patches": None,
    "text.causal": True,
    "text.pool": TextPool.END,
    "text.projection": Projection.LINEAR,
}
_SIGLIP: dict[str, Any] = {
    "image.pool": ImagePool.ATTENTION,
    "image.class_token": False,
    "image.num_registers": 0,
    "image.positions": Positions.LEARNED,
    "image.patch_bias": True,
    "image.ln_pre": False,
    "image.projection": Projection.NONE,
    "text.causal": False,
    "text.pool": TextPool.LAST,
    "text.projection": Projection.AFFINE,
}


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write their `config.json` for a model of ours.

    Raises:
        ValueError: they have no such model.
    """
    check_known(config)
    image, text = config.image, config.text
    assert isinstance(image, ViTConfig)
    assert isinstance(text, TextTransformerConfig)
    siglip = is_siglip(config)
    kind = _kind(config)
    size = {"num_patches": image.grid()[1] ** 2} if kind == "Siglip2" else {"image_size": image.image_size}
    vision = {**size, "patch_size": image.patch_size, "num_channels": 3}
    words = {"max_position_embeddings": text.context_length, "vocab_size": text.vocab_size}
    if siglip:
        return {
            "architectures": [f"{kind}Model"],
            "model_type": kind.lower(),
            "text_config": {
                "model_type": f"{kind.lower()}_text_model",
                **words,
                **{"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 1},
                "projection_size": config.embed_dim,
                **_write_blocks(text),
            },
            "vision_config": {"model_type": f"{kind.lower()}_vision_model", **vision, **_write_blocks(image)},
        }
    words |= {"eos_token_id": LARGEST_ID, "bos_token_id": text.vocab_size - 2, "pad_token_id": 0}
    shared = {"projection_dim": config.embed_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **shared,
        "logit_scale_init_value": math.log(config.init_logit_scale),
        "text_config": {"model_type": "clip_text_model", **words, **shared, **_write_blocks(text)},
        "vision_config": {"model_type": "clip_vision_model", **vision, **shared, **_write_blocks(image)},
    }


def _write_blocks(tower: ViTConfig | TextTransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.hidden_dim,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.num_heads,
        "hidden_act": next(name for name, item in ACTIVATIONS.items() if item is tower.activation),
        "layer_norm_eps": tower.layer_norm_epsilon,
    }


def table(config: ModelConfig) -> Table:
    """Build the table of their arrays and ours.

    Raises:
        ValueError: they have no such model.
    """
    check_known(config)
    image, text = config.image, config.text
    assert isinstance(image, ViTConfig)
    assert isinstance(text, TextTransformerConfig)
    sizes = {"three": 3, "n": image.num_heads, "m": text.num_heads, "side": image.patch_size}
    patch = "o (side h three) -> side h three o" if image.max_patches else "o c h w -> h w c o"
    ours = "transformer/blocks"
    vision, words = "vision_model.embeddings", "text_model.embeddings"
    found = [
        rule(f"{vision}.patch_embedding.weight", "image/patch_embed/kernel", patch),
        rule(f"{vision}.position_embedding.weight", "image/pos_embed", "p w -> p w"),
        *_blocks("vision_model.encoder.layers", f"image/{ours}", range(image.depth), "n"),
        *norm("vision_model.post_layernorm", "image/ln_post"),
        rule(f"{words}.token_embedding.weight", "text/token_embed", "v w -> v w"),
        rule(f"{words}.position_embedding.weight", "text/pos_embed", "p w -> p w"),
        *_blocks("text_model.encoder.layers", f"text/{ours}", range(text.depth), "m"),
        *norm("text_model.final_layer_norm", "text/ln_final"),
    ]
    if is_siglip(config):
        found += [
            rule(f"{vision}.patch_embedding.bias", "image/patch_embed/bias", "o -> o"),
            *_head("vision_model.head", "image/pool"),
            *linear("text_model.head", "text/proj"),
            rule("logit_scale", "log_logit_scale", "1 ->"),
            rule("logit_bias", "logit_bias", "1 ->"),
        ]
    else:
        found += [
            rule(f"{vision}.class_embedding", "image/class_embed", "w -> w"),
            *norm("vision_model.pre_layrnorm", "image/ln_pre"),
            rule("visual_projection.weight", "image/proj/kernel", "e w -> w e"),
            rule("text_projection.weight", "text/proj/kernel", "e w -> w e"),
            rule("logit_scale", "log_logit_scale", "->"),
        ]
    positions = (f"{vision}.position_ids", f"{words}.position_ids")
    return Table(found, sizes, dict.fromkeys(positions))


def _blocks(theirs: str, ours: str, layers: Sequence[int], n: str) -> list[Rule]:
    block = f"{theirs}.{{layer}}"
    attn = f"{block}.self_attn"
    return [
        *norm(f"{block}.layer_norm1", f"{ours}/ln_1", layers),
        *norm(f"{block}.layer_norm2", f"{ours}/ln_2", layers),
        rule(
            [f"{attn}.{name}_proj.weight" for name in "qkv"],
            f"{ours}/attn/qkv/kernel",
            f"l t ({n} d) w -> l w t {n} d",
            layers,
        ),
        rule(
            [f"{attn}.{name}_proj.bias" for name in "qkv"], f"{ours}/attn/qkv/bias", f"l t ({n} d) -> l t {n} d", layers
        ),
        *heads_out(f"{attn}.out_proj", f"{ours}/attn/out", n, layers),
        *linear(f"{block}.mlp.fc1", f"{ours}/mlp/fc_in", layers),
        *linear(f"{block}.mlp.fc2", f"{ours}/mlp/fc_out", layers),
    ]


def _head(theirs: str, ours: str) -> list[Rule]:
    """Return the rules of attention pooling."""
    return [
        rule(f"{theirs}.probe", f"{ours}/probe", "1 q w -> q w"),
        *attention(f"{theirs}.attention", f"{ours}/attn", "n"),
        *norm(f"{theirs}.layernorm", f"{ours}/ln"),
        *linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc_in"),
        *linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc_out"),
    ]
