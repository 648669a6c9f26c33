"""The image tower: a vision transformer as OpenAI's CLIP computes it (arXiv 2103.00020, section 2.4).

Patches without bias, class token first, LayerNorm before and after the blocks, projection without bias.
Axes: b batch, h height, w width (of the image), c channels, e embed.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.config import ModelConfig
from clipjax.models.transformer import (
    Dtypes,
    LayerNorm,
    Projection,
    Transformer,
    align,
    image_block_init,
    torch_uniform,
)
from clipjax.sharding import constrain


def patchify(pixels: Float[Array, "b h w c"], size: int) -> Float[Array, "b l size size c"]:
    """Cut an image into square patches, row by row."""
    b, h, w, c = pixels.shape
    grid = pixels.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(b, (h // size) * (w // size), size, size, c)


class ImageTower(nn.Module):
    """Vision transformer from normalised pixels to the embedding before normalisation."""

    config: ModelConfig
    dtypes: Dtypes

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        tower, width = self.config.image, self.config.image.width
        mlp_dim = tower.mlp_dim or 4 * width
        patch = (tower.patch_size, tower.patch_size, pixels.shape[-1])
        fan_in = patch[0] * patch[1] * patch[2]
        scaled_normal = nn.initializers.normal(width**-0.5)

        patches = patchify(pixels, tower.patch_size)
        x = Projection(patch, (width,), self.dtypes, torch_uniform(fan_in), None, name="patch_embed")(patches)
        class_embed = align(self.param("class_embed", scaled_normal, (width,)), x)
        class_embed = jnp.broadcast_to(class_embed, (x.shape[0], 1, width)).astype(x.dtype)
        x = jnp.concatenate([class_embed, x], axis=1)
        # Added in float32, and so its gradient, a sum over the batch, is float32 too.
        x = x.astype(jnp.float32) + self.param("pos_embed", scaled_normal, x.shape[1:])[None]
        x = constrain(LayerNorm(self.dtypes, name="ln_pre")(x), "batch", None, None)
        x = Transformer(
            depth=tower.depth,
            num_heads=tower.num_heads,
            mlp_dim=mlp_dim,
            causal=False,
            model=self.config,
            dtypes=self.dtypes,
            init=image_block_init(width, mlp_dim),
            name="transformer",
        )(x)
        x = LayerNorm(self.dtypes, name="ln_post")(x[:, 0])
        return Projection((width,), (self.config.embed_dim,), self.dtypes, scaled_normal, None, name="proj")(x)
