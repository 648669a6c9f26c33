"""The choices for pictures of variable aspect that fit together, and what is refused."""

import re

import pytest

from clipjax.config import Config, DataConfig, ModelConfig, Resize, ResizeOn, ResNetConfig, ViTConfig, patch_menu
from clipjax.config.validation import validate, validate_devices
from clipjax.config.variable_aspect import with_budget


def valid(max_patches: int | None = 256, **data) -> Config:
    image = ViTConfig(max_patches=max_patches, class_token=False, pool=ViTConfig().pool.AVERAGE)
    return Config(global_batch_size=64, model=ModelConfig(image=image), data=DataConfig(train="pairs.tar", **data))


def packed(**fields) -> Config:
    return valid(patch_menu=(64, 128), images_per_row=4, enlarge=False, **fields)


def test_what_fits_is_taken():
    validate(packed())
    validate(valid())
    validate_devices(packed(), num_devices=16, num_processes=4)


def test_the_menu_is_the_budgets_of_the_run():
    assert patch_menu(packed()) == (64, 128)
    assert patch_menu(valid()) == (256,)
    assert patch_menu(valid(None)) == ()
    assert patch_menu(with_budget(packed(), 64)) == (64,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"patch_menu": (64,)}, "data.patch_menu=(64,) would be ignored: model.image.max_patches is None"),
        ({"images_per_row": 4}, "data.images_per_row=4 would be ignored: model.image.max_patches is None"),
        ({"enlarge": False}, "data.enlarge=False would be ignored: model.image.max_patches is None"),
    ],
)
def test_choices_without_variable_aspect_are_refused(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(valid(None, **data))
    config = valid(None, **data)
    config.model.image = ResNetConfig()
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"patch_menu": (64, 512)}, "data.patch_menu=(64, 512): 512 must not exceed model.image.max_patches=256"),
        ({"patch_menu": (64, 64)}, "data.patch_menu=(64, 64) has a number twice"),
        ({"patch_menu": (64, 0)}, "data.patch_menu[1]=0 must be greater than 0"),
        ({"images_per_row": 0}, "data.images_per_row=0 must be greater than 0"),
        ({"images_per_row": 4}, "data.images_per_row=4 would save nothing with data.enlarge=True"),
        ({"resize_on": ResizeOn.DEVICE}, "data.resize_on=device makes squares only"),
        ({"decode_margin": 2.0}, "data.decode_margin=2.0 is for squares"),
        ({"resize": Resize.SQUASH}, "data.resize=squash would be ignored"),
        (
            {"images_per_row": 48, "enlarge": False},
            "global_batch_size=64 must be divisible by 48 (mesh.data=1 * mesh.fsdp=1 * data.images_per_row=48)",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(valid(**data))


def test_rows_are_of_one_device_and_one_microbatch():
    config = packed()
    config.microbatch_size = 32
    validate_devices(config, num_devices=8, num_processes=1)
    with pytest.raises(ValueError, match=re.escape("microbatch_size=32 must be divisible by 64 (mesh.data=16 * mesh")):
        validate_devices(config, num_devices=16, num_processes=1)
    config.microbatch_size = None
    with pytest.raises(ValueError, match=re.escape("global_batch_size=64 must be divisible by 128 (the number of")):
        validate_devices(config, num_devices=32, num_processes=32)
    config.eval.batch_size = 2  # each image of an evaluation has a row of its own
    validate_devices(config, num_devices=2, num_processes=1)
