"""Models of ours that open_clip (mlfoundations/open_clip) has too; all others are refused with the reason."""

from clipjax.config import (
    Activation,
    CbowConfig,
    DecoderConfig,
    ImagePool,
    ModelConfig,
    Positions,
    Projection,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)

Sizes = tuple[int, int, int, int, int | None, Activation]
_TRUNKS: tuple[tuple[str, tuple[int, ...], Sizes], ...] = (
    ("vit_base_patch16_siglip", (224, 256, 384, 512), (16, 768, 12, 12, None, Activation.GELU)),
    ("vit_base_patch32_siglip", (256,), (32, 768, 12, 12, None, Activation.GELU_TANH)),
    ("vit_large_patch16_siglip", (256, 384), (16, 1024, 24, 16, None, Activation.GELU)),
    ("vit_large_patch16_siglip", (512,), (16, 1024, 24, 16, None, Activation.GELU_TANH)),
    ("vit_so400m_patch14_siglip", (224, 378, 384), (14, 1152, 27, 16, 4304, Activation.GELU)),
    ("vit_so400m_patch16_siglip", (256, 384, 512), (16, 1152, 27, 16, 4304, Activation.GELU_TANH)),
    ("vit_giantopt_patch16_siglip", (256, 384), (16, 1536, 40, 16, None, Activation.GELU_TANH)),
)

SIGLIP_TRUNKS: dict[str, tuple[int, Sizes]] = {
    f"{name}_{size}": (size, tower) for name, sizes, tower in _TRUNKS for size in sizes
}
"""timm's image towers that open_clip names: image size and patch size, width, depth, heads, MLP, non-linearity
(huggingface/pytorch-image-models 1.0.31, `timm/models/vision_transformer.py`). The name sets the image's size, since
open_clip does not pass `image_size` on."""

POOLER_EPSILON = 1e-5
"""Epsilon of the norms in their pooling by queries and in their decoder, whatever `norm_kwargs` says."""


def trunk_name(image: ViTConfig) -> str | None:
    """Return timm's name of an image tower."""
    tower = (image.patch_size, image.width, image.depth, image.num_heads, image.mlp_dim, image.activation)
    found = (image.image_size, tower)
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
    errors += _coca_errors(config)
    quick = Activation.QUICK_GELU
    if isinstance(image, ViTConfig) and isinstance(text, TextTransformerConfig):
        if image.pool is not ImagePool.ATTENTION and (image.activation is quick) != (text.activation is quick):
            errors.append("model.image.activation and model.text.activation: quick_gelu is for both or none there")
        if image.pool is ImagePool.ATTENTION and (trunk_name(image) is None or image.layer_norm_epsilon != 1e-6):
            errors.append(
                "model.image: with pool=attention only timm's named towers have a counterpart, with their own sizes, "
                f"non-linearity and layer_norm_epsilon=1e-6: {', '.join(SIGLIP_TRUNKS)}"
            )
    if isinstance(image, ViTConfig):
        if image.pool is ImagePool.QUERIES and image.layer_norm_epsilon != POOLER_EPSILON:
            errors.append(
                f"model.image.layer_norm_epsilon must be {POOLER_EPSILON} with model.image.pool=queries there"
            )
        of_trunk = (False, True, False, image.projection)
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
        if image.max_patches is not None:
            errors.append(f"model.image.max_patches={image.max_patches} has no counterpart")
        if image.num_registers:
            errors.append(f"model.image.num_registers={image.num_registers} has no counterpart")
        if image.positions is Positions.SINCOS:
            errors.append("model.image.positions=sincos has no counterpart: theirs are ordered otherwise")
    if errors:
        raise ValueError("\n".join(errors))


def _coca_errors(config: ModelConfig) -> list[str]:
    """Their decoder reads a text tower with a token behind the text and as wide as itself and the image's tokens."""
    caption, text, image = config.caption, config.text, config.image
    if caption is None:
        return []
    if not isinstance(caption, DecoderConfig):
        return [f"model.caption is a {type(caption).__name__}, which has no counterpart"]
    if not isinstance(text, TextTransformerConfig) or text.pool is not TextPool.CLASS:
        return ["model.caption: theirs needs model.text.pool=class, a token behind the text"]
    if not isinstance(image, ViTConfig) or image.pool is ImagePool.ATTENTION:
        return ["model.caption: theirs needs a ViT as model.image, with pool=class, average or queries"]
    errors = []
    width = config.embed_dim if image.pool is ImagePool.QUERIES else image.width
    if width != text.width:
        errors.append(
            f"model.caption: the image's tokens are {width} wide, but must be as model.text.width={text.width}"
        )
    quick = Activation.QUICK_GELU
    activation = quick if text.activation is quick else Activation.GELU
    if (caption.mlp_dim, caption.activation, caption.layer_norm_epsilon) != (None, activation, POOLER_EPSILON):
        errors.append(
            f"model.caption: theirs has an MLP of four times the width, activation={activation.value} beside "
            f"model.text.activation={text.activation.value}, and layer_norm_epsilon={POOLER_EPSILON}"
        )
    return errors
