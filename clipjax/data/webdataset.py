"""WebDataset tar shards (img2dataset's layout) with random access: an index file a shard, one read a sample.

A sample is the members that share everything before the first dot of their name: `KEY.jpg|jpeg|png|webp`, `KEY.txt`
(caption), `KEY.json` (`caption` or `captions` if there is no txt, `label` if there is no cls), `KEY.cls` (class
number); `tar_index.py` tells the exceptions. A hard link stands for the earlier member that it names. Other members are
counted and left alone, other links and devices too; names are labels and never paths to open.
"""

import bisect
import contextlib
import copy
import errno
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import xxhash

from clipjax.data import index_store, indexes
from clipjax.data.block_reader import Read
from clipjax.data.caption_fields import to_weights
from clipjax.data.digests import DIGEST_THREADS, ShardDigest
from clipjax.data.file_errors import FileErrors
from clipjax.data.index_file import DamagedIndex, IndexHeader, shard_digest
from clipjax.data.index_table import Checked, IndexTable, open_table
from clipjax.data.metadata import Described, tar_metadata
from clipjax.data.sample import REASONS, BadSample, Sample, UnreadableData
from clipjax.data.tar_format import DamagedTar
from clipjax.data.tar_index import NO_FAULT, index_shard
from clipjax.data.tar_names import classify
from clipjax.data.tar_ranges import members_between, quick_sample, sample_in, windowed
from clipjax.data.tar_samples import Limits, assemble, keep_needed, read_all, read_members, slices
from clipjax.data.unused_members import require_samples, tell_unused
from clipjax.runtime.file_cache import FileCache
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import FileChanged, OpenFile, is_address, open_file
from clipjax.runtime.terminal import printable

_MAX_FILE_OVERHEAD_BYTES = 2**20  # of an image file beyond its pixels: profiles, thumbnails
_MAX_OPEN_SHARDS = 128
_MAX_SHOWN_KEY = 200
_WINDOW = 4 * 2**10
_MAX_BLOCK_BYTES = 256 * 2**20  # of consecutive samples that are read at once
_log = logging.getLogger(__name__)


def max_file_bytes(max_image_pixels: int) -> int:
    """Return the size of the largest image file that can hold so few pixels."""
    return 4 * max_image_pixels + _MAX_FILE_OVERHEAD_BYTES


def _make_opener(cache: FileCache | None) -> Callable[..., "_Shard"]:
    """Return a function that opens shards and keeps some of them open."""
    return functools.lru_cache(_MAX_OPEN_SHARDS)(functools.partial(_open_shard, cache, {}))


def _open_shard(
    cache: FileCache | None,
    checked: dict[str, Checked],
    path: str,
    place: str | bytes,
    *,
    stamp: int,
    limits: Limits,
    listed: Listed | None = None,
) -> "_Shard":
    """Open a shard.

    Args:
        cache: of copies of shards; None: there are none.
        checked: index files that have been checked in this process; changed.
        path: of the shard.
        place: of its index.
        stamp: of the shard when the source was opened.
        limits: of the members.
        listed: size and version of a shard in a store.

    Raises:
        OSError: it cannot be read, or is another one.
        ValueError: its index is gone, and it is no tar any more.
    """
    file = open_file(path, listed) if cache is None or not is_address(path) else cache.open(path, listed)
    if _stamp(file) != stamp:
        raise _changed(path)
    try:
        known = checked.get(place) if isinstance(place, str) else None
        table = IndexTable(place) if isinstance(place, bytes) else open_table(place, known)
        if table.checked is known:
            return _Shard(file, table, limits)
        problem = "" if _stamp(table.header) == stamp else "it is of another content of the shard"
    except (DamagedIndex, OSError) as error:
        problem = str(error)
    else:
        if isinstance(place, str) and not problem:
            checked[place] = table.checked
    if problem:
        _log.warning("the index of %s is made anew: %s", printable(path), printable(problem))
        entry = index_store.build(path, limit=limits.image)
        if entry is None or _stamp(entry.header) != stamp:
            raise _changed(path)
        table = entry.table()
    return _Shard(file, table, limits)


def _changed(path: str) -> FileChanged:
    return FileChanged(errno.ESTALE, "another program has written it anew", path)


class _Shard:
    """An open shard with its index."""

    def __init__(self, file: OpenFile, table: IndexTable, limits: Limits):
        self._file, self._table, self._limits = file, table, limits

    def read_rows(self, first: int, count: int) -> list[Sample | BadSample]:
        """Read consecutive samples at once where they lie together; see `read`."""
        start, end = self._extent(first, count)
        file: OpenFile = self._file
        if 0 < end - start <= _MAX_BLOCK_BYTES:
            file = Window(self._file, start, read_all(self._file, start, end - start))
        found: list[Sample | BadSample] = []
        for row in range(first, first + count):
            try:
                found.append(self.read(row, file))
            except BadSample as bad:
                found.append(bad)
        return found

    def _extent(self, first: int, count: int) -> tuple[int, int]:
        """Return where samples begin and end."""
        rows = [row for row in range(first, first + count) if self._table.fault(row) == NO_FAULT]
        if self._table.header.is_compact:
            spans = [self._table.span(row) for row in rows]
        else:
            members = [zip(*self._table.members(row), strict=True) for row in rows]
            spans = [(place, place + size) for each in members for place, size in each if place >= 0]
        ends = (end for _, end in spans)
        return min((start for start, _ in spans), default=0), min(max(ends, default=0), self._file.size)

    def read(self, row: int, file: OpenFile | None = None) -> Sample:
        """Read a sample.

        Args:
            row: number of the sample in the shard.
            file: gives the bytes of the shard; None: its storage.

        Raises:
            BadSample: it cannot be used.
            UnreadableData: the shard ends before it.
            DamagedTar: the shard holds something else there.
            OSError: the shard cannot be read, or is another one.
        """
        file = file or self._file
        if (fault := self._table.fault(row)) != NO_FAULT:
            raise BadSample(REASONS[fault])
        if not self._table.header.is_compact:
            offsets, sizes = self._table.members(row)
            keep_needed(offsets, sizes, self._limits)
            return assemble(self._table.key(row), read_members(file, offsets, sizes), self._limits)
        start, end = self._table.span(row)
        if end - start > self._limits.sample:  # something in it is too large
            key, offsets, sizes = sample_in(members_between(windowed(file, _WINDOW), start, end))
            keep_needed(offsets, sizes, self._limits)
            return assemble(key, read_members(file, offsets, sizes), self._limits)
        block = read_all(file, start, min(end, file.size) - start)
        found = quick_sample(block)
        if found is None:  # something in it is out of the ordinary
            found = sample_in(members_between(functools.partial(_slice, block), 0, end - start))
        key, offsets, sizes = found
        keep_needed(offsets, sizes, self._limits)
        return assemble(key, slices(block, offsets, sizes, 0), self._limits)

    def metadata(self) -> Iterator[Described]:
        """Yield key and JSON of all samples; errors as in `read`."""
        return tar_metadata(self._file, self._table)

    def key(self, row: int) -> str:
        """Return the key of a sample; errors as in `read`."""
        if not self._table.header.is_compact:
            return self._table.key(row)
        first = next(members_between(windowed(self._file, _WINDOW), *self._table.span(row)))
        return classify(first.name).key


class Window:
    """A part of a file in memory, and the file itself for what lies elsewhere."""

    def __init__(self, file: OpenFile, start: int, block: bytes):
        self._file, self._start, self._block = file, start, block
        self.size, self.version = file.size, file.version

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes from an offset on."""
        begin = offset - self._start
        if begin < 0 or begin + size > len(self._block):
            return self._file.read(offset, size)
        return self._block[begin : begin + size]


def _slice(block: bytes, offset: int, size: int) -> bytes:
    return block[offset : offset + size]


def _stamp(file: OpenFile | IndexHeader) -> int:
    """Return a number for the size and the version of a shard."""
    return xxhash.xxh3_64_intdigest(f"{file.size} {file.version}".encode("utf-8", "surrogatepass"))


class TarSource:
    """Samples of tar shards, in the order of the shards and, inside one, of each key's first member.

    A tar that is cut off, or damaged in the middle, gives the samples before that place; the one that it cuts is bad
    (`truncated_tar`). A key that has two images, or two of another kind, is bad (`duplicate_key`).

    Args:
        paths: uncompressed tar files.
        max_caption_bytes: limit of a caption; longer ones make a sample bad.
        max_image_pixels: limit of an image; files that are larger than its raw pixels are not even read.
        cache: of copies of shards that lie in stores; None: they are read from there each time.
        captions: weights of the fields of captions: `txt`, or names in the JSON; none: as above.

    Raises:
        ValueError: a file is no tar, or there is no sample at all.
        OSError: a file cannot be read.

    Cost: shards without an index are walked through once, by a process per core (20 to 30 microseconds a sample).
    Index files are read in place, and shared by all processes that way; worker processes get paths and counts.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        max_caption_bytes: int,
        max_image_pixels: int,
        captions: Mapping[str, float] | None = None,
        cache: FileCache | None = None,
    ):
        self._cache, self._errors = cache, FileErrors("shard")
        self._paths = [os.fspath(path) for path in paths]
        self._limits = Limits(max_file_bytes(max_image_pixels), max_caption_bytes, to_weights(captions))
        entries = indexes.open_indexes(self._paths, limit=self._limits.image)
        headers = [entry.header for entry in entries]
        self._places = [entry.place for entry in entries]
        self._first = list(itertools.accumulate((header.count for header in headers), initial=0))
        self._stamps = np.array([_stamp(header) for header in headers], np.uint64)
        # Of shards in stores, so that opening one again asks for nothing.
        self._listed = {
            path: Listed(header.size, header.version)
            for path, header in zip(self._paths, headers, strict=True)
            if is_address(path)
        }
        self._open = _make_opener(cache)
        self._digests: list[ShardDigest] | None = None
        if all(header.holds_digest(self._limits.image) for header in headers):
            self._digests = [
                ShardDigest(path, header.digest, header.count)
                for path, header in zip(self._paths, headers, strict=True)
            ]
        require_samples(self._paths, headers)
        tell_unused(self._paths, headers)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_digests")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _digests=None, _open=_make_opener(state["_cache"]))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Sample:
        shard, row = self._find(index)
        with self._reading(shard) as opened:
            return opened.read(row)

    def read_block(self, first: int, count: int) -> list[Read]:
        """Read consecutive samples, those of a shard by one request; the error of one stands in its place."""
        found: list[Read] = []
        while len(found) < count:
            shard, row = self._find(first + len(found))
            here = min(count - len(found), self._first[shard + 1] - self._first[shard] - row)
            try:
                with self._reading(shard) as opened:
                    found += opened.read_rows(row, here)
            except UnreadableData as error:  # the next shard may be well
                found += [error.again()] * (count - len(found) if error.is_away else here)
        return found

    @contextlib.contextmanager
    def _reading(self, shard: int) -> Iterator[_Shard]:
        with self._errors.reading(self._paths[shard]):
            try:
                yield self._shard(shard)
            except DamagedTar as error:
                raise ValueError(str(error)) from error

    def _find(self, index: int) -> tuple[int, int]:
        """Return the shard of a sample, and its number there."""
        if not 0 <= index < self._first[-1]:
            raise IndexError(f"sample {index} of {self._first[-1]}")
        shard = bisect.bisect_right(self._first, index) - 1
        return shard, int(index) - self._first[shard]

    def _shard(self, shard: int) -> _Shard:
        return self._open(
            self._paths[shard],
            self._places[shard],
            stamp=self._stamps[shard],
            limits=self._limits,
            listed=self._listed.get(self._paths[shard]),
        )

    def location(self, index: int) -> str:
        """Return the shard and the key."""
        shard, row = self._find(index)
        try:
            key = self._shard(shard).key(row)[:_MAX_SHOWN_KEY]
        except (OSError, ValueError, DamagedTar, StopIteration):  # this is for messages: they matter more
            return f"shard {self._paths[shard]}, sample {row}"
        return f"shard {self._paths[shard]}, key {key if key.isprintable() else ascii(key)}"

    def digests(self) -> list[ShardDigest]:
        """Return a digest of each shard: keys, kinds and sizes of members, and some contents."""
        if self._digests is None:
            with futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
                self._digests = list(pool.map(self._digest, self._paths))
        return self._digests

    def _digest(self, path: str) -> ShardDigest:
        entry = index_store.find(path)
        if isinstance(entry, index_store.Entry) and entry.header.holds_digest(self._limits.image):
            return ShardDigest(path, entry.header.digest, entry.header.count)
        file = open_file(path)
        index = index_shard(file, path)
        return ShardDigest(path, shard_digest(index, file, self._limits.image)[0], len(index.keys))

    def reordered(self, order: Sequence[int]) -> "TarSource":
        """Return the source with its shards in another order."""
        other = copy.copy(self)
        counts = np.diff(self._first)
        other._paths, other._places = ([each[shard] for shard in order] for each in (self._paths, self._places))
        other._first = list(itertools.accumulate(counts[list(order)].tolist(), initial=0))
        other._stamps = self._stamps[list(order)]
        other._digests = None if self._digests is None else [self._digests[shard] for shard in order]
        return other

    def shard_counts(self) -> list[tuple[str, int]]:
        """Return path and number of samples of each shard."""
        return list(zip(self._paths, np.diff(self._first).tolist(), strict=True))

    def metadata(self, shard: int, columns: Sequence[str]) -> Iterator[Described]:
        """Yield key and JSON of the samples of a shard, whatever the columns.

        Raises:
            UnreadableData: it cannot be read.
        """
        with self._reading(shard) as opened:
            yield from opened.metadata()

    def files(self) -> list[str]:
        """Return the paths of the shards."""
        return list(self._paths)
