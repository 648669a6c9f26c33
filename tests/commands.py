"""Running a command inside the test's own process."""

from collections.abc import Callable, Sequence


def exit_code(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int | str | None:
    """The exit code with which a command leaves, returned or raised."""
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code
