"""open_clip's `model_cfg` (mlfoundations/open_clip): read, written, and checked for models that it cannot describe."""

import math
from collections.abc import Mapping
from typing import Any

from clipjax.config import (
    Activation,
    DecoderConfig,
    ImagePool,
    ModelConfig,
    Projection,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.convert import peer_fields
from clipjax.convert.open_clip_limits import POOLER_EPSILON, SIGLIP_TRUNKS, check_known, trunk_name
from clipjax.convert.peer_config import MOST, MOST_LAYERS, PeerConfig

_TANH, _EXACT = {"approximate": "tanh"}, {"approximate": "none"}
_NORM = {"elementwise_affine", "bias"}  # of PyTorch's LayerNorm, which have to be true
VISION_NAMES = peer_fields.OPEN_CLIP["CLIPVisionCfg"].names


def read_config(peer: Mapping[str, Any]) -> ModelConfig:
    """Read the model that `open_clip_config.json`, or the `model_cfg` in it, describes.

    Raises:
        ValueError: everything in it that clipjax has no model for.
    """
    known = PeerConfig(peer.get("model_cfg", peer), "model_cfg")
    embed_dim, quick = known.size("embed_dim"), known.take("quick_gelu", bool, False)
    bias = known.take("init_logit_bias", (float, type(None)), None)
    known.check(peer_fields.MODEL)
    scale = known.logit_scale("init_logit_scale", ModelConfig().init_logit_scale if bias is None else 10.0)
    activation, decodes = Activation.QUICK_GELU if quick else Activation.GELU, known.has("multimodal_cfg")
    image = _read_image(known.group("vision_cfg"), activation, decodes)
    text = _read_text(known.group("text_cfg"), activation)
    caption = _read_decoder(known, text, activation) if decodes else None
    known.skip("multimodal_cfg")
    known.finish()
    return ModelConfig(
        embed_dim=embed_dim, image=image, text=text, caption=caption, init_logit_scale=scale, init_logit_bias=bias
    )


def _read_image(cfg: PeerConfig, activation: Activation, decodes: bool) -> ViTConfig | ResNetConfig:
    size = cfg.square("image_size", 224)
    if name := cfg.take("timm_model_name", (str, type(None)), None):
        return _read_trunk(cfg, name, size)
    layers, width = cfg.sizes("layers", 12, most=MOST_LAYERS), cfg.size("width", 768)
    if isinstance(layers, tuple):
        num_heads = _num_heads(cfg, 32 * width)
        cfg.skip(*VISION_NAMES)  # their ResNet reads nothing else
        return ResNetConfig(image_size=size, layers=layers, width=width, num_heads=num_heads)
    epsilon, patch_size = _epsilon(cfg), cfg.square("patch_size", 16)
    pool = cfg.choose("pool_type", {"tok": ImagePool.CLASS, "avg": ImagePool.AVERAGE}, "tok")
    after = cfg.take("final_ln_after_pool", bool, False)
    queries, query_heads = cfg.size("attn_pooler_queries", 256), cfg.size("attn_pooler_heads", 8)
    if cfg.take("attentional_pool", bool, False):
        if pool is not ImagePool.CLASS:
            cfg.refuse("pool_type", "avg", "must be 'tok' with attentional_pool: the first query is the image's vector")
        if epsilon != POOLER_EPSILON:
            cfg.refuse("norm_kwargs", {"eps": epsilon}, f"must be {POOLER_EPSILON} with attentional_pool, which has it")
        pool, after = ImagePool.QUERIES, False  # they ignore it there
    else:
        queries, query_heads = ViTConfig().num_queries, ViTConfig().query_heads
    tower = ViTConfig(
        image_size=size,
        patch_size=patch_size,
        width=width,
        depth=layers,
        num_heads=_num_heads(cfg, width),
        mlp_dim=_mlp_dim(width, cfg),
        activation=_activation(cfg, activation),
        layer_norm_epsilon=epsilon,
        pool=pool,
        num_queries=queries,
        query_heads=query_heads,
        crop_to_patches=size % patch_size > 0,
        ln_pre=not cfg.take("no_ln_pre", bool, False),
        # Of the class token alone both orders give the same, and only a decoder reads the other tokens.
        ln_post_after_pool=after and (decodes or pool is ImagePool.AVERAGE),
        patch_dropout=cfg.take("patch_dropout", float, 0.0),
    )
    _check_blocks(cfg)
    cfg.check(peer_fields.VISION)
    cfg.skip(*peer_fields.TIMM.names)  # they are read with timm_model_name only
    return tower


def _num_heads(cfg: PeerConfig, width: int) -> int:
    """Count heads as they do: by how often the heads' width fits into the tower's."""
    head_width = cfg.size("head_width", 64)
    heads = width // head_width
    if heads < 1 or width % heads:
        cfg.refuse("head_width", head_width, f"must make a number of heads that divides the width, {width}")
        return 1
    return heads


def _check_blocks(cfg: PeerConfig) -> None:
    """Their custom block is the default one unless an option changes it; the default one reads no option."""
    if cfg.choose("block_type", {None: False, "custom": False, "default": True}, None):
        cfg.skip(*peer_fields.BLOCK_OPTIONS.names)
    cfg.check(peer_fields.BLOCK_OPTIONS)


def _read_trunk(cfg: PeerConfig, name: str, size: int) -> ViTConfig:
    """Read a tower of timm's, whose name sets all sizes."""
    if name not in SIGLIP_TRUNKS:
        cfg.refuse("timm_model_name", name, f"must be one of {', '.join(SIGLIP_TRUNKS)}")
        cfg.skip(*VISION_NAMES)
        return ViTConfig()
    projections = {"none": Projection.NONE, "linear": Projection.LINEAR, "": Projection.AFFINE, None: Projection.AFFINE}
    linear = cfg.choose("timm_proj", projections, "linear")
    affine = cfg.take("timm_proj_bias", bool, False) and linear is Projection.LINEAR
    dropout = cfg.take("patch_dropout", float, 0.0)
    if (pool := cfg.take("timm_pool", (str, type(None)), "avg")) != "map":
        cfg.refuse("timm_pool", pool, "must be 'map', which is how SigLIP pools")
    if SIGLIP_TRUNKS[name][0] != size:
        cfg.refuse("image_size", size, f"must be that of timm_model_name={name}")
    cfg.skip(*VISION_NAMES)
    size, (patch_size, width, depth, heads, mlp_dim, activation) = SIGLIP_TRUNKS[name]
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
        projection=Projection.AFFINE if affine else linear,
        patch_dropout=dropout,
    )


def _read_text(cfg: PeerConfig, activation: Activation) -> TextTransformerConfig:
    width, vocab_size = cfg.size("width", 512), cfg.size("vocab_size", 49408)
    linear = Projection.NONE if cfg.take("proj_type", str, "linear") == "none" else Projection.LINEAR
    affine = cfg.take("proj_bias", bool, False) and linear is Projection.LINEAR
    tower = TextTransformerConfig(
        context_length=cfg.size("context_length", 77),
        vocab_size=vocab_size,
        width=width,
        depth=cfg.size("layers", 12, most=MOST_LAYERS),
        num_heads=cfg.size("heads", 8),
        mlp_dim=_mlp_dim(width, cfg),
        activation=_activation(cfg, activation),
        layer_norm_epsilon=_epsilon(cfg),
        causal=not cfg.take("no_causal_mask", bool, False),
        pool=_text_pool(cfg, vocab_size),
        projection=Projection.AFFINE if affine else linear,
    )
    if tower.pool is TextPool.LAST and tower.causal:
        cfg.refuse(
            "pool_type", "last", "must come with no_causal_mask=True: else it reads padding where texts are short"
        )
    if tower.pool is TextPool.CLASS and not tower.causal:
        cfg.refuse("no_causal_mask", True, "must be False with embed_cls")
    _check_blocks(cfg)
    cfg.check(peer_fields.TEXT)
    return tower


def _text_pool(cfg: PeerConfig, vocab_size: int) -> TextPool:
    """Read the place of the text's vector. Some fields count only together with others."""
    end, padding = (cfg.take(name, (int, type(None)), usual) for name, usual in (("eos_id", 2), ("pad_id", 0)))
    if cfg.take("embed_cls", bool, False):
        cfg.skip("pool_type")
        if padding != 0:
            cfg.refuse("pad_id", padding, "must be 0 with embed_cls: clipjax's tokenizers pad with 0")
        return TextPool.CLASS
    by_id = cfg.holds("pool_type", "eos")
    if by_id and end != vocab_size - 1:
        cfg.refuse("eos_id", end, f"must be {vocab_size - 1}, the largest id, which ends a text here")
    return cfg.choose("pool_type", {"argmax": TextPool.END, "last": TextPool.LAST, "eos": TextPool.END}, "argmax")


def _read_decoder(known: PeerConfig, text: TextTransformerConfig, activation: Activation) -> DecoderConfig:
    """Read the text decoder of their CoCa, whose MLP is four times as wide whatever its config says."""
    cfg = known.group("multimodal_cfg")
    if (width := cfg.size("width", 512)) != text.width:
        cfg.refuse("width", width, f"must be that of text_cfg, {text.width}")
    if (length := cfg.size("context_length", 77)) < text.context_length - 1:
        cfg.refuse("context_length", length, f"must be at least {text.context_length - 1}, or no text of text_cfg fits")
    cfg.check(peer_fields.MULTIMODAL)
    return DecoderConfig(
        depth=cfg.size("layers", 12, most=MOST_LAYERS), num_heads=cfg.size("heads", 8), activation=activation
    )


def _mlp_dim(width: int, cfg: PeerConfig) -> int | None:
    ratio = cfg.take("mlp_ratio", float, 4.0)
    if not 1 <= width * ratio <= MOST:
        cfg.refuse("mlp_ratio", ratio, f"must make a width between 1 and {MOST} of {width}")
    return None if ratio == 4 else int(width * ratio)


def _activation(cfg: PeerConfig, activation: Activation) -> Activation:
    """Read the non-linearity, of which their QuickGELU takes no options."""
    found = cfg.take("act_kwargs", (dict, type(None)), None)
    if not found:
        return activation
    if activation is Activation.QUICK_GELU:
        cfg.refuse("act_kwargs", found, "must be absent with quick_gelu")
    elif found not in (_TANH, _EXACT):
        cfg.refuse("act_kwargs", found, f"must be {_TANH} or absent")
    return Activation.GELU_TANH if found == _TANH else activation


def _epsilon(cfg: PeerConfig) -> float:
    found = cfg.take("norm_kwargs", (dict, type(None)), None) or {}
    epsilon = found.get("eps", 1e-5)
    others = {name: value for name, value in found.items() if name != "eps"}
    if not isinstance(epsilon, float) or any(others.get(name) is not True for name in others) or others.keys() - _NORM:
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
        mine["init_logit_bias"] = config.init_logit_bias
    if config.init_logit_bias is not None or config.init_logit_scale != ModelConfig().init_logit_scale:
        mine["init_logit_scale"] = math.log(config.init_logit_scale)
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
    if text.pool is TextPool.CLASS:
        text_cfg |= {"embed_cls": True, "pool_type": "argmax"}
    if isinstance(config.caption, DecoderConfig):
        text_cfg["output_tokens"] = vision_cfg["output_tokens"] = True
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
    plain = text.causal and text.projection is Projection.LINEAR and text.pool is not TextPool.CLASS
    return not plain or config.caption is not None


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
            "timm_model_name": trunk_name(image),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none" if image.projection is Projection.NONE else "linear",
            "timm_proj_bias": image.projection is Projection.AFFINE,
            "patch_dropout": image.patch_dropout,
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
        "final_ln_after_pool": image.ln_post_after_pool,
        "patch_dropout": image.patch_dropout,
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
