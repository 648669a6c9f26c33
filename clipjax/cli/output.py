"""Text for people on the standard output and error, which a pipe may close at any time (`| head`, `|& tee`)."""

import contextlib
import os
import sys
from typing import TextIO


def show(text: str) -> None:
    """Print a text that somebody may look at in parts, as `| head` does; a closed pipe ends it quietly."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        close_output()


def close_output() -> None:
    """Send the rest of the standard output nowhere: nobody reads it any more."""
    _send_nowhere(sys.stdout)


def close_broken_errors() -> None:
    """Send the rest of the standard error nowhere if nobody reads it; else Python would end with exit code 120."""
    with contextlib.suppress(AttributeError, ValueError):  # no stream, or a closed one
        try:
            sys.stderr.flush()
        except OSError:
            _send_nowhere(sys.stderr)


def _send_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
