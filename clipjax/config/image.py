"""Image towers: their fields with ranges, what their fields choose from, FLOPs, parameters, and rules across fields.

A new tower is a class here, one of `ImageTower`; its module and sharding rules lie in `models/`.
"""

import enum
from dataclasses import dataclass
from typing import ClassVar

from clipjax.config.layers import (
    Activation,
    Blocks,
    Projection,
    attention_params,
    attention_pool_flops,
    attention_pool_params,
)
from clipjax.config.ranges import INSIDE_ONE, LESS_THAN_ONE, NOT_NEGATIVE, POSITIVE, bounded


class ImagePool(enum.Enum):
    """One vector out of an image's tokens.

    The class token, the mean of the patches, attention (SigLIP's MAP), or the first of several `queries` that attend
    to the patches, whose others a captioning decoder reads (CoCa).
    """

    CLASS = "class"
    AVERAGE = "average"
    ATTENTION = "attention"
    QUERIES = "queries"


class Positions(enum.Enum):
    """Positions of patches: a learned table, or fixed sines and cosines of row and column."""

    LEARNED = "learned"
    SINCOS = "sincos"


@dataclass(kw_only=True, slots=True)
class ViTConfig(Blocks):
    """Vision transformer. Lengths in pixels; `mlp_dim` None means 4 * width. The defaults are OpenAI's CLIP."""

    KIND: ClassVar[str] = "vit"

    image_size: int = bounded(224, POSITIVE)
    patch_size: int = bounded(32, POSITIVE)
    max_patches: int | None = bounded(None, POSITIVE)  # variable aspect: most patches of an image; None: squares
    width: int = bounded(768, POSITIVE)
    depth: int = bounded(12, POSITIVE)
    num_heads: int = bounded(12, POSITIVE)
    mlp_dim: int | None = bounded(None, POSITIVE)
    activation: Activation = Activation.QUICK_GELU
    layer_norm_epsilon: float = bounded(1e-5, INSIDE_ONE)
    pool: ImagePool = ImagePool.CLASS
    class_token: bool = True
    num_registers: int = bounded(0, NOT_NEGATIVE)  # learned tokens without meaning (arXiv 2309.16588)
    positions: Positions = Positions.LEARNED
    patch_bias: bool = False
    crop_to_patches: bool = False  # leave out pixels at the right and below that fill no patch (SigLIP So400m/14@384)
    ln_pre: bool = True  # LayerNorm before the blocks
    ln_post_after_pool: bool = False  # LayerNorm of the pooled vector, not of all tokens before pooling
    num_queries: int = 256  # pool=queries only
    query_heads: int = 8  # pool=queries only
    projection: Projection = Projection.LINEAR
    patch_dropout: float = bounded(0.0, LESS_THAN_ONE)  # share of patches left out in training (arXiv 2212.00794)

    def grid(self) -> tuple[int, int]:
        """Return the number of places before the grid that have a position of their own, and the grid's side."""
        return int(self.class_token), self.image_size // self.patch_size

    def caption_tokens(self, embed_dim: int) -> tuple[int, int]:
        """Return how many tokens of an image a decoder attends to, and their width."""
        if self.pool is ImagePool.QUERIES:
            return self.num_queries - 1, embed_dim
        return self.grid()[1] ** 2, self.width

    def flops(self, embed_dim: int) -> int:
        """Return the FLOPs of one image; patch dropout is not credited."""
        patches, width = self.max_patches or self.grid()[1] ** 2, self.width
        tokens = patches + self.class_token + self.num_registers
        total = 2 * patches * 3 * self.patch_size**2 * width + self.block_flops(tokens)
        if self.pool is ImagePool.ATTENTION:
            total += attention_pool_flops(tokens, width, self.hidden_dim)
        if self.pool is ImagePool.QUERIES:
            queries = self.num_queries
            total += 4 * queries * embed_dim**2 + 4 * tokens * width * embed_dim + 4 * queries * tokens * embed_dim
            width = embed_dim
        return total + self.projection.flops(width, embed_dim)

    def num_params(self, embed_dim: int) -> int:
        """Return the number of parameters of the tower."""
        (prefix, side), width = self.grid(), self.width
        total = (3 * self.patch_size**2 + self.patch_bias + self.class_token + self.num_registers) * width
        total += (prefix + side**2) * width if self.positions is Positions.LEARNED else 0
        total += self.block_params() + 2 * width * self.ln_pre
        if self.pool is ImagePool.ATTENTION:
            total += attention_pool_params(width, self.hidden_dim)
        if self.pool is ImagePool.QUERIES:
            total += self.num_queries * embed_dim + 2 * embed_dim + 2 * width
            total += attention_params(embed_dim, width, embed_dim)
            width = embed_dim
        return total + 2 * width + self.projection.num_params(width, embed_dim)

    def _variable_aspect_errors(self, path: str) -> list[str]:
        """Return what cannot go with images whose number of patches varies, a line each."""
        choices = {
            "class_token": (self.class_token, False),
            "num_registers": (self.num_registers, 0),
            "positions": (self.positions.value, Positions.LEARNED.value),
            "crop_to_patches": (self.crop_to_patches, False),
            "patch_dropout": (self.patch_dropout, 0.0),
        }
        errors = [
            f"{path}.{name}={value} does not go with {path}.max_patches={self.max_patches}; it must be {needed}"
            for name, (value, needed) in choices.items()
            if value != needed
        ]
        if self.pool not in (ImagePool.ATTENTION, ImagePool.AVERAGE):
            errors.append(
                f"{path}.pool={self.pool.value} does not go with {path}.max_patches={self.max_patches}; it must be "
                "attention or average"
            )
        return errors

    def errors(self, path: str, embed_dim: int) -> list[str]:
        """Return what is wrong between the fields, a line each."""
        errors = self.block_errors(path, embed_dim)
        if self.image_size < self.patch_size or (self.image_size % self.patch_size and not self.crop_to_patches):
            errors.append(
                f"{path}.image_size={self.image_size} must be a multiple of {path}.patch_size={self.patch_size}"
                f" (or set {path}.crop_to_patches)"
            )
        errors += [] if self.max_patches is None else self._variable_aspect_errors(path)
        if self.pool is ImagePool.CLASS and not self.class_token:
            errors.append(f"{path}.pool=class needs {path}.class_token=True")
        queries = (self.num_queries, self.query_heads)
        if self.pool is ImagePool.QUERIES and (min(queries) < 1 or embed_dim % self.query_heads):
            errors.append(
                f"{path}.num_queries={self.num_queries} and {path}.query_heads={self.query_heads} must be at "
                f"least 1, and the latter divide model.embed_dim={embed_dim}"
            )
        if self.pool is not ImagePool.QUERIES and queries != (ViTConfig().num_queries, ViTConfig().query_heads):
            errors.append(f"{path}.num_queries and query_heads: {path}.pool={self.pool.value} would ignore them")
        if self.positions is Positions.SINCOS and (self.width % 4 or self.width < 8):
            errors.append(f"{path}.positions=sincos needs a width divisible by 4 and at least 8, not {self.width}")
        return errors


@dataclass(kw_only=True, slots=True)
class ResNetConfig:
    """The paper's modified ResNet with attention pooling; `layers` are the blocks of its four stages."""

    KIND: ClassVar[str] = "resnet"
    FIRST_LAYER_SHARE: ClassVar[int] = 2  # the first layer has half as many channels as `width`
    BATCH_STATISTICS: ClassVar[bool] = True  # BatchNorm

    image_size: int = bounded(224, POSITIVE)
    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = bounded(64, POSITIVE)  # channels of the first stage; the last has 32 times as many
    num_heads: int = bounded(32, POSITIVE)  # of the attention pooling

    def grid(self) -> tuple[int, int]:
        """Return the number of places before the grid that have a position of their own, and the grid's side."""
        return 1, self.image_size // 32

    def caption_tokens(self, embed_dim: int) -> tuple[int, int]:
        """Return how many tokens of an image a decoder attends to, and their width."""
        del embed_dim
        return self.grid()[1] ** 2, 32 * self.width

    def flops(self, embed_dim: int) -> int:
        """Return the FLOPs of one image."""
        side, width = self.image_size // 2, self.width
        total = 2 * side**2 * 9 * (3 * width // 2 + (width // 2) ** 2 + width // 2 * width)
        side, channels = side // 2, width
        for stage, depth in enumerate(self.layers):
            planes = width * 2**stage
            for block in range(depth):
                after = side // 2 if block == 0 and stage else side
                total += 2 * side**2 * planes * (channels + 9 * planes) + 2 * after**2 * 4 * planes * planes
                total += 2 * after**2 * channels * 4 * planes if block == 0 else 0
                side, channels = after, 4 * planes
        places = side**2 + 1  # every one of them is counted as a query, as peers compute and count it
        return total + places * (6 * channels**2 + 4 * places * channels + 2 * channels * embed_dim)

    def num_params(self, embed_dim: int) -> int:
        """Return the number of parameters of the tower; running statistics are none."""
        (prefix, side), width, half = self.grid(), self.width, self.width // 2
        total = 9 * (3 * half + half**2 + half * width) + 4 * half + 2 * width
        channels = width
        for stage, depth in enumerate(self.layers):
            planes = width * 2**stage
            wide = 4 * planes
            total += channels * wide + 2 * wide  # the shortcut of the first block
            for _ in range(depth):
                total += channels * planes + 9 * planes**2 + planes * wide + 4 * planes + 2 * wide
                channels = wide
        return total + (prefix + side**2) * channels + attention_params(channels, channels, embed_dim)

    def errors(self, path: str, embed_dim: int) -> list[str]:
        """Return what is wrong between the fields, a line each."""
        del embed_dim
        errors = []
        if len(self.layers) != 4 or min(self.layers) < 1:
            errors.append(f"{path}.layers={self.layers} must be four numbers of blocks, each at least 1")
        if self.image_size % 32:
            errors.append(f"{path}.image_size={self.image_size} must be a multiple of 32, by which a ResNet shrinks it")
        if self.width % 2 or 32 * self.width % self.num_heads:
            errors.append(
                f"{path}.width={self.width} must be even, and 32 times that a multiple of "
                f"{path}.num_heads={self.num_heads}"
            )
        return errors


ImageTower = ViTConfig | ResNetConfig
