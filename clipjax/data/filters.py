"""Sources without the samples that filters drop: those that are kept are numbered without gaps.

Reading order: `FilteredSource`; `kept_samples.py` numbers the samples, `filter_results.py` judges them.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clipjax.data.block_reader import Read, read_block
from clipjax.data.digests import Hasher, ShardDigest
from clipjax.data.kept_format import ShardBits, pack_kept
from clipjax.data.kept_samples import KeptSamples, make_kept
from clipjax.data.sample import Sample, Source, UnreadableData
from clipjax.runtime.terminal import printable

_MAX_GAP = 8  # dropped samples that are read with those around them, which is cheaper than another request


class FilteredSource:
    """The kept samples of a source.

    Args:
        source: of all samples.
        kept: those that are kept.
        counts: numbers of samples of its shards.
        names: of the conditions that drop samples, for messages.

    Raises:
        ValueError: no sample is kept.
    """

    def __init__(self, source: Source, kept: KeptSamples, counts: Sequence[int], names: Sequence[str]):
        assert sum(counts) == len(source) == kept.header.samples
        self.source, self._kept, self._names = source, kept, tuple(names)
        self._first = list(itertools.accumulate(counts, initial=0))
        self._digests: list[ShardDigest] | None = None
        if not len(self):
            raise ValueError(f"filters keep none of {len(source):,} samples: {self.counts()}; loosen them")

    def __getstate__(self) -> dict[str, Any]:
        # Whoever reads samples needs no shards; those are for digests, and another order.
        return self.__dict__ | {"_first": [], "_digests": None}

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
            if isinstance(last := found[-1], UnreadableData) and last.is_away:  # each further try may take minutes
                return found + [last] * (count - len(found))
        return found

    def counts(self) -> str:
        """Return in words how many samples are kept, and by which condition the others were dropped."""
        dropped = zip(self._names, self._kept.header.dropped, strict=True)
        shown = ", ".join(f"{count:,} by {printable(name)}" for name, count in dropped)
        return f"{len(self):,} of {len(self.source):,} samples are kept, dropped: {shown or 'none'}"

    def location(self, index: int) -> str:
        """Return the place in the source of all samples."""
        return self.source.location(self._inner(index))

    def digests(self) -> list[ShardDigest]:
        """Return a digest of each shard: of its contents, and of the choice of samples in it."""
        if self._digests is None:
            self._digests = [
                _filtered_digest(digest, shard)
                for digest, shard in zip(self.source.digests(), self._shards(), strict=True)
            ]
        return self._digests

    def _shards(self) -> Iterator[ShardBits]:
        return (self._kept.shard(first, end - first) for first, end in itertools.pairwise(self._first))

    def reordered(self, order: Sequence[int]) -> "FilteredSource":
        """Return the source with its shards in another order; only for sources that can do that."""
        source: Any = self.source
        shards = list(self._shards())
        shards = [shards[number] for number in order]
        key = hashlib.sha256(json.dumps([self._kept.header.key, list(order)]).encode()).hexdigest()
        kept = make_kept(
            self._kept.sibling(key), key, lambda: pack_kept(shards, key=key, dropped=self._kept.header.dropped)
        )
        return FilteredSource(source.reordered(order), kept, [shard.count for shard in shards], self._names)

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
