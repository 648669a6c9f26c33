"""Several sources in one stream of training: how many pairs each gives up to any point, and which.

Every source has epochs of its own, and gives each of its samples once in one of them. Which source a place of a batch
is for depends on the weights, the seed and the number of the batch alone.

Reading order: `Proportions`, `MixtureOrder`, `MixedSource`.
"""

import bisect
import functools
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from clipjax.data.block_reader import Read, read_block
from clipjax.data.digests import ShardDigest
from clipjax.data.order import BlockOrder, blocks_of, derive_key, permute
from clipjax.data.sample import Sample, Source

_SCALE = 2**40  # weights are counted in parts of it
_PART, _SLOTS, _PHASE = 32, 33, 34  # what a key is for, beside those of an order
_PHASES = 2**20
_MAX_COUNTED = 4096


@dataclass(frozen=True)
class Proportions:
    """Whole numbers of pairs in proportion to weights: the method of Webster, which takes no pair back.

    The j-th pair of a source with share w is due at (j + 1/2) / w; those that are due first come first. So the count
    of a source after g pairs is never further from w g than 1/2 + w K / 2, with K sources, and never falls.

    Attributes:
        shares: whole numbers from 1, of any sum.
    """

    shares: tuple[int, ...]

    @classmethod
    def of_weights(cls, weights: Sequence[float]) -> "Proportions":
        """Return the proportions of weights above 0; shares below a million millionth are raised to that."""
        total = sum(map(Fraction, weights))
        return cls(tuple(max(1, round(Fraction(weight) / total * _SCALE)) for weight in weights))

    def counts(self, pairs: int) -> tuple[int, ...]:
        """Return how many of the first pairs each source gives: they add up to `pairs`."""
        return _counts(self.shares, pairs)


@functools.lru_cache(_MAX_COUNTED)
def _counts(shares: tuple[int, ...], pairs: int) -> tuple[int, ...]:
    number, total = len(shares), sum(shares)
    # From counts that are certainly reached, the rest goes to whoever is due.
    counts = [max(0, (2 * pairs - number) * share // (2 * total) - 1) for share in shares]
    # The next pair of a source is due at (2 c + 1) / share: the smallest first, of equal ones the first source.
    due = [(Fraction(2 * count + 1, share), k) for k, (count, share) in enumerate(zip(counts, shares, strict=True))]
    heapq.heapify(due)
    for _ in range(pairs - sum(counts)):
        time, k = due[0]
        counts[k] += 1
        heapq.heapreplace(due, (time + Fraction(2, shares[k]), k))
    return tuple(counts)


class MixtureOrder:
    """The order of several sources: the samples of each global batch, numbered through all of them.

    Args:
        orders: of the sources, with the same number of lanes.
        weights: of the sources.
        seed: of the run.
        batch_size: global, a multiple of the lanes.

    Raises:
        ValueError: a source has too few samples for the lanes.
    """

    def __init__(self, orders: Sequence[BlockOrder], weights: Sequence[float], seed: int, batch_size: int):
        self._orders, self._proportions, self._seed = orders, Proportions.of_weights(weights), seed
        self._first = list(itertools.accumulate((order.size for order in orders), initial=0))
        self._lanes, self._batch_size = orders[0].lanes, batch_size
        self._share = batch_size // self._lanes
        # Lanes begin at other places of the proportions, so that they do not all draw from a rare source at once.
        self._phases = [derive_key(seed, _PHASE, lane) % _PHASES if lane else 0 for lane in range(self._lanes)]
        for number, order in enumerate(orders):
            if any(not order.lane_size(lane) for lane in range(self._lanes)):
                raise ValueError(
                    f"source {number + 1} of data.mixture, sorted by name, has {order.size} samples, too few for the "
                    f"{self._lanes} lanes of the order that the run was begun with"
                )

    def placed(self, number: int, rows: range | None = None) -> np.ndarray:
        """Return samples of a global batch, and first sample and length of their blocks: int64 [rows, 3]."""
        rows = range(self._batch_size) if rows is None else rows
        lanes = range(rows.start // self._share, -(-rows.stop // self._share))
        parts = [self._lane(lane, number) for lane in lanes]
        if not parts:
            return np.empty((0, 3), np.int64)
        begin = lanes.start * self._share
        return np.concatenate(parts)[rows.start - begin : rows.stop - begin]

    def counts(self, number: int) -> list[int]:
        """Return how many samples each source has given before a global batch."""
        parts = [self._counts(lane, number) for lane in range(self._lanes)]
        return [sum(counts) for counts in zip(*parts, strict=True)]

    def _counts(self, lane: int, number: int) -> list[int]:
        start = self._proportions.counts(self._phases[lane])
        now = self._proportions.counts(self._phases[lane] + number * self._share)
        return [after - before for before, after in zip(start, now, strict=True)]

    def _lane(self, lane: int, number: int) -> np.ndarray:
        parts = []
        spans = zip(self._counts(lane, number), self._counts(lane, number + 1), strict=True)
        for order, first, (begin, end) in zip(self._orders, self._first, spans, strict=False):
            epochs, places = np.divmod(np.arange(begin, end, dtype=np.int64), order.lane_size(lane))
            for epoch in np.unique(epochs).tolist():
                found = order.in_lane(epoch, lane, places[epochs == epoch])
                blocks = blocks_of(found, order.size, order.block)
                parts.append(np.column_stack([first + found, first + blocks[:, 0], blocks[:, 1]]))
        placed = np.concatenate(parts)
        return placed[permute(np.arange(len(placed)), len(placed), derive_key(self._seed, _SLOTS, number, lane))]


def part_seed(seed: int, part: int) -> int:
    """Return the seed of the order of a source in a mixture: two sources of one size have other orders."""
    return derive_key(seed, _PART, part)


def sizes_of(source: Source) -> tuple[int, ...]:
    """Return the numbers of samples of the sources in a source, which may be a mixture."""
    return source.sizes if isinstance(source, MixedSource) else (len(source),)


class MixedSource:
    """Several sources as one, their samples numbered one source after the other.

    Args:
        parts: sources by name.

    Attributes:
        names: of the sources.
        parts: the sources.
        sizes: numbers of their samples.
        first: number of the first sample of each, and of all.
    """

    def __init__(self, parts: Mapping[str, Source]):
        self.names, self.parts = tuple(parts), tuple(parts.values())
        self.sizes = tuple(len(part) for part in self.parts)
        self.first = list(itertools.accumulate(self.sizes, initial=0))

    def find(self, index: int) -> tuple[int, int]:
        """Return the number of the source of a sample, and the sample's number in it.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = bisect.bisect_right(self.first, index) - 1
        return part, index - self.first[part]

    def __len__(self) -> int:
        return self.first[-1]

    def __getitem__(self, index: int) -> Sample:
        part, number = self.find(index)
        return self.parts[part][number]

    def read_block(self, first: int, count: int) -> Sequence[Read]:
        """Read consecutive samples of one source; the error of one stands in its place."""
        part, number = self.find(first)
        return read_block(self.parts[part], number, count)

    def location(self, index: int) -> str:
        """Return the source and the place in it."""
        part, number = self.find(index)
        return f"{self.names[part]}: {self.parts[part].location(number)}"

    def digests(self) -> list[ShardDigest]:
        """Return the digests of all sources, one after the other."""
        return [digest for part in self.parts for digest in part.digests()]

    def files(self) -> list[str]:
        """Return the files of all sources."""
        return [file for part in self.parts for file in part.files()]
