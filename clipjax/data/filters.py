"""Sources without the samples that filters drop: those that are kept are numbered without gaps.

Reading order: `KeptSamples` (a bitmap with rank and select), `FilteredSource`; `filter_results.py` judges the samples.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.data.block_reader import Read, read_block
from clipjax.data.digests import Hasher, ShardDigest
from clipjax.data.sample import Sample, Source
from clipjax.runtime.terminal import printable

_BLOCK = 512
"""Samples whose kept ones are counted in advance."""

_BLOCK_BYTES = _BLOCK // 8
_MAX_GAP = 8  # dropped samples that are read with those around them, which is cheaper than another request


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


class KeptSamples:
    """Numbers of kept samples among all: the k-th kept one is found in a logarithmic number of steps.

    Args:
        shards: kept samples of each shard.

    Cost: a bit a sample, and 16 bytes for each 512 of a shard.
    """

    def __init__(self, shards: Sequence[ShardBits]):
        blocks = [-(-shard.count // _BLOCK) for shard in shards]
        self._bits = np.zeros((sum(blocks), _BLOCK_BYTES), np.uint8)
        self._first = np.zeros(sum(blocks), np.int64)  # sample of each block
        place = start = 0
        for shard, number in zip(shards, blocks, strict=True):
            part = self._bits[place : place + number].reshape(-1)
            part[: len(shard.bits)] = np.frombuffer(shard.bits, np.uint8)
            self._first[place : place + number] = start + _BLOCK * np.arange(number)
            place, start = place + number, start + shard.count
        self._rank = np.zeros(sum(blocks) + 1, np.int64)  # kept samples before each block
        np.cumsum(np.bitwise_count(self._bits).sum(axis=1, dtype=np.int64), out=self._rank[1:])

    def __len__(self) -> int:
        return int(self._rank[-1])

    def select(self, first: int, count: int = 1) -> np.ndarray:
        """Return the numbers among all samples of kept ones: int64 [count].

        Args:
            first: number of the first one among the kept.
            count: how many.

        Raises:
            IndexError: there are not so many.
        """
        if not (first >= 0 and count >= 0 and first + count <= len(self)):
            raise IndexError(f"samples {first} to {first + count - 1} of {len(self)}")
        begin = int(np.searchsorted(self._rank, first, side="right")) - 1
        end = int(np.searchsorted(self._rank, first + count, side="left"))
        blocks, places = np.nonzero(np.unpackbits(self._bits[begin:end], axis=1))
        skipped = first - int(self._rank[begin])
        return (self._first[begin:end][blocks] + places)[skipped : skipped + count]


class FilteredSource:
    """The kept samples of a source.

    Args:
        source: of all samples.
        shards: kept samples of each of its shards.
        dropped: numbers of samples by the condition that dropped them, for messages.

    Raises:
        ValueError: no sample is kept.
    """

    def __init__(self, source: Source, shards: Sequence[ShardBits], dropped: Mapping[str, int]):
        assert sum(shard.count for shard in shards) == len(source)
        self.source, self._shards, self._dropped = source, list(shards), dict(dropped)
        self._kept = KeptSamples(shards)
        self._digests: list[ShardDigest] | None = None
        if not len(self):
            raise ValueError(f"filters keep none of {len(source):,} samples: {self.counts()}; loosen them")

    def __getstate__(self) -> dict[str, Any]:
        # Whoever reads samples needs no shards; those are for digests, and another order.
        return self.__dict__ | {"_shards": [], "_digests": None}

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self._inner(index)]

    def _inner(self, index: int) -> int:
        return int(self._kept.select(index)[0])

    def read_block(self, first: int, count: int) -> list[Read]:
        """Read consecutive kept samples, with the dropped ones between them where those are few; see `read_block`."""
        found: list[Read] = []
        for run in _runs(self._kept.select(first, count)):
            start = int(run[0])
            samples = read_block(self.source, start, int(run[-1]) - start + 1)
            found += [samples[each - start] for each in run.tolist()]
        return found

    def counts(self) -> str:
        """Return in words how many samples are kept, and by which condition the others were dropped."""
        shown = ", ".join(f"{count:,} by {printable(name)}" for name, count in self._dropped.items())
        return f"{len(self):,} of {len(self.source):,} samples are kept, dropped: {shown or 'none'}"

    def location(self, index: int) -> str:
        """Return the place in the source of all samples."""
        return self.source.location(self._inner(index))

    def digests(self) -> list[ShardDigest]:
        """Return a digest of each shard: of its contents, and of the choice of samples in it."""
        if self._digests is None:
            self._digests = [
                _filtered_digest(digest, shard)
                for digest, shard in zip(self.source.digests(), self._shards, strict=True)
            ]
        return self._digests

    def reordered(self, order: Sequence[int]) -> "FilteredSource":
        """Return the source with its shards in another order; only for sources that can do that."""
        source: Any = self.source
        return FilteredSource(source.reordered(order), [self._shards[shard] for shard in order], self._dropped)

    def files(self) -> Sequence[str]:
        """Return the files of all samples."""
        return self.source.files()


def unfiltered(source: Source) -> Source:
    """Return the source of all samples."""
    return source.source if isinstance(source, FilteredSource) else source


def _filtered_digest(digest: ShardDigest, shard: ShardBits) -> ShardDigest:
    hasher = Hasher()
    hasher.add(digest.digest.encode(), shard.bits)
    return ShardDigest(digest.name, hasher.hexdigest(), shard.kept)


def _runs(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Yield parts of rising numbers between which gaps are large."""
    cuts = [0, *(np.flatnonzero(np.diff(numbers) > _MAX_GAP) + 1).tolist(), len(numbers)]
    yield from (numbers[start:end] for start, end in itertools.pairwise(cuts) if end > start)
