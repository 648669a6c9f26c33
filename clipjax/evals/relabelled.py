"""Samples whose labels are numbered anew, for a list that holds a part of the data's classes."""

import dataclasses
from collections.abc import Sequence

from clipjax.data.digests import ShardDigest
from clipjax.data.sample import Sample, Source
from clipjax.data.tfds import TfdsSource
from clipjax.evals.datasets.labels import numbers_by_id


class RelabelledSource:
    """A source with other numbers for its labels; a label that has none is -1, or not among several.

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
        several = sample.labels
        if several is not None:
            several = tuple(sorted({self._number(label) for label in several} - {-1}))
        return dataclasses.replace(sample, label=self._number(sample.label), labels=several)

    def _number(self, label: int) -> int:
        return self._numbers[label] if 0 <= label < len(self._numbers) else -1

    def location(self, index: int) -> str:
        """Return the place of a sample."""
        return self._source.location(index)

    def digests(self) -> Sequence[ShardDigest]:
        """Return the digests of the data as it lies there."""
        return self._source.digests()

    def files(self) -> Sequence[str]:
        """Return the files of the data."""
        return self._source.files()


def class_names_of(source: Source) -> tuple[str, ...] | None:
    """Return the data's own names of its labels, in their order; None: it has none."""
    return source.class_names() if isinstance(source, TfdsSource) else None


def number_as_listed(classes: str | None, source: Source) -> Source:
    """Return a source whose labels are those of a list, if this is a part of the data's classes; else the source.

    Args:
        classes: name of the list; None: there is none.
        source: the samples.

    Raises:
        ValueError: the data lacks a class of the list.
    """
    labels = None if classes is None else class_names_of(source)
    numbers = None if classes is None or labels is None else numbers_by_id(classes, labels)
    return source if numbers is None else RelabelledSource(source, numbers)
