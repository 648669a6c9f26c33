"""Worker processes of the training stream: their signals, their end, and what their death looks like."""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that a launcher or a terminal sends to all processes: only the training process acts on them."""

_DEATH = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")  # Grain's words


class WorkersDie(RuntimeError):
    """The error of loader workers that die more often than `recovery.max_worker_restarts` allows."""


def exit_code_of_death(error: RuntimeError) -> int | None:
    """Return the exit code of the worker whose death Grain reports by this error; None if it is another error."""
    found = _DEATH.search(str(error))
    return int(found.group(1)) if found else None


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block signals in this thread, so that the processes it starts meanwhile do not die of them while they import.

    They inherit the mask; `begin_worker` takes it off. This process gets its signals in other threads, or afterwards.
    """
    resource_tracker.ensure_running()  # its start unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(worker_index: int, worker_count: int) -> None:
    """Prepare a worker process: it ignores signals to stop, and ends with the training process.

    They reach every process of a terminal or a job; the training process saves first and then ends its workers. A
    training process that is killed can end nobody, and its workers would wait for it for ever, with all their memory.
    """
    del worker_index, worker_count
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True, name="end-with-parent").start()


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)


def own_memory(array: np.ndarray) -> np.ndarray:
    """Return the array, with its shared memory, if it lies in any, taken out of the file system at once.

    The memory stays as long as the array does. Grain takes it out when the array is deleted, which never happens to one
    that outlives the loop; Python then warns at exit of "leaked shared_memory objects".
    """
    memory = getattr(array, "shm", None)
    if memory is not None:
        memory.unlink()
        memory.unlink = _do_nothing  # Grain's own call, later
    return np.asarray(array)


def _do_nothing() -> None: ...


def mark_flags_as_parsed() -> None:
    """Mark absl's flags as parsed: Grain's workers read them, an error in a program that never parsed any."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
