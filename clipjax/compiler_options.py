"""What the compiler is told beyond its defaults, by kind of device: how to hide communication behind computation."""

from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import Mesh

TPU = MappingProxyType({})
GPU = MappingProxyType({})

PRESETS: Mapping[str, Mapping[str, bool | int | str]] = MappingProxyType({"tpu": TPU, "gpu": GPU})


def compiler_options(mesh: Mesh) -> Mapping[str, bool | int | str]:
    """The options for the devices of a mesh; none for CPUs."""
    return PRESETS.get(mesh.devices.flat[0].platform, {})
