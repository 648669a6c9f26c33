"""Digests of shards: they tell whether data is that of an earlier start, wherever it lies and however new it is.

A digest covers the keys, the sizes and some contents of a shard, so it is cheap; edits of the same size elsewhere in
the shard are found by `clipjax data verify` alone, which reads everything.

Reading order: `ShardDigest`, `Hasher`, `digest_samples` (make one), `find_order`, `find_differences` (compare).
"""

import collections
import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import xxhash

from clipjax.data.sample import BadSample, Source
from clipjax.runtime.storage import stream

CONTENTS = 16
"""Samples of a shard whose content enters its digest, spread evenly over it."""

DIGEST_THREADS = 16
"""Threads that read these samples: storage is slow to answer, and quick to send."""

_SHOWN = 5  # shards in a message


class ShardDigest(NamedTuple):
    """One shard of a source.

    Attributes:
        name: the place of the shard, for messages; it does not count.
        digest: of its contents.
        size: number of its samples; of a whole file, its bytes.
    """

    name: str
    digest: str
    size: int

    @property
    def shown(self) -> str:
        """The name as a terminal may get it."""
        return self.name if self.name.isprintable() else ascii(self.name)


class Hasher:
    """The 128 bits of XXH3 over parts, each with its length."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def add(self, *parts: bytes) -> None:
        """Add parts."""
        for part in parts:
            self._state.update(len(part).to_bytes(8, "little"))
            self._state.update(part)

    def hexdigest(self) -> str:
        """Return the digest of all parts so far."""
        return self._state.hexdigest()


def digest_samples(source: Source, name: str, start: int, count: int) -> ShardDigest:
    """Return the digest of `count` samples of a source that has no raw bytes to look at."""
    hasher = Hasher()
    hasher.add(str(count).encode())
    for index in spread(count, CONTENTS):
        try:
            sample = source[start + index]
        except BadSample as bad:
            hasher.add(bad.reason.encode())
            continue
        image = sample.image
        hasher.add(image if isinstance(image, bytes) else repr(image.shape).encode() + image.tobytes())
        hasher.add(json.dumps([*sample.captions, sample.label if sample.labels is None else sample.labels]).encode())
    return ShardDigest(name, hasher.hexdigest(), count)


def spread(size: int, most: int) -> list[int]:
    """Return at most so many positions, from the first to the last."""
    return list(range(size)) if size <= most else [round(i * (size - 1) / (most - 1)) for i in range(most)]


def from_record(record: Any) -> list[ShardDigest] | None:
    """Return the digests of a JSON record; None if there is none.

    Raises:
        ValueError: the record is damaged.
    """
    if record is None:
        return None
    try:
        found = [ShardDigest(*shard) for shard in record]
    except TypeError as error:
        raise ValueError(f"digests are damaged: {error}") from error
    if any([type(value) for value in shard] != [str, str, int] for shard in found):
        raise ValueError("digests are damaged: each must be [name, digest, size]")
    return found


def find_order(recorded: Sequence[ShardDigest], found: Sequence[ShardDigest]) -> list[int] | None:
    """Return the positions in `found` that give the shards in the recorded order; None if they are not the same."""
    places: dict[str, collections.deque[int]] = {}
    for position, shard in enumerate(found):
        places.setdefault(shard.digest, collections.deque()).append(position)
    if len(recorded) != len(found) or any(not places.get(shard.digest) for shard in recorded):
        return None
    order = [places[shard.digest].popleft() if places[shard.digest] else -1 for shard in recorded]
    return None if -1 in order else order


def find_differences(recorded: Sequence[ShardDigest], found: Sequence[ShardDigest]) -> dict[str, list[ShardDigest]]:
    """Return the shards that are `changed`, `missing` and `additional`; order and folders do not count.

    A shard is changed if one of its file name is there with another digest.
    """
    lacking, extra = _without(recorded, found), _without(found, recorded)
    by_name = {_base(shard): shard for shard in extra}
    old_names = {_base(shard) for shard in lacking}
    return {
        "changed": [by_name[_base(shard)] for shard in lacking if _base(shard) in by_name],
        "missing": [shard for shard in lacking if _base(shard) not in by_name],
        "additional": [shard for shard in extra if _base(shard) not in old_names],
    }


def describe_differences(recorded: Sequence[ShardDigest], found: Sequence[ShardDigest]) -> str:
    """Return in words which shards are not those that were recorded."""
    parts = [f"{word}: {_list(shards)}" for word, shards in find_differences(recorded, found).items() if shards]
    return "; ".join(parts) or "the same shards in another order"


def digest_files(paths: Sequence[str]) -> list[ShardDigest]:
    """Return the digests of whole files, in order."""

    def digest(path: str) -> ShardDigest:
        with stream(path) as file:
            return ShardDigest(path, hashlib.file_digest(file, xxhash.xxh3_128).hexdigest(), file.tell())

    with futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
        return list(pool.map(digest, paths))


def _without(ours: Iterable[ShardDigest], theirs: Iterable[ShardDigest]) -> list[ShardDigest]:
    """Return the shards of ours that are not among theirs, as often as they are there."""
    left = collections.Counter(shard.digest for shard in theirs)
    found = []
    for shard in ours:
        if left[shard.digest] > 0:
            left[shard.digest] -= 1
        else:
            found.append(shard)
    return found


def _base(shard: ShardDigest) -> str:
    return shard.name.rpartition("/")[2]


def _list(shards: Sequence[ShardDigest]) -> str:
    shown = ", ".join(f"{shard.shown} ({shard.size} samples)" for shard in shards[:_SHOWN])
    return shown + (f" and {len(shards) - _SHOWN} more" if len(shards) > _SHOWN else "")
