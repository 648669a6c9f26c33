"""Samples of an object store, read ahead in blocks: one request for all samples that the order keeps together.

Reading order: `BlockReader`, `read_block`.
"""

import collections
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np

from clipjax.data.sample import BadSample, Sample, Source

REQUESTS = 16
"""Requests at a time of each process that reads."""


def read_block(source: Source, first: int, count: int) -> Sequence[Sample | BadSample]:
    """Return consecutive samples, with the error in the place of each that cannot be used.

    Sources whose samples lie together have a method of this name, which reads them at once.
    """
    read = getattr(source, "read_block", None)
    if read is not None:
        return read(first, count)
    found: list[Sample | BadSample] = []
    for index in range(first, first + count):
        try:
            found.append(source[index])
        except BadSample as bad:
            found.append(bad)
    return found


class _Block:
    """A block that is being read, or lies ready."""

    def __init__(self, samples: "futures.Future[Sequence[Sample | BadSample]]", count: int):
        self.samples, self.left = samples, count


class BlockReader:
    """Blocks of a source, each read once and kept until all of its samples have been taken.

    Args:
        source: of the samples; it is read by several threads.
        most: blocks that are kept at a time; the oldest go first, and are read again if they are needed.
    """

    def __init__(self, source: Source, most: int):
        self._source, self._most = source, most
        self._blocks: collections.OrderedDict[tuple[int, int], _Block] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._pool: futures.ThreadPoolExecutor | None = None
        self._is_closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "_most": self._most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_source"], state["_most"])

    def announce(self, blocks: np.ndarray) -> None:
        """Begin to read blocks: int64 [k, 2], the first sample and the number of samples of each."""
        for first, count in np.unique(blocks[blocks[:, 1] > 1], axis=0).tolist():
            self._find(first, count)

    def take(self, index: int, first: int, count: int) -> Sample:
        """Return a sample of a block.

        Raises:
            BadSample: it cannot be used.
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
                del self._blocks[first, count]
        if isinstance(sample, BadSample):
            raise BadSample(sample.reason)
        return sample

    def close(self) -> None:
        """Read nothing more."""
        with self._lock:
            pool, self._pool, self._is_closed = self._pool, None, True
            self._blocks.clear()
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
                block = _Block(self._pool.submit(read_block, self._source, first, count), count)
                self._blocks[first, count] = block
                while len(self._blocks) > self._most:
                    self._blocks.popitem(last=False)[1].samples.cancel()
            return block
