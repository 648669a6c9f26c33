"""Sizes of known models as data, each row with its source."""

from dataclasses import replace

from clipjax.config import ImageTowerConfig, ModelConfig, TextTowerConfig

_BASE_TEXT = TextTowerConfig(width=512, depth=12, num_heads=8)
_LARGE_TEXT = TextTowerConfig(width=768, depth=12, num_heads=12)

MODELS: dict[str, ModelConfig] = {
    # arXiv 2103.00020, table 20
    "ViT-B/32": ModelConfig(
        embed_dim=512,
        image=ImageTowerConfig(image_size=224, patch_size=32, width=768, depth=12, num_heads=12),
        text=_BASE_TEXT,
    ),
    "ViT-B/16": ModelConfig(
        embed_dim=512,
        image=ImageTowerConfig(image_size=224, patch_size=16, width=768, depth=12, num_heads=12),
        text=_BASE_TEXT,
    ),
    "ViT-L/14": ModelConfig(
        embed_dim=768,
        image=ImageTowerConfig(image_size=224, patch_size=14, width=1024, depth=24, num_heads=16),
        text=_LARGE_TEXT,
    ),
    "ViT-L/14@336px": ModelConfig(
        embed_dim=768,
        image=ImageTowerConfig(image_size=336, patch_size=14, width=1024, depth=24, num_heads=16),
        text=_LARGE_TEXT,
    ),
}


def model(name: str) -> ModelConfig:
    """A copy of a preset, free to change.

    Raises:
        ValueError: unknown name; the known ones are listed.
    """
    if name not in MODELS:
        raise ValueError(f"model preset {name!r} is unknown; known: {', '.join(MODELS)}")
    preset = MODELS[name]
    return replace(preset, image=replace(preset.image), text=replace(preset.text))
