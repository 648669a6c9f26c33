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
_BLOCKS, _TAIL, _WINDOW, _REST = range(4)  # what a key is for


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

    def num_batches(self, batch_size: int, *, start: int = 0) -> int:
        """Return the number of whole batches in an epoch, after `start` of its samples."""
        return max(0, self.size - start) // batch_size

    def batch(self, epoch: int, number: int, batch_size: int, *, start: int = 0) -> np.ndarray:
        """Return the samples of a batch: int64 [batch_size], lane after lane.

        Batches of another size may go on in the middle of an epoch.

        Args:
            epoch: number of the epoch, from 0.
            number: of the batch in the epoch, from 0, after `start`.
            batch_size: samples of a batch, a multiple of `lanes`.
            start: samples of the epoch that were used before, by batches of any size; a multiple of `lanes`.

        Raises:
            IndexError: the epoch has no such batch.
            ValueError: the batch or the start is no multiple of the lanes.
        """
        if not 0 <= number < self.num_batches(batch_size, start=start):
            raise IndexError(f"batch {number} of {self.num_batches(batch_size, start=start)}")
        if batch_size % self.lanes or start % self.lanes:
            raise ValueError(f"batches of {batch_size} from {start} on do not divide by {self.lanes} lanes")
        share, begin = batch_size // self.lanes, start // self.lanes
        full = max(0, self.lane_size - begin) // share  # batches that all lanes can fill
        if number < full:
            positions = begin + number * share + np.arange(share, dtype=np.int64)
            return np.concatenate([self.in_lane(epoch, lane, positions) for lane in range(self.lanes)])
        positions = (number - full) * batch_size + np.arange(batch_size, dtype=np.int64)
        return self._in_rest(epoch, begin + full * share, positions)

    @property
    def lane_size(self) -> int:
        """Number of samples of a lane; of a single one also the tail, the samples after the last whole block."""
        return self.size if self.lanes == 1 else self.size // self.block // self.lanes * self.block

    def in_lane(self, epoch: int, lane: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of a lane, from 0 to `lane_size` - 1: int64 [k]."""
        if self.block == 1:
            return self._block(epoch, lane + self.lanes * positions)
        num_blocks, tail = divmod(self.size, self.block)
        shuffled = np.empty_like(positions)
        for window, chosen in _groups(positions // (self.window * self.block)):
            first = window * self.window * self.block
            length = min(self.window * self.block, self.lane_size - first)
            key = derive_key(self.seed, _WINDOW, epoch, lane, window)
            shuffled[chosen] = first + permute(positions[chosen] - first, length, key)
        if self.lanes > 1 or not tail:
            rank, offset = np.divmod(shuffled, self.block)
            return self._block(epoch, lane + self.lanes * rank) * self.block + offset
        before = derive_key(self.seed, _TAIL, epoch) % (num_blocks + 1) * self.block  # the tail stands there
        in_tail = (shuffled >= before) & (shuffled < before + tail)
        rank, offset = np.divmod(np.where(shuffled < before, shuffled, shuffled - tail), self.block)
        whole = self._block(epoch, np.where(in_tail, 0, rank)) if num_blocks else rank
        return np.where(in_tail, num_blocks * self.block + shuffled - before, whole * self.block + offset)

    def _in_rest(self, epoch: int, used: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of what the lanes leave, when so many of each are used."""
        left = self.lane_size - used
        num_blocks, tail = divmod(self.size, self.block)
        num_spare = num_blocks % self.lanes if self.lanes > 1 else 0
        length = self.size - self.lanes * used
        place = permute(positions, length, derive_key(self.seed, _REST, epoch))
        found = np.empty_like(place)
        in_lanes = place < self.lanes * left
        lanes = place // left if left else np.zeros_like(place)
        for lane in range(self.lanes if left else 0):
            chosen = in_lanes & (lanes == lane)
            found[chosen] = self.in_lane(epoch, lane, used + place[chosen] - lane * left)
        rank, offset = np.divmod(place - self.lanes * left, self.block)
        spare = ~in_lanes & (rank < num_spare)
        found[spare] = self._block(epoch, num_blocks - num_spare + rank[spare]) * self.block + offset[spare]
        last = ~in_lanes & ~spare
        found[last] = num_blocks * self.block + (place[last] - self.lanes * left - num_spare * self.block)
        assert tail or not last.any()
        return found

    def _block(self, epoch: int, ranks: np.ndarray) -> np.ndarray:
        """Return the blocks at ranks of the permutation of an epoch."""
        return permute(ranks, self.size // self.block, derive_key(self.seed, _BLOCKS, epoch))


def blocks_of(samples: np.ndarray, size: int, block: int, shift: int = 0) -> np.ndarray:
    """Return the block in which each sample lies: int64 [k, 2], its first sample and its length.

    Args:
        samples: int64 [k], from 0 to size - 1.
        size: number of all samples; a block that would go beyond is cut there.
        block: length of a block.
        shift: sample with which the first block begins; the last one goes on at sample 0, as a block of its own.
    """
    place = (samples - shift) % size
    start = place // block * block + shift
    end = np.minimum(start + block, size + shift)
    goes_on = place + shift >= size  # at sample 0
    first = np.where(goes_on, np.maximum(start - size, 0), start)
    return np.stack([first, np.where(goes_on, end - size, np.minimum(end, size)) - first], axis=-1)


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


@functools.lru_cache(256)
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
