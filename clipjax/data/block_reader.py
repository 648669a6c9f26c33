"""Samples of an object store, read ahead in blocks: one request for all samples that the order keeps together.

Reading order: `BlockReader`, `read_block`.
"""

import collections
import logging
import os
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np

from clipjax.data.file_errors import to_unreadable
from clipjax.data.sample import BadSample, Sample, Source, UnreadableData

REQUESTS = 16
"""Requests at a time of each process that reads."""

MOST_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
"""Half of the memory of the machine, for the encoded pictures that a training process and its workers keep."""

_log = logging.getLogger(__name__)


Read = Sample | BadSample | UnreadableData
"""A sample that was read, or the error in its place."""


def read_block(source: Source, first: int, count: int) -> Sequence[Read]:
    """Return consecutive samples, with the error in the place of each that cannot be used or read.

    Where storage is away, which is known after all tries, the rest of them is not tried.

    Sources whose samples lie together have a method of this name, which reads them at once.
    """
    read = getattr(source, "read_block", None)
    if read is not None:
        return read(first, count)
    found: list[Read] = []
    for index in range(first, first + count):
        try:
            found.append(source[index])
        except BadSample as bad:
            found.append(BadSample(bad.reason))
        except (OSError, UnreadableData) as error:
            unreadable = error.again() if isinstance(error, UnreadableData) else to_unreadable(error, index)
            found += [unreadable] * (count - len(found) if unreadable.is_away else 1)
            if len(found) == count:
                break
    return found


class _Block:
    """A block that is being read, or lies ready."""

    def __init__(self, samples: "futures.Future[Sequence[Read]]", count: int):
        self.samples, self.left, self.size = samples, count, 0


class BlockReader:
    """Blocks of a source, each read once and kept until all of its samples have been taken.

    Args:
        source: of the samples; it is read by several threads.
        most: blocks that are kept at a time; the oldest go first, and are read again if they are needed.
        most_bytes: of the pictures in the blocks that lie ready, besides those of the latest one.
    """

    def __init__(self, source: Source, most: int, most_bytes: int = MOST_BYTES):
        self._source, self._most, self._most_bytes = source, most, most_bytes
        self._bytes, self._is_told = 0, False
        self._blocks: collections.OrderedDict[tuple[int, int], _Block] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._pool: futures.ThreadPoolExecutor | None = None
        self._is_closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "_most": self._most, "_most_bytes": self._most_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_source"], state["_most"], state["_most_bytes"])

    def announce(self, blocks: np.ndarray) -> None:
        """Begin to read blocks: int64 [k, 2], the first sample and the number of samples of each."""
        for first, count in np.unique(blocks[blocks[:, 1] > 1], axis=0).tolist():
            self._find(first, count)

    def take(self, index: int, first: int, count: int) -> Sample:
        """Return a sample of a block.

        Raises:
            BadSample: it cannot be used.
            UnreadableData: it cannot be read.
        """
        if count == 1:
            return self._source[index]
        block = self._find(first, count)
        try:
            sample = block.samples.result()[index - first]
        except futures.CancelledError:  # another thread has pushed it out before it was read
            return self._source[index]
        with self._lock:
            block.left -= 1
            if not block.left and self._blocks.get((first, count)) is block:
                self._forget((first, count))
        if isinstance(sample, BadSample):
            raise BadSample(sample.reason)
        if isinstance(sample, UnreadableData):
            raise sample.again()
        return sample

    def close(self) -> None:
        """Read nothing more."""
        with self._lock:
            pool, self._pool, self._is_closed = self._pool, None, True
            self._blocks.clear()
            self._bytes = 0
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _find(self, first: int, count: int) -> _Block:
        with self._lock:
            block = self._blocks.get((first, count))
            if block is None:
                if self._is_closed:
                    raise ValueError("the reader is closed")
                if self._pool is None:
                    self._pool = futures.ThreadPoolExecutor(REQUESTS, thread_name_prefix="read-block")
                block = _Block(self._pool.submit(self._read, first, count), count)
                self._blocks[first, count] = block
                while len(self._blocks) > self._most:
                    self._forget(next(iter(self._blocks)))
            return block

    def _read(self, first: int, count: int) -> Sequence[Read]:
        samples = read_block(self._source, first, count)
        with self._lock:
            if block := self._blocks.get((first, count)):  # else it was pushed out meanwhile
                self._bytes -= block.size
                block.size = sum(map(_num_bytes, samples))
                self._bytes += block.size
                self._keep_to_bytes(block)
        return samples

    def _keep_to_bytes(self, latest: _Block) -> None:
        """Forget the oldest of the blocks that lie ready; the lock is held."""
        if self._bytes <= self._most_bytes:
            return
        if not self._is_told:
            self._is_told = True
            _log.warning(
                "the pictures that are read ahead take more than %d MiB in one process: some are read twice; a smaller "
                "global_batch_size, more data.num_workers, or smaller pictures spare the store",
                self._most_bytes >> 20,
            )
        for key in [key for key, block in self._blocks.items() if block.size and block is not latest]:
            if self._bytes <= self._most_bytes:
                return
            self._forget(key)

    def _forget(self, key: tuple[int, int]) -> None:
        """Let go of a block; the lock is held."""
        block = self._blocks.pop(key)
        self._bytes -= block.size
        block.samples.cancel()


def _num_bytes(sample: Read) -> int:
    if not isinstance(sample, Sample):
        return 0
    return sample.image.nbytes if isinstance(sample.image, np.ndarray) else len(sample.image)
