"""Export of a checkpoint as a directory that a peer's own loader opens."""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from clipjax.checkpoints.saved import SavedCheckpoint, load_params
from clipjax.config import Config, MeshConfig, ViTConfig, most_patches
from clipjax.convert import files, huggingface, open_clip, open_clip_config, preprocessing, stablehlo, tokenizers
from clipjax.convert.rules import to_theirs
from clipjax.data.tokenizers.protocol import Tokenizer
from clipjax.pytrees import to_flat
from clipjax.runtime import sharding

TARGETS = ("open_clip", "huggingface", "stablehlo")


def export(saved: SavedCheckpoint, target: str, output: pathlib.Path | str) -> None:
    """Write a directory that the peer's own loader opens.

    Args:
        saved: the checkpoint.
        target: one of `TARGETS`.
        output: a new or empty directory.

    Raises:
        ValueError: the peer has no such model or tokenizer, or `output` is not empty.
    """
    config, tokenizer = saved.config, saved.tokenizer()
    if target == "stablehlo" and (most := most_patches(config.model.image)) is not None:
        raise ValueError(
            f"--to=stablehlo: its program takes squares, and model.image.max_patches={most} gives other pictures; use "
            "--to=huggingface"
        )
    tokenizer_files = tokenizers.write(tokenizer, config.model.text.context_length)
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    params = {name: np.asarray(leaf) for name, leaf in to_flat(load_params(saved, mesh)).items()}
    with files.new_directory(output) as folder:
        match target:
            case "huggingface":
                _write_huggingface(config, params, folder)
            case "open_clip":
                _write_open_clip(config, params, tokenizer, folder)
            case _:
                stablehlo.write(config, params, folder)
                files.write_json(folder / "preprocessing.json", saved.records["preprocessing"])
        for name, content in tokenizer_files.items():
            (folder / name).write_bytes(content)


def _write_huggingface(config: Config, params: Mapping[str, np.ndarray], folder: pathlib.Path) -> None:
    model, size = config.model, config.model.image.image_size
    files.write_weights(folder / "model.safetensors", to_theirs(huggingface.table(model), params))
    files.write_json(folder / "config.json", huggingface.write_config(model))
    if isinstance(model.image, ViTConfig) and model.image.max_patches is not None:
        picture = preprocessing.write_huggingface_patches(config.data, model.image.patch_size, model.image.max_patches)
    else:
        picture = preprocessing.write_huggingface(config.data, size, siglip=huggingface.is_siglip(model))
    files.write_json(folder / "preprocessor_config.json", picture)


def _write_open_clip(
    config: Config, params: Mapping[str, np.ndarray], tokenizer: Tokenizer, folder: pathlib.Path
) -> None:
    model = config.model
    table = open_clip.table(model, custom_text=open_clip_config.is_custom(model))
    files.write_weights(folder / "open_clip_model.safetensors", to_theirs(table, params))
    picture = preprocessing.write_open_clip(config.data)
    written = open_clip_config.write_config(model)
    written["text_cfg"] |= tokenizers.open_clip_fields(tokenizer)
    whole = {"model_cfg": written, "preprocess_cfg": picture}
    files.write_json(folder / "open_clip_config.json", whole)
