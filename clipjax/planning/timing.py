"""How long a compiled step may take: a prediction to rank by, and the bound that it cannot go below.

On TPUs the prediction adds up the compiler's own estimates of cycles, each as often as its instruction runs. They cover
neither kernels of ours nor collectives, so both are added from what they compute and move (`kernel_seconds`,
`traffic`). On GPUs, whose compiler estimates nothing, every instruction takes what its operations or its bytes need at
the shares of the peaks that an H200 was seen to reach.
"""

from dataclasses import dataclass

from clipjax.planning.hlo import HloModule, Instruction
from clipjax.planning.traffic import KINDS, Collective
from clipjax.runtime.chips import Chip, Tpu

GPU_PRODUCT_SHARE, GPU_MEMORY_SHARE = 0.6, 0.8
"""Of a GPU's peaks, that products and memory traffic of a training step reach."""

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "async-start", "async-update", "opt-barrier", "rng-get-and-update-state", "send",
    "recv",
    *KINDS, *(f"{kind}-start" for kind in KINDS),
}  # fmt: skip
"""What takes no time of its own, or is counted elsewhere; so does whatever only waits for what began before it."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one step.

    Attributes:
        compute: products, sums, copies: all but what follows.
        kernels: of our own.
        exposed: collectives that nothing hides.
        hidden: collectives that run beside computation.
        roofline: the bound of this program: the largest of what its products (those that are computed again included),
            its memory and its links need.
        flops: of all products of one chip, those that are computed again included.
    """

    compute: float
    kernels: float
    exposed: float
    hidden: float
    roofline: float
    flops: float

    @property
    def predicted(self) -> float:
        """All of it; what is hidden counts where it is longer than all that could hide it."""
        return max(self.compute + self.kernels, self.hidden) + self.exposed


def predict(program: HloModule, chip: Chip, collectives: list[Collective], memory_traffic_bytes: int) -> Timing:
    """Seconds of a step of a compiled program.

    Args:
        program: its text, parsed.
        chip: that it was compiled for.
        collectives: what it moves.
        memory_traffic_bytes: that a step reads and writes at least.
    """
    compute = kernels = kernel_flops = 0.0
    for instruction, times in program.executed():
        if is_kernel(instruction):
            kernels += times * kernel_seconds(instruction, chip)
            kernel_flops += times * float(instruction.attribute(r'"cost_estimate":\{"flops":"(\d+)"') or 0)
        elif isinstance(chip, Tpu):
            compute += times * instruction.estimated_cycles / chip.clock_hertz
        elif not is_free(instruction):
            compute += times * operation_seconds(instruction, program, chip)
    flops = program.flops() + kernel_flops
    exposed = sum(collective.seconds for collective in collectives if not collective.overlapped)
    hidden = sum(collective.seconds for collective in collectives if collective.overlapped)
    roofline = max(flops / (1e12 * chip.peak_tflops), memory_traffic_bytes / chip.memory_bandwidth, exposed + hidden)
    return Timing(compute, kernels, exposed, hidden, roofline, flops)


def is_free(instruction: Instruction) -> bool:
    """Whether it takes no time of its own, or is counted elsewhere."""
    return instruction.opcode in _FREE or instruction.opcode.endswith("-done")


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel for TPUs."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.attributes


def kernel_seconds(instruction: Instruction, chip: Chip) -> float:
    """A kernel's: its bytes, or its products and then its vector operations, whichever takes longer.

    What the units have to do, padding included, the kernel says itself (`models.fused_attention`).
    """

    def said(name: str) -> float:
        return float(instruction.attribute(rf'"?{name}"?[:=]\s*\\?"?(\d+)') or 0)

    products = said("matrix_flops") / (1e12 * chip.peak_tflops)
    vectors = said("vector_operations") / chip.vector_rate if isinstance(chip, Tpu) else 0.0
    return max(said("bytes_accessed") / chip.memory_bandwidth, products + vectors)


def operation_seconds(instruction: Instruction, program: HloModule, chip: Chip) -> float:
    """One instruction of a GPU's program, by its operations or by its bytes."""
    products = sum(program.product_flops(part) for part in program.inside(instruction))
    moved = program.moved_bytes(instruction)
    return max(
        products / (GPU_PRODUCT_SHARE * 1e12 * chip.peak_tflops), moved / (GPU_MEMORY_SHARE * chip.memory_bandwidth)
    )
