"""Judgement of all samples of a source by its filters: done once, by all processes of a run, and kept for later ones.

Each shard has a result beside its index (`shard_results.py`), the whole source a bitmap in the machine's cache folder
(`kept_samples.py`), which a later start maps without looking at the results.

Reading order: `filter_source`, `_judge_all` (by several processes where there is much to do), `_Jobs`.
"""

import base64
import collections
import functools
import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np

from clipjax.config import DataConfig
from clipjax.data.filter_workers import Judge
from clipjax.data.filters import FilteredSource
from clipjax.data.folders import FolderSource
from clipjax.data.index_store import cache_folder
from clipjax.data.index_workers import run_threads
from clipjax.data.indexes import list_shards, num_cores
from clipjax.data.kept_format import pack_kept
from clipjax.data.kept_samples import find_kept, kept_place, make_kept
from clipjax.data.key_lists import DROP_KEYS, KEEP_KEYS
from clipjax.data.metadata import DescribedSource
from clipjax.data.sample import Source
from clipjax.data.shard_results import (
    Filters,
    ShardResult,
    find_result,
    is_fresh,
    judge_shard,
    make_filters,
    unpack_result,
    unreadable,
)
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import is_address, open_file
from clipjax.runtime.terminal import printable

_FORMAT = 1
_THREADS, _REMOTE_THREADS, _REMOTE_LOOKING_THREADS = 4, 16, 64
_SECONDS_PER_SAMPLE = 20e-6
_SECONDS_TO_START = 2.0  # worth the start of processes
_TOLD_SECONDS = 20.0
_log = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]
"""A function that gets how many shards have been judged, of how many, and the samples in those."""


def filter_source(source: Source, data: DataConfig, spec: str, *, progress: Progress | None = None) -> Source:
    """Return the kept samples of a source; the source itself where nothing filters.

    Args:
        source: of all samples.
        data: with `filters`, `keep_keys` and `drop_keys`.
        spec: string that names the source, for messages.
        progress: called from one thread at a time, also for shards that another process has judged meanwhile.

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
    filters, shards = make_filters(data), source.shard_counts()
    versions = _look_at(shards)
    key = _key_of(shards, versions, filters)
    place = kept_place(cache_folder(), key) if None not in versions else None
    kept = find_kept(place, key)
    if kept is None:
        results = _judge_all(source, versions, filters, data, progress or _Told(spec))
        dropped = np.sum([result.dropped for result in results], axis=0).tolist()
        bits = [result.shard for result in results]
        kept = make_kept(place, key, lambda: pack_kept(bits, key=key, dropped=dropped))
    try:
        return FilteredSource(source, kept, [count for _, count in shards], filters.names)
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


def _look_at(shards: Sequence[tuple[str, int]]) -> list[Listed | None]:
    """Return size and version of each shard; None for what is no file, or may change without another version.

    Raises:
        UnreadableData: a shard cannot be read.
    """

    def look(path: str) -> Listed | None:
        if not path or path in listed:
            return listed.get(path)
        try:
            file = open_file(path)
            return None if is_fresh(path) else Listed(file.size, file.version)
        except OSError as error:
            raise unreadable(path, error) from error

    paths = [path for path, _ in shards]
    with futures.ThreadPoolExecutor(_threads(paths, _REMOTE_LOOKING_THREADS)) as pool:
        listed = list_shards(paths, pool)
        return list(pool.map(look, paths))


def _threads(paths: Sequence[str], remote: int) -> int:
    return remote if any(map(is_address, paths)) else _THREADS


def _key_of(shards: Sequence[tuple[str, int]], versions: Sequence[Listed | None], filters: Filters) -> str:
    """Return a hash of everything on which the kept samples depend."""
    hasher = hashlib.sha256(json.dumps([_FORMAT, filters.fingerprint]).encode())
    for (path, count), version in zip(shards, versions, strict=True):
        whole = path if is_address(path) else os.path.abspath(path)  # noqa: PTH100
        found = None if version is None else [version.size, version.version]
        hasher.update(json.dumps([whole, count, found]).encode() + b"\n")
    return hasher.hexdigest()


def _judge_all(
    source: DescribedSource, versions: Sequence[Listed | None], filters: Filters, data: DataConfig, progress: Progress
) -> list[ShardResult]:
    """Return the results of all shards; judge those that have none, with the other processes that do so."""
    shards = source.shard_counts()
    paths = [path for path, _ in shards]

    def find(number: int) -> ShardResult | None:
        path, count = shards[number]
        return find_result(path, versions[number], count, filters)

    with futures.ThreadPoolExecutor(_threads(paths, _REMOTE_LOOKING_THREADS)) as pool:
        known = list(pool.map(find, range(len(shards))))
    missing = [number for number, result in enumerate(known) if result is None]
    if missing:
        filters.load_lists()  # what cannot be used is refused before the work begins
        jobs = _Jobs(source, missing, filters, progress)
        seconds = _SECONDS_PER_SAMPLE * sum(shards[number][1] for number in missing)
        judges = [Judge(data) for _ in range(min(num_cores(), len(missing)) if seconds > _SECONDS_TO_START else 0)]
        works = [functools.partial(jobs.run, judge) for judge in judges or [None] * _threads(paths, _REMOTE_THREADS)]
        try:
            run_threads(works, stop=jobs.stop)
        finally:
            for judge in judges:
                judge.close()
        for number, result in jobs.results.items():
            path, before = shards[number][0], versions[number]
            # Some stores list other versions than they give.
            if before is not None and result.version != before and not is_address(path):
                raise unreadable(path, "another program has written it anew")
            known[number] = result
    return [result for result in known if result is not None]


class _Jobs:
    """Shards that are to be judged by several threads, some with a process of their own.

    Args:
        source: of the shards.
        missing: numbers of the shards.
        filters: to pass.
        progress: see `filter_source`.

    Attributes:
        results: those that are there, by number of the shard.
    """

    def __init__(self, source: DescribedSource, missing: Sequence[int], filters: Filters, progress: Progress):
        self._source, self._filters, self._progress = source, filters, progress
        self._shards = source.shard_counts()
        # Processes that start together begin with other shards, and find what each has judged.
        order = list(missing)
        if any(is_address(self._shards[number][0]) for number in missing):
            random.shuffle(order)
        start = random.randrange(len(order))
        self._jobs = collections.deque([*order[start:], *order[:start]])
        self._lock, self._samples, self._missing, self._is_stopped = threading.Lock(), 0, len(missing), False
        self.results: dict[int, ShardResult] = {}

    def run(self, judge: Judge | None) -> None:
        """Judge shards until none is left: first those that nobody else does, then those that others did not finish.

        Args:
            judge: process that does it; None: this thread does.

        Raises:
            ValueError: a list of keys has changed.
            UnreadableData: a shard cannot be read.
        """
        held: list[int] = []
        while not self._is_stopped:
            try:
                number = self._jobs.popleft()
            except IndexError:
                break
            if not self._add(number, self._judge(number, judge, may_wait=False)):
                held.append(number)
        for number in held:
            if not self._is_stopped:
                self._add(number, self._judge(number, judge, may_wait=True))

    def stop(self) -> None:
        """Begin no further shard."""
        self._is_stopped = True

    def _judge(self, number: int, judge: Judge | None, *, may_wait: bool) -> ShardResult | None:
        path, count = self._shards[number]
        if judge is not None and path:
            answer = judge.judge(path, may_wait=may_wait)
            if answer.get("is_held"):
                return None
            result = unpack_result(base64.b64decode(answer.get("result", "")), count, self._filters)
            if result is not None:
                return result
        return judge_shard(self._source, number, path, count, self._filters, may_wait=may_wait)

    def _add(self, number: int, result: ShardResult | None) -> bool:
        if result is None:
            return False
        with self._lock:
            self.results[number] = result
            self._samples += result.shard.count
            self._progress(len(self.results), self._missing, self._samples)
        return True
