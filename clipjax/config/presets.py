"""Sizes of known models as data, each row with its source."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from clipjax.config.caption import DecoderConfig
from clipjax.config.image import ImagePool, ResNetConfig, ViTConfig
from clipjax.config.layers import Activation, Projection
from clipjax.config.model import ModelConfig
from clipjax.config.text import TextPool, TextTransformerConfig

CLIP = "arXiv 2103.00020, tables 19 and 20"
OPEN_CLIP = "mlfoundations/open_clip, src/open_clip/model_configs"
SIGLIP = "arXiv 2303.15343; google-research/big_vision, README_siglip2.md and SigLIP_demo.ipynb"
GELU_SUFFIX = "-gelu"
BIG_VISION = "google-research/big_vision, models/vit.py, decode_variant"


@dataclass(frozen=True)
class Preset:
    """A model, and the source of its sizes."""

    config: ModelConfig
    source: str


def _text(width: int, depth: int, num_heads: int, activation: Activation) -> TextTransformerConfig:
    return TextTransformerConfig(width=width, depth=depth, num_heads=num_heads, activation=activation)


def _sizes(size: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return (width, depth, heads, MLP) as fields of a tower."""
    width, depth, num_heads, mlp_dim = size
    mlp = None if mlp_dim == 4 * width else mlp_dim
    return {"width": width, "depth": depth, "num_heads": num_heads, "mlp_dim": mlp}


def _vit(
    name: str, size: tuple[int, int, int, int], image: tuple[int, int], text: tuple[int, int, int], source: str
) -> tuple[str, Preset]:
    """Return a CLIP with a ViT: (width, depth, heads, MLP), (image size, patch), the text's (width, depth, heads).

    The embedding is as wide as the text tower; OpenAI's models have QuickGELU, the others GELU.
    """
    activation = Activation.QUICK_GELU if source is CLIP else Activation.GELU
    tower = ViTConfig(image_size=image[0], patch_size=image[1], **_sizes(size), activation=activation)
    return name, Preset(ModelConfig(embed_dim=text[0], image=tower, text=_text(*text, activation)), source)


def _resnet(
    name: str, embed_dim: int, tower: tuple[int, tuple[int, ...], int], text: tuple[int, int, int]
) -> tuple[str, Preset]:
    """Return a CLIP with a ResNet: (image size, blocks, width), the text's (width, depth, heads)."""
    size, layers, width = tower
    image = ResNetConfig(image_size=size, layers=layers, width=width, num_heads=width * 32 // 64)
    return name, Preset(ModelConfig(embed_dim=embed_dim, image=image, text=_text(*text, Activation.QUICK_GELU)), CLIP)


def _with_gelu(named: tuple[str, Preset]) -> tuple[str, Preset]:
    """Return one of OpenAI's sizes as open_clip trains it: with GELU instead of QuickGELU."""
    name, preset = named
    model = deepcopy(preset.config)
    for tower in (model.image, model.text):
        if hasattr(tower, "activation"):
            tower.activation = Activation.GELU  # type: ignore[union-attr]
    return f"{name}{GELU_SUFFIX}", Preset(model, OPEN_CLIP)


def _siglip(
    name: str,
    image: tuple[int, int, int, int],
    size: tuple[int, int],
    text: tuple[int, int, int, int],
    vocab_size: int,
    context_length: int = 64,
) -> tuple[str, Preset]:
    """Return a SigLIP: both towers as (width, depth, heads, MLP), (image size, patch)."""
    common: dict[str, Any] = {"activation": Activation.GELU_TANH, "layer_norm_epsilon": 1e-6}
    image_tower = ViTConfig(
        image_size=size[0],
        patch_size=size[1],
        **_sizes(image),
        pool=ImagePool.ATTENTION,
        class_token=False,
        patch_bias=True,
        crop_to_patches=size[0] % size[1] > 0,
        ln_pre=False,
        projection=Projection.NONE,
        **common,
    )
    text_tower = TextTransformerConfig(
        context_length=context_length,
        vocab_size=vocab_size,
        **_sizes(text),
        causal=False,
        pool=TextPool.LAST,
        projection=Projection.AFFINE,
        **common,
    )
    config = ModelConfig(
        embed_dim=image_tower.width, image=image_tower, text=text_tower, init_logit_scale=10.0, init_logit_bias=-10.0
    )
    return name, Preset(config, SIGLIP)


def _coca(
    name: str, size: tuple[int, int, int, int], image: tuple[int, int], text: tuple[int, int, int]
) -> tuple[str, Preset]:
    """Return a CoCa as open_clip builds it, from the arguments of `_vit`; the decoder is as large as the text tower."""
    _, preset = _vit(name, size, image, text, OPEN_CLIP)
    model = preset.config
    assert isinstance(model.image, ViTConfig)
    assert isinstance(model.text, TextTransformerConfig)
    model.image.pool = ImagePool.QUERIES
    model.text.context_length, model.text.pool = 76, TextPool.CLASS
    model.caption = DecoderConfig(depth=text[1], num_heads=text[2], activation=Activation.GELU)
    return name, preset


_TI, _S, _M = (192, 12, 3, 768), (384, 12, 6, 1536), (512, 12, 8, 2048)
_B, _L, _H = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1280, 32, 16, 5120)
_G, _BIG_G, _E = (1408, 40, 16, 6144), (1664, 48, 16, 8192), (1792, 56, 16, 15360)
_SO400M, _G_OPT = (1152, 27, 16, 4304), (1536, 40, 16, 6144)
_SENTENCEPIECE, _GEMMA = 32_000, 256_000

_OPENAI = (
    _resnet("RN50", 1024, (224, (3, 4, 6, 3), 64), (512, 12, 8)),
    _resnet("RN101", 512, (224, (3, 4, 23, 3), 64), (512, 12, 8)),
    _resnet("RN50x4", 640, (288, (4, 6, 10, 6), 80), (640, 12, 10)),
    _resnet("RN50x16", 768, (384, (6, 8, 18, 8), 96), (768, 12, 12)),
    _resnet("RN50x64", 1024, (448, (3, 15, 36, 10), 128), (1024, 12, 16)),
    _vit("ViT-B/32", _B, (224, 32), (512, 12, 8), CLIP),
    _vit("ViT-B/16", _B, (224, 16), (512, 12, 8), CLIP),
    _vit("ViT-L/14", _L, (224, 14), (768, 12, 12), CLIP),
    _vit("ViT-L/14@336px", _L, (336, 14), (768, 12, 12), CLIP),
)

MODELS: dict[str, Preset] = dict(
    (
        *_OPENAI,
        *map(_with_gelu, _OPENAI),
        _vit("ViT-Ti/16", _TI, (224, 16), (192, 12, 3), BIG_VISION),
        _vit("ViT-S/32", _S, (224, 32), (384, 12, 6), OPEN_CLIP),
        _vit("ViT-S/16", _S, (224, 16), (384, 12, 6), OPEN_CLIP),
        _vit("ViT-M/32", _M, (224, 32), (512, 12, 8), OPEN_CLIP),
        _vit("ViT-M/16", _M, (224, 16), (512, 12, 8), OPEN_CLIP),
        _vit("ViT-B/32@256px", _B, (256, 32), (512, 12, 8), OPEN_CLIP),
        _vit("ViT-L/16", _L, (224, 16), (768, 12, 12), OPEN_CLIP),
        _vit("ViT-H/14", _H, (224, 14), (1024, 24, 16), OPEN_CLIP),
        _vit("ViT-H/14@378px", _H, (378, 14), (1024, 24, 16), OPEN_CLIP),
        _vit("ViT-H/16", _H, (224, 16), (1024, 24, 16), OPEN_CLIP),
        _vit("ViT-g/14", _G, (224, 14), (1024, 24, 16), OPEN_CLIP),
        _vit("ViT-bigG/14", _BIG_G, (224, 14), (1280, 32, 20), OPEN_CLIP),
        _vit("ViT-e/14", _E, (224, 14), (1280, 36, 20), OPEN_CLIP),
        _coca("CoCa-B/32", _B, (224, 32), (512, 12, 8)),
        _coca("CoCa-L/14", _L, (224, 14), (768, 12, 12)),
        *(_siglip(f"SigLIP-B/16@{size}px", _B, (size, 16), _B, _SENTENCEPIECE) for size in (224, 256, 384, 512)),
        *(_siglip(f"SigLIP-L/16@{size}px", _L, (size, 16), _L, _SENTENCEPIECE) for size in (256, 384)),
        _siglip("SigLIP-So400m/14@224px", _SO400M, (224, 14), _SO400M, _SENTENCEPIECE, context_length=16),
        _siglip("SigLIP-So400m/14@384px", _SO400M, (384, 14), _SO400M, _SENTENCEPIECE),
        _siglip("SigLIP2-B/32@256px", _B, (256, 32), _B, _GEMMA),
        *(_siglip(f"SigLIP2-B/16@{size}px", _B, (size, 16), _B, _GEMMA) for size in (224, 256, 384, 512)),
        *(_siglip(f"SigLIP2-L/16@{size}px", _L, (size, 16), _L, _GEMMA) for size in (256, 384, 512)),
        *(_siglip(f"SigLIP2-So400m/14@{size}px", _SO400M, (size, 14), _SO400M, _GEMMA) for size in (224, 378)),
        *(_siglip(f"SigLIP2-So400m/16@{size}px", _SO400M, (size, 16), _SO400M, _GEMMA) for size in (256, 384, 512)),
        *(_siglip(f"SigLIP2-g-opt/16@{size}px", _G_OPT, (size, 16), _SO400M, _GEMMA) for size in (256, 384)),
    )
)


def model(name: str) -> ModelConfig:
    """Return a copy of a preset, free to change.

    Raises:
        ValueError: unknown name; the known ones are listed.
    """
    if name not in MODELS:
        raise ValueError(f"model preset {name!r} is unknown; known: {', '.join(MODELS)}")
    return deepcopy(MODELS[name].config)
