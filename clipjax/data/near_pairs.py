"""Pairs of 64-bit hashes that differ in few bits, and groups of them: exact, without comparing all with all.

Reading order: `near_pairs`, `_Banding`, `join_groups`. Axis: n hashes.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clipjax.data.picture_hash import BITS

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Numbers of the first and second hashes (the first is smaller), and the bits in which they differ."""

_MOST_WAITING = 2**20  # pairs of a part, and of comparisons at once
_MOST_SPARE = 4  # bands that must agree
_FEW = 64  # hashes of a bucket that are compared with each other without further banding
_SORT_COST = 10.0  # of one hash, in comparisons
_OFFSET_COST = 2000.0  # of a loop, in comparisons


def near_pairs(hashes: np.ndarray, distance: int) -> Iterator[Pairs]:
    """Find every pair of hashes within a Hamming distance, each pair once, in parts of bounded size.

    The 64 bits are cut into d + k bands. Two hashes within the distance d differ in at most d of them, so at least k
    bands are equal: for each choice of k bands, those with equal ones are compared (pigeonhole). k = 1 is the usual
    banding with d + 1 bands; a larger k has smaller buckets in more choices, and is taken where that costs less.

    Args:
        hashes: uint64 [n], all different: n equal ones would be n^2 / 2 pairs, so the caller collapses them.
        distance: most bits that differ.

    Cost: buckets of hashes that agree in an unusual number of bits are banded again in the bits that are left, so that
    the work is in proportion to n and to the pairs that are found.
    """
    yield from _search(hashes, np.arange(len(hashes)), distance, depth=0)


@dataclass(frozen=True)
class _Banding:
    """A cut of some bits into bands of which `agreeing` are equal in every pair within the distance."""

    masks: tuple[int, ...]
    agreeing: int

    def choices(self) -> Iterator[tuple[int, ...]]:
        return itertools.combinations(range(len(self.masks)), self.agreeing)

    def mask(self, choice: Sequence[int]) -> int:
        return sum(self.masks[band] for band in choice)


def _choose_banding(count: int, distance: int, bits: Sequence[int]) -> _Banding | None:
    """Return the cheapest cut for hashes that are random in these bits; None if comparing all costs less."""
    best, least = None, count**2 / 2
    for agreeing in range(1, _MOST_SPARE + 1):
        bands = distance + agreeing
        if bands > len(bits):
            break
        shared = agreeing * len(bits) / bands
        cost = math.comb(bands, agreeing) * (count * _SORT_COST + count**2 / 2 / 2**shared + _OFFSET_COST)
        if cost < least:
            # Neighbouring frequencies depend on each other: each band takes bits from all over the picture.
            best, least = _Banding(tuple(sum(1 << bit for bit in bits[i::bands]) for i in range(bands)), agreeing), cost
    return best


def _search(hashes: np.ndarray, numbers: np.ndarray, distance: int, depth: int) -> Iterator[Pairs]:
    """Find the near pairs among some of the hashes; `depth` counts how often they have been put into buckets."""
    if len(numbers) < 2:
        return
    values = hashes[numbers]
    varying = int(np.bitwise_or.reduce(values) ^ np.bitwise_and.reduce(values))
    banding = _choose_banding(len(numbers), distance, [bit for bit in range(BITS) if varying >> bit & 1])
    if banding is None:
        yield from _compare_all(values, numbers, distance)
        return
    for choice in banding.choices():
        mask = banding.mask(choice)
        keys = values & np.uint64(mask)
        order = np.argsort(keys, kind="stable")
        keys, members = keys[order], numbers[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        sizes = np.diff(np.append(starts, len(keys)))
        # A bucket of nearly all hashes would be the same problem again, once for each choice.
        is_large = (sizes > _large(len(numbers), mask)) & ((depth == 0) | (2 * sizes <= len(numbers)))
        found = [_compare(hashes, members, keys, distance, skip=np.repeat(is_large, sizes))]
        found += [
            _search(hashes, members[start : start + size], distance, depth + 1)
            for start, size in zip(starts[is_large], sizes[is_large], strict=True)
        ]
        for part in itertools.chain.from_iterable(found):
            yield from _first_found(hashes, part, banding, choice)


def _large(count: int, mask: int) -> float:
    """Return the size above which a bucket is banded again: far above that of random bits."""
    return max(_FEW, 8 * count / 2.0 ** mask.bit_count())


def _compare(
    hashes: np.ndarray, members: np.ndarray, keys: np.ndarray, distance: int, *, skip: np.ndarray | None = None
) -> Iterator[Pairs]:
    """Compare the members of each bucket: rows i and i + 1 of the sorted keys, then i and i + 2, and so on."""
    values = hashes[members]
    rows = np.arange(len(members)) if skip is None else np.flatnonzero(~skip)
    waiting, count = [], 0
    for offset in range(1, len(members)):
        rows = rows[: np.searchsorted(rows, len(members) - offset)]
        rows = rows[keys[rows] == keys[rows + offset]]
        if not len(rows):
            break
        apart = np.bitwise_count(values[rows] ^ values[rows + offset])
        near = np.flatnonzero(apart <= distance)
        if len(near):
            one, other = members[rows[near]], members[rows[near] + offset]
            waiting.append((np.minimum(one, other), np.maximum(one, other), apart[near]))
            count += len(near)
            if count >= _MOST_WAITING:
                yield _join(waiting)
                waiting, count = [], 0
    if waiting:
        yield _join(waiting)


def _compare_all(values: np.ndarray, members: np.ndarray, distance: int) -> Iterator[Pairs]:
    """Compare all with all, a few rows at once."""
    rows = max(1, _MOST_WAITING // len(values))
    for start in range(0, len(values), rows):
        apart = np.bitwise_count(values[start : start + rows, None] ^ values[None, start:])
        one, other = np.nonzero(np.triu(apart <= distance, 1))
        if len(one):
            pair = members[start + one], members[start + other]
            yield np.minimum(*pair), np.maximum(*pair), apart[one, other]


def _join(parts: Sequence[Pairs]) -> Pairs:
    first, second, apart = (np.concatenate(column) for column in zip(*parts, strict=True))
    return first, second, apart


def _first_found(hashes: np.ndarray, pairs: Pairs, banding: _Banding, choice: Sequence[int]) -> Iterator[Pairs]:
    """Leave out the pairs that an earlier choice of bands finds, too: those that agree in an earlier band."""
    first, second, apart = pairs
    differing = hashes[first] ^ hashes[second]
    is_new = np.ones(len(first), bool)
    for band in set(range(choice[-1])) - set(choice):
        is_new &= differing & np.uint64(banding.masks[band]) != 0
    if is_new.any():
        yield first[is_new], second[is_new], apart[is_new]


def join_groups(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Join the groups of pairs (union-find, all pairs at once); `find_groups` tells the groups.

    Args:
        labels: int64 [n], a smaller or equal number of the same group for each; changed. It begins as 0, 1, 2, ...
        first: one of each pair.
        second: the other.
    """
    while True:
        one, other = find_groups(labels, first), find_groups(labels, second)
        apart = one != other
        if not apart.any():
            return
        first, second, one, other = first[apart], second[apart], one[apart], other[apart]
        np.minimum.at(labels, np.maximum(one, other), np.minimum(one, other))


def find_groups(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the group of each number, which is the smallest number in it; the next call finds it at once."""
    found = labels[numbers]
    while not np.array_equal(further := labels[found], found):
        found = further
    labels[numbers] = found
    return found
