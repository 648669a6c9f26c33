"""FLOPs of a model's forward pass, from its config alone. Free of JAX."""

from clipjax.config import (
    BagOfWordsConfig,
    CbowConfig,
    ImagePool,
    ModelConfig,
    Projection,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)


def model_flops(config: ModelConfig) -> int:
    """FLOPs of one forward pass of one image-text pair.

    A multiply-add is 2 FLOPs; attention is counted dense, the causal half of the text tower too; patch embedding,
    pooling by attention and all projections are included, look-ups, norms, softmax and the loss are not. The
    convention of open_clip's `docs/model_profile.csv`.
    """
    return sum(tower_flops(config)) + caption_flops(config)


def tower_flops(config: ModelConfig) -> tuple[int, int]:
    """FLOPs of one image and of one text; see `model_flops`. Patch dropout is not credited."""
    image, text = config.image, config.text
    if isinstance(image, ResNetConfig):
        of_image = _resnet_flops(image, config.embed_dim)
    else:
        of_image = _vit_flops(image, config.embed_dim)
    if isinstance(text, CbowConfig):
        return of_image, 2 * text.width * config.embed_dim
    length = text.context_length + (text.pool is TextPool.CLASS)
    of_text = _transformer_flops(length, text)
    if text.pool is TextPool.ATTENTION:
        of_text += _pool_flops(length, text.width, text.mlp_dim or 4 * text.width)
    if text.projection is not Projection.NONE:
        of_text += 2 * text.width * config.embed_dim
    return of_image, of_text


def caption_flops(config: ModelConfig) -> int:
    """FLOPs of predicting one caption from the towers' outputs; see `model_flops`.

    The text's last place, which nothing follows, is counted as well: the convention does.
    """
    image, text, caption = config.image, config.text, config.caption
    if caption is None:
        return 0
    if isinstance(caption, BagOfWordsConfig):
        return 2 * config.embed_dim * text.vocab_size
    seen, seen_width = _image_tokens(image, config.embed_dim)
    length, width = text.context_length, text.width
    hidden = 2 * width * (caption.mlp_dim or 4 * width)
    weights = 4 * width**2 + hidden + 2 * width**2 + hidden  # a block, then queries, output and MLP of the second one
    layer = 2 * length * weights + 4 * length**2 * width + 4 * seen * seen_width * width + 4 * length * seen * width
    return caption.depth * layer + 2 * length * width * text.vocab_size


def _vit_flops(tower: ViTConfig, embed_dim: int) -> int:
    patches = (tower.image_size // tower.patch_size) ** 2
    tokens, width = patches + tower.class_token + tower.num_registers, tower.width
    flops = 2 * patches * 3 * tower.patch_size**2 * width + _transformer_flops(tokens, tower)
    if tower.pool is ImagePool.ATTENTION:
        flops += _pool_flops(tokens, width, tower.mlp_dim or 4 * width)
    if tower.pool is ImagePool.QUERIES:
        queries = tower.num_queries
        flops += 4 * queries * embed_dim**2 + 4 * tokens * width * embed_dim + 4 * queries * tokens * embed_dim
        width = embed_dim
    return flops + (2 * width * embed_dim if tower.projection is not Projection.NONE else 0)


def _image_tokens(tower: ViTConfig | ResNetConfig, embed_dim: int) -> tuple[int, int]:
    """How many tokens of an image a decoder sees, and their width."""
    if isinstance(tower, ResNetConfig):
        return (tower.image_size // 32) ** 2, 32 * tower.width
    if tower.pool is ImagePool.QUERIES:
        return tower.num_queries - 1, embed_dim
    return (tower.image_size // tower.patch_size) ** 2, tower.width


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
