"""Files of the kept samples of a source: a bitmap, and counts of what is set in it.

A file is 56 fixed bytes (magic, format, lengths, digests of header and body), a header in JSON, the number of kept
samples before each block of 512 (int64), and a bit a sample, the first one the highest of its byte: 14 MB for 100
million samples.

Reading order: `ShardBits`, `KeptHeader`, `pack_kept`, `read_kept_header`, `split_kept`, `check_kept`.
"""

import dataclasses
import json
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

_MAGIC, _FORMAT = b"clipjaxK", 1
FIXED = struct.Struct("<8sIIQ16s16s")
"""Magic, format, bytes of the header and of the body, digests of both."""

BLOCK = 512
"""Samples whose kept ones are counted in advance."""

_BLOCK_BYTES = BLOCK // 8
_MAX_HEADER_BYTES = 2**20
_MAX_SAMPLES = 2**40


class DamagedKept(ValueError):
    """A file of kept samples that was not written as it is now."""


@dataclass(frozen=True)
class ShardBits:
    """Kept samples of one shard.

    Attributes:
        count: samples of the shard.
        bits: a bit a sample, the first one the highest of its byte.
    """

    count: int
    bits: bytes

    @property
    def kept(self) -> int:
        """Number of kept samples."""
        return int(np.bitwise_count(np.frombuffer(self.bits, np.uint8)).sum())

    @classmethod
    def of_flags(cls, is_kept: np.ndarray) -> "ShardBits":
        """Return the bits of a flag per sample."""
        return cls(len(is_kept), np.packbits(is_kept.astype(np.bool_)).tobytes())


@dataclass(frozen=True)
class KeptHeader:
    """Facts that a file of kept samples tells besides the bitmap.

    Attributes:
        key: hash of everything on which the file depends; "" for what is never looked for.
        samples: number of all samples.
        kept: number of kept ones.
        dropped: number of samples that each filter dropped.
    """

    key: str
    samples: int
    kept: int
    dropped: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Number of blocks of the bitmap."""
        return -(-self.samples // BLOCK)

    @property
    def body_bytes(self) -> int:
        """Length that the body must have."""
        return 8 * (self.blocks + 1) + _BLOCK_BYTES * self.blocks


def pack_kept(shards: Sequence[ShardBits], *, key: str, dropped: Sequence[int]) -> bytes:
    """Return the file of the kept samples of a source.

    Args:
        shards: kept samples of each shard.
        key: hash of everything on which they depend.
        dropped: number of samples that each filter dropped.
    """
    samples = sum(shard.count for shard in shards)
    header = KeptHeader(key, samples, samples - sum(dropped), tuple(dropped))
    bits = np.zeros(_BLOCK_BYTES * header.blocks + 1, np.uint8)  # one more for what is shifted out of the last byte
    start = 0
    for shard in shards:
        first, shift = divmod(start, 8)
        part = np.frombuffer(shard.bits, np.uint8)
        bits[first : first + len(part)] |= part >> shift
        if shift:
            bits[first + 1 : first + 1 + len(part)] |= part << (8 - shift)
        start += shard.count
    ranks = np.zeros(header.blocks + 1, np.int64)
    np.cumsum(_count_by_block(bits[:-1]), out=ranks[1:])
    assert ranks[-1] == header.kept
    body = ranks.astype("<i8").tobytes() + bits[:-1].tobytes()
    text = json.dumps(dataclasses.asdict(header)).encode()
    text += b" " * (-(FIXED.size + len(text)) % 64)  # the body's numbers lie at their places
    lengths = struct.pack("<IIQ", _FORMAT, len(text), len(body))
    digests = xxhash.xxh3_128_digest(lengths + text), xxhash.xxh3_128_digest(body)
    return FIXED.pack(_MAGIC, _FORMAT, len(text), len(body), *digests) + text + body


def _count_by_block(bits: np.ndarray) -> np.ndarray:
    """Return the number of bits that are set in each block: int64 [blocks]."""
    words = bits.view(np.uint64).reshape(-1, _BLOCK_BYTES // 8)
    return np.bitwise_count(words).sum(axis=1, dtype=np.int64)


def read_kept_header(content: bytes | mmap.mmap) -> KeptHeader:
    """Parse the beginning of a file.

    Raises:
        DamagedKept: it cannot be used.
    """
    if len(content) < FIXED.size:
        raise DamagedKept("it is cut off")
    magic, version, length, body, digest, _ = FIXED.unpack_from(content)
    if magic != _MAGIC or version != _FORMAT:
        raise DamagedKept(f"it is of another format than {_FORMAT}")
    if length > _MAX_HEADER_BYTES or FIXED.size + length + body != len(content):
        raise DamagedKept("its length is wrong")
    text = content[FIXED.size : FIXED.size + length]
    if xxhash.xxh3_128_digest(struct.pack("<IIQ", version, length, body) + text) != digest:
        raise DamagedKept("its digest is wrong")
    try:
        fields = json.loads(text)
        header = KeptHeader(**fields | {"dropped": tuple(fields["dropped"])})
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedKept(f"its header is wrong: {error}") from None
    numbers = (header.samples, header.kept, *header.dropped)
    if any(type(each) is not int or not 0 <= each < _MAX_SAMPLES for each in numbers) or type(header.key) is not str:
        raise DamagedKept("its header is wrong")
    if header.kept + sum(header.dropped) != header.samples or header.body_bytes != body:
        raise DamagedKept("its header contradicts itself")
    return header


def split_kept(content: bytes | mmap.mmap, header: KeptHeader) -> tuple[np.ndarray, np.ndarray]:
    """Return kept samples before each block, int64 [blocks + 1], and the bitmap, uint8 [blocks, 64], without a copy."""
    first = len(content) - header.body_bytes
    ranks = np.frombuffer(content, "<i8", header.blocks + 1, first)
    bits = np.frombuffer(content, np.uint8, _BLOCK_BYTES * header.blocks, first + ranks.nbytes)
    return ranks, bits.reshape(-1, _BLOCK_BYTES)


def check_kept(content: bytes | mmap.mmap, header: KeptHeader, ranks: np.ndarray, bits: np.ndarray) -> None:
    """Check the body of a file.

    Raises:
        DamagedKept: it cannot be used.
    """
    body = memoryview(content)[len(content) - header.body_bytes :]
    if xxhash.xxh3_128_digest(body) != FIXED.unpack_from(content)[5]:
        raise DamagedKept("its digest is wrong")
    is_counted = ranks[0] == 0 and np.array_equal(np.diff(ranks), _count_by_block(bits.reshape(-1)))
    extra = np.unpackbits(bits[-1])[header.samples % BLOCK :] if header.samples % BLOCK else np.zeros(0)
    if not is_counted or ranks[-1] != header.kept or extra.any():
        raise DamagedKept("its numbers contradict its bits")
