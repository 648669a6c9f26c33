"""Running a command: inside the test's own process, and how all of them compile."""

from collections.abc import Callable, Sequence
from importlib.metadata import version

_KNOWS_OLD_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10)  # 0.12 ends on an unknown flag
QUICK_COMPILE = "--xla_backend_optimization_level=0" + _KNOWS_OLD_EMITTERS * " --xla_cpu_use_fusion_emitters=false"
"""XLA's flags in all tests. Compiling is most of what they spend: without LLVM's optimisation and with XLA's older code
for fused operations it takes a fraction of the time. Programs made so round a little differently, as CPUs do among
themselves; bits are compared between programs with the same flags only.
"""


def exit_code(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int | str | None:
    """The exit code with which a command leaves, returned or raised."""
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code
