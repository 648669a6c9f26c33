"""Index files of many shards: those that are missing are built, by processes that share the work.

Reading order: `open_indexes`, `_build_all`.
"""

import collections
import contextlib
import json
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

from clipjax.data.index_store import Entry, Missing, build, find
from clipjax.data.index_workers import Builder
from clipjax.runtime.files import read_bounded
from clipjax.runtime.storage import is_address
from clipjax.runtime.terminal import printable

_LOOKING_THREADS = 16
_FEW_BYTES = 256 * 2**20
_MAX_STATS_BYTES = 2**20
_MOST_SHOWN = 5
_log = logging.getLogger(__name__)


def open_indexes(
    paths: Sequence[str],
    *,
    limit: int,
    num_workers: int | None = None,
    is_thorough: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Entry]:
    """Return the indexes of shards; build those that are missing.

    Args:
        paths: of the shards.
        limit: largest image file that the source reads, in bytes.
        num_workers: processes that build; None: one per core of this process.
        is_thorough: also look at the places in the index files that are there.
        progress: function that gets the number of shards that are indexed, and their samples, from time to time.

    Raises:
        ValueError: a shard is no tar.
        OSError: a shard cannot be read.
    """
    with futures.ThreadPoolExecutor(_LOOKING_THREADS) as pool:
        found = list(pool.map(lambda path: find(path, is_thorough=is_thorough), paths))
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
    progress = progress or _ignore
    ready = [each.header.count for each in found if isinstance(each, Entry)]
    built = _build_all(
        missing,
        limit=limit,
        num_workers=num_workers,
        progress=lambda shards, samples: progress(len(ready) + shards, sum(ready) + samples),
    )
    _compare_with_stats([each.path for each in missing], built)
    return [built[each.path] if isinstance(each, Missing) else each for each in found]


def _ignore(shards: int, samples: int) -> None: ...


def _build_all(
    missing: Sequence[Missing], *, limit: int, num_workers: int | None, progress: Callable[[int, int], None]
) -> dict[str, Entry]:
    """Build indexes, by paths of the shards; see `open_indexes`."""
    entries: dict[str, Entry] = {}
    jobs = collections.deque(dict.fromkeys(each.path for each in missing))
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(jobs))
    if sum(each.size for each in missing) < _FEW_BYTES:
        num_workers = 1  # done before another process has started
    lock, samples = threading.Lock(), 0

    def add(path: str, entry: Entry) -> None:
        nonlocal samples
        with lock:
            entries[path] = entry
            samples += entry.header.count
            progress(len(entries), samples)

    def work(builder: Callable[..., Entry | None]) -> None:
        held: list[str] = []  # by other processes
        while True:
            try:
                path = jobs.popleft()
            except IndexError:
                break
            entry = builder(path, limit=limit, may_wait=False)
            if entry is None:
                held.append(path)
            else:
                add(path, entry)
        for path in held:
            entry = builder(path, limit=limit, may_wait=True)
            assert entry is not None
            add(path, entry)

    if num_workers == 1:
        work(build)
        return entries
    with futures.ThreadPoolExecutor(num_workers) as pool, contextlib.ExitStack() as stack:
        stack.callback(jobs.clear)  # after an error or a signal, none is begun
        builders = [stack.enter_context(Builder()) for _ in range(num_workers)]
        for each in [pool.submit(work, builder.build) for builder in builders]:
            each.result()
    return entries


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
