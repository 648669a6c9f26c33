"""Peers' preprocessing of images: their JSON to the fields of `DataConfig`, and back."""

from collections.abc import Mapping
from typing import Any

from clipjax.config import CLIP_MEAN, CLIP_STD, DataConfig, Interpolation, Resize
from clipjax.convert.peer_config import PeerConfig

HALF = (0.5, 0.5, 0.5)
MOST_MEAN = 1_000
_RESAMPLE = {2: Interpolation.BILINEAR, 3: Interpolation.BICUBIC}
"""Interpolation by Pillow's numbers."""


def default(*, siglip: bool) -> DataConfig:
    """Return the defaults of a family, for files that do not say."""
    if siglip:
        return DataConfig(mean=HALF, std=HALF, resize=Resize.SQUASH)
    return DataConfig(mean=CLIP_MEAN, std=CLIP_STD)


def read_open_clip(peer: Mapping[str, Any], *, siglip: bool) -> DataConfig:
    """Read the `preprocess_cfg` of `open_clip_config.json`.

    Raises:
        ValueError: with every field that clipjax does not support.
    """
    data = default(siglip=siglip)
    known = PeerConfig(peer, "preprocess_cfg")
    data.mean = _triple(known, "mean", data.mean)
    data.std = _triple(known, "std", data.std)
    known.skip("size", "mode", "fill_color")
    data.interpolation = known.choose("interpolation", {item.value: item for item in Interpolation}, "bicubic")
    modes = {"shortest": Resize.SHORTER_SIDE, "squash": Resize.SQUASH}
    data.resize = known.choose("resize_mode", modes, "squash" if siglip else "shortest")
    known.finish()
    return data


def write_open_clip(data: DataConfig) -> dict[str, Any]:
    """Return the `preprocess_cfg` of `open_clip_config.json`."""
    return {
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": data.interpolation.value,
        "resize_mode": "squash" if data.resize is Resize.SQUASH else "shortest",
    }


def read_huggingface(peer: Mapping[str, Any], image_size: int, *, siglip: bool) -> DataConfig:
    """Read `preprocessor_config.json`.

    Raises:
        ValueError: with every field that clipjax does not support, or a size that is not the model's.
    """
    data = default(siglip=siglip)
    known = PeerConfig(peer, "preprocessor_config")
    known.skip("image_processor_type", "processor_class", "feature_extractor_type", "do_convert_rgb")
    known.skip("default_to_square", "disable_grouping", "input_data_format", "data_format", "device", "return_tensors")
    known.skip("do_pad", "pad_size", "image_seq_length", "size_divisor", "use_fast", "_valid_processor_keys")
    data.mean = _triple(known, "image_mean", data.mean)
    data.std = _triple(known, "image_std", data.std)
    data.interpolation = known.choose("resample", _RESAMPLE, 3)
    _check_switches(known)
    crop = known.choose("do_center_crop", {True: True, False: False, None: False}, not siglip)
    _read_size(known, "crop_size", image_size, {"height", "width"})
    short = _read_size(known, "size", image_size, {"shortest_edge"} if crop else {"height", "width"})
    if short and not crop:
        known.refuse("do_center_crop", crop, "would leave pictures as long as they are; it must be true")
    data.resize = Resize.SHORTER_SIDE if short else Resize.SQUASH
    known.finish()
    return data


def read_huggingface_patches(peer: Mapping[str, Any], patch_size: int) -> tuple[DataConfig, int]:
    """Read the `preprocessor_config.json` of a model of variable aspect; return also the most patches of an image.

    Raises:
        ValueError: with every field that clipjax does not support, or a patch that is not the model's.
    """
    data = default_of_patches()
    known = PeerConfig(peer, "preprocessor_config")
    known.skip("image_processor_type", "processor_class", "do_convert_rgb", "default_to_square", "disable_grouping")
    known.skip("input_data_format", "data_format", "device", "return_tensors", "use_fast", "_valid_processor_keys")
    known.skip("do_pad", "do_center_crop", "size", "crop_size", "pad_size", "image_seq_length")  # it never reads them
    data.mean = _triple(known, "image_mean", data.mean)
    data.std = _triple(known, "image_std", data.std)
    data.interpolation = known.choose("resample", _RESAMPLE, 2)
    _check_switches(known)
    if (size := known.size("patch_size", 16)) != patch_size:
        known.refuse("patch_size", size, f"must be the model's {patch_size}")
    most = known.size("max_num_patches", 256)
    known.finish()
    return data, most


def default_of_patches() -> DataConfig:
    """Return the defaults of SigLIP 2 of variable aspect."""
    return DataConfig(mean=HALF, std=HALF, interpolation=Interpolation.BILINEAR)


def write_huggingface_patches(data: DataConfig, patch_size: int, max_patches: int) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json` for a model of variable aspect."""
    square = write_huggingface(data, 0, siglip=True)
    del square["size"]
    kind = {"image_processor_type": "Siglip2ImageProcessor"}
    return {**square, **kind, "patch_size": patch_size, "max_num_patches": max_patches}


def _check_switches(known: PeerConfig) -> None:
    """Refuse pictures that are not resized, scaled to 0..1 and normalised."""
    known.choose("do_resize", {True: True}, True)
    known.choose("do_rescale", {True: True}, True)
    known.choose("do_normalize", {True: True}, True)
    factor = known.take("rescale_factor", float, 1 / 255)
    if abs(factor - 1 / 255) > 1e-6:
        known.refuse("rescale_factor", factor, "must be 1/255")


def write_huggingface(data: DataConfig, image_size: int, *, siglip: bool) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`."""
    squash = data.resize is Resize.SQUASH
    square = {"height": image_size, "width": image_size}
    return {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        "do_resize": True,
        "size": square if squash else {"shortest_edge": image_size},
        "resample": next(number for number, item in _RESAMPLE.items() if item is data.interpolation),
        **({} if siglip else {"do_center_crop": not squash, "crop_size": square}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
        "do_convert_rgb": True,
    }


def _read_size(known: PeerConfig, name: str, image_size: int, number: set[str]) -> bool:
    """Check a size, and return true if it is of the shorter side. A bare number stands for the sides of `number`."""
    size = known.take(name, (dict, int, type(None)), None)
    if size is None:
        return number == {"shortest_edge"}
    sides = size if isinstance(size, dict) else dict.fromkeys(number, size)
    shapes = ({"shortest_edge"}, {"height", "width"})
    if set(sides) not in shapes or any(side != image_size for side in sides.values()):
        known.refuse(name, size, f"must be the model's {image_size}, as shortest_edge or as height and width")
    return set(sides) == {"shortest_edge"}


def _triple(known: PeerConfig, name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = known.take(name, list, list(default))
    if len(value) != 3 or not all(isinstance(item, int | float) and abs(item) <= MOST_MEAN for item in value):
        known.refuse(name, value, f"must be three numbers, none beyond {MOST_MEAN}")
        return default
    if "std" in name and min(value) <= 0:
        known.refuse(name, value, "must be greater than 0")
        return default
    return float(value[0]), float(value[1]), float(value[2])
