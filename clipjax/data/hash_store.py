"""Perceptual hashes of a source's samples, kept in a file for each shard beside its index.

Reading order: `hash_source`, `Shard`, `PictureHashes` (a file's content), `hash_rows` (one by one).
"""

import contextlib
import json
import os
import pathlib
import struct
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
import xxhash

from clipjax.data.hash_workers import Hasher, SourceSpec
from clipjax.data.index_store import index_places, make_folder
from clipjax.data.picture_hash import HASH_FORMAT
from clipjax.data.picture_rows import USABLE, PictureHashes, hash_rows
from clipjax.data.sample import REASONS, Source
from clipjax.runtime.files import read_bounded, write_atomic
from clipjax.runtime.storage import open_file

_SUFFIX = ".hashes"
_HEADER = struct.Struct("<8sIQ")  # magic, bytes of the JSON, digest of all that follows
_MAGIC = b"CJXHASH1"
_MAX_JSON_BYTES = 2**16
_ROWS_AT_ONCE = 1000
_FEW = 2000
"""Samples that are hashed here: starting processes would take longer."""


class Shard(NamedTuple):
    """A part of a source whose hashes are kept together.

    Attributes:
        path: of the file that holds the samples; empty for what is hashed each time (tables, folders, arrays).
        first: its first sample.
        count: of its samples.
    """

    path: str
    first: int
    count: int


def shards_of(source: Source) -> list[Shard]:
    """Return the shards of a source: its files, where these hold the pictures themselves."""
    files, digests = list(source.files()), source.digests()
    is_kept = [digest.name for digest in digests] == files and sum(digest.size for digest in digests) == len(source)
    shards, first = [], 0
    for digest in digests:
        holds_pictures = is_kept and not digest.name.lower().endswith((".csv", ".tsv", ".jsonl"))
        shards.append(Shard(digest.name if holds_pictures else "", first, digest.size))
        first += digest.size
    return shards if first == len(source) else [Shard("", 0, len(source))]


def hash_source(
    spec: SourceSpec, source: Source, *, num_workers: int, progress: Callable[[int, int], None]
) -> PictureHashes:
    """Return the hashes of all samples of a source; those of each shard are kept as soon as they are complete.

    Args:
        spec: names the source to the worker processes.
        source: the same, open.
        num_workers: processes.
        progress: function that gets the samples that have been hashed, and how many had to be.

    Raises:
        UnreadableData: a shard cannot be read.
    """
    shards = shards_of(source)
    found = [_read(shard) for shard in shards]
    missing = [shard for shard, hashes in zip(shards, found, strict=True) if hashes is None]
    total = sum(shard.count for shard in missing)
    num_workers = 1 if total <= _FEW else num_workers
    made = _Progress(progress, total)
    hashers = [Hasher(spec) if num_workers > 1 else None for _ in range(num_workers)]
    try:
        for number, (shard, kept) in enumerate(zip(shards, found, strict=True)):
            if kept is None:
                found[number] = _hash_shard(source, shard, hashers, made)
                _write(shard, found[number])
    finally:
        for hasher in hashers:
            if hasher is not None:
                hasher.close()
    return PictureHashes.join([each for each in found if each is not None])


class _Progress:
    """A count of hashed samples that is told on."""

    def __init__(self, tell: Callable[[int, int], None], total: int):
        self._tell, self._total, self._done = tell, total, 0

    def add(self, count: int) -> None:
        """Count further samples."""
        self._done += count
        self._tell(self._done, self._total)


def _hash_shard(source: Source, shard: Shard, hashers: Sequence[Hasher | None], progress: _Progress) -> PictureHashes:
    """Hash the samples of a shard, by several processes at once."""
    starts = range(shard.first, shard.first + shard.count, _ROWS_AT_ONCE)
    jobs = [range(start, min(start + _ROWS_AT_ONCE, shard.first + shard.count)) for start in starts]
    parts: list[PictureHashes] = []

    def run(rows: range, hasher: Hasher | None) -> PictureHashes:
        return hash_rows(source, rows) if hasher is None else hasher.hash(source, rows)

    free = list(hashers)
    with futures.ThreadPoolExecutor(len(hashers)) as pool:

        def work(rows: range) -> PictureHashes:
            hasher = free.pop()  # as many threads as hashers: there is always one
            try:
                return run(rows, hasher)
            finally:
                free.append(hasher)

        running = [pool.submit(work, rows) for rows in jobs]
        try:
            for each in running:
                parts.append(each.result())
                progress.add(len(parts[-1].values))
        finally:
            for each in running:
                each.cancel()
    return PictureHashes.join(parts)


def hash_places(path: str) -> list[pathlib.Path]:
    """Return the paths where the hashes of a shard may lie, the best first."""
    return [pathlib.Path(place.removesuffix(".idx") + _SUFFIX) for place in index_places(path)]


def _stamp(shard: Shard) -> dict[str, object]:
    """Return what the hashes belong to: another content of the shard, or another formula, has another one."""
    file = open_file(shard.path)
    name = os.path.basename(shard.path)  # noqa: PTH119 - it may be an address
    return {"format": HASH_FORMAT, "name": name, "size": file.size, "version": str(file.version), "count": shard.count}


def _read(shard: Shard) -> PictureHashes | None:
    """Return the hashes that are kept; None if there are none, or those of another content."""
    if not shard.path:
        return None
    expected = _stamp(shard)
    for place in hash_places(shard.path):
        with contextlib.suppress(OSError, ValueError, RecursionError, struct.error):
            content = read_bounded(place, _HEADER.size + _MAX_JSON_BYTES + 9 * shard.count)
            magic, json_bytes, digest = _HEADER.unpack_from(content)
            body = content[_HEADER.size :]
            if magic != _MAGIC or xxhash.xxh3_64_intdigest(body) != digest:
                continue
            arrays = body[json_bytes:]
            if json.loads(body[:json_bytes]) == expected and len(arrays) == 9 * shard.count:
                cut = 8 * shard.count
                reasons = np.frombuffer(arrays[cut:], np.int8)
                if not len(reasons) or (reasons.min() >= USABLE and reasons.max() < len(REASONS)):
                    return PictureHashes(np.frombuffer(arrays[:cut], "<u8"), reasons)
    return None


def _write(shard: Shard, hashes: PictureHashes | None) -> None:
    """Keep the hashes of a shard where something can be written; else they are made again the next time."""
    if not shard.path or hashes is None:
        return
    stamp = json.dumps(_stamp(shard)).encode()
    body = stamp + hashes.values.astype("<u8").tobytes() + hashes.reasons.astype(np.int8).tobytes()
    content = _HEADER.pack(_MAGIC, len(stamp), xxhash.xxh3_64_intdigest(body)) + body
    for place in hash_places(shard.path):
        try:
            make_folder(place.parent)
            write_atomic(place, content)
        except OSError:
            continue
        return
