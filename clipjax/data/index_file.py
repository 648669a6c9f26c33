"""Index files: where each sample of a tar shard begins, in 4 bytes a sample, read in place.

A file is 56 fixed bytes (magic, lengths, digests of header and body), a header in JSON, and the body. The body of a
compact index is one uint32 a sample, its first header's place in blocks of 512 bytes, and one more for the end: a
sample is read as one range, and its members are found by the headers in it. Shards whose samples lie apart have a full
table of members, with their keys. Faults are few and stored as pairs of sample and fault.

A file of others may say anything, so nothing is believed that its shard's size, its own digests and lengths contradict.

Reading order: `pack`, `IndexHeader`, `read_header`; `index_table.py` reads the body.
"""

import dataclasses
import json
import os
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from clipjax.data.digests import CONTENTS, Hasher, spread
from clipjax.data.tar_format import BLOCK
from clipjax.data.tar_index import NO_FAULT, ShardIndex, Unused
from clipjax.data.tar_names import NUM_COLUMNS
from clipjax.runtime.storage import OpenFile

FORMAT = 2
_MAGIC = b"clipjaxI"
FIXED = struct.Struct("<8sIIQ16s16s")
"""Magic, format, bytes of the header and of the body, digests of both."""

MAX_HEADER_BYTES = 2**18
"""Largest header; it names a few members of a shard."""

_MAX_COUNT = 2**32 - 1


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
    assert len(body) == header.body_bytes and len(text) <= MAX_HEADER_BYTES
    text += b" " * (-len(text) % 8)  # the body's numbers lie at their places
    lengths = struct.pack("<IIQ", FORMAT, len(text), len(body))
    digests = digest_of(lengths + text), digest_of(body)
    return FIXED.pack(_MAGIC, FORMAT, len(text), len(body), *digests) + text + body


def digest_of(content: Any) -> bytes:
    """Return the digest of a part of an index file."""
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
        while len(start) < FIXED.size + length and (more := file.read(FIXED.size + length - len(start))):
            start += more
    return parse_header(start, size)


def _header_length(start: bytes, size: int) -> int:
    if len(start) < FIXED.size:
        raise DamagedIndex("it is cut off")
    magic, version, length, body, *_ = FIXED.unpack_from(start)
    if magic != _MAGIC or version != FORMAT:
        raise DamagedIndex(f"it is of another format than {FORMAT}")
    if length > MAX_HEADER_BYTES or FIXED.size + length + body != size:
        raise DamagedIndex("its length is wrong")
    return length


def parse_header(content: Any, size: int) -> IndexHeader:
    """Parse the beginning of an index file of `size` bytes.

    Raises:
        DamagedIndex: it cannot be used.
    """
    length = _header_length(bytes(content[: FIXED.size]), size)
    text = bytes(content[FIXED.size : FIXED.size + length])
    _, version, length, body, digest, _ = FIXED.unpack_from(content)
    if digest_of(struct.pack("<IIQ", version, length, body) + text) != digest:
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
