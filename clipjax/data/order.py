"""The order of training data: a pure function from seed, epoch and position to a sample; nothing is kept or drawn.

Samples are numbered 0 to n - 1 in the order of their shards. A *block* is so many consecutive samples, which storage
gives in one request. An epoch permutes all blocks, and shuffles the samples of a *window* of blocks among each other;
blocks of one sample are a full permutation. A batch is made of *lanes*, each with blocks of its own, so that processes
and their readers do not fetch each other's.

Reading order: `BlockOrder`, `permute` (a keyed permutation of any length), `derive_key` (its key).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ALL = 2**64 - 1
_MAX_TABLE = 2**16  # longer permutations are computed item by item
_ROUNDS = 8  # of the Feistel network: each half changes four times
_BLOCKS, _TAIL, _WINDOW = range(3)  # what a key is for


@dataclass(frozen=True)
class BlockOrder:
    """The order of n samples in any epoch.

    Every epoch gives each sample once, but for the last n modulo the batch size ones of its own order, which are
    others in each epoch.

    Attributes:
        size: number n of the samples.
        seed: of the run.
        block: consecutive samples that stay together until the shuffle inside a window; 1: a full permutation.
        window: blocks whose samples are shuffled among each other.
        lanes: parts of a batch that take turns in the blocks.

    Raises:
        ValueError: at construction: a number is below 1.
    """

    size: int
    seed: int
    block: int = 1
    window: int = 1024
    lanes: int = 1

    def __post_init__(self) -> None:
        for name in ("size", "block", "window", "lanes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of an order must be 1 or more")

    def num_batches(self, batch_size: int) -> int:
        """Return the number of whole batches in an epoch."""
        return self.size // batch_size

    def batch(self, epoch: int, number: int, batch_size: int, rows: range | None = None) -> np.ndarray:
        """Return the samples of a batch, lane after lane: int64 [rows].

        When the shortest lane is used up, the batches that are left take what the lanes have left, one after the other.

        Args:
            epoch: number of the epoch, from 0.
            number: of the batch in the epoch, from 0.
            batch_size: samples of a batch, a multiple of `lanes`.
            rows: of the batch, a range of step 1; None: all of them.

        Raises:
            IndexError: the epoch has no such batch.
            ValueError: the batch is no multiple of the lanes.
        """
        if not 0 <= number < self.num_batches(batch_size):
            raise IndexError(f"batch {number} of {self.num_batches(batch_size)}")
        if batch_size % self.lanes:
            raise ValueError(f"batches of {batch_size} do not divide by {self.lanes} lanes")
        rows = range(batch_size) if rows is None else rows
        share = batch_size // self.lanes
        full = self._shortest_lane // share  # batches that all lanes can fill
        if number >= full:
            positions = (number - full) * batch_size + np.arange(rows.start, rows.stop, dtype=np.int64)
            return self._in_rest(epoch, full * share, positions)
        parts = []
        for lane in range(rows.start // share, -(-rows.stop // share)):
            first = max(rows.start - lane * share, 0)
            stop = min(rows.stop - lane * share, share)
            parts.append(self.in_lane(epoch, lane, number * share + np.arange(first, stop, dtype=np.int64)))
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def lane_size(self, lane: int) -> int:
        """Return the number of samples of a lane: of its blocks, which are dealt out in turn.

        The samples after the last whole block are a shorter one, for the lane whose turn it is.
        """
        num_blocks, tail = divmod(self.size, self.block)
        return self._num_blocks(lane) * self.block + (tail if lane == num_blocks % self.lanes else 0)

    def _num_blocks(self, lane: int) -> int:
        """Return the number of whole blocks of a lane."""
        return -(-(self.size // self.block - lane) // self.lanes)

    @property
    def _shortest_lane(self) -> int:
        return min(self.lane_size(self.size // self.block % self.lanes), self.lane_size(self.lanes - 1))

    def in_lane(self, epoch: int, lane: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of a lane, from 0 to `lane_size(lane)` - 1: int64 [k]."""
        if self.block == 1:
            return self._block(epoch, lane + self.lanes * positions)
        size, num_blocks = self.lane_size(lane), self._num_blocks(lane)
        shuffled = np.empty_like(positions)
        for window, chosen in _groups(positions // (self.window * self.block)):
            first = window * self.window * self.block
            length = min(self.window * self.block, size - first)
            key = derive_key(self.seed, _WINDOW, epoch, lane, window)
            shuffled[chosen] = first + permute(positions[chosen] - first, length, key)
        tail = size - num_blocks * self.block
        # The shorter block stands there.
        before = derive_key(self.seed, _TAIL, epoch) % (num_blocks + 1) * self.block if tail else size
        in_tail = (shuffled >= before) & (shuffled < before + tail)
        rank, offset = np.divmod(np.where(shuffled < before, shuffled, shuffled - tail), self.block)
        if not num_blocks:
            return self.size - tail + shuffled
        whole = self._block(epoch, lane + self.lanes * np.where(in_tail, 0, rank))
        return np.where(in_tail, self.size - tail + shuffled - before, whole * self.block + offset)

    def _in_rest(self, epoch: int, used: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of what the lanes leave, in turn, when so many of each are used."""
        ends = np.cumsum([self.lane_size(lane) - used for lane in range(self.lanes)])
        lanes = np.searchsorted(ends, positions, side="right")
        found = np.empty_like(positions)
        for lane, chosen in _groups(lanes):
            begin = ends[lane - 1] if lane else 0
            found[chosen] = self.in_lane(epoch, lane, used + positions[chosen] - begin)
        return found

    def _block(self, epoch: int, ranks: np.ndarray) -> np.ndarray:
        """Return the blocks at ranks of the permutation of an epoch."""
        return permute(ranks, self.size // self.block, derive_key(self.seed, _BLOCKS, epoch))


def blocks_of(samples: np.ndarray, size: int, block: int) -> np.ndarray:
    """Return the block in which each sample lies: int64 [k, 2], its first sample and its length.

    Args:
        samples: int64 [k], from 0 to size - 1.
        size: number of all samples.
        block: length of a block; the last one may be shorter.
    """
    first = samples // block * block
    return np.stack([first, np.minimum(block, size - first)], axis=-1)


def permute(items: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return the images of items under a permutation of 0 to size - 1 that a key chooses.

    Short ones sort hashes; long ones are a Feistel network of eight rounds on the bits of an item, applied again until
    the image is below `size` (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        items: int64 [k], from 0 to size - 1.
        size: length of the permutation.
        key: 64 bits, as of `derive_key`.

    Returns:
        int64 [k].
    """
    if size <= _MAX_TABLE:
        return _table(size, key)[items].astype(np.int64)
    found = _feistel(items.astype(np.uint64), size, key)
    while (above := np.flatnonzero(found >= size)).size:
        found[above] = _feistel(found[above], size, key)
    return found.astype(np.int64)


def derive_key(*parts: int) -> int:
    """Return 64 bits that depend on all of the parts and on their order."""
    key = 0
    for part in parts:
        key = _mix_int((key ^ _mix_int((part + _GOLDEN) & _ALL)) + _GOLDEN & _ALL)
    return key


@functools.lru_cache(4096)
def _table(size: int, key: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        hashes = _mix(np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))
    return np.argsort(hashes, kind="stable").astype(np.uint16)


def _feistel(items: np.ndarray, size: int, key: int) -> np.ndarray:
    bits = (size - 1).bit_length()
    low = bits // 2
    low_mask, high_mask = np.uint64(2**low - 1), np.uint64(2 ** (bits - low) - 1)
    right, left = items & low_mask, items >> np.uint64(low)
    with np.errstate(over="ignore"):
        for number in range(0, _ROUNDS, 2):
            right ^= _mix(left + np.uint64(derive_key(key, number))) >> np.uint64(32) & low_mask
            left ^= _mix(right + np.uint64(derive_key(key, number + 1))) >> np.uint64(32) & high_mask
    return left << np.uint64(low) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Return a bijective hash of 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(_FIRST)
    values = (values ^ values >> np.uint64(27)) * np.uint64(_SECOND)
    return values ^ values >> np.uint64(31)


def _mix_int(value: int) -> int:
    value = (value ^ value >> 30) * _FIRST & _ALL
    value = (value ^ value >> 27) * _SECOND & _ALL
    return value ^ value >> 31


def _groups(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each value, with the places where it stands."""
    for value in np.unique(values):
        yield int(value), np.flatnonzero(values == value)
