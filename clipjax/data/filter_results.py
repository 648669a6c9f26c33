"""Judgement of all samples of a source by its filters: done once, shard by shard, and kept beside the index.

Reading order: `filter_source`, `_judge_all` (by several processes where there is much to do), `judge_shard` (one shard,
or its cached result), `_judge` (the samples).
"""

import array
import collections
import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass

import numpy as np
import xxhash

from clipjax.config import DataConfig
from clipjax.config.filters import Condition, parse_condition
from clipjax.data.filter_workers import Judge
from clipjax.data.filters import FilteredSource, ShardBits
from clipjax.data.folders import FolderSource
from clipjax.data.index_store import index_places, locked, make_folder
from clipjax.data.index_workers import run_threads
from clipjax.data.indexes import num_cores
from clipjax.data.metadata import Described, DescribedSource
from clipjax.data.sample import Source, UnreadableData
from clipjax.data.tar_format import DamagedTar
from clipjax.runtime.files import read_bounded, write_atomic
from clipjax.runtime.storage import OpenFile, is_address, open_file, stream
from clipjax.runtime.terminal import printable

_MAGIC = b"clipjaxF"
_FIXED = struct.Struct("<8sI16s")
"""Magic, bytes of the JSON, and digest of all that follows."""

_FORMAT = 1
_MAX_RESULT_BYTES = 2**30
_MAX_LIST_BYTES = 2**32
_MAX_KEY_BYTES = 4096
_THREADS = 16
_SECONDS_PER_SAMPLE = 20e-6
_SECONDS_TO_START = 2.0  # worth the start of processes
_TOLD_SECONDS = 20.0
_CLOCK_TICK_NS = 20_000_000
KEEP_KEYS, DROP_KEYS = "data.keep_keys", "data.drop_keys"
_log = logging.getLogger(__name__)


class _KeyList:
    """Keys of a text file, a line each: `KEY`, or `SHARD/KEY` with the shard's name, with or without its ending.

    Raises:
        ValueError: the file cannot be read, or has no key.
    """

    def __init__(self, field: str, path: str):
        hasher, hashes = xxhash.xxh3_128(), array.array("Q")
        try:
            with stream(path) as file:
                if open_file(path).size > _MAX_LIST_BYTES:
                    raise ValueError(f"{field}={path} is larger than {_MAX_LIST_BYTES} bytes; split it")
                while line := file.readline(_MAX_KEY_BYTES + 1):
                    if len(line) > _MAX_KEY_BYTES:
                        raise ValueError(f"{field}={path}: line {len(hashes) + 1} is too long for a key")
                    hasher.update(line)
                    if key := line.removeprefix(b"\xef\xbb\xbf").strip():
                        hashes.append(xxhash.xxh3_64_intdigest(key))
        except OSError as error:
            raise ValueError(f"{field}={path} cannot be read: {error.strerror or error}; give a text file") from error
        if not hashes:
            raise ValueError(f"{field}={path} holds no key; write one a line, or leave the field out")
        self.digest = hasher.hexdigest()
        self._hashes = np.unique(np.frombuffer(hashes, np.uint64))

    def contains(self, shard: str, keys: Sequence[str]) -> np.ndarray:
        """Return for each key of a shard whether it is listed: bool [n]."""
        name = shard.rpartition("/")[2]
        found = np.zeros(len(keys), np.bool_)
        for prefix in dict.fromkeys(("", f"{name}/", f"{name.rpartition('.')[0]}/")):
            hashes = np.fromiter(
                (xxhash.xxh3_64_intdigest((prefix + key).encode("utf-8", "replace")) for key in keys), np.uint64
            )
            places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            found |= self._hashes[places] == hashes
        return found & np.array([bool(key) for key in keys], np.bool_)


@dataclass(frozen=True)
class _Filters:
    """Everything that a sample has to pass, in this order: lists of keys, then conditions."""

    conditions: tuple[Condition, ...]
    keep: _KeyList | None
    drop: _KeyList | None
    choice: str

    @property
    def names(self) -> list[str]:
        """Names of the conditions, for counts."""
        lists = [KEEP_KEYS] * (self.keep is not None) + [DROP_KEYS] * (self.drop is not None)
        return lists + [condition.text for condition in self.conditions]

    @property
    def fingerprint(self) -> str:
        """Hash of everything on which the result for one shard depends besides the shard."""
        lists = [None if each is None else each.digest for each in (self.keep, self.drop)]
        texts = [condition.text for condition in self.conditions]
        return hashlib.sha256(json.dumps([_FORMAT, texts, lists, self.choice]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Result:
    shard: ShardBits
    dropped: tuple[int, ...]


def make_filters(data: DataConfig) -> _Filters:
    """Return everything that a sample has to pass.

    Raises:
        ValueError: a condition is none, or a list of keys cannot be used.
    """
    return _Filters(
        tuple(map(parse_condition, data.filters)),
        _KeyList(KEEP_KEYS, data.keep_keys) if data.keep_keys else None,
        _KeyList(DROP_KEYS, data.drop_keys) if data.drop_keys else None,
        json.dumps([data.image_field, data.caption_field]),
    )


Progress = Callable[[int, int, int], None]
"""A function that gets how many shards have been judged, of how many, and the samples in those."""


def filter_source(source: Source, data: DataConfig, spec: str, *, progress: Progress | None = None) -> Source:
    """Return the kept samples of a source; the source itself where nothing filters.

    Args:
        source: of all samples.
        data: with `filters`, `keep_keys` and `drop_keys`.
        spec: string that names the source, for messages.
        progress: called from one thread at a time, also for shards whose result was there.

    Raises:
        ValueError: the source has no metadata, nothing is kept, or a list of keys cannot be used.
        UnreadableData: a shard cannot be read.
    """
    if not (data.filters or data.keep_keys or data.drop_keys):
        return source
    if not isinstance(source, DescribedSource) or (data.filters and isinstance(source, FolderSource)):
        field = "data.filters" if data.filters else KEEP_KEYS if data.keep_keys else DROP_KEYS
        raise ValueError(
            f"{field} cannot be used with source {spec!r}: its samples have no metadata; tars, "
            "Parquet, tables and ArrayRecord have some (clipjax data pack makes tars)"
        )
    filters = make_filters(data)
    results = _judge_all(source, filters, data, progress or _Told(spec))
    dropped = np.sum([result.dropped for result in results], axis=0).tolist()
    try:
        return FilteredSource(
            source, [result.shard for result in results], dict(zip(filters.names, dropped, strict=True))
        )
    except ValueError as error:
        raise ValueError(f"source {spec!r}: {error}") from error


class _Told:
    """The progress of a long judgement, as warnings."""

    def __init__(self, spec: str):
        self._spec, self._at = spec, time.monotonic()

    def __call__(self, done: int, of: int, samples: int) -> None:
        if time.monotonic() - self._at > _TOLD_SECONDS:
            self._at = time.monotonic()
            _log.warning("filters: %d of %d shards of %s, %d samples", done, of, printable(self._spec), samples)


def _judge_all(source: DescribedSource, filters: _Filters, data: DataConfig, progress: Progress) -> list[_Result]:
    shards = source.shard_counts()
    threads = _THREADS if any(is_address(path) for path, _ in shards) else 4
    found: dict[int, _Result] = {}
    with futures.ThreadPoolExecutor(threads) as pool:
        known = pool.map(lambda shard: _find_result(shard[0], shard[1], filters), shards)
        found = {number: result for number, result in enumerate(known) if result is not None}
    missing = [number for number in range(len(shards)) if number not in found]
    if not missing:
        return [found[number] for number in range(len(shards))]
    # Processes of one machine begin at other shards, and take what others have finished.
    start = os.getpid() * 7919 % len(missing)
    jobs, lock, samples = collections.deque([*missing[start:], *missing[:start]]), threading.Lock(), [0]
    seconds = _SECONDS_PER_SAMPLE * sum(shards[number][1] for number in missing)
    judges = [Judge(data) for _ in range(min(num_cores(), len(missing)) if seconds > _SECONDS_TO_START else 0)]

    def work(judge: Judge | None) -> None:
        while jobs:
            try:
                number = jobs.popleft()
            except IndexError:
                return
            if judge is not None and shards[number][0]:
                judge.judge(shards[number][0])  # whose result is found below
            result = judge_shard(source, number, *shards[number], filters)
            with lock:
                found[number] = result
                samples[0] += result.shard.count
                progress(len(found) - len(shards) + len(missing), len(missing), samples[0])

    try:
        works = [functools.partial(work, judge) for judge in judges or [None] * threads]
        run_threads(works, stop=jobs.clear)  # then no further shard is begun
    finally:
        for judge in judges:
            judge.close()
    return [found[number] for number in range(len(shards))]


def _find_result(path: str, count: int, filters: _Filters) -> _Result | None:
    """Return the result of an earlier start, None if there is none.

    Raises:
        UnreadableData: the shard cannot be read.
    """
    if not path:
        return None
    try:
        file = open_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    results = (_read_result(place, file, count, filters) for place in _places(path, filters))
    return next((result for result in results if result is not None), None)


def judge_shard(source: DescribedSource, shard: int, path: str, count: int, filters: _Filters) -> _Result:
    """Return the result for a shard: that of an earlier start, or a new one, which is kept for later ones.

    Args:
        source: of the shard.
        shard: number of the shard in it.
        path: of the shard.
        count: number of its samples.
        filters: to pass.

    Raises:
        UnreadableData: it cannot be read.
    """
    try:
        if not path:
            return _judge(source.metadata(shard, _columns(filters)), path, count, filters)
        file, is_fresh = open_file(path), _is_fresh(path)
        for place in _places(path, filters):
            with contextlib.ExitStack() as stack:
                try:
                    make_folder(place.parent)
                    stack.enter_context(locked(f"{place}.lock", may_wait=True))
                except OSError:
                    continue
                if (found := _read_result(place, file, count, filters)) is not None:
                    return found
                result = _judge(source.metadata(shard, _columns(filters)), path, count, filters)
                with contextlib.suppress(OSError):
                    if not is_fresh:
                        write_atomic(place, _pack(result, file, filters))
                return result
        return _judge(source.metadata(shard, _columns(filters)), path, count, filters)
    except (OSError, DamagedTar) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> UnreadableData:
    return UnreadableData(f"shard {printable(path)} cannot be read for its filters: {error}; look at its disk")


def _columns(filters: _Filters) -> list[str]:
    return list(dict.fromkeys(name for condition in filters.conditions for name in condition.columns))


def _judge(described: Iterator[Described], path: str, count: int, filters: _Filters) -> _Result:
    keys: list[str] = []
    failed = np.full(count, len(filters.conditions), np.int64)  # the first condition that a sample does not meet
    for row, (key, metadata) in enumerate(described):
        if row >= count:
            break
        keys.append(key)
        for number, condition in enumerate(filters.conditions):
            if not condition.is_met(metadata):
                failed[row] = number
                break
    if len(keys) != count:
        raise UnreadableData(f"shard {printable(path)} has {len(keys)} samples instead of {count}; look at its disk")
    is_kept, dropped = np.ones(count, np.bool_), []
    lists = [(filters.keep, True), (filters.drop, False)]
    for is_wanted in [each.contains(path, keys) == wanted for each, wanted in lists if each is not None]:
        dropped.append(int((is_kept & ~is_wanted).sum()))
        is_kept &= is_wanted
    by_condition = collections.Counter(failed[is_kept].tolist())
    dropped += [by_condition[number] for number in range(len(filters.conditions))]
    is_kept &= failed == len(filters.conditions)
    return _Result(ShardBits.of_flags(is_kept), tuple(dropped))


def _places(path: str, filters: _Filters) -> list[pathlib.Path]:
    """Return where the result for a shard may lie: beside its index."""
    return [pathlib.Path(f"{place.removesuffix('.idx')}.{filters.fingerprint}.kept") for place in index_places(path)]


def _is_fresh(path: str) -> bool:
    """Return True for a file that may change once more without another time."""
    return not is_address(path) and abs(time.time_ns() - os.stat(path).st_mtime_ns) < _CLOCK_TICK_NS  # noqa: PTH116


def _pack(result: _Result, file: OpenFile, filters: _Filters) -> bytes:
    about = {
        "fingerprint": filters.fingerprint,
        "size": file.size,
        "version": file.version,
        "count": result.shard.count,
        "dropped": result.dropped,
    }
    body = json.dumps(about).encode()
    digest = xxhash.xxh3_128_digest(body + result.shard.bits)
    return _FIXED.pack(_MAGIC, len(body), digest) + body + result.shard.bits


def _read_result(place: pathlib.Path, file: OpenFile, count: int, filters: _Filters) -> _Result | None:
    """Return the result in a file; None if it is not there, is damaged, or of another content of the shard."""
    try:
        content = read_bounded(place, _MAX_RESULT_BYTES)
        magic, length, digest = _FIXED.unpack_from(content)
        body, bits = content[_FIXED.size : _FIXED.size + length], content[_FIXED.size + length :]
        about = json.loads(body)
        expected = (filters.fingerprint, file.size, file.version, count)
        if (magic, digest) != (_MAGIC, xxhash.xxh3_128_digest(body + bits)):
            return None
        if (about["fingerprint"], about["size"], about["version"], about["count"]) != expected:
            return None
        result = _Result(ShardBits(count, bits), tuple(about["dropped"]))
        is_whole = len(bits) == -(-count // 8) and not any(np.unpackbits(np.frombuffer(bits, np.uint8))[count:])
        fits = len(result.dropped) == len(filters.names) and sum(result.dropped) + result.shard.kept == count
        return result if is_whole and fits else None
    except (OSError, ValueError, LookupError, TypeError, struct.error, RecursionError):
        return None
