"""Index files of many shards: those that are missing are built, by processes that share the work.

Reading order: `open_indexes`, `_build_all`, `_Work`.
"""

import collections
import functools
import json
import logging
import os
import pathlib
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

from clipjax.config.paths import STORES
from clipjax.data.index_store import Entry, Missing, build, find
from clipjax.data.index_workers import Builder, run_threads
from clipjax.runtime import objects
from clipjax.runtime.files import read_bounded
from clipjax.runtime.storage import is_address
from clipjax.runtime.terminal import printable

_LOOKING_THREADS = 16
_REMOTE_THREADS = 64  # each waits for a store to answer
_SECONDS_PER_SHARD = 0.0006
_SECONDS_PER_BYTE = 15e-6 / 30_000  # of samples of 30 kB
_SECONDS_TO_START = 1.0  # worth the start of processes
_SECONDS_TO_TELL = 20.0
_MAX_STATS_BYTES = 2**20
_MOST_SHOWN = 5
_LISTING = tuple(f"{scheme}://" for scheme in STORES)
_MANY = 8  # shards of a folder that are worth a listing
_log = logging.getLogger(__name__)


def open_indexes(
    paths: Sequence[str],
    *,
    limit: int,
    num_workers: int | None = None,
    is_thorough: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Entry]:
    """Return the indexes of shards; build those that are missing.

    Args:
        paths: of the shards.
        limit: largest image file that the source reads, in bytes.
        num_workers: processes that build; None: one per core of this process.
        is_thorough: also look at the places in the index files that are there.
        progress: function that gets how many indexes have been built, how many were missing, and the samples in those
            that have been built, from one thread at a time.

    Raises:
        ValueError: a shard is no tar.
        OSError: a shard cannot be read.
    """
    threads = _REMOTE_THREADS if any(map(is_address, paths)) else _LOOKING_THREADS
    with futures.ThreadPoolExecutor(threads) as pool:
        listed = list_shards(paths, pool)
        found = list(pool.map(lambda path: find(path, is_thorough=is_thorough, listed=listed.get(path)), paths))
    missing = [each for each in found if isinstance(each, Missing)]
    if not missing:
        return [each for each in found if isinstance(each, Entry)]
    for reason, words in (("changed", "have changed since they were indexed"), ("damaged", "have a damaged index")):
        if named := [each.path for each in missing if each.reason == reason]:
            _log.warning(
                "%d of %d shards %s and are indexed again, the first: %s",
                len(named),
                len(paths),
                words,
                printable(named[0]),
            )
    built = _build_all(missing, limit=limit, num_workers=num_workers, progress=progress or _ignore)
    _compare_with_stats([each.path for each in missing], built)
    return [built[each.path] if isinstance(each, Missing) else each for each in found]


def list_shards(paths: Sequence[str], pool: futures.Executor) -> dict[str, objects.Listed]:
    """Return size and version of shards in folders of stores: a thousand by one request, if there are many."""
    folders = collections.Counter(path.rpartition("/")[0] for path in paths if path.startswith(_LISTING))
    many = [folder for folder, count in folders.items() if count >= _MANY]
    listings = zip(many, pool.map(_list_folder, many), strict=True)
    return {objects.join(folder, name): each for folder, listing in listings for name, each in listing.items()}


def _list_folder(folder: str) -> dict[str, objects.Listed]:
    try:
        return objects.list_objects(folder)
    except (OSError, ValueError):  # who may read need not be allowed to list; each shard is asked for then
        return {}


def _ignore(built: int, missing: int, samples: int) -> None: ...


def _build_all(
    missing: Sequence[Missing], *, limit: int, num_workers: int | None, progress: Callable[[int, int, int], None]
) -> dict[str, Entry]:
    """Build indexes, by paths of the shards; see `open_indexes`."""
    work = _Work([each.path for each in missing], limit, progress)
    num_workers = min(num_workers or num_cores(), len(missing))
    size = sum(each.size for each in missing)
    seconds = len(missing) * _SECONDS_PER_SHARD + size * _SECONDS_PER_BYTE
    if num_workers == 1 or seconds < _SECONDS_TO_START:
        work.run(build)
        return work.entries
    if progress is _ignore and seconds > _SECONDS_TO_TELL:
        _log.warning(
            "indexing %d shards, %.1f GB, with %d processes; `clipjax data index` does it ahead of a run",
            len(missing),
            size / 1e9,
            num_workers,
        )
    builders = [Builder() for _ in range(num_workers)]
    try:
        run_threads([functools.partial(work.run, builder.build) for builder in builders], stop=work.stop)
    finally:
        for builder in builders:
            builder.close()
    return work.entries


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Work:
    """Shards that are to be indexed by several threads, each with a process of its own.

    Args:
        paths: of the shards.
        limit: largest image file that the source reads, in bytes.
        progress: see `open_indexes`.

    Attributes:
        entries: indexes that are there, by path of the shard.
    """

    def __init__(self, paths: Sequence[str], limit: int, progress: Callable[[int, int, int], None]):
        jobs = list(dict.fromkeys(paths))
        if any(map(is_address, jobs)):
            random.shuffle(jobs)  # machines that start together begin with others, and find what each has built
        self._jobs = collections.deque(jobs)
        self._limit, self._progress, self._missing = limit, progress, len(self._jobs)
        self._lock, self._samples, self._is_stopped = threading.Lock(), 0, False
        self.entries: dict[str, Entry] = {}

    def run(self, build_one: Callable[..., Entry | None]) -> None:
        """Index shards until none is left: first those that nobody else does, then those that others did not finish."""
        held: list[str] = []
        while not self._is_stopped:
            try:
                path = self._jobs.popleft()
            except IndexError:
                break
            if not self._add(path, build_one(path, limit=self._limit, may_wait=False)):
                held.append(path)
        for path in held:
            if not self._is_stopped:
                self._add(path, build_one(path, limit=self._limit, may_wait=True))

    def stop(self) -> None:
        """Begin no further shard."""
        self._is_stopped = True

    def _add(self, path: str, entry: Entry | None) -> bool:
        if entry is None:
            return False
        with self._lock:
            self.entries[path] = entry
            self._samples += entry.header.count
            self._progress(len(self.entries), self._missing, self._samples)
        return True


def _compare_with_stats(paths: Sequence[str], entries: Mapping[str, Entry]) -> None:
    """Tell where img2dataset counted other numbers of pairs than shards hold."""
    differing = []
    for path in paths:
        stats = pathlib.Path(path.removesuffix(".tar") + "_stats.json")
        if is_address(path) or not path.endswith(".tar"):
            continue
        try:
            counted = json.loads(read_bounded(stats, _MAX_STATS_BYTES)).get("successes")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if type(counted) is int and counted != entries[path].header.count:
            differing.append(f"{printable(path)} holds {entries[path].header.count} samples, not {counted}")
    if differing:
        _log.warning(
            "the number of samples is not that of img2dataset's _stats.json in %d of %d shards: %s; their download may "
            "have been interrupted",
            len(differing),
            len(paths),
            "; ".join(differing[:_MOST_SHOWN]) + ("; ..." if len(differing) > _MOST_SHOWN else ""),
        )
