"""open_clip's models (mlfoundations/open_clip), and OpenAI's, whose names are the same.

Read: `read_config` (their JSON to ours), `table` (their names to ours), `write_config`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.config import (
    Activation,
    CbowConfig,
    ImagePool,
    ModelConfig,
    Positions,
    Projection,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.convert.known import Known
from clipjax.convert.rules import Rule, Table, heads_out, linear, norm, rule

SIGLIP_TRUNKS = {
    "vit_base_patch16_siglip": (16, 768, 12, 12, None, Activation.GELU),
    "vit_base_patch32_siglip": (32, 768, 12, 12, None, Activation.GELU_TANH),
    "vit_large_patch16_siglip": (16, 1024, 24, 16, None, Activation.GELU),
    "vit_so400m_patch14_siglip": (14, 1152, 27, 16, 4304, Activation.GELU),
    "vit_so400m_patch16_siglip": (16, 1152, 27, 16, 4304, Activation.GELU_TANH),
    "vit_giantopt_patch16_siglip": (16, 1536, 40, 16, None, Activation.GELU_TANH),
}
"""timm's image towers that open_clip names: patch size, width, depth, heads, MLP, non-linearity
(huggingface/pytorch-image-models, `timm/models/vision_transformer.py`)."""


_TANH = {"approximate": "tanh"}


def read_config(peer: Mapping[str, Any]) -> ModelConfig:
    """The model that `open_clip_config.json`, or the `model_cfg` in it, describes.

    Raises:
        ValueError: everything in it that clipjax has no model for.
    """
    known = Known(peer.get("model_cfg", peer), "model_cfg")
    embed_dim, quick = known.take("embed_dim", int), known.take("quick_gelu", bool, False)
    bias = known.take("init_logit_bias", float, None)
    known.take("custom_text", bool, False)
    scale = known.take("init_logit_scale", float, None)
    activation = Activation.QUICK_GELU if quick else Activation.GELU
    image = _read_image(known.group("vision_cfg"), activation)
    text = _read_text(known.group("text_cfg"), activation)
    known.finish()
    config = ModelConfig(embed_dim=embed_dim, image=image, text=text, init_logit_bias=bias)
    if bias is not None:
        config.init_logit_scale = 10.0
    if scale is not None:
        config.init_logit_scale = math.exp(scale)
    return config


def _read_image(cfg: Known, activation: Activation) -> ViTConfig | ResNetConfig:
    size = cfg.take("image_size", int, 224)
    if cfg.has("timm_model_name"):
        return _read_trunk(cfg, size)
    layers, width = cfg.take("layers", (int, list), 12), cfg.take("width", int, 768)
    head_width = cfg.take("head_width", int, 64)
    if isinstance(layers, list):
        cfg.take("patch_size", (int, type(None)), None)
        return ResNetConfig(image_size=size, layers=tuple(layers), width=width, num_heads=width * 32 // head_width)
    if _is_tanh(cfg):
        activation = Activation.GELU_TANH
    pool = cfg.choose("pool_type", {"tok": ImagePool.CLASS, "avg": ImagePool.AVERAGE}, "tok")
    positions = cfg.choose("pos_embed_type", {"learnable": Positions.LEARNED}, "learnable")
    return ViTConfig(
        image_size=size,
        patch_size=cfg.take("patch_size", int, 16),
        width=width,
        depth=layers,
        num_heads=width // head_width,
        mlp_dim=_mlp_dim(width, cfg.take("mlp_ratio", float, 4.0)),
        activation=activation,
        layer_norm_epsilon=_epsilon(cfg),
        pool=pool,
        positions=positions,
        ln_pre=not cfg.take("no_ln_pre", bool, False),
        patch_dropout=cfg.take("patch_dropout", float, 0.0),
    )


def _read_trunk(cfg: Known, size: int) -> ViTConfig:
    name = cfg.take("timm_model_name", str)
    cfg.take("timm_model_pretrained", bool, False)
    cfg.choose("timm_pool", {"map": True}, "avg")
    cfg.choose("timm_proj", {"none": True}, "linear")
    base = name.rpartition("_")[0]
    if base not in SIGLIP_TRUNKS:
        cfg.refuse("timm_model_name", name, f"must be one of {', '.join(SIGLIP_TRUNKS)}, and _SIZE")
        base = next(iter(SIGLIP_TRUNKS))
    patch_size, width, depth, heads, mlp_dim, activation = SIGLIP_TRUNKS[base]
    return ViTConfig(
        image_size=size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_dim=mlp_dim,
        activation=activation,
        layer_norm_epsilon=1e-6,
        pool=ImagePool.ATTENTION,
        class_token=False,
        patch_bias=True,
        crop_to_patches=size % patch_size > 0,
        ln_pre=False,
        projection=Projection.NONE,
    )


def _read_text(cfg: Known, activation: Activation) -> TextTransformerConfig:
    width = cfg.take("width", int, 512)
    for name in ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id", "eos_id"):
        cfg.take(name, (str, dict, int, type(None)), None)
    linear = cfg.choose("proj_type", {"linear": Projection.LINEAR, "none": Projection.NONE}, "linear")
    affine = cfg.take("proj_bias", bool, False) and linear is Projection.LINEAR
    return TextTransformerConfig(
        context_length=cfg.take("context_length", int, 77),
        vocab_size=cfg.take("vocab_size", int, 49408),
        width=width,
        depth=cfg.take("layers", int, 12),
        num_heads=cfg.take("heads", int, 8),
        mlp_dim=_mlp_dim(width, cfg.take("mlp_ratio", float, 4.0)),
        activation=Activation.GELU_TANH if _is_tanh(cfg) else activation,
        layer_norm_epsilon=_epsilon(cfg),
        causal=not cfg.take("no_causal_mask", bool, False),
        pool=cfg.choose("pool_type", {"argmax": TextPool.END, "last": TextPool.LAST}, "argmax"),
        projection=Projection.AFFINE if affine else linear,
    )


def _mlp_dim(width: int, ratio: float) -> int | None:
    return None if ratio == 4 else int(width * ratio)


def _is_tanh(cfg: Known) -> bool:
    found = cfg.take("act_kwargs", (dict, type(None)), None)
    if found not in (None, {}, _TANH):
        cfg.refuse("act_kwargs", found, f"must be {_TANH} or absent")
    return found == _TANH


def _epsilon(cfg: Known) -> float:
    return float((cfg.take("norm_kwargs", (dict, type(None)), None) or {}).get("eps", 1e-5))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Their `model_cfg` for a model of ours.

    Raises:
        ValueError: they have no such model.
    """
    check_known(config)
    image, text = config.image, config.text
    assert isinstance(text, TextTransformerConfig)
    quick = text.activation is Activation.QUICK_GELU
    mine: dict[str, Any] = {"embed_dim": config.embed_dim, "quick_gelu": quick}
    if config.init_logit_bias is not None:
        mine |= {"init_logit_bias": config.init_logit_bias, "init_logit_scale": math.log(config.init_logit_scale)}
    text_cfg: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.depth,
        **_write_ratio(text.width, text.mlp_dim),
        **_write_numerics(text),
        "no_causal_mask": not text.causal,
        "pool_type": "argmax" if text.pool is TextPool.END else "last",
        "proj_type": "none" if text.projection is Projection.NONE else "linear",
        "proj_bias": text.projection is Projection.AFFINE,
    }
    return mine | {"custom_text": is_custom(config), "vision_cfg": _write_image(image), "text_cfg": text_cfg}


def is_custom(config: ModelConfig) -> bool:
    """Whether theirs is a `CustomTextCLIP`: their `CLIP` has only the causal tower and a projection without bias."""
    text = config.text
    assert isinstance(text, TextTransformerConfig)
    return not text.causal or text.projection is not Projection.LINEAR


def _write_image(image: ViTConfig | ResNetConfig) -> dict[str, Any]:
    if isinstance(image, ResNetConfig):
        head_width = image.width * 32 // image.num_heads
        return {
            "image_size": image.image_size,
            "layers": list(image.layers),
            "width": image.width,
            "head_width": head_width,
            "patch_size": None,
        }
    if image.pool is ImagePool.ATTENTION:
        return {
            "image_size": image.image_size,
            "timm_model_name": f"{_trunk_name(image)}_224",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
    return {
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "layers": image.depth,
        "width": image.width,
        "head_width": image.width // image.num_heads,
        **_write_ratio(image.width, image.mlp_dim),
        **_write_numerics(image),
        "no_ln_pre": not image.ln_pre,
        "pool_type": "avg" if image.pool is ImagePool.AVERAGE else "tok",
    }


def _write_ratio(width: int, mlp_dim: int | None) -> dict[str, float]:
    """The MLP's ratio, from which they take the whole part of width times it."""
    if mlp_dim is None:
        return {}
    ratio = mlp_dim / width
    return {"mlp_ratio": ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)}


def _write_numerics(tower: ViTConfig | TextTransformerConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if tower.activation is Activation.GELU_TANH:
        found["act_kwargs"] = _TANH
    if tower.layer_norm_epsilon != 1e-5:
        found["norm_kwargs"] = {"eps": tower.layer_norm_epsilon}
    return found


def _trunk_name(image: ViTConfig) -> str | None:
    """timm's name of an image tower, without its size."""
    found = (image.patch_size, image.width, image.depth, image.num_heads, image.mlp_dim, image.activation)
    return next((name for name, sizes in SIGLIP_TRUNKS.items() if sizes == found), None)


def table(config: ModelConfig, *, custom_text: bool) -> Table:
    """Which of their arrays is which of ours.

    Args:
        config: the model.
        custom_text: whether the text tower lies in `text.`, as in their `CustomTextCLIP`.

    Raises:
        ValueError: they have no such model.
    """
    check_known(config)
    image, text = config.image, config.text
    assert isinstance(text, TextTransformerConfig)
    sizes = {"two": 2, "three": 3, "n": image.num_heads, "m": text.num_heads}
    scalars = [rule("logit_scale", "log_logit_scale", "->")]
    if config.init_logit_bias is not None:
        scalars.append(rule("logit_bias", "logit_bias", "->"))
    text_rules = _text_rules(text, "text." if custom_text else "")
    if isinstance(image, ResNetConfig):
        return Table([*_resnet_rules(image), *text_rules, *scalars], sizes, _counters(image))
    image_rules = _trunk_rules(image) if image.pool is ImagePool.ATTENTION else _vit_rules(image)
    return Table([*image_rules, *text_rules, *scalars], sizes)


def check_known(config: ModelConfig) -> None:
    """Refuse what open_clip has no model for.

    Raises:
        ValueError: all of it, a line each.
    """
    image, text, errors = config.image, config.text, []
    if isinstance(text, CbowConfig):
        errors.append("model.text: a bag of words (CbowConfig) has no counterpart")
    elif text.pool is TextPool.ATTENTION:
        errors.append("model.text.pool=attention has no counterpart")
    elif (text.pool is TextPool.LAST) == text.causal:
        errors.append(f"model.text.pool={text.pool.value} with model.text.causal={text.causal} has no counterpart")
    quick = Activation.QUICK_GELU
    if isinstance(image, ViTConfig) and isinstance(text, TextTransformerConfig):
        if (image.activation is quick) != (text.activation is quick):
            errors.append("model.image.activation and model.text.activation: quick_gelu is for both or none there")
        if image.pool is ImagePool.ATTENTION and (_trunk_name(image) is None or image.layer_norm_epsilon != 1e-6):
            errors.append(
                "model.image: with pool=attention only timm's named towers have a counterpart, with their own sizes, "
                f"non-linearity and layer_norm_epsilon=1e-6: {', '.join(SIGLIP_TRUNKS)}"
            )
    if isinstance(image, ViTConfig):
        of_trunk = (False, True, False, Projection.NONE)
        of_vit = (True, False, image.ln_pre, Projection.LINEAR)
        expected = of_trunk if image.pool is ImagePool.ATTENTION else of_vit
        found = (image.class_token, image.patch_bias, image.ln_pre, image.projection)
        for name, mine, theirs in zip(
            ("class_token", "patch_bias", "ln_pre", "projection"), found, expected, strict=True
        ):
            if mine != theirs:
                errors.append(
                    f"model.image.{name}={getattr(mine, 'value', mine)} has no counterpart with "
                    f"model.image.pool={image.pool.value}"
                )
        if image.num_registers:
            errors.append(f"model.image.num_registers={image.num_registers} has no counterpart")
        if image.positions is Positions.SINCOS:
            errors.append("model.image.positions=sincos has no counterpart: theirs are ordered otherwise")
    if errors:
        raise ValueError("\n".join(errors))


def _blocks(theirs: str, ours: str, depth: int, n: str) -> list[Rule]:
    layers, block = range(depth), f"{theirs}.{{layer}}"
    qkv = f"{ours}/attn/qkv"
    return [
        *norm(f"{block}.ln_1", f"{ours}/ln_1", layers),
        *norm(f"{block}.ln_2", f"{ours}/ln_2", layers),
        rule(f"{block}.attn.in_proj_weight", f"{qkv}/kernel", f"l (three {n} d) w -> l w three {n} d", layers),
        rule(f"{block}.attn.in_proj_bias", f"{qkv}/bias", f"l (three {n} d) -> l three {n} d", layers),
        *heads_out(f"{block}.attn.out_proj", f"{ours}/attn/out", n, layers),
        *linear(f"{block}.mlp.c_fc", f"{ours}/mlp/fc_in", layers),
        *linear(f"{block}.mlp.c_proj", f"{ours}/mlp/fc_out", layers),
    ]


def _text_rules(tower: TextTransformerConfig, prefix: str) -> list[Rule]:
    found = [
        rule(f"{prefix}token_embedding.weight", "text/token_embed", "v w -> v w"),
        rule(f"{prefix}positional_embedding", "text/pos_embed", "p w -> p w"),
        *_blocks(f"{prefix}transformer.resblocks", "text/transformer/blocks", tower.depth, "m"),
        *norm(f"{prefix}ln_final", "text/ln_final"),
    ]
    match tower.projection:
        case Projection.LINEAR:
            found.append(rule(f"{prefix}text_projection", "text/proj/kernel", "w e -> w e"))
        case Projection.AFFINE:
            found += linear(f"{prefix}text_projection", "text/proj")
    return found


def _vit_rules(tower: ViTConfig) -> list[Rule]:
    return [
        rule("visual.conv1.weight", "image/patch_embed/kernel", "o c h w -> h w c o"),
        rule("visual.class_embedding", "image/class_embed", "w -> w"),
        rule("visual.positional_embedding", "image/pos_embed", "p w -> p w"),
        *(norm("visual.ln_pre", "image/ln_pre") if tower.ln_pre else []),
        *_blocks("visual.transformer.resblocks", "image/transformer/blocks", tower.depth, "n"),
        *norm("visual.ln_post", "image/ln_post"),
        rule("visual.proj", "image/proj/kernel", "w e -> w e"),
    ]


def _trunk_rules(tower: ViTConfig) -> list[Rule]:
    """timm's ViT with attention pooling, as their SigLIPs have it."""
    trunk, layers, ours = "visual.trunk", range(tower.depth), "image/transformer/blocks"
    block = f"{trunk}.blocks.{{layer}}"
    pool = f"{trunk}.attn_pool"
    return [
        rule(f"{trunk}.patch_embed.proj.weight", "image/patch_embed/kernel", "o c h w -> h w c o"),
        rule(f"{trunk}.patch_embed.proj.bias", "image/patch_embed/bias", "o -> o"),
        rule(f"{trunk}.pos_embed", "image/pos_embed", "1 p w -> p w"),
        *norm(f"{block}.norm1", f"{ours}/ln_1", layers),
        *norm(f"{block}.norm2", f"{ours}/ln_2", layers),
        rule(f"{block}.attn.qkv.weight", f"{ours}/attn/qkv/kernel", "l (three n d) w -> l w three n d", layers),
        rule(f"{block}.attn.qkv.bias", f"{ours}/attn/qkv/bias", "l (three n d) -> l three n d", layers),
        *heads_out(f"{block}.attn.proj", f"{ours}/attn/out", "n", layers),
        *linear(f"{block}.mlp.fc1", f"{ours}/mlp/fc_in", layers),
        *linear(f"{block}.mlp.fc2", f"{ours}/mlp/fc_out", layers),
        *norm(f"{trunk}.norm", "image/ln_post"),
        rule(f"{pool}.latent", "image/pool/probe", "1 q w -> q w"),
        rule(f"{pool}.q.weight", "image/pool/attn/q/kernel", "(n d) w -> w n d"),
        rule(f"{pool}.q.bias", "image/pool/attn/q/bias", "(n d) -> n d"),
        rule(
            f"{pool}.kv.weight",
            ("image/pool/attn/k/kernel", "image/pool/attn/v/kernel"),
            "(two n d) w -> two w n d",
        ),
        rule(f"{pool}.kv.bias", ("image/pool/attn/k/bias", "image/pool/attn/v/bias"), "(two n d) -> two n d"),
        *heads_out(f"{pool}.proj", "image/pool/attn/out", "n"),
        *norm(f"{pool}.norm", "image/pool/ln"),
        *linear(f"{pool}.mlp.fc1", "image/pool/mlp/fc_in"),
        *linear(f"{pool}.mlp.fc2", "image/pool/mlp/fc_out"),
    ]


def _resnet_rules(tower: ResNetConfig) -> list[Rule]:
    found: list[Rule] = []
    for number in (1, 2, 3):
        found += _convolution(f"visual.conv{number}", f"image/conv_{number}")
        found += _batch_norm(f"visual.bn{number}", f"bn_{number}")
    for stage, depth in enumerate(tower.layers, start=1):
        theirs, first, rest = f"visual.layer{stage}", f"stage_{stage}_first", f"stage_{stage}"
        found += _convolution(f"{theirs}.0.downsample.0", f"image/{first}/downsample")
        found += _batch_norm(f"{theirs}.0.downsample.1", f"{first}/bn_downsample")
        for number in (1, 2, 3):
            found += _convolution(f"{theirs}.0.conv{number}", f"image/{first}/conv_{number}")
            found += _batch_norm(f"{theirs}.0.bn{number}", f"{first}/bn_{number}")
            if layers := range(1, depth):
                found += _convolution(f"{theirs}.{{layer}}.conv{number}", f"image/{rest}/conv_{number}", layers)
                found += _batch_norm(f"{theirs}.{{layer}}.bn{number}", f"{rest}/bn_{number}", layers)
    pool = "visual.attnpool"
    found.append(rule(f"{pool}.positional_embedding", "image/pool/pos_embed", "p w -> p w"))
    for name in "qkv":
        found.append(rule(f"{pool}.{name}_proj.weight", f"image/pool/attn/{name}/kernel", "(n d) w -> w n d"))
        found.append(rule(f"{pool}.{name}_proj.bias", f"image/pool/attn/{name}/bias", "(n d) -> n d"))
    return [*found, *heads_out(f"{pool}.c_proj", "image/pool/attn/out", "n")]


def _convolution(theirs: str, ours: str, layers: Sequence[int] = ()) -> list[Rule]:
    lead = "l " if layers else ""
    return [rule(f"{theirs}.weight", f"{ours}/kernel", f"{lead}o c h w -> {lead}h w c o", layers)]


def _batch_norm(theirs: str, ours: str, layers: Sequence[int] = ()) -> list[Rule]:
    lead = "l " if layers else ""
    return [
        *norm(theirs, f"image/{ours}", layers),
        rule(f"{theirs}.running_mean", f"batch_stats/{ours}/mean", f"{lead}c -> {lead}c", layers),
        rule(f"{theirs}.running_var", f"batch_stats/{ours}/variance", f"{lead}c -> {lead}c", layers),
    ]


def _counters(tower: ResNetConfig) -> dict[str, Callable[[], np.ndarray] | None]:
    """PyTorch counts the batches that a BatchNorm has seen; nothing reads it at a fixed momentum."""
    norms = [f"visual.bn{number}" for number in (1, 2, 3)]
    for stage, depth in enumerate(tower.layers, start=1):
        norms.append(f"visual.layer{stage}.0.downsample.1")
        norms += [f"visual.layer{stage}.{block}.bn{number}" for block in range(depth) for number in (1, 2, 3)]
    return {f"{name}.num_batches_tracked": lambda: np.zeros((), np.int64) for name in norms}
