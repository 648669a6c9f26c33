"""FLOPs of a model: open_clip's table, and a count by hand."""

import pytest

from clipjax.config import ModelConfig, TextTransformerConfig, ViTConfig


def vit(image_width: int, patch_size: int, *, image_size: int = 224) -> ModelConfig:
    large = image_width == 1024
    return ModelConfig(
        embed_dim=768 if large else 512,
        image=ViTConfig(image_size=image_size, patch_size=patch_size, width=image_width, depth=24 if large else 12),
        text=TextTransformerConfig(width=768 if large else 512),
    )


@pytest.mark.parametrize(
    ("config", "published_gflops", "exact"),
    [
        (vit(768, 32), 14.78, 14_777_163_776),
        (vit(768, 16), 41.09, 41_086_447_616),
        (vit(1024, 14), 175.33, 175_325_220_864),
        (vit(1024, 14, image_size=336), 395.22, 395_219_472_384),
    ],
    ids=["B/32", "B/16", "L/14", "L/14@336"],
)
def test_flops_match_open_clips_table(config, published_gflops, exact):
    assert config.flops() == pytest.approx(published_gflops * 1e9, rel=5e-3)
    assert config.flops() == exact  # frozen: reported MFU must stay comparable


def test_flops_by_hand():
    config = ModelConfig(
        embed_dim=5,
        image=ViTConfig(image_size=8, patch_size=4, width=6, depth=2, num_heads=1, mlp_dim=7),
        text=TextTransformerConfig(context_length=3, vocab_size=11, width=4, depth=1, num_heads=1),
    )
    image = 4 * (2 * 48 * 6) + 2 * (5 * (2 * 4 * 36 + 2 * 2 * 6 * 7) + 2 * (2 * 25 * 6)) + 2 * 6 * 5
    text = 3 * (2 * 4 * 16 + 2 * 2 * 4 * 16) + 2 * (2 * 9 * 4) + 2 * 4 * 5
    assert config.flops() == image + text
