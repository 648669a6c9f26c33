"""Differentiable crops and changes against NumPy in float64, and the gradient through them and a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import Config, Dtype, ModelConfig, TextTransformerConfig, ViTConfig
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.inference import Model
from clipjax.models.augmentations import add_noise, jitter_colours, random_crops, random_flips
from clipjax.models.clip import build_clip

pytestmark = pytest.mark.newest
KEY = jax.random.key(0)


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)


def brute_force(picture: np.ndarray, top: float, left: float, side: float, size: int) -> np.ndarray:
    """Sample by a triangle over each axis, pixel by pixel, in float64."""

    def weights(start: float, length: int, i: int) -> np.ndarray:
        scale = side / size
        center = start + (i + 0.5) * scale
        found = [max(0.0, 1 - abs(place + 0.5 - center) / max(scale, 1.0)) for place in range(length)]
        return np.asarray(found) / sum(found)

    result = np.zeros((size, size, 3))
    for i in range(size):
        for j in range(size):
            rows, columns = weights(top, picture.shape[0], i), weights(left, picture.shape[1], j)
            result[i, j] = np.einsum("y,x,yxc->c", rows, columns, picture.astype(np.float64))
    return result


@pytest.mark.parametrize(("shape", "size"), [((2, 9, 14, 3), 5), ((2, 6, 4, 3), 11)])
def test_crops_are_parts_inside_the_picture_sampled_bilinearly(shape, size):
    pixels, count = pictures(*shape), 3
    crops = random_crops(KEY, jnp.asarray(pixels), count, size, min_side=0.4, max_side=0.9)
    assert crops.shape == (6, size, size, 3) and crops.dtype == jnp.float32
    # Two ramps tell each crop's place and side.
    ramps = np.zeros(shape, np.float32)
    ramps[..., 0], ramps[..., 1] = np.arange(shape[1])[:, None] + 0.5, np.arange(shape[2])[None] + 0.5
    keys = jax.random.split(KEY, 3)
    side, down, across = (np.asarray(jax.random.uniform(key, (6,)), np.float64) for key in keys)
    side = min(shape[1:3]) * (0.4 + 0.5 * side)
    top, left = (shape[1] - side) * down, (shape[2] - side) * across
    assert (top >= 0).all() and (top + side <= shape[1]).all() and (left + side <= shape[2]).all()
    for n in range(6):
        for values in (pixels, ramps):
            got = random_crops(KEY, jnp.asarray(values), count, size, min_side=0.4, max_side=0.9)[n]
            np.testing.assert_allclose(got, brute_force(values[n % 2], top[n], left[n], side[n], size), atol=2e-5)
    assert len(set(side.round(6))) == 6


def test_a_whole_picture_at_its_own_size_stays_as_it_is():
    pixels = jnp.asarray(pictures(2, 8, 8, 3))
    np.testing.assert_allclose(random_crops(KEY, pixels, 1, 8, min_side=1.0), pixels, atol=1e-6)
    same = jitter_colours(KEY, pixels, brightness=0.0, contrast=0.0, saturation=0.0)
    np.testing.assert_allclose(same, pixels, atol=1e-6)
    np.testing.assert_array_equal(add_noise(KEY, pixels, most=0.0), pixels)


def test_flips_colours_and_noise_are_those_of_their_definitions():
    pixels = pictures(64, 6, 5, 3)
    flipped = np.asarray(random_flips(KEY, jnp.asarray(pixels)))
    mirrored = [np.array_equal(one, other[:, ::-1]) for one, other in zip(flipped, pixels, strict=True)]
    assert 16 < sum(mirrored) < 48
    kept = ~np.asarray(mirrored)
    np.testing.assert_array_equal(flipped[kept], pixels[kept])

    changed = np.asarray(jitter_colours(KEY, jnp.asarray(pixels), brightness=0.3, contrast=0.2, saturation=0.5))
    factors = np.asarray(jax.random.uniform(KEY, (3, 64), minval=-1, maxval=1), np.float64)
    bright, contrast, saturation = (1 + share * row for share, row in zip((0.3, 0.2, 0.5), factors, strict=True))
    for n in range(64):
        one = pixels[n].astype(np.float64) * bright[n]
        mean = (one @ [0.299, 0.587, 0.114]).mean()
        one = mean + (one - mean) * contrast[n]
        grey = (one @ [0.299, 0.587, 0.114])[..., None]
        np.testing.assert_allclose(changed[n], grey + (one - grey) * saturation[n], atol=1e-5)

    noise = np.asarray(add_noise(KEY, jnp.zeros((400, 20, 20, 3)), most=0.5))
    spread = noise.std(axis=(1, 2, 3))
    assert 0 < spread.min() < 0.02 and 0.48 < spread.max() < 0.53 and abs(spread.mean() - 0.25) < 0.03


def test_the_same_key_gives_the_same_also_when_compiled_and_another_key_another():
    pixels = jnp.asarray(pictures(2, 12, 12, 3))

    def augment(key, pixels):
        keys = jax.random.split(key, 4)
        pixels = random_flips(keys[1], random_crops(keys[0], pixels, 4, 8))
        return add_noise(keys[3], jitter_colours(keys[2], pixels))

    first = augment(KEY, pixels)
    np.testing.assert_array_equal(augment(KEY, pixels), first)
    np.testing.assert_allclose(jax.jit(augment)(KEY, pixels), first, atol=1e-5)
    assert abs(augment(jax.random.key(1), pixels) - first).max() > 0.1


@pytest.mark.heavy
def test_the_gradient_through_crops_and_the_score_is_that_of_finite_differences():
    tokenizer = BytesTokenizer()
    config = Config(
        model=ModelConfig(
            embed_dim=16,
            image=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
            text=TextTransformerConfig(context_length=8, vocab_size=259, width=16, depth=1, num_heads=2),
            compute_dtype=Dtype.FLOAT32,
        )
    )
    model = Model(config, jax.jit(build_clip(config.model).init)(KEY), tokenizer)

    @jax.jit
    def total(pixels):
        keys = jax.random.split(KEY, 4)
        crops = random_flips(keys[1], random_crops(keys[0], pixels, 3, 16))
        scores = model.score(add_noise(keys[3], jitter_colours(keys[2], crops)), ["a", "bc"])
        return (scores @ jnp.asarray([1.0, -0.5])).sum()

    pixels, rng, step = pictures(2, 24, 20, 3) * 0.6 + 0.2, np.random.default_rng(1), 0.05
    gradient = np.asarray(jax.grad(total)(pixels), np.float64)
    scale = np.linalg.norm(gradient)
    assert scale > 1e-2
    for along in (gradient, *rng.standard_normal((3, *pixels.shape))):
        along = along / np.linalg.norm(along)
        ahead, behind = (float(total((pixels + side * along).astype(np.float32))) for side in (step, -step))
        assert abs((ahead - behind) / (2 * step) - (gradient * along).sum()) < 2e-3 * scale


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: random_crops(KEY, x, 0, 8), "count=0 must be a whole number of at least 1"),
        (lambda x: random_crops(KEY, x, 1, 0), "size=0 must be"),
        (lambda x: random_crops(KEY, x, 1, 8, min_side=0.0), "min_side=0.0 and max_side=1.0 must rise from above 0"),
        (lambda x: random_crops(KEY, x, 1, 8, max_side=1.5), "max_side=1.5 must rise from above 0 to at most 1"),
        (lambda x: random_crops(KEY, x, 1, 8, min_side=0.9, max_side=0.5), "min_side=0.9 and max_side=0.5"),
        (lambda x: random_crops(KEY, x[:, :0], 1, 8), "pictures of 0 x 8 pixels have no parts"),
        (lambda x: jitter_colours(KEY, x, contrast=-0.1), "contrast=-0.1 must be from 0 to 1"),
        (lambda x: jitter_colours(KEY, x, brightness=float("nan")), "brightness=nan must be from 0 to 1"),
        (lambda x: add_noise(KEY, x, most=-1.0), "most=-1.0 must be at least 0"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((1, 8, 8, 3)))
