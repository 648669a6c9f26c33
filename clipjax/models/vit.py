"""The image tower as a vision transformer: OpenAI's CLIP (arXiv 2103.00020, section 2.4) and its successors.

Tokens are the class token if there is one, registers if there are any, then patches row by row.
Axes: b batch, h height, w width (of the image), c channels, l patches, e embed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.config import ImagePool, ModelConfig, Positions, ViTConfig
from clipjax.models.layers import LayerNorm, Linear, Numerics, align, torch_uniform, tower_projection
from clipjax.models.pool import AttentionPool, QueryPool
from clipjax.models.positions import sincos
from clipjax.models.transformer import Transformer, image_block_init
from clipjax.runtime.sharding import Rules, constrain

RULES: Rules = (
    (r"image/patch_embed/kernel", (None, None, None, "width")),
    (r"image/patch_embed/bias", (None,)),
    (r"image/class_embed", (None,)),
    (r"image/(registers|pos_embed)", (None, "width")),
    (r"image/ln_(pre|post)/(bias|scale)", (None,)),
    (r"image/proj/kernel", ("width", "embed")),
    (r"image/proj/bias", (None,)),
)
"""Dimensions of the tower's own parameters; those of its blocks and pooling lie beside these."""


def patchify(pixels: Float[Array, "b h w c"], size: int) -> Float[Array, "b l size size c"]:
    """Cut an image into square patches, row by row; drop pixels that do not fill a patch."""
    b, h, w, c = pixels.shape
    pixels = pixels[:, : h // size * size, : w // size * size]
    grid = pixels.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(b, (h // size) * (w // size), size, size, c)


def kept_patches(tower: ViTConfig) -> int:
    """Return the number of patches that training keeps, a fixed one, so that shapes are static."""
    patches = (tower.image_size // tower.patch_size) ** 2
    return max(1, int(patches * (1 - tower.patch_dropout)))


def drop_patches(x: Float[Array, "b l w"], kept: int, key: jax.Array) -> Float[Array, "b k w"]:
    """Return `kept` patches of every image, drawn without replacement (FLIP, arXiv 2212.00794, section 3)."""
    noise = jax.random.uniform(key, x.shape[:2])
    chosen = jax.lax.top_k(noise, kept)[1]
    return jnp.take_along_axis(x, chosen[:, :, None], axis=1)


class VisionTransformer(nn.Module):
    """Image tower: normalised pixels in, the embedding before normalisation and the tokens for a caption out."""

    tower: ViTConfig
    model: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b h w c"], *, train: bool = False
    ) -> tuple[Float[Array, "b e"], Float[Array, "b k v"]]:
        tower, width = self.tower, self.tower.width
        x = self._embed(pixels, train)
        if tower.ln_pre:
            x = LayerNorm(self.numerics, name="ln_pre")(x)
        x = constrain(x.astype(self.numerics.compute_dtype), "batch", None, None)
        init = image_block_init(width, tower.hidden_dim)
        x = Transformer(tower, False, self.model, self.numerics, init, name="transformer")(x)
        pooled, tokens = self._pool(x)
        return tower_projection(pooled, tower.projection, width, self.model.embed_dim, self.numerics), tokens

    def _embed(self, pixels: Float[Array, "b h w c"], train: bool) -> Float[Array, "b l e"]:
        """Return tokens with their positions, float32."""
        tower, width = self.tower, self.tower.width
        normal = nn.initializers.normal(width**-0.5)
        patch = (tower.patch_size, tower.patch_size, pixels.shape[-1])
        init = torch_uniform(patch[0] * patch[1] * patch[2])
        bias = init if tower.patch_bias else None
        x = Linear(patch, (width,), self.numerics, init, bias, name="patch_embed")(patchify(pixels, tower.patch_size))
        # Added in float32, and so its gradient, a sum over the batch, is float32 too.
        x = x.astype(jnp.float32)
        prefix = []
        if tower.class_token:
            prefix.append(self.param("class_embed", normal, (width,)).reshape(1, width))
        if tower.positions is Positions.LEARNED:
            positions = self.param("pos_embed", normal, (len(prefix) + x.shape[1], width))
            prefix = [token + positions[:1] for token in prefix]
            x = x + positions[len(prefix) :][None]
        else:
            x = x + align(jnp.asarray(sincos(tower.image_size // tower.patch_size, width)), x)
        if train and tower.patch_dropout:
            x = drop_patches(x, kept_patches(tower), self.make_rng("patch_dropout"))
        if tower.num_registers:
            prefix.append(self.param("registers", normal, (tower.num_registers, width)))
        rows = [jnp.broadcast_to(token[None], (x.shape[0], *token.shape)) for token in prefix]
        return jnp.concatenate([*rows, x], axis=1)

    def _pool(self, x: Float[Array, "b l e"]) -> tuple[Float[Array, "b v"], Float[Array, "b k v"]]:
        tower, norm = self.tower, LayerNorm(self.numerics, name="ln_post")
        prefix = int(tower.class_token) + tower.num_registers
        match tower.pool:
            case ImagePool.CLASS:
                return norm(x[:, 0]), x[:, prefix:] if tower.ln_post_after_pool else norm(x[:, prefix:])
            case ImagePool.AVERAGE if tower.ln_post_after_pool:
                x = x[:, prefix:]
                return norm(x.astype(jnp.float32).mean(1)), x
            case ImagePool.AVERAGE:
                x = norm(x)[:, prefix:]
                return x.astype(jnp.float32).mean(1).astype(x.dtype), x
            case ImagePool.ATTENTION:
                x = norm(x)
                pool = AttentionPool(tower.num_heads, tower.hidden_dim, tower.activation, self.numerics, name="pool")
                return pool(x), x[:, prefix:]
            case ImagePool.QUERIES:
                pool = QueryPool(tower.num_queries, tower.query_heads, self.model.embed_dim, self.numerics, name="pool")
                x = norm(pool(x))
                return x[:, 0], x[:, 1:]
