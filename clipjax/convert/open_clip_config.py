"""open_clip's `model_cfg` (mlfoundations/open_clip): read, written, and checked for models that it cannot describe."""

import math
from collections.abc import Mapping
from typing import Any

from clipjax.config import (
    Activation,
    CbowConfig,
    DecoderConfig,
    ImagePool,
    ModelConfig,
    Positions,
    Projection,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.convert.peer_config import MOST, MOST_LAYERS, PeerConfig

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
    """Read the model that `open_clip_config.json`, or the `model_cfg` in it, describes.

    Raises:
        ValueError: everything in it that clipjax has no model for.
    """
    known = PeerConfig(peer.get("model_cfg", peer), "model_cfg")
    embed_dim, quick = known.size("embed_dim"), known.take("quick_gelu", bool, False)
    bias = known.take("init_logit_bias", float, None)
    known.take("custom_text", bool, False)
    scale = known.logit_scale("init_logit_scale", ModelConfig().init_logit_scale if bias is None else 10.0)
    activation = Activation.QUICK_GELU if quick else Activation.GELU
    image = _read_image(known.group("vision_cfg"), activation)
    text = _read_text(known.group("text_cfg"), activation)
    caption = _read_decoder(known, text, activation) if known.has("multimodal_cfg") else None
    known.finish()
    return ModelConfig(
        embed_dim=embed_dim, image=image, text=text, caption=caption, init_logit_scale=scale, init_logit_bias=bias
    )


def _read_image(cfg: PeerConfig, activation: Activation) -> ViTConfig | ResNetConfig:
    size = cfg.size("image_size", 224)
    if cfg.has("timm_model_name"):
        return _read_trunk(cfg, size)
    layers, width = cfg.sizes("layers", 12, most=MOST_LAYERS), cfg.size("width", 768)
    head_width = cfg.size("head_width", 64)
    if (32 * width if isinstance(layers, tuple) else width) % head_width:
        cfg.refuse("head_width", head_width, f"must divide the width, {width} (of a ResNet, 32 times that)")
        head_width = 1
    if isinstance(layers, tuple):
        cfg.take("patch_size", (int, type(None)), None)
        return ResNetConfig(image_size=size, layers=layers, width=width, num_heads=width * 32 // head_width)
    if _is_tanh(cfg):
        activation = Activation.GELU_TANH
    pool = cfg.choose("pool_type", {"tok": ImagePool.CLASS, "avg": ImagePool.AVERAGE}, "tok")
    cfg.skip("output_tokens")
    queries, query_heads = cfg.size("attn_pooler_queries", 256), cfg.size("attn_pooler_heads", 8)
    if cfg.take("attentional_pool", bool, False):
        pool = ImagePool.QUERIES
    else:
        queries, query_heads = ViTConfig().num_queries, ViTConfig().query_heads
    positions = cfg.choose("pos_embed_type", {"learnable": Positions.LEARNED}, "learnable")
    return ViTConfig(
        image_size=size,
        patch_size=cfg.size("patch_size", 16),
        width=width,
        depth=layers,
        num_heads=width // head_width,
        mlp_dim=_mlp_dim(width, cfg),
        activation=activation,
        layer_norm_epsilon=_epsilon(cfg),
        pool=pool,
        num_queries=queries,
        query_heads=query_heads,
        positions=positions,
        ln_pre=not cfg.take("no_ln_pre", bool, False),
        patch_dropout=cfg.take("patch_dropout", float, 0.0),
    )


def _read_trunk(cfg: PeerConfig, size: int) -> ViTConfig:
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


def _read_text(cfg: PeerConfig, activation: Activation) -> TextTransformerConfig:
    width = cfg.size("width", 512)
    for name in ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id", "eos_id"):
        cfg.take(name, (str, dict, int, type(None)), None)
    cfg.skip("output_tokens")
    behind = cfg.take("embed_cls", bool, False)
    linear = cfg.choose("proj_type", {"linear": Projection.LINEAR, "none": Projection.NONE}, "linear")
    pool = cfg.choose("pool_type", {"argmax": TextPool.END, "last": TextPool.LAST}, "argmax")
    affine = cfg.take("proj_bias", bool, False) and linear is Projection.LINEAR
    return TextTransformerConfig(
        context_length=cfg.size("context_length", 77),
        vocab_size=cfg.size("vocab_size", 49408),
        width=width,
        depth=cfg.size("layers", 12, most=MOST_LAYERS),
        num_heads=cfg.size("heads", 8),
        mlp_dim=_mlp_dim(width, cfg),
        activation=Activation.GELU_TANH if _is_tanh(cfg) else activation,
        layer_norm_epsilon=_epsilon(cfg),
        causal=not cfg.take("no_causal_mask", bool, False),
        pool=TextPool.CLASS if behind else pool,
        projection=Projection.AFFINE if affine else linear,
    )


def _read_decoder(known: PeerConfig, text: TextTransformerConfig, activation: Activation) -> DecoderConfig:
    """Read the text decoder of their CoCa, whose MLP is four times as wide whatever its config says."""
    cfg = known.group("multimodal_cfg")
    cfg.skip("context_length", "mlp_ratio", "dim_head", "n_queries", "attn_pooler_heads")
    for name, wanted in (("width", text.width), ("vocab_size", text.vocab_size)):
        if cfg.has(name) and (found := cfg.size(name)) != wanted:
            cfg.refuse(name, found, f"must be that of text_cfg, {wanted}")
    return DecoderConfig(
        depth=cfg.size("layers", 12, most=MOST_LAYERS), num_heads=cfg.size("heads", 8), activation=activation
    )


def _mlp_dim(width: int, cfg: PeerConfig) -> int | None:
    ratio = cfg.take("mlp_ratio", float, 4.0)
    if not 1 <= width * ratio <= MOST:
        cfg.refuse("mlp_ratio", ratio, f"must make a width between 1 and {MOST} of {width}")
    return None if ratio == 4 else int(width * ratio)


def _is_tanh(cfg: PeerConfig) -> bool:
    found = cfg.take("act_kwargs", (dict, type(None)), None)
    if found not in (None, {}, _TANH):
        cfg.refuse("act_kwargs", found, f"must be {_TANH} or absent")
    return found == _TANH


def _epsilon(cfg: PeerConfig) -> float:
    found = cfg.take("norm_kwargs", (dict, type(None)), None) or {}
    epsilon = found.get("eps", 1e-5)
    if not isinstance(epsilon, float) or found.keys() - {"eps"}:
        cfg.refuse("norm_kwargs", found, "must hold nothing but eps, a number")
        return 1e-5
    return epsilon


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Write their `model_cfg` for a model of ours.

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
    vision_cfg = _write_image(image)
    if isinstance(config.caption, DecoderConfig):
        text_cfg |= {"embed_cls": True, "output_tokens": True, "pool_type": "argmax"}
        vision_cfg["output_tokens"] = True
        mine["multimodal_cfg"] = {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": config.caption.num_heads,
            "layers": config.caption.depth,
        }
    return mine | {"custom_text": is_custom(config), "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def is_custom(config: ModelConfig) -> bool:
    """Return true if only their `CustomTextCLIP` fits: `CLIP` has a causal tower and a projection without bias."""
    text = config.text
    assert isinstance(text, TextTransformerConfig)
    return not text.causal or text.projection is not Projection.LINEAR or config.caption is not None


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
        **(_write_queries(image) if image.pool is ImagePool.QUERIES else {}),
    }


def _write_queries(image: ViTConfig) -> dict[str, Any]:
    return {
        "attentional_pool": True,
        "attn_pooler_queries": image.num_queries,
        "attn_pooler_heads": image.query_heads,
    }


def _write_ratio(width: int, mlp_dim: int | None) -> dict[str, float]:
    """Return the MLP's ratio; its width is the whole part of the ratio times the tower's width."""
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
    """Return timm's name of an image tower, without its size."""
    found = (image.patch_size, image.width, image.depth, image.num_heads, image.mlp_dim, image.activation)
    return next((name for name, sizes in SIGLIP_TRUNKS.items() if sizes == found), None)


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
    elif text.pool is not TextPool.CLASS and (text.pool is TextPool.LAST) == text.causal:
        errors.append(f"model.text.pool={text.pool.value} with model.text.causal={text.causal} has no counterpart")
    errors += _coca_errors(config)
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


def _coca_errors(config: ModelConfig) -> list[str]:
    """List the errors of a decoder without pooling by queries and a class token, or of these without a decoder."""
    caption, text = config.caption, config.text
    parts = {
        "model.caption is a decoder": isinstance(caption, DecoderConfig),
        "model.image.pool is queries": getattr(config.image, "pool", None) is ImagePool.QUERIES,
        "model.text.pool is class": getattr(text, "pool", None) is TextPool.CLASS,
    }
    if len(set(parts.values())) > 1 or (caption is not None and not isinstance(caption, DecoderConfig)):
        found = ", ".join(f"{name}: {value}" for name, value in parts.items())
        return [f"model: a CoCa has all of these, a CLIP none ({found}); other mixtures have no counterpart"]
    if not isinstance(caption, DecoderConfig) or not isinstance(text, TextTransformerConfig):
        return []
    same = (caption.mlp_dim, caption.activation, caption.layer_norm_epsilon, config.embed_dim)
    if same != (None, text.activation, 1e-5, text.width):
        return [
            "model.caption: theirs has an MLP of four times the width, the text tower's non-linearity, "
            "layer_norm_epsilon=1e-5, and model.embed_dim = model.text.width"
        ]
    return []
