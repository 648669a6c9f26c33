"""The image tower as a vision transformer: OpenAI's CLIP (arXiv 2103.00020, section 2.4) and its successors.

Tokens are the class token if there is one, registers if there are any, then patches row by row. Images of variable
aspect (`Patches`; NaFlex, arXiv 2502.14786, section 2.4.2) have patches alone, several of them in a row of tokens.
Axes: b batch, h height, w width (of the image), c channels, l patches, e embed.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipjax.config import ImagePool, ModelConfig, Positions, ViTConfig
from clipjax.models.layers import FEATURES, LayerNorm, Linear, Numerics, align, torch_uniform, tower_projection
from clipjax.models.pool import AttentionPool, QueryPool
from clipjax.models.positions import positions_of_patches, sincos
from clipjax.models.transformer import Mask, Transformer, image_block_init
from clipjax.runtime.sharding import Rules, constrain
from clipjax.typing import Patches

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


def parts_of(images: Patches) -> Bool[Array, "r g t"]:
    """Return which patches of a row are those of each of its images."""
    numbers = jnp.arange(images.grid.shape[1], dtype=images.segment.dtype)
    return images.segment[:, None, :] == numbers.reshape(1, -1, 1)


def visible_patches(images: Patches) -> Mask:
    """Return which patches are attended to: those of the same image.

    Padding attends to padding, as a softmax over nothing is not finite; alone in a row, it attends to the image.
    """
    if images.grid.shape[1] == 1:
        return images.segment == 0
    return images.segment[:, :, None] == images.segment[:, None, :]


class VisionTransformer(nn.Module):
    """Image tower: normalised pixels in, the embedding before normalisation and the tokens for a caption out."""

    tower: ViTConfig
    model: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b h w c"] | Patches, *, train: bool = False
    ) -> tuple[Float[Array, "n e"], Float[Array, "b k v"]]:
        tower, width = self.tower, self.tower.width
        is_square = not isinstance(pixels, Patches)
        x = self._embed(pixels, train) if is_square else self._embed_patches(pixels)
        parts = None if is_square else parts_of(pixels)
        if tower.ln_pre:
            x = LayerNorm(self.numerics, name="ln_pre")(x)
        x = constrain(x.astype(self.numerics.compute_dtype), "batch", None, None)
        init = image_block_init(width, tower.hidden_dim)
        mask = None if is_square else visible_patches(pixels)
        x = Transformer(tower, False, self.model, self.numerics, init, name="transformer")(x, mask)
        pooled, tokens = self._pool(x) if parts is None else (constrain(self._pool_parts(x, parts), "batch", None), x)
        self.sow("intermediates", FEATURES, pooled)
        return tower_projection(pooled, tower.projection, width, self.model.embed_dim, self.numerics), tokens

    def _embed(self, pixels: Float[Array, "b h w c"], train: bool) -> Float[Array, "b l e"]:
        """Return tokens with their positions, float32."""
        tower, width = self.tower, self.tower.width
        normal = nn.initializers.normal(width**-0.5)
        x = self._project(patchify(pixels, tower.patch_size))
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

    def _project(self, patches: Float[Array, "b l s s c"]) -> Float[Array, "b l e"]:
        """Return patches as tokens: float32, so that the gradient of what is added, a sum over the batch, is it too."""
        shape = patches.shape[2:]
        init = torch_uniform(math.prod(shape))
        bias = init if self.tower.patch_bias else None
        linear = Linear(shape, (self.tower.width,), self.numerics, init, bias, name="patch_embed")
        return linear(patches).astype(jnp.float32)

    def _embed_patches(self, images: Patches) -> Float[Array, "b l e"]:
        """Return tokens of images of variable aspect with their positions, float32."""
        size, width, side = self.tower.patch_size, self.tower.width, self.tower.grid()[1]
        x = self._project(images.patches.reshape(*images.patches.shape[:2], size, size, -1))
        table = self.param("pos_embed", nn.initializers.normal(width**-0.5), (side**2, width))
        number = jnp.maximum(images.segment, 0)[..., None]
        return x + positions_of_patches(table, images.place, jnp.take_along_axis(images.grid, number, axis=1))

    def _pool_parts(self, x: Float[Array, "b l e"], parts: Bool[Array, "b g l"]) -> Float[Array, "n e"]:
        """Return the vector of each image, row by row."""
        tower, norm = self.tower, LayerNorm(self.numerics, name="ln_post")
        if tower.pool is ImagePool.ATTENTION:
            pool = AttentionPool(tower.num_heads, tower.hidden_dim, tower.activation, self.numerics, name="pool")
            return pool(norm(x), parts)
        x = (x if tower.ln_post_after_pool else norm(x)).astype(jnp.float32)
        shares = parts / parts.sum(-1, keepdims=True, dtype=jnp.float32)
        mean = jnp.einsum("bgl,ble->bge", shares, x, precision=jax.lax.Precision.HIGHEST).reshape(-1, x.shape[-1])
        return norm(mean) if tower.ln_post_after_pool else mean.astype(self.numerics.compute_dtype)

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
