"""Near-duplicates inside a source, and samples of evaluation sets among those of the source.

Reading order: `find_duplicates`, `Duplicates`, `_Search`. Axes: n samples of the source, u different hashes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from clipjax.data.near_pairs import find_groups, join_groups, near_pairs
from clipjax.data.picture_rows import USABLE, PictureHashes

MAX_DISTANCE = 12
"""Largest distance: unrelated pictures differ in about 32 bits, and in 12 or fewer by chance too often."""

DEFAULT_DISTANCE = 6

_EXAMPLES = 24  # of each distance


class Example(NamedTuple):
    """A pair to look at.

    Attributes:
        against: number of the evaluation set that `other` is of, -1 for the source itself.
        distance: bits that differ.
        sample: number in the source.
        other: number in the source or the evaluation set.
    """

    against: int
    distance: int
    sample: int
    other: int


@dataclass
class Duplicates:
    """Pairs within the distance, and the samples to drop.

    Attributes:
        pairs: number of pairs inside the source.
        groups: number of groups of two or more; a group holds whatever a chain of pairs joins.
        repeated: numbers of all samples of groups but the first of each.
        leaked: for each evaluation set the numbers of the source's samples that are near one of its samples.
        examples: pairs of every distance.
    """

    pairs: int = 0
    groups: int = 0
    repeated: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    leaked: list[np.ndarray] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def dropped(self) -> np.ndarray:
        """Return the numbers of the samples to drop, in order."""
        return np.unique(np.concatenate([self.repeated, *self.leaked]))


def find_duplicates(hashes: PictureHashes, against: Sequence[PictureHashes], distance: int) -> Duplicates:
    """Find near-duplicates; a sample without a hash is none.

    Args:
        hashes: of the source.
        against: of evaluation sets.
        distance: most bits that differ in a pair.
    """
    search = _Search(hashes, against)
    search.add_equal()
    for first, second, apart in near_pairs(search.unique, distance):
        search.add_near(first, second, apart)
    return search.finish()


class _Search:
    """The state of a search: equal hashes are one, so that n of them cost n and not n^2 / 2."""

    def __init__(self, hashes: PictureHashes, against: Sequence[PictureHashes]):
        sets = [hashes, *against]
        rows = [np.flatnonzero(each.reasons == USABLE) for each in sets]
        values = [each.values[usable] for each, usable in zip(sets, rows, strict=True)]
        self.unique, numbers = np.unique(np.concatenate(values), return_inverse=True)
        cuts = np.cumsum([len(each) for each in values])[:-1]
        self._rows, self._numbers = rows, np.split(numbers.reshape(-1), cuts)
        size = len(self.unique)
        self._counts = np.array([np.bincount(each, minlength=size) for each in self._numbers])  # [sets, u]
        self._labels = np.arange(size)
        self._leaked = np.zeros((len(against), size), bool)
        # The first sample of each hash in each set; of those that the set does not have, any number.
        self._firsts = np.zeros((len(sets), size), np.int64)
        for number, each in enumerate(self._numbers):
            self._firsts[number, each[::-1]] = rows[number][::-1]
        self._found = Duplicates()
        self._shown: dict[tuple[int, int], int] = {}

    def add_equal(self) -> None:
        """Take the pairs of equal hashes."""
        counts = self._counts[0]
        self._found.pairs += int((counts * (counts - 1) // 2).sum())
        seconds = np.full(len(self.unique), -1)
        order = np.argsort(self._numbers[0], kind="stable")
        sorted_numbers, sorted_rows = self._numbers[0][order], self._rows[0][order]
        is_second = (sorted_numbers[1:] == sorted_numbers[:-1]) & (
            self._firsts[0][sorted_numbers[1:]] == sorted_rows[:-1]
        )
        seconds[sorted_numbers[1:][is_second]] = sorted_rows[1:][is_second]
        repeated = np.flatnonzero(counts > 1)
        self._show(-1, self._firsts[0][repeated], seconds[repeated], np.zeros(len(repeated), np.int64))
        for number in range(len(self._leaked)):
            both = (counts > 0) & (self._counts[number + 1] > 0)
            self._leaked[number] |= both
            firsts = self._firsts[:, np.flatnonzero(both)]
            self._show(number, firsts[0], firsts[number + 1], np.zeros(firsts.shape[1], np.int64))

    def add_near(self, first: np.ndarray, second: np.ndarray, apart: np.ndarray) -> None:
        """Take pairs of different hashes."""
        counts = self._counts[0]
        inside = (counts[first] > 0) & (counts[second] > 0)
        one, other = first[inside], second[inside]
        self._found.pairs += int((counts[one] * counts[other]).sum())
        join_groups(self._labels, one, other)
        firsts = np.sort([self._firsts[0][one], self._firsts[0][other]], axis=0)
        self._show(-1, firsts[0], firsts[1], apart[inside])
        for number in range(len(self._leaked)):
            for ours, theirs in ((first, second), (second, first)):
                leaks = (counts[ours] > 0) & (self._counts[number + 1][theirs] > 0)
                self._leaked[number][ours[leaks]] = True
                self._show(number, self._firsts[0][ours[leaks]], self._firsts[number + 1][theirs[leaks]], apart[leaks])

    def _show(self, against: int, samples: np.ndarray, others: np.ndarray, apart: np.ndarray) -> None:
        for distance in np.unique(apart).tolist():
            room = _EXAMPLES - self._shown.get((against, distance), 0)
            places = np.flatnonzero(apart == distance)[: max(room, 0)]
            self._shown[against, distance] = _EXAMPLES - room + len(places)
            self._found.examples += [
                Example(against, distance, int(samples[place]), int(others[place])) for place in places
            ]

    def finish(self) -> Duplicates:
        """Return all that was found."""
        found, groups, rows = self._found, find_groups(self._labels, self._numbers[0]), self._rows[0]
        # Rows are in the source's order, so the first of each group is the one that stays.
        _, places, sizes = np.unique(groups, return_index=True, return_counts=True)
        stays = np.zeros(len(rows), bool)
        stays[places] = True
        found.groups, found.repeated = int((sizes > 1).sum()), rows[~stays]
        found.leaked = [rows[leaked[self._numbers[0]]] for leaked in self._leaked]
        return found
