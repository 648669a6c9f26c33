"""Running a command: inside the test's own process, and how all of them compile."""

from collections.abc import Callable, Sequence

QUICK_COMPILE = "--xla_backend_optimization_level=0"
"""XLA's flag in all tests. Compiling is most of what they spend, and unoptimised code is made in half the time. It
rounds a little differently, as CPUs do among themselves; bits are compared between programs with the same flags only.
"""


def exit_code(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int | str | None:
    """The exit code with which a command leaves, returned or raised."""
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code
