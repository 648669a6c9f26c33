"""Rules of pictures of variable aspect (`model.image.max_patches`) across fields."""

import dataclasses

from clipjax.config.data import DataConfig, Resize, ResizeOn
from clipjax.config.image import ImageTower
from clipjax.config.run import Config, most_patches

_FIELDS = ("patch_menu", "images_per_row", "enlarge")


def with_budget(config: Config, patches: int) -> Config:
    """Return the config of a run whose steps all have one budget."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, patch_menu=(patches,)))


def variable_aspect_errors(data: DataConfig, image: ImageTower) -> list[str]:
    """Return what is wrong with the choices for pictures of variable aspect, a line each.

    Args:
        data: of the run.
        image: tower of the model.
    """
    most, default = most_patches(image), DataConfig()
    if most is None:
        return [
            f"data.{name}={value} would be ignored: model.image.max_patches is None, and all images are squares; "
            "leave it out, or set that"
            for name in _FIELDS
            if (value := getattr(data, name)) != getattr(default, name)
        ]
    errors = []
    if too_many := [patches for patches in data.patch_menu if patches > most]:
        errors.append(
            f"data.patch_menu={data.patch_menu}: {', '.join(map(str, too_many))} must not exceed "
            f"model.image.max_patches={most}; leave it out, or raise that"
        )
    if len(set(data.patch_menu)) < len(data.patch_menu):
        errors.append(f"data.patch_menu={data.patch_menu} has a number twice; name each once")
    if data.images_per_row > 1 and data.enlarge:
        errors.append(
            f"data.images_per_row={data.images_per_row} would save nothing with data.enlarge=True, where every image "
            "fills its budget by itself; set data.enlarge=False, or leave it 1"
        )
    if data.resize_on is ResizeOn.DEVICE:
        errors.append(
            f"data.resize_on=device makes squares only, and model.image.max_patches={most} asks for other pictures; "
            "use data.resize_on=host"
        )
    if data.decode_margin is not None:
        errors.append(
            f"data.decode_margin={data.decode_margin} is for squares, and model.image.max_patches={most} asks for "
            "other pictures; leave it None"
        )
    if data.resize is not Resize.SHORTER_SIDE:
        errors.append(
            f"data.resize={data.resize.value} would be ignored: with model.image.max_patches={most} pictures keep "
            "their aspect; leave it out"
        )
    return errors
