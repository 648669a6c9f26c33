"""Accelerators to compile for: `v5e:16x16`, `h100:32x8`, or those of this machine."""

import functools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipjax.config import Config
from clipjax.config.validation import validate_devices
from clipjax.runtime.chips import CHIPS, Chip, Gpu, Tpu, find_chip

HERE = "here"

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else two processes of one machine cannot compile at once
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # else the CUDA plugin does not load without a GPU
    # Without these, libtpu asks the network which TPU it runs on, and complains that it does not.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Defaults of environment variables that JAX and the compilers read when they load."""

XLA_FLAGS = "--xla_gpu_enable_triton_gemm=false"
"""Triton's products need a GPU to be tuned on; the compiler fails without one (JAX 0.10.2)."""


@dataclass(frozen=True)
class Target:
    """The accelerators for which a step is compiled.

    Attributes:
        name: as the user gave it.
        chip: one of its devices.
        devices: all of them, as JAX describes them.
        num_slices: groups with slow links between them.
        is_here: true for this machine's own devices, on which a step can run.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    num_slices: int = 1
    is_here: bool = False

    @property
    def num_hosts(self) -> int:
        """Machines that feed the devices."""
        return len({device.process_index for device in self.devices})


def prepare_environment(topology: str) -> None:
    """Let JAX load compilers for devices that this machine lacks. Call it before JAX is used."""
    if topology == HERE:
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_triton_gemm" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {XLA_FLAGS}".strip()


def find_target(name: str, num_slices: int = 1) -> Target:
    """Find the accelerators that a topology's name means.

    Args:
        name: `CHIP:SHAPE`. For TPUs the shape is the torus, in chips: `v5e:16x16`, `v5p:4x8x8`; for GPUs it is nodes
            times GPUs of each: `h100:8`, `h100:32x8`. `here`: the accelerators of this machine.
        num_slices: number of such slices, joined by the data-center network.

    Raises:
        ValueError: no such chip or shape, or the compiler for it is not installed.
    """
    if name == HERE:
        if num_slices > 1:
            raise ValueError(f"--slices={num_slices}: --topology={HERE} has the slices that it has; leave --slices out")
        return _here()
    chip_name, separator, shape = name.partition(":")
    chip = CHIPS.get(chip_name)
    if chip is None or not separator:
        raise ValueError(
            f"--topology={name}: write CHIP:SHAPE, for example v5e:16x16, v5p:4x8x8 or h100:32x8 (nodes x GPUs), or "
            f"here; known chips: {', '.join(CHIPS)}"
        )
    sides = [int(side) for side in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
    if num_slices < 1:
        raise ValueError(f"--slices={num_slices} must be at least 1")
    if isinstance(chip, Gpu):
        if len(sides) not in (1, 2):
            raise ValueError(f"--topology={name}: a shape of GPUs is their number, or nodes x GPUs of each: h100:32x8")
        if num_slices > 1:
            raise ValueError(f"--slices={num_slices}: nodes of GPUs are one slice; write --topology={chip_name}:NxM")
        nodes, each = ([1, *sides])[-2:]
        return Target(name, chip, _gpu_devices(chip, nodes, each))
    assert isinstance(chip, Tpu)
    if not 1 <= len(sides) <= chip.torus or math.prod(sides) > chip.pod:
        example = "x".join(["4"] * chip.torus)
        raise ValueError(
            f"--topology={name}: a shape of {chip_name} chips looks like {example}: {chip.torus} sides at most, and "
            f"{chip.pod} chips in one slice (--slices=N for more)"
        )
    return Target(name, chip, _tpu_devices(name, chip, sides, num_slices), num_slices)


def _tpu_devices(name: str, chip: Tpu, sides: Sequence[int], num_slices: int) -> Sequence[Any]:
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    if math.prod(sides) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]  # else a host has four of them
    shape = "x".join(str(side) for side in [*sides, 1, 1][: chip.torus])
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{shape}", **options).devices
    except Exception as error:
        if any(words in str(error) for words in ("libtpu", "not installed", "Unable to load")):
            raise ValueError(
                f"--topology={name} needs the TPU compiler, which is not installed: pip install 'clipjax[plan]'"
            ) from error
        reason = str(error).splitlines()[0]
        raise ValueError(f"--topology={name}: the TPU compiler knows no such shape ({reason})") from error
    return devices


def _gpu_devices(chip: Gpu, nodes: int, each: int) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            "", "cuda", topology=f"1x{nodes}x{each}", target_config=gpu_description(chip)
        ).devices
    except Exception as error:
        raise ValueError(
            f"--topology={chip.name}:... needs JAX's CUDA plugin, which is not installed or does not load: "
            f"pip install 'clipjax[plan-gpu]' ({str(error).splitlines()[0]})"
        ) from error


def gpu_description(chip: Gpu) -> str:
    """Describe a GPU for XLA's compiler (`GpuTargetConfigProto`), from its published figures."""
    major, minor = chip.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": chip.shared_memory_bytes,
        "shared_memory_per_block_optin": chip.shared_memory_bytes - 1024,
        "threads_per_core_limit": 2048,
        "core_count": chip.multiprocessors,
        "fpus_per_core": 64 if major == 8 else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(chip.memory_bandwidth),
        "device_memory_size": chip.memory_bytes,
        "l2_cache_size": chip.cache_bytes,
        "clock_rate_ghz": chip.clock_hertz / 1e9,
    }
    described = "\n".join(f"  {name}: {value}" for name, value in fields.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {chip.feature} }}"
    return (
        f"gpu_device_info {{\n{described}\n  {capability}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 2 }\n"
        f'device_description_str: "{chip.kinds[0]}"\n'
    )


def check_devices(config: Config, target: Target, teacher: Config | None) -> None:
    """Refuse a config that cannot be split over the target's devices.

    Raises:
        ValueError: with every field that does not fit.
    """
    validate_devices(
        config,
        num_devices=len(target.devices),
        num_processes=len({device.process_index for device in target.devices}),
        num_slices=target.num_slices,
        batch_fields=("global_batch_size", "microbatch_size"),
        teacher=teacher,
        platform=target.chip.platform,
    )


def _here() -> Target:
    import jax

    from clipjax.runtime.processes import open_devices
    from clipjax.runtime.sharding import hardware_slices

    open_devices()
    devices = jax.devices()
    chip = find_chip(devices[0].device_kind)
    if chip is None:
        raise ValueError(
            f"--topology={HERE}: {devices[0].device_kind!r} is no accelerator whose peaks are known "
            f"({', '.join(CHIPS)}); name one, for example --topology=v5e:4x4"
        )
    return Target(HERE, chip, devices, hardware_slices(devices), is_here=True)


@functools.cache
def compiler_versions() -> dict[str, str]:
    """Return the versions of JAX and of the installed compilers."""
    import importlib.metadata

    names = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
