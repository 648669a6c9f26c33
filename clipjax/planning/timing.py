"""Seconds of a compiled step: a prediction to rank by, and a lower bound.

On TPUs the prediction adds up the compiler's own estimates of cycles, each as often as its instruction runs. They cover
neither our kernels nor collectives, whose seconds follow from their operations and bytes (`kernel_seconds`,
`traffic`). The GPU compiler estimates nothing: there every instruction takes the time of its operations or its bytes,
at the shares of the peaks that were measured on an H200.
"""

from dataclasses import dataclass

from clipjax.planning.hlo import HloModule, Instruction
from clipjax.planning.traffic import KINDS, Collective
from clipjax.runtime.chips import Chip, Tpu

GPU_PRODUCT_SHARE, GPU_MEMORY_SHARE = 0.6, 0.8
"""Shares of a GPU's peaks that products and memory traffic of a training step reach."""

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "async-start", "async-update", "opt-barrier", "rng-get-and-update-state", "send",
    "recv",
    *KINDS, *(f"{kind}-start" for kind in KINDS),
}  # fmt: skip
"""Opcodes that take no time of their own or are counted elsewhere; `is_free` adds all that only wait for a start."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one step.

    Attributes:
        compute: products, sums, copies: all but kernels and collectives.
        kernels: our Pallas kernels.
        exposed: collectives during which nothing computes.
        hidden: collectives that run beside computation.
        roofline: the lower bound of this program: the largest of the seconds that its products (with those computed
            again), its memory and its links need.
        flops: of all products of one chip, with those computed again.
    """

    compute: float
    kernels: float
    exposed: float
    hidden: float
    roofline: float
    flops: float

    @property
    def predicted(self) -> float:
        """Sum of the parts; hidden collectives count where they take longer than the computation."""
        return max(self.compute + self.kernels, self.hidden) + self.exposed


def predict(program: HloModule, chip: Chip, collectives: list[Collective], memory_traffic_bytes: int) -> Timing:
    """Predict the seconds of a step.

    Args:
        program: the compiled step, parsed.
        chip: the target of the compilation.
        collectives: of the program.
        memory_traffic_bytes: the least that a step reads and writes.
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
    """Return true if an instruction takes no time of its own, or is counted elsewhere."""
    return instruction.opcode in _FREE or instruction.opcode.endswith("-done")


def is_kernel(instruction: Instruction) -> bool:
    """Return true if an instruction is a Pallas kernel for TPUs."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.attributes


def kernel_seconds(instruction: Instruction, chip: Chip) -> float:
    """Return the seconds of a kernel: of its bytes, or of its products and then its vector operations; the larger.

    The kernel's own annotation counts this work, padding included (`models.fused_attention`).
    """

    def annotation(name: str) -> float:
        return float(instruction.attribute(rf'"?{name}"?[:=]\s*\\?"?(\d+)') or 0)

    products = annotation("matrix_flops") / (1e12 * chip.peak_tflops)
    vectors = annotation("vector_operations") / chip.vector_rate if isinstance(chip, Tpu) else 0.0
    return max(annotation("bytes_accessed") / chip.memory_bandwidth, products + vectors)


def operation_seconds(instruction: Instruction, program: HloModule, chip: Chip) -> float:
    """Return the seconds of one instruction of a GPU's program, by its operations or by its bytes."""
    products = sum(program.product_flops(part) for part in program.fused_instructions(instruction))
    moved = program.bytes_accessed(instruction)
    return max(
        products / (GPU_PRODUCT_SHARE * 1e12 * chip.peak_tflops), moved / (GPU_MEMORY_SHARE * chip.memory_bandwidth)
    )
