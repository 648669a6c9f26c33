"""Images of variable aspect: an embedding does not depend on what else lies in the row, nor on padding.

Tolerance: the same float32 sums in another order.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import Config, DataConfig, Dtype, ImagePool, ModelConfig, TextTransformerConfig, ViTConfig
from clipjax.config.model_validation import model_errors
from clipjax.data.patches import PADDING
from clipjax.models.clip import Clip, build_clip
from clipjax.models.positions import positions_of_patches
from clipjax.typing import Patches

P, SIDE, MOST = 4, 3, 12
GRIDS = [(3, 3), (1, 5), (4, 2), (2, 6), (6, 1), (1, 1)]
TOLERANCE = 2e-6


def small(pool: ImagePool, **fields) -> ModelConfig:
    image = ViTConfig(
        image_size=SIDE * P, patch_size=P, max_patches=MOST, width=16, depth=2, num_heads=2, pool=pool,
        class_token=False, **fields,
    )  # fmt: skip
    text = TextTransformerConfig(context_length=4, vocab_size=8, width=16, depth=1, num_heads=2)
    return ModelConfig(embed_dim=8, image=image, text=text, compute_dtype=Dtype.FLOAT32, scan_layers=False)


def rows(per_row: int, places: int, garbage: int = 0) -> Patches:
    """The images of `GRIDS`, so many in a row of so many places, with some value in the places of padding."""
    count = len(GRIDS) // per_row
    patches = np.full((count, places, 3 * P * P), garbage, np.uint8)
    segment, place = np.full((count, places), PADDING, np.int32), np.zeros((count, places, 2), np.int32)
    for number, (height, width) in enumerate(GRIDS):
        row, part = divmod(number, per_row)
        first = int((segment[row] != PADDING).sum())
        here = slice(first, first + height * width)
        content = np.random.default_rng(number).integers(0, 256, (height * width, 3 * P * P))
        patches[row, here], segment[row, here] = content, part
        place[row, here] = [(y, x) for y in range(height) for x in range(width)]
    grid = np.array(GRIDS, np.int32).reshape(count, per_row, 2)
    return Patches(*map(jnp.asarray, (patches, segment, place, grid)))


def build(pool: ImagePool, **fields) -> tuple[Clip, dict]:
    clip = build_clip(small(pool, **fields), data=DataConfig())
    key = jax.random.key(1)
    return clip, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), clip.init(key))


KINDS = [(ImagePool.ATTENTION, {}), (ImagePool.AVERAGE, {}), (ImagePool.AVERAGE, {"ln_post_after_pool": True})]


@pytest.mark.parametrize(("pool", "fields"), KINDS)
def test_an_image_is_the_same_alone_padded_and_packed(pool, fields):
    clip, params = build(pool, **fields)
    encode = jax.jit(clip.encode_image)
    alone = encode(params, rows(1, MOST))
    assert alone.shape == (len(GRIDS), 8)
    for per_row, places, garbage in ((1, MOST + 5, 200), (2, 24, 0), (3, 40, 7), (6, 48, 255)):
        np.testing.assert_allclose(encode(params, rows(per_row, places, garbage)), alone, atol=TOLERANCE)


@pytest.mark.parametrize(("pool", "fields"), KINDS)
def test_padding_has_no_gradient(pool, fields):
    clip, params = build(pool, **fields)
    images = rows(3, 40)
    float_patches = images.patches.astype(jnp.float32) / 255

    def loss(patches):
        return jnp.sum(clip.encode_image(params, images._replace(patches=patches)) ** 3)

    grads = jax.jit(jax.grad(loss))(float_patches)
    assert np.isfinite(grads).all()
    is_padding = np.asarray(images.segment) == PADDING
    assert (np.asarray(grads)[is_padding] == 0).all()
    assert (np.abs(np.asarray(grads)[~is_padding]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("pool", [ImagePool.ATTENTION, ImagePool.AVERAGE])
def test_a_square_is_the_image_of_the_tables_own_grid(pool):
    clip, params = build(pool)
    square = np.random.default_rng(0).integers(0, 256, (2, SIDE * P, SIDE * P, 3), dtype=np.uint8)
    cut = square.reshape(2, SIDE, P, SIDE, P, 3).swapaxes(2, 3).reshape(2, SIDE * SIDE, -1)
    numbers = np.arange(SIDE * SIDE)
    place = np.broadcast_to(np.stack(np.divmod(numbers, SIDE), -1), (2, SIDE * SIDE, 2)).astype(np.int32)
    segment, grid = np.zeros((2, SIDE * SIDE), np.int32), np.full((2, 1, 2), SIDE, np.int32)
    images = Patches(*map(jnp.asarray, (cut, segment, place, grid)))
    np.testing.assert_allclose(
        clip.encode_image(params, images), clip.encode_image(params, jnp.asarray(square)), atol=TOLERANCE
    )


def resize_weights(old: int, new: int) -> np.ndarray:
    """Float64 weights [new, old] of an antialiased bilinear resize, place by place over a window, as PyTorch's loop."""
    scale, found = old / new, np.zeros((new, old))
    support = max(scale, 1.0)
    for place in range(new):
        centre = scale * (place + 0.5)
        window = range(max(0, int(centre - support + 0.5)), min(old, int(centre + support + 0.5)))
        for source in window:
            found[place, source] = max(0.0, 1 - abs(source + 0.5 - centre) / support)
    return found / found.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("grid", [(3, 3), (1, 16), (16, 1), (2, 7), (5, 4), (1, 1)])
def test_positions_are_those_of_float64(grid):
    side, (height, width) = 4, grid
    table = np.random.default_rng(3).normal(size=(side**2, 6))
    square = table.reshape(side, side, -1)
    wanted = np.einsum("ay,bx,yxw->abw", resize_weights(side, height), resize_weights(side, width), square)
    place = np.stack(np.divmod(np.arange(height * width), width), axis=-1)[None]
    found = positions_of_patches(
        jnp.asarray(table, jnp.float32), jnp.asarray(place), jnp.broadcast_to(jnp.asarray(grid), place.shape)
    )
    np.testing.assert_allclose(found[0], wanted.reshape(height * width, -1), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_token": True}, "model.image.class_token=True does not go with model.image.max_patches=12"),
        ({"num_registers": 2}, "model.image.num_registers=2 does not go"),
        ({"patch_dropout": 0.5}, "model.image.patch_dropout=0.5 does not go"),
        ({"crop_to_patches": True}, "model.image.crop_to_patches=True does not go"),
        ({"pool": ImagePool.QUERIES}, "model.image.pool=queries does not go"),
    ],
)
def test_what_knows_squares_only_is_refused(fields, message):
    config = Config(model=small(ImagePool.ATTENTION), data=DataConfig(train="x"))
    config.model.image = dataclasses.replace(config.model.image, **fields)
    assert any(error.startswith(message) for error in model_errors(config))
