"""Kept samples of a source: a bitmap with rank and select, in one file that all processes of a machine map.

The name of a file tells everything on which it depends, so that it is replaced only where it is damaged, and never
changed while it is mapped. Who opens it first checks all of it; worker processes get its path and its digests.

Reading order: `KeptSamples`, `find_kept`, `make_kept`; `kept_format.py` tells what lies in a file.
"""

import contextlib
import logging
import mmap
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from clipjax.data.index_store import locked, make_folder
from clipjax.data.kept_format import BLOCK, FIXED, DamagedKept, ShardBits, check_kept, read_kept_header, split_kept
from clipjax.data.sample import ChangedData
from clipjax.runtime.terminal import printable

_log = logging.getLogger(__name__)


class KeptSamples:
    """Numbers of kept samples among all, by rank and select: each takes a logarithmic number of steps.

    Another process gets the path of the file and maps it when it first needs it; without a file it gets the content.

    Args:
        content: of a whole file, or its mapping.
        place: of the file; None: there is none.

    Raises:
        DamagedKept: it cannot be used.

    Attributes:
        header: what the file tells.

    Cost: a bit a sample, and 8 bytes for each 512, once a machine.
    """

    def __init__(self, content: bytes | mmap.mmap, place: pathlib.Path | None = None):
        self.header = read_kept_header(content)
        self._content, self._place, self._size = content, place, len(content)
        self._fixed = bytes(content[: FIXED.size])
        self._arrays: tuple[np.ndarray, np.ndarray] | None = split_kept(content, self.header)
        check_kept(content, self.header, *self._arrays)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_arrays": None}
        if self._place is None:
            return state | {"_content": bytes(self._whole())}
        if not self._is_there():
            try:  # somebody has emptied the folder
                _publish(self._place, self._whole(), self.header.key)
            except OSError:
                return state | {"_place": None, "_content": bytes(self._whole())}
        return state | {"_content": None}

    def _whole(self) -> bytes | mmap.mmap:
        self._views()
        assert self._content is not None
        return self._content

    def _is_there(self) -> bool:
        assert self._place is not None
        try:
            with self._place.open("rb", buffering=0) as file:
                return file.read(FIXED.size) == self._fixed and os.fstat(file.fileno()).st_size == self._size
        except OSError:
            return False

    def _views(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of kept samples before each block, and the bitmap by blocks."""
        if self._arrays is None:
            if self._content is None:
                self._content = self._map()
            self._arrays = split_kept(self._content, self.header)
        return self._arrays

    def _map(self) -> mmap.mmap:
        """Map the file that the process which opened the source has checked."""
        assert self._place is not None
        try:
            content = _map(self._place)
            problem = "" if (content[: FIXED.size], len(content)) == (self._fixed, self._size) else "it has changed"
        except (OSError, DamagedKept) as error:
            content, problem = None, str(error)
        if content is None or problem:
            raise ChangedData(
                f"the kept samples of the filters in {printable(str(self._place))} cannot be read: {problem}; look at "
                "its disk, and start the same command again, which makes them anew"
            )
        return content

    def __len__(self) -> int:
        return self.header.kept

    def select(self, first: int, count: int = 1) -> np.ndarray:
        """Return the numbers among all samples of kept ones: int64 [count].

        Args:
            first: number of the first one among the kept.
            count: how many.

        Raises:
            IndexError: there are not so many.
            ChangedData: the file is not there any more.
        """
        if not (first >= 0 and count >= 0 and first + count <= len(self)):
            raise IndexError(f"samples {first} to {first + count - 1} of {len(self)}")
        ranks, bits = self._views()
        begin = int(np.searchsorted(ranks, first, side="right")) - 1
        end = int(np.searchsorted(ranks, first + count, side="left"))
        places = np.flatnonzero(np.unpackbits(bits[begin:end]))
        skipped = first - int(ranks[begin])
        return begin * BLOCK + places[skipped : skipped + count]

    def rank(self, number: int) -> int:
        """Return how many kept samples come before a sample: of a kept one, its number among the kept.

        Args:
            number: of the sample among all, or the number of all.

        Raises:
            IndexError: there is no such sample.
            ChangedData: the file is not there any more.
        """
        if not 0 <= number <= self.header.samples:
            raise IndexError(f"sample {number} of {self.header.samples}")
        ranks, bits = self._views()
        block, place = divmod(number, BLOCK)
        before = np.unpackbits(bits[block])[:place].sum() if place else 0
        return int(ranks[block]) + int(before)

    def shard(self, first: int, count: int) -> ShardBits:
        """Return the kept ones of consecutive samples.

        Args:
            first: number of the first one among all.
            count: how many.
        """
        _, bits = self._views()
        start, shift = divmod(first, 8)
        size = -(-count // 8)
        part = np.zeros(size + 1, np.uint8)
        found = bits.reshape(-1)[start : start + size + 1]
        part[: len(found)] = found
        aligned = part[:-1] << shift | part[1:] >> (8 - shift) if shift else part[:-1]
        if count % 8:
            aligned[-1] &= 0xFF << (8 - count % 8) & 0xFF
        return ShardBits(count, aligned.tobytes())

    def sibling(self, key: str) -> pathlib.Path | None:
        """Return the place of another file in the same folder; None without a file."""
        return None if self._place is None else kept_place(self._place.parent, key)


def kept_place(folder: pathlib.Path, key: str) -> pathlib.Path:
    """Return the path of the file with a key."""
    return folder / f"{key}.bitmap"


def find_kept(place: pathlib.Path | None, key: str) -> KeptSamples | None:
    """Return the kept samples of a file; None where it is not there, or cannot be used.

    Args:
        place: of the file; None: there is none.
        key: hash of everything on which it must depend.
    """
    if place is None:
        return None
    try:
        return _open(place, key)
    except FileNotFoundError:
        return None
    except (OSError, DamagedKept) as error:
        _log.warning("the kept samples in %s are made anew: %s", printable(str(place)), printable(str(error)))
        return None


def make_kept(place: pathlib.Path | None, key: str, make: Callable[[], bytes]) -> KeptSamples:
    """Return the kept samples of a file, which is written unless another process does so or has just done so.

    Where nothing can be written, the content is held in memory, here and in each process that gets the samples.

    Args:
        place: of the file; None: the content is not to be kept.
        key: hash of everything on which it depends.
        make: returns the content.
    """
    if place is None:
        return KeptSamples(make())
    with contextlib.suppress(OSError, DamagedKept):
        return _open(place, key)
    content = make()
    try:
        _publish(place, content, key)
        return _open(place, key)
    except (OSError, DamagedKept) as error:
        _log.warning(
            "the kept samples of the filters cannot be written to %s: %s; each worker process takes %.1f MB for them; "
            "make that folder writable, or name another by XDG_CACHE_HOME",
            printable(str(place.parent)),
            printable(str(error)),
            len(content) / 1e6,
        )
        return KeptSamples(content)


def _open(place: pathlib.Path, key: str) -> KeptSamples:
    """Map a file and check all of it.

    Raises:
        DamagedKept: it cannot be used.
        OSError: it cannot be read.
    """
    kept = KeptSamples(_map(place), place)
    if kept.header.key != key:
        raise DamagedKept("it is of another source")
    return kept


def _map(place: pathlib.Path) -> mmap.mmap:
    descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise DamagedKept("it is empty") from None
    finally:
        os.close(descriptor)


def _publish(place: pathlib.Path, content: bytes | mmap.mmap, key: str) -> None:
    """Write a file that is whole or absent at any time, unless another process has just done so.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(place.parent)
    with locked(f"{place}.lock", may_wait=True):
        with contextlib.suppress(OSError, DamagedKept):
            _open(place, key)
            return
        temporary = place.with_name(place.name + ".tmp")
        temporary.unlink(missing_ok=True)  # of a process that was killed
        try:
            with temporary.open("xb") as file:
                file.write(content)
            # Where locks do not work, a file that another machine has just written stays: a network file system takes
            # a file that is replaced away from those who have mapped it.
            try:
                place.hardlink_to(temporary)
            except FileExistsError:
                with contextlib.suppress(OSError, DamagedKept):
                    _open(place, key)
                    return
                temporary.replace(place)
            except OSError:  # this file system has no links
                temporary.replace(place)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
