"""The device's resizing against Pillow, and against the same formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from clipjax.config import Interpolation
from clipjax.models.device_resize import resize_crops

SIDE, SIZE = 96, 56
FILTERS = {Interpolation.BICUBIC: Image.Resampling.BICUBIC, Interpolation.BILINEAR: Image.Resampling.BILINEAR}

resize = jax.jit(resize_crops, static_argnums=(2, 3))


def random_crops(count: int, rng: np.random.Generator, *, is_square: bool = False):
    """Return canvases with soft pictures of any size up to the canvas, boxes, and the pictures."""
    canvas, crops, pictures = np.zeros((count, SIDE, SIDE, 3), np.uint8), np.zeros((count, 7), np.float32), []
    for i in range(count):
        height, width = rng.integers(20, SIDE + 1, 2)
        width = height if is_square else width
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(small).resize((int(width), int(height)), Image.Resampling.BICUBIC))
        rows, columns = (int(rng.integers(10, side + 1)) for side in (height, width))
        columns = rows if is_square else columns
        top, left = int(rng.integers(0, height - rows + 1)), int(rng.integers(0, width - columns + 1))
        canvas[i, :height, :width] = picture
        crops[i] = top, left, rows, columns, height, width, 0
        pictures.append(picture)
    return canvas, crops, pictures


def by_pillow(pictures, crops, interpolation):
    resized = []
    for picture, (top, left, height, width) in zip(pictures, crops[:, :4].tolist(), strict=True):
        box = (left, top, left + width, top + height)
        resized.append(np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), FILTERS[interpolation], box=box)))
    return np.stack(resized)


def weights(start: float, extent: float, valid: int) -> np.ndarray:
    """Return Pillow's bicubic weights in float64."""
    scale = extent / SIZE
    matrix = np.zeros((SIZE, valid))
    for row in range(SIZE):
        for column in range(valid):
            x = abs(column + 0.5 - start - (row + 0.5) * scale) / max(scale, 1)
            if x < 1:
                matrix[row, column] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                matrix[row, column] = -0.5 * (x**3 - 5 * x**2 + 8 * x - 4)
    return matrix / matrix.sum(1, keepdims=True)


def rounded(x: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(x + 0.5), 0, 255)


def test_the_formula_in_float64():
    canvas, crops, pictures = random_crops(12, np.random.default_rng(1))
    found = np.asarray(resize(canvas, crops, SIZE, Interpolation.BICUBIC)).astype(int)
    for picture, crop, ours in zip(pictures, crops, found, strict=True):
        top, left, height, width, rows, columns, _ = crop.tolist()
        across = rounded(np.einsum("sx,yxc->ysc", weights(left, width, int(columns)), picture))
        expected = rounded(np.einsum("ty,ysc->tsc", weights(top, height, int(rows)), across))
        # Of float32 sums near a half, a few are rounded the other way.
        assert np.abs(ours - expected).max() <= 1 and (ours == expected).mean() > 0.995


@pytest.mark.parametrize("interpolation", list(Interpolation))
def test_squares_are_those_of_pillow(interpolation):
    canvas, crops, pictures = random_crops(40, np.random.default_rng(2), is_square=True)
    differing = np.asarray(resize(canvas, crops, SIZE, interpolation)).astype(int) - by_pillow(
        pictures, crops, interpolation
    )
    # Sums of just a half, of which a linear filter gives many, are rounded the other way, twice in places.
    least = 0.998 if interpolation is Interpolation.BICUBIC else 0.98
    assert np.abs(differing).max() <= 2 and (differing == 0).mean() > least


@pytest.mark.parametrize("interpolation", list(Interpolation))
def test_any_box_is_close_to_pillow(interpolation):
    canvas, crops, pictures = random_crops(40, np.random.default_rng(3))
    differing = np.asarray(resize(canvas, crops, SIZE, interpolation)).astype(int) - by_pillow(
        pictures, crops, interpolation
    )
    # Pillow 13 resizes some tall pictures in the other order: its first rounding is another one.
    assert (differing == 0).mean() > 0.95 and np.abs(differing).mean() < 0.05


def test_mirrored():
    canvas, crops, _ = random_crops(3, np.random.default_rng(4))
    plain = np.asarray(resize(canvas, crops, SIZE, Interpolation.BICUBIC))  # done before its input changes
    crops[1, 6] = 1
    mirrored = resize(canvas, crops, SIZE, Interpolation.BICUBIC)
    np.testing.assert_array_equal(mirrored[1], plain[1, :, ::-1])
    np.testing.assert_array_equal(mirrored[::2], plain[::2])


def test_what_lies_beside_the_picture_does_not_count():
    canvas, crops, pictures = random_crops(4, np.random.default_rng(5))
    expected = np.asarray(resize(canvas, crops, SIZE, Interpolation.BICUBIC))  # done before its input changes
    for row, picture in zip(canvas, pictures, strict=True):
        row[picture.shape[0] :], row[:, picture.shape[1] :] = 255, 255
    np.testing.assert_array_equal(resize(canvas, crops, SIZE, Interpolation.BICUBIC), expected)


def test_sharded_over_devices_is_the_same():
    canvas, crops, _ = random_crops(16, np.random.default_rng(6))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put(canvas, split), jax.device_put(crops, split)
    found = resize(*placed, SIZE, Interpolation.BICUBIC)
    assert found.sharding.is_equivalent_to(split, 4)
    np.testing.assert_array_equal(found, resize(jnp.asarray(canvas), jnp.asarray(crops), SIZE, Interpolation.BICUBIC))
