"""Stacks of the threads of this process."""

import faulthandler
import os
import sys
import threading
import traceback
from typing import TextIO

_MOST_THREADS = 100  # that faulthandler writes: the newest, so that of more it is the main thread that is missing


def write(file: TextIO) -> None:
    """Write the stacks of all threads.

    It goes by the number of the file, since the stream itself may be locked by the thread that hangs.

    Raises:
        OSError, ValueError, AttributeError: the file cannot be written, or has no number.
    """
    faulthandler.dump_traceback(file.fileno(), all_threads=True)
    write_missing(file)


def write_missing(file: TextIO) -> None:
    """Write the main thread's stack where faulthandler, asked for those of all threads, leaves it out."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if threading.active_count() > _MOST_THREADS and frame is not None:
        lines = "".join(traceback.format_stack(frame))
        os.write(file.fileno(), f"\nMain thread (most recent call last):\n{lines}".encode())
