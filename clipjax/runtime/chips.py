"""Accelerators by name, with the figures that their makers publish. Free of JAX.

Rates are peaks, per chip. A chip of several cores counts as one device.

Source:
    TPUs: cloud.google.com/tpu/docs (system architecture pages of v4, v5e, v5p, v6e); links and networks as tabulated in
    jax-ml.github.io/scaling-book/hardware. GPUs: NVIDIA's datasheets of A100, H100, H200 and B200, and the limits of
    their compute capabilities in the CUDA programming guide.
"""

import math
from dataclasses import dataclass

GB, GIB = 10**9, 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    Attributes:
        name: name in `--topology`.
        kinds: values that `jax.Device.device_kind` may have.
        platform: "tpu" or "gpu".
        peak_tflops: peak of dense bfloat16 products, TFLOP/s.
        memory_bytes: memory of the chip; compiler and runtime keep a little of it (a v5e's 0.25 GiB).
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s to the other chips of a slice or node: of a TPU along one side of the torus in one
            direction, of a GPU in all.
        network_bandwidth: bytes/s to chips of other slices or nodes.
    """

    name: str
    kinds: tuple[str, ...]
    platform: str
    peak_tflops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """A TPU.

    Attributes:
        clock_hertz: clock of the compiler's cycles.
        cores: number of cores, each with vector units of its own.
        torus: dimensions of the network inside a slice.
        pod: chips of the largest slice.
    """

    clock_hertz: float
    cores: int
    torus: int
    pod: int

    @property
    def vector_rate(self) -> float:
        """Operations on 32-bit numbers per second: two registers of 1,024 in each cycle, half of what can be issued."""
        return self.cores * 2 * 1024 * self.clock_hertz


@dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """A GPU, with the facts that its compiler needs.

    Attributes:
        capability: compute capability, major and minor.
        multiprocessors: number in use on this board.
        clock_hertz: highest clock.
        shared_memory_bytes: shared memory of a multiprocessor; a block may have 1,024 less.
        cache_bytes: size of the second-level cache.
        feature: the compiler's name for the instructions of this capability alone.
    """

    capability: tuple[int, int]
    multiprocessors: int
    clock_hertz: float
    shared_memory_bytes: int
    cache_bytes: int
    feature: str = "NONE"


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Tpu(
            name="v4", kinds=("TPU v4",), platform="tpu", peak_tflops=275, memory_bytes=32 * GIB,
            memory_bandwidth=1228e9, link_bandwidth=45e9, network_bandwidth=6.25e9,
            clock_hertz=1.05e9, cores=2, torus=3, pod=4096,
        ),
        Tpu(
            name="v5e", kinds=("TPU v5 lite", "TPU v5e"), platform="tpu", peak_tflops=197, memory_bytes=16 * GIB,
            memory_bandwidth=819e9, link_bandwidth=45e9, network_bandwidth=3.125e9,
            clock_hertz=1.5e9, cores=1, torus=2, pod=256,
        ),
        Tpu(
            name="v5p", kinds=("TPU v5", "TPU v5p"), platform="tpu", peak_tflops=459, memory_bytes=95 * GIB,
            memory_bandwidth=2765e9, link_bandwidth=90e9, network_bandwidth=6.25e9,
            clock_hertz=1.75e9, cores=2, torus=3, pod=8960,
        ),
        Tpu(
            name="v6e", kinds=("TPU v6 lite", "TPU v6e"), platform="tpu", peak_tflops=918, memory_bytes=32 * GIB,
            memory_bandwidth=1640e9, link_bandwidth=90e9, network_bandwidth=12.5e9,
            clock_hertz=1.75e9, cores=1, torus=2, pod=256,
        ),
        Gpu(
            name="a100-40", kinds=("NVIDIA A100-SXM4-40GB",), platform="gpu", peak_tflops=312, memory_bytes=40 * GB,
            memory_bandwidth=1555e9, link_bandwidth=300e9, network_bandwidth=25e9,
            capability=(8, 0), multiprocessors=108, clock_hertz=1.41e9, shared_memory_bytes=164 * 1024,
            cache_bytes=40 * 2**20,
        ),
        Gpu(
            name="a100", kinds=("NVIDIA A100-SXM4-80GB",), platform="gpu", peak_tflops=312, memory_bytes=80 * GB,
            memory_bandwidth=2039e9, link_bandwidth=300e9, network_bandwidth=25e9,
            capability=(8, 0), multiprocessors=108, clock_hertz=1.41e9, shared_memory_bytes=164 * 1024,
            cache_bytes=40 * 2**20,
        ),
        Gpu(
            name="h100", kinds=("NVIDIA H100 80GB HBM3",), platform="gpu", peak_tflops=989.4, memory_bytes=80 * GB,
            memory_bandwidth=3352e9, link_bandwidth=450e9, network_bandwidth=50e9,
            capability=(9, 0), multiprocessors=132, clock_hertz=1.98e9, shared_memory_bytes=228 * 1024,
            cache_bytes=50 * 2**20, feature="ACCELERATED_FEATURES",
        ),
        Gpu(
            name="h200", kinds=("NVIDIA H200",), platform="gpu", peak_tflops=989.4, memory_bytes=141 * GB,
            memory_bandwidth=4800e9, link_bandwidth=450e9, network_bandwidth=50e9,
            capability=(9, 0), multiprocessors=132, clock_hertz=1.98e9, shared_memory_bytes=228 * 1024,
            cache_bytes=60 * 2**20, feature="ACCELERATED_FEATURES",
        ),
        Gpu(
            name="b200", kinds=("NVIDIA B200",), platform="gpu", peak_tflops=2250, memory_bytes=180 * GB,
            memory_bandwidth=7700e9, link_bandwidth=900e9, network_bandwidth=50e9,
            capability=(10, 0), multiprocessors=148, clock_hertz=1.965e9, shared_memory_bytes=228 * 1024,
            cache_bytes=126 * 2**20, feature="ACCELERATED_FEATURES",
        ),
    )
}  # fmt: skip

OTHER_BOARDS = {"NVIDIA A100-PCIE-40GB": "a100-40", "NVIDIA A100 80GB PCIe": "a100"}
"""Boards with the peak and memory of a chip above, and slower links.

Slower boards of the same name (H100 PCIe) are absent on purpose: no MFU is better than a wrong one; `log.peak_tflops`
sets it by hand."""


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip that `jax.Device.device_kind` names, if it is known."""
    if device_kind in OTHER_BOARDS:
        return CHIPS[OTHER_BOARDS[device_kind]]
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def memory_bytes(device_kind: str) -> float:
    """Return the memory of a device of this kind by the table, equal on all processes; infinite if not known."""
    chip = find_chip(device_kind)
    return math.inf if chip is None else chip.memory_bytes
