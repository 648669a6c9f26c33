"""Memory in which loader workers hand batches over: written once, copied never, and used again and again.

New shared memory costs a page fault for every 4 KiB, in the worker and in the training process, which is more time than
reading a sample. So a worker keeps its segments. The training process gives one back when the last array in it is gone.

Reading order: `BatchWriter` (in a worker), `SentColumns` (what is sent), `ReceivedColumns` (in the training process).
"""

import contextlib
import functools
import itertools
import math
import multiprocessing
import multiprocessing.util
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from clipjax.data.workers import WorkersDie

_IN_USE, _OPENED = 0, 1  # bytes of a segment's head
_HEAD = _ALIGNMENT = 64  # JAX's CPU backend takes aligned arrays without a copy

_numbers = itertools.count()

_Rows = tuple[Mapping[str, np.ndarray], int]
"""A row by the names of its values, and the number of rows like it."""


def _shapes(wanted: Sequence[_Rows]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: ((count, *value.shape), value.dtype) for row, count in wanted for name, value in row.items()}


def new_columns(*wanted: _Rows) -> dict[str, np.ndarray]:
    """Return empty arrays for rows."""
    return {name: np.empty(shape, dtype) for name, (shape, dtype) in _shapes(wanted).items()}


class _Segment(SharedMemory):
    """Shared memory that may be closed while arrays lie in it; it then stays until these are gone."""

    def __init__(self, name: str | None = None, *, create: bool = False, size: int = 0):
        super().__init__(name, create, size)
        self.number = next(_numbers)

    @property
    def memory(self) -> memoryview:
        """The bytes."""
        assert self.buf is not None  # only once it is closed
        return self.buf

    def reserve(self) -> None:
        """Take all of it now: a machine that has too little kills a process when it writes.

        Raises:
            WorkersDie: there is too little.
        """
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, 0, self.size)  # pyright: ignore[reportAttributeAccessIssue]
            except OSError as error:
                self.unlink()
                raise WorkersDie(
                    f"{error.strerror}: a loader worker wants {self.size / 2**20:.0f} MiB more of shared memory "
                    "(/dev/shm); give the machine more (docker run --shm-size=...), lower data.prefetch_batches or "
                    "data.num_workers, or set data.num_workers=0"
                ) from None

    def close(self) -> None:
        """Take the mapping away, if nothing uses it."""
        with contextlib.suppress(BufferError):
            super().close()

    def unlink(self) -> None:
        """Take it out of the file system, if the other side has not: both may at once when a worker is closed."""
        with contextlib.suppress(FileNotFoundError):
            super().unlink()


_Layout = Mapping[str, tuple[int, tuple[int, ...], str]]
"""Of each column its first byte, shape and type."""


@dataclass(frozen=True)
class SentColumns:
    """The columns of a batch in a segment of shared memory; pickled, they become `ReceivedColumns`.

    Attributes:
        process: that made the segment; with `number`, its identity, as names may come again.
        number: of the segment.
        name: of the shared memory.
        layout: of the columns.
    """

    process: int
    number: int
    name: str
    layout: _Layout

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.process, self.number, self.name, self.layout)


class BatchWriter:
    """Segments of one worker, for its threads."""

    def __init__(self):
        self._segments: list[_Segment] = []
        self._lock = threading.Lock()
        self._ends = False
        multiprocessing.util.Finalize(None, self._end, exitpriority=1)

    def columns(self, *wanted: _Rows) -> tuple[SentColumns, dict[str, np.ndarray]]:
        """Return what to send when they are full, and the arrays that `new_columns` returns."""
        layout, size = {}, _HEAD
        for name, (shape, dtype) in _shapes(wanted).items():
            layout[name] = (size, shape, dtype.str)
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        segment = self._take(size)
        return SentColumns(os.getpid(), segment.number, segment.name, layout), _arrays(segment, layout)

    def _take(self, size: int) -> _Segment:
        with self._lock:
            free = (each for each in self._segments if each.size >= size and not each.memory[_IN_USE])
            if (segment := next(free, None)) is None:
                segment = _Segment(create=True, size=size)
                segment.reserve()
                self._segments.append(segment)
                if self._ends:
                    segment.unlink()
            segment.memory[_IN_USE] = 1
        return segment

    def _end(self) -> None:
        """Take segments out of the file system that the training process has not opened, and so never will."""
        with self._lock:
            self._ends = True  # threads that read ahead may still ask for more
            for segment in self._segments:
                if not segment.memory[_OPENED]:
                    segment.unlink()


@dataclass(frozen=True)
class ReceivedColumns:
    """The columns of a batch, in the training process, which holds their memory from now on."""

    segment: _Segment | None  # None: the worker had ended
    layout: _Layout

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the columns, once. The worker may use their memory again when all arrays that lie in it are gone."""
        if self.segment is None:
            raise WorkersDie("a loader worker ended before its batch was read")
        return _arrays(self.segment, self.layout, release=True)


_received: dict[tuple[int, int], _Segment] = {}
_receiving = threading.Lock()


def _receive(process: int, number: int, name: str, layout: _Layout) -> ReceivedColumns:
    """Unpickle columns. Others of the worker may wait to be read when it ends, so its memory is opened at once."""
    with _receiving:
        segment = _received.get((process, number))
        if segment is None:
            try:
                segment = _Segment(name)
            except FileNotFoundError:  # what waits in the queue of a worker that is closed is read and thrown away
                return ReceivedColumns(None, layout)
            segment.unlink()  # both sides have it; nothing is left behind, however they end
            segment.memory[_OPENED] = 1
            _received[process, number] = segment
    return ReceivedColumns(segment, layout)


def forget_the_dead() -> None:
    """Let go of the memory of workers that are gone, as far as no array lies in it."""
    alive = {process.pid for process in multiprocessing.active_children()}
    with _receiving:
        for key in [key for key in _received if key[0] not in alive]:
            del _received[key]


def _arrays(segment: _Segment, layout: _Layout, *, release: bool = False) -> dict[str, np.ndarray]:
    whole = np.frombuffer(segment.memory, np.uint8)  # the base of every array that is made of it
    if release:
        weakref.finalize(whole, functools.partial(_give_back, segment)).atexit = False
    found = {}
    for name, (start, shape, dtype) in layout.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        found[name] = whole[start : start + size].view(dtype).reshape(shape)
    return found


def _give_back(segment: _Segment) -> None:
    segment.memory[_IN_USE] = 0
