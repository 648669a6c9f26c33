"""The host's half of `data.resize_on=device`: the same draws, the box on the canvas, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from clipjax.config import (
    AugmentConfig,
    Config,
    Crop,
    DataConfig,
    Interpolation,
    ModelConfig,
    Resize,
    ResizeOn,
    ViTConfig,
)
from clipjax.config.validation import validate
from clipjax.data.sources import ArraySource
from clipjax.data.training_stream import TrainStream
from clipjax.models.device_resize import resize_crops
from tests.data.test_training_stream import tokenize

SIZE, CANVAS = 32, 64

resize = jax.jit(resize_crops, static_argnums=(2, 3))


def soft_pictures(shapes) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in shapes]
    return [
        np.asarray(each.resize((width, height), Image.Resampling.BICUBIC))
        for each, (height, width) in zip(small, shapes, strict=True)
    ]


def config(resize_on: ResizeOn, **data) -> Config:
    model = ModelConfig(image=ViTConfig(image_size=SIZE, patch_size=16))
    canvas = {"canvas_size": CANVAS} if resize_on is ResizeOn.DEVICE else {}
    return Config(
        global_batch_size=8, model=model, data=DataConfig(train="test", resize_on=resize_on, **canvas, **data)
    )


def take(shapes, count: int, run: Config, **options) -> list[dict[str, np.ndarray]]:
    source = ArraySource(soft_pictures(shapes), [(f"a{i}", f"b{i}") for i in range(len(shapes))])
    stream = TrainStream(source, tokenize=tokenize, config=run, **options)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


CHOICES = [
    {"min_crop_area": 0.3},
    {"min_crop_area": 0.3, "augment": AugmentConfig(horizontal_flip=0.5)},
    {"crop": Crop.CENTER},
    {"crop": Crop.CENTER, "resize": Resize.SQUASH},
    {"interpolation": Interpolation.BILINEAR},
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("options", [{}, {"order": None}])
def test_the_pictures_are_those_of_the_host(choice, options):
    shapes = [(40 + 2 * i % 20, 38 + 3 * i % 23) for i in range(24)]
    on_host = take(shapes, 3, config(ResizeOn.HOST, **choice), **options)
    on_device = take(shapes, 3, config(ResizeOn.DEVICE, **choice), **options)
    for host, device in zip(on_host, on_device, strict=True):
        assert device["image"].shape == (8, CANVAS, CANVAS, 3) and device["image"].dtype == np.uint8
        assert device["crop"].shape == (8, 7) and device["crop"].dtype == np.float32
        for name in ("tokens", "index", "skip_reason"):
            np.testing.assert_array_equal(host[name], device[name])
        interpolation = choice.get("interpolation", Interpolation.BICUBIC)
        found = np.asarray(resize(device["image"], device["crop"], SIZE, interpolation)).astype(int)
        differing = found - host["image"]
        # Pillow 13 resizes some tall pictures in the other order, with another rounding between the two.
        assert np.abs(differing).mean() < 0.05 and np.abs(differing).max() <= 4


@pytest.mark.parametrize("shape", [(200, 300), (64, 2000), (2000, 64), (65, 65)])
@pytest.mark.parametrize("crop", list(Crop))
def test_larger_pictures_are_reduced_first(shape, crop):
    (host,), (device,) = (take([shape] * 8, 1, config(place, crop=crop)) for place in (ResizeOn.HOST, ResizeOn.DEVICE))
    box = device["crop"]
    assert (box[:, 4:6] <= CANVAS).all() and (box[:, :2] + box[:, 2:4] <= box[:, 4:6] + 1e-3).all()
    found = np.asarray(resize(device["image"], box, SIZE, Interpolation.BICUBIC)).astype(int)
    # Two filters one after the other blur a little more than one.
    assert np.abs(found - host["image"]).mean() < 4


def test_a_small_part_of_a_large_picture_is_not_reduced():
    (device,) = take([(30, 900)] * 8, 1, config(ResizeOn.DEVICE, crop=Crop.CENTER))
    np.testing.assert_array_equal(device["crop"][:, 2:4], 30)
    assert (device["crop"][:, 4] == 30).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_on": ResizeOn.HOST}, "data.canvas_size=64 would be ignored"),
        ({"canvas_size": 31}, "data.canvas_size=31 must be at least model.image.image_size=32"),
        ({"augment": AugmentConfig(grayscale=0.1)}, "data.augment.grayscale=0.1 changes resized pictures"),
        ({"augment": AugmentConfig(erasing=0.1)}, "data.augment.erasing=0.1 changes resized pictures"),
        (
            {"augment": AugmentConfig(color_jitter=(0.1, 0.0, 0.0, 0.0), color_jitter_probability=0.5)},
            "data.augment.color_jitter_probability=0.5 changes resized pictures",
        ),
    ],
)
def test_what_is_refused(change, message):
    run = config(ResizeOn.DEVICE)
    validate(run)
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(run, data=dataclasses.replace(run.data, **change)))
