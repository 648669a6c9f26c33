"""FLOPs of a model's forward pass, from its config alone. Free of JAX."""

from clipjax.config import ImagePool, ModelConfig, Projection, ResNetConfig, TextPool, TextTransformerConfig, ViTConfig


def model_flops(config: ModelConfig) -> int:
    """FLOPs of one forward pass of one image-text pair.

    A multiply-add is 2 FLOPs; attention is counted dense, the causal half of the text tower too; patch embedding and
    both projections are included, look-ups, norms, softmax and the loss are not. The convention of open_clip's
    `docs/model_profile.csv`.
    """
    return sum(tower_flops(config))


def tower_flops(config: ModelConfig) -> tuple[int, int]:
    """FLOPs of one image and of one text; see `model_flops`. Patch dropout is not credited."""
    image, text = config.image, config.text
    if isinstance(image, ResNetConfig):
        of_image = _resnet_flops(image, config.embed_dim)
    else:
        patches = (image.image_size // image.patch_size) ** 2
        tokens = patches + image.class_token + image.num_registers
        of_image = 2 * patches * 3 * image.patch_size**2 * image.width + _transformer_flops(tokens, image)
        if image.pool is ImagePool.ATTENTION:
            of_image += _pool_flops(tokens, image.width, image.mlp_dim or 4 * image.width)
        if image.projection is not Projection.NONE:
            of_image += 2 * image.width * config.embed_dim
    of_text = 0
    if isinstance(text, TextTransformerConfig):
        of_text += _transformer_flops(text.context_length, text)
        if text.pool is TextPool.ATTENTION:
            of_text += _pool_flops(text.context_length, text.width, text.mlp_dim or 4 * text.width)
    if getattr(text, "projection", None) is not Projection.NONE:
        of_text += 2 * text.width * config.embed_dim
    return of_image, of_text


def _transformer_flops(length: int, tower: ViTConfig | TextTransformerConfig) -> int:
    weights = 4 * tower.width**2 + 2 * tower.width * (tower.mlp_dim or 4 * tower.width)
    return tower.depth * (2 * length * weights + 4 * length**2 * tower.width)


def _pool_flops(length: int, width: int, mlp_dim: int) -> int:
    """One query: projections of it and of what comes out, keys and values of all, the mixture, an MLP."""
    return 4 * width**2 + 4 * length * width**2 + 4 * length * width + 4 * width * mlp_dim


def _resnet_flops(tower: ResNetConfig, embed_dim: int) -> int:
    side, width = tower.image_size // 2, tower.width
    flops = 2 * side**2 * 9 * (3 * width // 2 + (width // 2) ** 2 + width // 2 * width)
    side, channels = side // 2, width
    for stage, depth in enumerate(tower.layers):
        planes = width * 2**stage
        for block in range(depth):
            after = side // 2 if block == 0 and stage else side
            flops += 2 * side**2 * planes * (channels + 9 * planes) + 2 * after**2 * 4 * planes * planes
            flops += 2 * after**2 * channels * 4 * planes if block == 0 else 0
            side, channels = after, 4 * planes
    places = side**2 + 1  # every one of them is counted as a query, as peers compute and count it
    return flops + places * (6 * channels**2 + 4 * places * channels + 2 * channels * embed_dim)
