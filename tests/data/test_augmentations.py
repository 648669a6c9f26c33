"""Random changes of pictures against torchvision's formulas in float64."""

import pickle

import numpy as np
import pytest

from clipjax.config import AugmentConfig, Config, DataConfig
from clipjax.config.serialization import from_dict, to_dict
from clipjax.config.validation import range_errors
from clipjax.data.augmentations import Augmentations, erase, jitter_colours, make_augmentations

pytestmark = pytest.mark.newest

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
PICTURE[:4] = PICTURE[:4, :, :1]  # greys have no hue
PICTURE[4, :8] = [[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)]
FILL = (123, 117, 104)


def grey(pixels: np.ndarray) -> np.ndarray:
    return (0.2989 * pixels[..., 0] + 0.587 * pixels[..., 1] + 0.114 * pixels[..., 2])[..., None]


def blend(first: np.ndarray, second: np.ndarray | float, ratio: float) -> np.ndarray:
    return np.clip(ratio * first + (1 - ratio) * second, 0, 1)


def rgb_to_hsv(pixels: np.ndarray) -> list[np.ndarray]:
    """torchvision.transforms._functional_tensor._rgb2hsv."""
    r, g, b = np.moveaxis(pixels, 2, 0)
    most, least = pixels.max(2), pixels.min(2)
    equal = most == least
    spread = most - least
    saturation = spread / np.where(equal, 1, most)
    divisor = np.where(equal, 1, spread)
    rc, gc, bc = (most - r) / divisor, (most - g) / divisor, (most - b) / divisor
    hr = (most == r) * (bc - gc)
    hg = ((most == g) & (most != r)) * (2 + rc - bc)
    hb = ((most != g) & (most != r)) * (4 + gc - rc)
    return [np.fmod((hr + hg + hb) / 6 + 1, 1), saturation, most]


def hsv_to_rgb(h: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    """torchvision.transforms._functional_tensor._hsv2rgb."""
    i = np.floor(h * 6)
    f = h * 6 - i
    p, q, t = (np.clip(v * (1 - part), 0, 1) for part in (s, s * f, s * (1 - f)))
    choices = [(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)]
    sixth = i.astype(int) % 6
    return np.stack([np.choose(sixth, [choice[channel] for choice in choices]) for channel in range(3)], 2)


def reference(image: np.ndarray, amounts: list[float], order: list[int]) -> np.ndarray:
    pixels = image / 255.0
    for change in order:
        amount = amounts[change]
        if change == 0:
            pixels = blend(pixels, 0.0, amount)
        elif change == 1:
            pixels = blend(pixels, grey(pixels).mean(), amount)
        elif change == 2:
            pixels = blend(pixels, grey(pixels), amount)
        else:
            h, s, v = rgb_to_hsv(pixels)
            pixels = hsv_to_rgb((h + amount) % 1, s, v)
    return 255 * pixels


@pytest.mark.parametrize(
    ("amounts", "order"),
    [
        ([1.3, 1, 1, 0], [0, 1, 2, 3]),
        ([0.0, 1, 1, 0], [0, 1, 2, 3]),
        ([1, 0.4, 1, 0], [0, 1, 2, 3]),
        ([1, 1.7, 1, 0], [0, 1, 2, 3]),
        ([1, 1, 0.0, 0], [0, 1, 2, 3]),
        ([1, 1, 1.9, 0], [0, 1, 2, 3]),
        ([1, 1, 1, 0.5], [0, 1, 2, 3]),
        ([1, 1, 1, -0.13], [0, 1, 2, 3]),
        ([0.7, 1.3, 0.8, 0.08], [3, 1, 0, 2]),
        ([1.3, 0.7, 1.3, -0.4], [2, 3, 1, 0]),
    ],
)
def test_colour_jitter_is_torchvisions(amounts, order):
    found = jitter_colours(PICTURE, amounts, order)
    assert found.dtype == np.uint8
    # Half a level for the rounding, the rest for float32.
    assert np.abs(found - reference(PICTURE, amounts, order)).max() < 0.501


def test_amounts_that_change_nothing():
    np.testing.assert_array_equal(jitter_colours(PICTURE, [1, 1, 1, 0], [3, 2, 1, 0]), PICTURE)


class Draws:
    """A generator that gives what it is told, and records what it is asked for."""

    def __init__(self, *draws):
        self.draws, self.asked = list(draws), []

    def _draw(self, *asked):
        self.asked.append(asked)
        return self.draws.pop(0)

    def random(self):
        return self._draw("random")

    def uniform(self, low, high):
        return self._draw("uniform", low, high)

    def integers(self, low, high):
        return self._draw("integers", low, high)

    def permutation(self, size):
        return np.array(self._draw("permutation", size))


def test_what_is_off_draws_nothing():
    rng = Draws()
    assert make_augmentations(Config())(PICTURE, rng) is PICTURE
    assert rng.asked == []


def test_flip():
    flip = Augmentations(AugmentConfig(horizontal_flip=0.3), FILL)
    np.testing.assert_array_equal(flip(PICTURE, Draws(0.29)), np.fliplr(PICTURE))
    assert flip(PICTURE, Draws(0.3)) is PICTURE


def test_colour_jitter_draws_from_its_ranges():
    jitter = Augmentations(AugmentConfig(color_jitter=(0.4, 1.5, 0.2, 0.1), color_jitter_probability=0.8), FILL)
    rng = Draws(0.79, 1.2, 0.5, 0.9, -0.05, [2, 0, 3, 1])
    found = jitter(PICTURE, rng)
    expected = [
        ("random",),
        ("uniform", 0.6, 1.4),
        ("uniform", 0.0, 2.5),
        ("uniform", 0.8, 1.2),
        ("uniform", -0.1, 0.1),
    ]
    assert rng.asked == [*expected, ("permutation", 4)]
    assert np.abs(found - reference(PICTURE, [1.2, 0.5, 0.9, -0.05], [2, 0, 3, 1])).max() < 0.501
    assert jitter(PICTURE, Draws(0.8)) is PICTURE


def test_grayscale():
    found = Augmentations(AugmentConfig(grayscale=1.0), FILL)(PICTURE, np.random.default_rng(0))
    assert np.abs(found - grey(PICTURE.astype(float))).max() < 0.501  # rounding
    assert (found == found[..., :1]).all()


def test_erasing_is_torchvisions():
    rng = Draws(0.5, 0.1, np.log(2.0), 3, 7)
    found = Augmentations(AugmentConfig(erasing=1.0), FILL)(PICTURE, rng)
    # 120 of 1200 pixels at height / width 2: sqrt(240) = 15.5 rows, sqrt(60) = 7.7 columns.
    assert rng.asked == [
        ("random",),
        ("uniform", 0.02, 0.33),
        ("uniform", np.log(0.3), np.log(3.3)),
        ("integers", 0, 40 - 15 + 1),
        ("integers", 0, 30 - 8 + 1),
    ]
    expected = PICTURE.copy()
    expected[3:18, 7:15] = FILL
    np.testing.assert_array_equal(found, expected)


def test_a_picture_with_no_room_stays():
    thin = np.zeros((1, 50, 3), np.uint8)
    assert erase(thin, FILL, np.random.default_rng(0)) is thin


def test_the_given_picture_is_never_written_to():
    image = PICTURE.copy()
    image.flags.writeable = False
    everything = AugmentConfig(
        horizontal_flip=1.0, color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_probability=1.0, grayscale=0.5, erasing=1.0
    )
    augment = pickle.loads(pickle.dumps(Augmentations(everything, FILL)))
    first = augment(image, np.random.default_rng(5))
    assert first.dtype == np.uint8 and first.shape == image.shape and first.flags.c_contiguous
    np.testing.assert_array_equal(first, augment(image, np.random.default_rng(5)))
    assert (first != augment(image, np.random.default_rng(6))).any()


def test_how_often():
    flip = Augmentations(AugmentConfig(horizontal_flip=0.25), FILL)
    rng = np.random.default_rng(0)
    count = sum(flip(PICTURE, rng) is not PICTURE for _ in range(4000))
    assert abs(count - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75)


def test_what_is_erased_is_zero_to_the_model():
    config = Config(data=DataConfig(mean=(0.5, 0.0, 1.2)))
    assert make_augmentations(config).fill == (128, 0, 255)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"color_jitter": (0.1, 0.1, 0.1, 0.6), "color_jitter_probability": 1.0}, "hue may turn by 0.5"),
        ({"color_jitter": (0.1, 0.1), "color_jitter_probability": 1.0}, "must have four numbers"),
        ({"color_jitter": (0.1, 0.0, 0.0, 0.0)}, "color_jitter_probability=0.0 changes nothing"),
        ({"color_jitter_probability": 0.5}, "changes nothing"),
    ],
)
def test_settings_that_are_refused(fields, message):
    (error,) = DataConfig(augment=AugmentConfig(**fields)).errors("data")
    assert message in error and error.startswith("data.augment.color_jitter=")


def test_ranges():
    assert range_errors(AugmentConfig(grayscale=1.5), "a") == ["a.grayscale=1.5 must lie between 0 and 1"]
    assert range_errors(AugmentConfig(color_jitter=(-0.1, 0, 0, 0)), "a") != []
    assert range_errors(DataConfig(background=(0, 256, 0)), "data") == [
        "data.background[1]=256 must lie between 0 and 255"
    ]
    assert "three numbers" in DataConfig(background=(1, 2)).errors("data")[0]


def test_settings_survive_json():
    config = Config(data=DataConfig(background=(1, 2, 3), augment=AugmentConfig(erasing=0.25)))
    assert from_dict(to_dict(config)) == config
