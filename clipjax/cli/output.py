"""Text for people on the standard output, which a pipe may close at any time (`| head`)."""

import os
import sys


def show(text: str) -> None:
    """Print a text that somebody may look at in parts, as `| head` does; a closed pipe ends it quietly."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        close_output()


def close_output() -> None:
    """Send the rest of the standard output nowhere: nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
