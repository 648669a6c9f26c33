"""The image tower: a vision transformer as OpenAI's CLIP computes it (arXiv 2103.00020, section 2.4).

Patches without bias, class token first, LayerNorm before and after the blocks, projection without bias.
Axes: b batch, h height, w width (of the image), c channels, e embed.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.config import ModelConfig
from clipjax.models.transformer import LayerNorm, Projection, Transformer, align, image_block_init, torch_uniform
from clipjax.sharding import constrain


def patchify(pixels: Float[Array, "b h w c"], size: int) -> Float[Array, "b l size size c"]:
    """Cut an image into square patches, row by row."""
    b, h, w, c = pixels.shape
    grid = pixels.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(b, (h // size) * (w // size), size, size, c)


class ImageTower(nn.Module):
    """Vision transformer from normalised pixels to the embedding before normalisation."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        tower, width = self.config.image, self.config.image.width
        mlp_dim = tower.mlp_dim or 4 * width
        patch = (tower.patch_size, tower.patch_size, pixels.shape[-1])
        fan_in = patch[0] * patch[1] * patch[2]
        scaled_normal = nn.initializers.normal(width**-0.5)

        patches = patchify(pixels, tower.patch_size)
        x = Projection(patch, (width,), self.dtype, torch_uniform(fan_in), None, name="patch_embed")(patches)
        class_embed = align(self.param("class_embed", scaled_normal, (width,)), x).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_embed, (x.shape[0], 1, width)), x], axis=1)
        x = x + self.param("pos_embed", scaled_normal, x.shape[1:]).astype(self.dtype)[None]
        x = constrain(LayerNorm(self.dtype, name="ln_pre")(x), "batch", None, None)
        x = Transformer(
            depth=tower.depth,
            num_heads=tower.num_heads,
            mlp_dim=mlp_dim,
            causal=False,
            model=self.config,
            dtype=self.dtype,
            init=image_block_init(width, mlp_dim),
            name="transformer",
        )(x)
        x = LayerNorm(self.dtype, name="ln_post")(x[:, 0])
        return Projection((width,), (self.config.embed_dim,), self.dtype, scaled_normal, None, name="proj")(x)
