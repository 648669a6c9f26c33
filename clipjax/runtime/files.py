"""Files: places that can be written to."""

import contextlib
import pathlib


def require_writable(workdir: pathlib.Path) -> None:
    """Make the workdir.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".write-probe"
        probe.write_bytes(b"")
    except OSError as error:
        raise ValueError(f"--workdir={workdir}: cannot be written to ({error.strerror}); choose another") from error
    with contextlib.suppress(OSError):
        probe.unlink()
