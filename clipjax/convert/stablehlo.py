"""Both towers as StableHLO programs that need nothing of clipjax's model code: weights beside them, any batch size.

`IMAGE_FILE` maps weights and uint8 pixels [b, s, s, 3] to unit-norm embeddings [b, e], `TEXT_FILE` weights and token
ids [b, l]. Both are what `jax.export` serialises; the weights are a dict of arrays by name, in `WEIGHTS_FILE`.
"""

import functools
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from clipjax.config import Config
from clipjax.convert import files
from clipjax.models.clip import build_clip
from clipjax.pytrees import from_flat

IMAGE_FILE, TEXT_FILE, WEIGHTS_FILE = "image.stablehlo", "text.stablehlo", "model.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(config: Config, params: Mapping[str, np.ndarray], folder: pathlib.Path) -> None:
    """Write the three files.

    Args:
        config: the model, and how it normalises pixels.
        params: all arrays by path, `batch_stats/...` among them.
        folder: where they go.
    """
    clip, size = build_clip(config.model, data=config.data), config.model.image.image_size

    def encode_image(weights: Mapping[str, jax.Array], pixels: jax.Array) -> jax.Array:
        return clip.encode_image(from_flat(weights), pixels)

    def encode_text(weights: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return clip.encode_text(from_flat(weights), tokens)

    weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in params.items()}
    pixels = jax.ShapeDtypeStruct(export.symbolic_shape(f"b, {size}, {size}, 3"), jnp.uint8)
    tokens = jax.ShapeDtypeStruct(export.symbolic_shape(f"b, {config.model.text.context_length}"), jnp.int32)
    for name, function, example in ((IMAGE_FILE, encode_image, pixels), (TEXT_FILE, encode_text, tokens)):
        exported = export.export(jax.jit(function), platforms=PLATFORMS)(weights, example)
        (folder / name).write_bytes(exported.serialize())
    files.write_weights(folder / WEIGHTS_FILE, params)


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """Both programs and their weights, ready to run.

    Attributes:
        weights: arrays by name.
        image: the program of `IMAGE_FILE`.
        text: the program of `TEXT_FILE`.
    """

    weights: Mapping[str, jax.Array]
    image: export.Exported
    text: export.Exported

    @functools.cached_property
    def _jitted(self) -> tuple[Any, Any]:
        return jax.jit(self.image.call), jax.jit(self.text.call)

    def encode_image(self, pixels: Any) -> jax.Array:
        """Return unit-norm embeddings [b, e] of uint8 pixels [b, s, s, 3]."""
        return self._jitted[0](self.weights, pixels)

    def encode_text(self, tokens: Any) -> jax.Array:
        """Return unit-norm embeddings [b, e] of int32 token ids [b, l]."""
        return self._jitted[1](self.weights, tokens)


def read(folder: pathlib.Path) -> ExportedModel:
    """Open the three files.

    Raises:
        ValueError: one of them is missing or damaged.
    """
    weights = jax.device_put(files.read_weights(folder / WEIGHTS_FILE))
    return ExportedModel(weights, _read_program(folder / IMAGE_FILE), _read_program(folder / TEXT_FILE))


def _read_program(path: pathlib.Path) -> export.Exported:
    try:
        return export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # flatbuffers and MLIR raise their own kinds
        raise ValueError(f"{path} is damaged or absent: {error}") from error
