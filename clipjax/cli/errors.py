"""Messages and exit codes of a command that fails. Nothing below `cli` knows an exit code.

`refusals` surrounds all that can be refused before the work starts, `stops` the work itself.
"""

import contextlib
import sys
from collections.abc import Iterator

from absl import logging

from clipjax.runtime import process_log
from clipjax.runtime.terminal import printable

USAGE_ERROR = 2

DOES_NOT_FIT = 3
"""Exit code of a plan whose run does not fit into the memory of its chips."""

SIGNAL = 128
"""Added to the number of the signal that ended a command, as shells do."""

UNUSABLE_DATA = 3
"""Exit code of training that a person has to look at: started again, it would stop at the same place."""


@contextlib.contextmanager
def refusals(program: str) -> Iterator[None]:
    """End with a message and exit code 2 where something is the user's to mend (`ValueError`, `OSError`).

    A defect of ours, or an error after this block, shows in full.

    Args:
        program: what messages call the command.

    Raises:
        SystemExit: something was refused.
    """
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    except BrokenPipeError:  # of the standard output: nobody reads on
        raise
    except (ValueError, OSError) as error:
        print_error(program, error)
        raise SystemExit(_code_of_refusal(error)) from error


def _code_of_refusal(error: Exception) -> int:
    """Return 3 for checkpoints of which none can be used, else 2."""
    from clipjax.checkpoints.manifest import UnusableCheckpoint

    return UNUSABLE_DATA if isinstance(error, UnusableCheckpoint) else USAGE_ERROR


@contextlib.contextmanager
def stops(program: str) -> Iterator[None]:
    """End with a message and exit code 3 where a person has to look at the run, its data or its machine.

    Raises:
        SystemExit: it did. One of several processes whose data, checkpoint or device is at fault ends at once instead,
            since the others may wait for it, or it for one that is missing.
    """
    # In here, so that commands that need no JAX do not wait for its import.
    from clipjax.checkpoints.manager import SavesFail
    from clipjax.checkpoints.manifest import UnusableCheckpoint
    from clipjax.data.sample import UnreadableData
    from clipjax.data.training_batches import NoUsableSample, TooManyBadSamples
    from clipjax.runtime import processes
    from clipjax.runtime.device_check import BrokenDevice
    from clipjax.training.recovery import RunStopped

    try:
        yield
    except (NoUsableSample, UnreadableData, UnusableCheckpoint, BrokenDevice) as error:
        print_error(program, error)
        raise SystemExit(processes.abort(UNUSABLE_DATA)) from error
    except (TooManyBadSamples, RunStopped, SavesFail) as error:  # all processes meet it at one place
        print_error(program, error)
        raise SystemExit(UNUSABLE_DATA) from error


def print_error(program: str, error: Exception) -> None:
    """Print an error's message for a person, a line per finding."""
    for line in str(error).splitlines() or [repr(error)]:
        with contextlib.suppress(OSError, ValueError):  # a broken pipe must not change the exit code
            print(f"{program}: error: {printable(line)}", file=sys.stderr)
        process_log.info(f"error: {line}")
