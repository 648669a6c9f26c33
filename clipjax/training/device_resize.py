"""Crop and resizing of a training batch on the devices, a few pictures of each at a time."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from clipjax.config import Config, Interpolation, ResizeOn
from clipjax.models.device_resize import resize_crops
from clipjax.runtime.sharding import batch_devices
from clipjax.training.gradients import Microbatches
from clipjax.typing import Batch

_MOST = 64
"""Pictures of a device at a time: float32 copies of that many canvases of 384 x 384 pixels are 113 MB."""


@dataclass(frozen=True)
class DeviceResize:
    """The pictures of a batch from its canvases and crops.

    Attributes:
        size: side of the pictures.
        interpolation: filter.
        microbatches: parts of the batch.
    """

    size: int
    interpolation: Interpolation
    microbatches: Microbatches

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with `image` uint8 [b, h, w, 3] and no `crop`."""

        def resize(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            return resize_crops(*part, self.size, self.interpolation)

        parts = self.microbatches.split(batch["image"]), self.microbatches.split(batch["crop"])
        others = {name: value for name, value in batch.items() if name != "crop"}
        return {**others, "image": self.microbatches.merge(jax.lax.map(resize, parts))}


def build_device_resize(config: Config, mesh: Mesh) -> DeviceResize | None:
    """Return the resizing that a config asks for; None if the host does it."""
    if config.data.resize_on is ResizeOn.HOST:
        return None
    devices = batch_devices(mesh)
    own = config.global_batch_size // devices
    most = max(size for size in range(1, min(own, _MOST) + 1) if own % size == 0)
    size, interpolation = config.model.image.image_size, config.data.interpolation
    return DeviceResize(size, interpolation, Microbatches(most * devices, devices))
