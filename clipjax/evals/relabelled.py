"""Samples whose labels are numbered anew, for a list that holds a part of the data's classes."""

import dataclasses
from collections.abc import Sequence

from clipjax.data.digests import ShardDigest
from clipjax.data.sample import Sample, Source


class RelabelledSource:
    """A source with other numbers for its labels; a label that has none is -1.

    Args:
        source: the samples.
        numbers: by label.
    """

    def __init__(self, source: Source, numbers: Sequence[int]) -> None:
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        sample = self._source[index]
        known = 0 <= sample.label < len(self._numbers)
        return dataclasses.replace(sample, label=self._numbers[sample.label] if known else -1)

    def location(self, index: int) -> str:
        """Return the place of a sample."""
        return self._source.location(index)

    def digests(self) -> Sequence[ShardDigest]:
        """Return the digests of the data as it lies there."""
        return self._source.digests()

    def files(self) -> Sequence[str]:
        """Return the files of the data."""
        return self._source.files()
