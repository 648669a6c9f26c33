"""The body of an index file: checked as a whole once in a process, then read number by number.

Reading order: `open_table`, `IndexTable`, `_check`.
"""

import dataclasses
import errno
import os
import struct
from typing import NamedTuple

import numpy as np

from clipjax.data.index_file import FIXED, MAX_HEADER_BYTES, DamagedIndex, IndexHeader, digest_of, parse_header
from clipjax.data.sample import REASONS
from clipjax.data.tar_format import BLOCK
from clipjax.data.tar_index import NO_FAULT
from clipjax.data.tar_names import NUM_COLUMNS

_PAIR, _OFFSETS, _SIZES, _END = map(struct.Struct, ("<II", f"<{NUM_COLUMNS}q", f"<{NUM_COLUMNS}I", "<Q"))


class Checked(NamedTuple):
    """An index file that has been checked.

    Attributes:
        fixed: its first bytes, with the digests of all others.
        size: its bytes.
        header: what it tells, but not of unused members and damage.
    """

    fixed: bytes
    size: int
    header: IndexHeader


def _check(content: bytes) -> Checked:
    """Check a whole index file.

    Raises:
        DamagedIndex: it cannot be used.
    """
    header = parse_header(content[: FIXED.size + MAX_HEADER_BYTES], len(content))
    place = len(content) - header.body_bytes
    if digest_of(memoryview(content)[place:]) != FIXED.unpack_from(content)[5]:
        raise DamagedIndex("its digest is wrong")
    rows = header.count * NUM_COLUMNS
    if header.is_compact:
        starts, place = _view(content, "<u4", header.count + 1, place)
        offsets = ends = sizes = starts[:0]
    else:
        offsets, place = _view(content, "<i8", rows, place)
        ends, place = _view(content, "<u8", header.count, place)
        sizes, place = _view(content, "<u4", rows, place)
        starts = sizes[:0]
    fault_rows, place = _view(content, "<u4", header.num_faults, place)
    faults, _ = _view(content, "i1", header.num_faults, place + header.key_bytes)
    if not (
        _faults_fit(header, fault_rows, faults)
        and (
            _starts_fit(header, starts) if header.is_compact else _members_fit(header, offsets, ends, sizes, fault_rows)
        )
    ):
        raise DamagedIndex("its places are not in the shard")
    # What it tells of unused members has been told, and would take memory for each shard.
    return Checked(content[: FIXED.size], len(content), dataclasses.replace(header, unused={}, damage=""))


def _view(content: bytes, dtype: str, count: int, place: int) -> tuple[np.ndarray, int]:
    """Return numbers of an index without a copy, and the place behind them."""
    array = np.frombuffer(content, dtype, count, place)
    return array, place + array.nbytes


def _faults_fit(header: IndexHeader, rows: np.ndarray, faults: np.ndarray) -> bool:
    in_order = (np.diff(rows.astype(np.int64), prepend=-1, append=header.count) > 0).all()
    return bool(in_order and ((faults >= 0) & (faults < len(REASONS))).all())


def _starts_fit(header: IndexHeader, starts: np.ndarray) -> bool:
    places = starts.astype(np.int64)
    return bool((np.diff(places) > 0).all() and places[-1] * BLOCK < header.size + BLOCK)


def _members_fit(
    header: IndexHeader, offsets: np.ndarray, ends: np.ndarray, sizes: np.ndarray, fault_rows: np.ndarray
) -> bool:
    is_read = np.ones(header.count, np.bool_)
    is_read[fault_rows] = False
    starts, lengths = (each.reshape(-1, NUM_COLUMNS)[is_read] for each in (offsets, sizes))
    inside = (starts <= header.size) & (starts + lengths <= header.size)
    places = ends.astype(np.int64)
    keys_fit = (np.diff(places, prepend=0) >= 0).all() and (places[-1] if len(places) else 0) == header.key_bytes
    return bool(keys_fit and (offsets >= -1).all() and (inside | (starts < 0)).all())


class _IndexBytes:
    """The bytes of an index file, read where they lie; the system keeps them in memory for all processes.

    A mapping would do the same, but where a file in use is cut, or deleted on another machine, it kills the process.
    """

    def __init__(self, place: str):
        self._descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._descriptor).st_size

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, end, _ = part.indices(self._size)
        data = os.pread(self._descriptor, end - start, start)
        if len(data) < end - start:
            raise OSError(errno.EIO, "the index file is cut off")
        return data


class IndexTable:
    """The places in one index file: read from it one by one, or held in memory.

    Args:
        content: of the whole file.
        checked: the file as it was when it was checked before, if it was.

    Raises:
        DamagedIndex: it cannot be used.
        OSError: it cannot be read.

    Attributes:
        header: what the file tells.
        checked: the file as it is, for the next time.
    """

    def __init__(self, content: "bytes | _IndexBytes", checked: Checked | None = None):
        self._content = content
        if checked is None or checked.fixed != content[: FIXED.size] or checked.size != len(content):
            checked = _check(content[:])
        self.checked, self.header = checked, checked.header
        header = checked.header
        self._first = len(content) - header.body_bytes
        if header.num_faults:
            end = len(content) - header.num_faults
            start = end - header.key_bytes - 4 * header.num_faults
            self._fault_rows = np.frombuffer(content[start : start + 4 * header.num_faults], "<u4")
            self._faults = content[end:]

    def fault(self, row: int) -> int:
        """Return why a sample cannot be used, an index into `REASONS`, or `NO_FAULT`."""
        if not self.header.num_faults:
            return NO_FAULT
        place = int(np.searchsorted(self._fault_rows, row))
        return self._faults[place] if place < len(self._faults) and self._fault_rows[place] == row else NO_FAULT

    def span(self, row: int) -> tuple[int, int]:
        """Return start and end of a sample; the index is compact."""
        place = self._first + 4 * row
        start, end = _PAIR.unpack(self._content[place : place + _PAIR.size])
        return start * BLOCK, end * BLOCK

    def members(self, row: int) -> tuple[list[int], list[int]]:
        """Return offsets and sizes of a sample's members by column; the index is a full table."""
        offsets = self._numbers(_OFFSETS, self._first, row)
        return offsets, self._numbers(_SIZES, self._first + self.header.count * (_OFFSETS.size + 8), row)

    def _numbers(self, form: struct.Struct, first: int, row: int) -> list[int]:
        place = first + form.size * row
        return list(form.unpack(self._content[place : place + form.size]))

    def key(self, row: int) -> str:
        """Return the key of a sample; the index is a full table."""
        ends = self._first + self.header.count * _OFFSETS.size
        start, end = ((self._numbers(_END, ends, each)[0] if each >= 0 else 0) for each in (row - 1, row))
        keys = len(self._content) - self.header.num_faults - self.header.key_bytes
        return self._content[keys + start : keys + end].decode("utf-8", "backslashreplace")


def open_table(place: str, checked: Checked | None = None) -> IndexTable:
    """Open an index file.

    Args:
        place: its path.
        checked: the file as it was when it was checked before, if it was.

    Raises:
        DamagedIndex: it cannot be used.
        OSError: it cannot be read.
    """
    return IndexTable(_IndexBytes(place), checked)
