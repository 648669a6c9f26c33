"""Index files: where each sample of a tar shard begins, in 4 bytes a sample, to be mapped into memory.

A file is 56 fixed bytes (magic, lengths, digests of header and body), a header in JSON, and the body. The body of a
compact index is one uint32 a sample, its first header's place in blocks of 512 bytes, and one more for the end: a
sample is read as one range, and its members are found by the headers in it. Shards whose samples lie apart have a full
table of members, with their keys. Faults are few and stored as pairs of sample and fault.

A file of others may say anything, so nothing is believed that its shard's size, its own digests and lengths contradict.

Reading order: `pack`, `IndexHeader`, `read_header`, `IndexTable`.
"""

import dataclasses
import json
import mmap
import os
import re
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from clipjax.data.digests import CONTENTS, Hasher, spread
from clipjax.data.sample import REASONS
from clipjax.data.tar_format import BLOCK
from clipjax.data.tar_index import NO_FAULT, ShardIndex, Unused
from clipjax.data.tar_names import NUM_COLUMNS
from clipjax.runtime.storage import OpenFile

FORMAT = 1
_MAGIC = b"clipjaxI"
_FIXED = struct.Struct("<8sIIQ16s16s")  # magic, format, bytes of the header, of the body, digests of both
_MAX_HEADER_BYTES = 2**18
_MAX_COUNT = 2**32 - 1
_PAIR = struct.Struct("<II")


class DamagedIndex(ValueError):
    """An index file that was not written as it is now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexHeader:
    """Facts of a shard that an index file tells besides the places.

    Attributes:
        name: base name of the shard.
        size: bytes of the shard.
        version: of the shard, see `OpenFile`.
        count: number of samples.
        is_compact: kind of the body.
        num_faults: number of samples that cannot be used.
        key_bytes: of all keys; 0 in a compact index.
        digest: of the shard, see `shard_digest`.
        digest_limit: the limit of an image file for which it was made.
        largest: bytes of the largest member in it.
        unused: members that belong to no sample, by extension.
        damage: what cut the shard short, or "".
        is_fresh: True if the shard had just been written: another content may have the same version.
    """

    name: str
    size: int
    version: str
    count: int
    is_compact: bool
    num_faults: int
    key_bytes: int
    digest: str
    digest_limit: int
    largest: int
    unused: dict[str, Unused]
    damage: str
    is_fresh: bool

    def holds_digest(self, limit: int) -> bool:
        """Return True if `digest` is that for a limit of an image file, too."""
        return limit == self.digest_limit or self.largest <= min(limit, self.digest_limit)

    @property
    def body_bytes(self) -> int:
        """Length that the body must have."""
        rows = 4 * (self.count + 1) if self.is_compact else self.count * (12 * NUM_COLUMNS + 8) + self.key_bytes
        return rows + 5 * self.num_faults


def shard_digest(index: ShardIndex, file: OpenFile, limit: int) -> tuple[str, int]:
    """Return the digest of a shard, and the bytes of the largest member whose content may be in it.

    It covers keys, kinds and sizes of members, and the contents of a few samples up to `limit` bytes each. Checkpoints
    hold it: it must stay as it is for shards that are read as before.

    Raises:
        OSError: the shard cannot be read.
    """
    keys = [key.encode() for key in index.keys]
    hasher = Hasher()
    hasher.add(b"".join(keys), np.cumsum([len(key) for key in keys], dtype=np.int64).tobytes())
    for rows in (index.offsets >= 0, index.sizes, index.faults):
        hasher.add(np.ascontiguousarray(rows).tobytes())
    largest = 0
    for row in spread(len(keys), CONTENTS):
        if index.faults[row] != NO_FAULT:
            continue
        for offset, size in zip(index.offsets[row].tolist(), index.sizes[row].tolist(), strict=True):
            if offset >= 0:
                largest = max(largest, size)
                if size <= limit:
                    hasher.add(file.read(offset, size))
    return hasher.hexdigest(), largest


def pack(index: ShardIndex, file: OpenFile, *, name: str, limit: int, is_fresh: bool = False) -> bytes:
    """Return the index file of a shard.

    Args:
        index: of the shard.
        file: the shard.
        name: its base name.
        limit: largest image file that a source reads, for the digest.
        is_fresh: the shard had just been written before it was read.

    Raises:
        OSError: the shard cannot be read.
    """
    digest, largest = shard_digest(index, file, limit)
    faulty = np.flatnonzero(index.faults != NO_FAULT)
    is_compact = index.is_compact and int(index.starts[-1]) // BLOCK <= _MAX_COUNT
    keys = [] if is_compact else [key.encode() for key in index.keys]
    header = IndexHeader(
        name=name,
        size=file.size,
        version=file.version,
        count=len(index.keys),
        is_compact=is_compact,
        num_faults=len(faulty),
        key_bytes=sum(map(len, keys)),
        digest=digest,
        digest_limit=limit,
        largest=largest,
        unused=index.unused,
        damage=index.damage,
        is_fresh=is_fresh,
    )
    if is_compact:
        parts = [(index.starts // BLOCK).astype("<u4").tobytes()]
    else:
        ends = np.cumsum([len(key) for key in keys], dtype="<u8")
        parts = [index.offsets.astype("<i8").tobytes(), ends.tobytes(), index.sizes.astype("<u4").tobytes()]
    parts += [faulty.astype("<u4").tobytes(), *keys, index.faults[faulty].tobytes()]
    body = b"".join(parts)
    text = json.dumps(dataclasses.asdict(header)).encode()
    assert len(body) == header.body_bytes and len(text) <= _MAX_HEADER_BYTES
    text += b" " * (-len(text) % 8)  # the body's numbers lie at their places
    lengths = struct.pack("<IIQ", FORMAT, len(text), len(body))
    digests = _digest(lengths + text), _digest(body)
    return _FIXED.pack(_MAGIC, FORMAT, len(text), len(body), *digests) + text + body


def _digest(content: Any) -> bytes:
    return xxhash.xxh3_128_digest(content)


def read_header(place: str) -> IndexHeader:
    """Read what an index file tells, but not its body.

    Raises:
        DamagedIndex: it cannot be used.
        OSError: it cannot be read.
    """
    with open(place, "rb", buffering=0) as file:  # noqa: PTH123
        start = file.read(4096)
        size = os.fstat(file.fileno()).st_size
        length = _header_length(start, size)
        while len(start) < _FIXED.size + length and (more := file.read(_FIXED.size + length - len(start))):
            start += more
    return parse_header(start, size)


def _header_length(start: bytes, size: int) -> int:
    if len(start) < _FIXED.size:
        raise DamagedIndex("it is cut off")
    magic, version, length, body, *_ = _FIXED.unpack_from(start)
    if magic != _MAGIC or version != FORMAT:
        raise DamagedIndex(f"it is of another format than {FORMAT}")
    if length > _MAX_HEADER_BYTES or _FIXED.size + length + body != size:
        raise DamagedIndex("its length is wrong")
    return length


def parse_header(content: Any, size: int) -> IndexHeader:
    """Parse the beginning of an index file of `size` bytes.

    Raises:
        DamagedIndex: it cannot be used.
    """
    length = _header_length(bytes(content[: _FIXED.size]), size)
    text = bytes(content[_FIXED.size : _FIXED.size + length])
    _, version, length, body, digest, _ = _FIXED.unpack_from(content)
    if _digest(struct.pack("<IIQ", version, length, body) + text) != digest:
        raise DamagedIndex("its digest is wrong")
    try:
        fields = json.loads(text)
        fields["unused"] = {name: Unused(**each) for name, each in fields["unused"].items()}
        header = IndexHeader(**fields)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedIndex(f"its header is wrong: {error}") from None
    _check_types(header)
    if header.body_bytes != body:
        raise DamagedIndex("its header contradicts its length")
    return header


def _check_types(header: IndexHeader) -> None:
    numbers = (header.size, header.count, header.num_faults, header.key_bytes, header.digest_limit, header.largest)
    unused = [value for each in header.unused.values() for value in (each.count, each.lost)]
    texts = (
        header.name,
        header.version,
        header.digest,
        header.damage,
        *(each.example for each in header.unused.values()),
    )
    if (
        any(type(number) is not int or not 0 <= number < 2**62 for number in (*numbers, *unused))
        or any(type(text) is not str for text in texts)
        or any(type(flag) is not bool for flag in (header.is_compact, header.is_fresh))
        or header.count > min(header.size // BLOCK + 1, _MAX_COUNT)  # each has a header of its own
        or header.num_faults > header.count
        or header.key_bytes > 4 * header.size  # of names with escapes
        or not re.fullmatch(r"[0-9a-f]{32}", header.digest)
    ):
        raise DamagedIndex("its header is wrong")


class Checked(NamedTuple):
    """An index file that has been checked.

    Attributes:
        fixed: its first bytes, with the digests of all others.
        header: what it tells, but not of unused members and damage.
    """

    fixed: bytes
    header: IndexHeader


class IndexTable:
    """The places in one index file: mapped into memory, or held in it.

    Args:
        content: of the whole file.
        checked: the file as it was when it was checked before, if it was.

    Raises:
        DamagedIndex: it cannot be used.

    Attributes:
        header: what the file tells.
        checked: the file as it is, for the next time.
    """

    def __init__(self, content: bytes | mmap.mmap, checked: Checked | None = None):
        self._content = content
        fixed = content[: _FIXED.size]
        is_new = checked is None or checked.fixed != fixed
        if checked is None or is_new:
            header = parse_header(content[: _FIXED.size + _MAX_HEADER_BYTES], len(content))
            # What it tells of unused members has been told, and would take memory for each shard.
            checked = Checked(fixed, dataclasses.replace(header, unused={}, damage=""))
        self.checked, self.header = checked, checked.header
        header = checked.header
        self._first = len(content) - header.body_bytes
        if is_new and _digest(memoryview(content)[self._first :]) != _FIXED.unpack_from(content)[5]:
            raise DamagedIndex("its digest is wrong")
        if is_new or header.num_faults or not header.is_compact:
            self._view_arrays()
        if is_new and not (self._faults_fit() and (self._starts_fit() if header.is_compact else self._members_fit())):
            raise DamagedIndex("its places are not in the shard")

    def _view_arrays(self) -> None:
        header, place = self.header, self._first
        if header.is_compact:
            self._starts, place = self._view("<u4", header.count + 1, place)
        else:
            self._offsets, place = self._view("<i8", header.count * NUM_COLUMNS, place)
            self._ends, place = self._view("<u8", header.count, place)
            self._sizes, place = self._view("<u4", header.count * NUM_COLUMNS, place)
        self._fault_rows, self._keys = self._view("<u4", header.num_faults, place)
        self._faults, _ = self._view("i1", header.num_faults, self._keys + header.key_bytes)

    def _view(self, dtype: str, count: int, place: int) -> tuple[np.ndarray, int]:
        """Return numbers of the body without a copy, and the place behind them."""
        array = np.frombuffer(self._content, dtype, count, place)
        return array, place + array.nbytes

    def _faults_fit(self) -> bool:
        rows = self._fault_rows.astype(np.int64)
        in_order = bool((np.diff(rows, prepend=-1, append=self.header.count) > 0).all())
        return in_order and bool(((self._faults >= 0) & (self._faults < len(REASONS))).all())

    def _starts_fit(self) -> bool:
        starts = self._starts.astype(np.int64)
        return bool((np.diff(starts) > 0).all()) and starts[-1] * BLOCK < self.header.size + BLOCK

    def _members_fit(self) -> bool:
        ends, header = self._ends.astype(np.int64), self.header
        rows = np.ones(header.count, np.bool_)
        rows[self._fault_rows] = False
        offsets, sizes = (each.reshape(-1, NUM_COLUMNS)[rows] for each in (self._offsets, self._sizes))
        inside = (offsets <= header.size) & (offsets + sizes <= header.size)
        keys_fit = bool((np.diff(ends, prepend=0) >= 0).all()) and (ends[-1] if len(ends) else 0) == header.key_bytes
        return keys_fit and bool((self._offsets >= -1).all()) and bool((inside | (offsets < 0)).all())

    def fault(self, row: int) -> int:
        """Return why a sample cannot be used, an index into `REASONS`, or `NO_FAULT`."""
        if not self.header.num_faults:
            return NO_FAULT
        place = int(np.searchsorted(self._fault_rows, row))
        found = place < len(self._fault_rows) and self._fault_rows[place] == row
        return int(self._faults[place]) if found else NO_FAULT

    def span(self, row: int) -> tuple[int, int]:
        """Return start and end of a sample; the index is compact."""
        start, end = _PAIR.unpack_from(self._content, self._first + 4 * row)
        return start * BLOCK, end * BLOCK

    def members(self, row: int) -> tuple[list[int], list[int]]:
        """Return offsets and sizes of a sample's members by column; the index is a full table."""
        span = slice(row * NUM_COLUMNS, (row + 1) * NUM_COLUMNS)
        return self._offsets[span].tolist(), self._sizes[span].tolist()

    def key(self, row: int) -> str:
        """Return the key of a sample; the index is a full table."""
        start, end = (self._keys + int(self._ends[each]) if each >= 0 else self._keys for each in (row - 1, row))
        return self._content[start:end].decode("utf-8", "backslashreplace")


def map_table(place: str, checked: Checked | None = None) -> IndexTable:
    """Map an index file.

    Args:
        place: its path.
        checked: the file as it was when it was checked before, if it was.

    Raises:
        DamagedIndex: it cannot be used.
        OSError: it cannot be read.
    """
    with open(place, "rb", buffering=0) as file:  # noqa: PTH123
        if os.fstat(file.fileno()).st_size < _FIXED.size:
            raise DamagedIndex("it is cut off")  # nothing can be mapped of an empty file
        return IndexTable(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), checked)
