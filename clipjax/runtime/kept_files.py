"""Copies of objects that all have to be on this machine's disk before a library opens them, and that stay till then.

The files of a source are links in a tree, `KEY.files`, to the copies of `copy_folder.py`. Who makes it holds
`KEY.lock`, so that one process of a machine copies while the others wait; who reads it holds `KEY.use`, so that nobody
makes room with its copies. Both locks end with their process. A start that is killed leaves what it has copied, and the
next one goes on with that.

Reading order: `Wanted`, `keep_files`, `KeptFiles`, `_Work` (threads that copy).
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import NamedTuple

from clipjax.runtime.copy_folder import (
    TREE,
    Copy,
    links_of,
    locked,
    make_room,
    recorded_places,
    room_lock,
)
from clipjax.runtime.file_cache import FileCache
from clipjax.runtime.files import require_writable
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import FileChanged, open_file
from clipjax.runtime.terminal import printable

_THREADS = 8
_POLL_SECONDS = 0.2
_TOLD_SECONDS = 20.0
_SOON_SECONDS = 2.0
_GIB = 2**30
_log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """An object that is to be on the disk: its address, with the size and the version that it has now."""

    place: str
    listed: Listed


class KeptFiles:
    """Copies that stay on the disk as long as this object lives; it cannot be pickled, its paths can.

    Args:
        folder: of the links to the copies, by the names that were wanted.
        descriptor: of the lock that keeps them.
    """

    def __init__(self, folder: pathlib.Path, descriptor: int) -> None:
        self.folder = folder
        self._close = weakref.finalize(self, os.close, descriptor)

    def close(self) -> None:
        """Let go of the copies at once."""
        self._close()

    def path(self, name: str) -> str:
        """Return the path of a file by the name that was wanted."""
        return str(self.folder / name)


def keep_files(cache: FileCache, wanted: Mapping[str, Wanted], spec: str) -> KeptFiles:
    """Copy objects to the disk, or wait until another process of this machine has done so, and keep the copies there.

    Copies that are there already are compared with their digests, unless another process uses them at this time.

    Args:
        cache: the folder of the copies, and the bytes that it may take.
        wanted: objects by their names in the tree, such as `a/b.array_record`.
        spec: string that names the source, for messages.

    Raises:
        ValueError: there is no room, the folder cannot be written to, or an object cannot be copied as it is listed.
    """
    folder = cache.folder
    require_writable(folder, "data.cache_dir")
    copies = {name: Copy(folder, each.place, each.listed.version, each.listed.size) for name, each in wanted.items()}
    names = json.dumps(sorted((name, copy.name) for name, copy in copies.items()))
    tree = folder / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}{TREE}"
    with _turn(tree.with_suffix(".lock"), copies, spec):
        descriptor = os.open(tree.with_suffix(".use"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        kept = KeptFiles(tree, descriptor)
        try:
            if _is_used_by_others(descriptor):
                _require_all(tree, copies, spec)
            else:
                _link(tree, copies)  # before anything is copied, so that nobody makes room with what is there
                unique = list({copy.name: copy for copy in copies.values()}.values())
                _Work(folder, unique, spec).run(cache.max_bytes)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # no other comes between: they would need the first lock
        except BaseException:
            kept.close()
            raise
        return kept


def _is_used_by_others(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _require_all(tree: pathlib.Path, copies: Mapping[str, Copy], spec: str) -> None:
    """Check that copies are there which others use, and have verified."""
    if not all(copy.is_there() for copy in copies.values()) or len(list(links_of(tree))) != len(copies):
        raise ValueError(
            f"data.cache_dir={tree.parent}: copies of source {spec!r} have been deleted while another process of this "
            "machine reads them; end that process, then start again"
        )


@contextlib.contextmanager
def _turn(path: pathlib.Path, copies: Mapping[str, Copy], spec: str) -> Iterator[None]:
    """Wait for the lock of a tree, which one process of the machine holds at a time."""
    told = time.monotonic() - _TOLD_SECONDS + _SOON_SECONDS
    while True:
        with locked(path) as is_ours:
            if is_ours:
                yield
                return
        if time.monotonic() - told > _TOLD_SECONDS:
            told = time.monotonic()
            done = sum(copy.size for copy in copies.values() if copy.is_there())
            _log.warning(
                "data.cache_dir: waiting for another process of this machine, which copies %s: %s of %s GiB are there",
                printable(spec),
                _gib(done),
                _gib(sum(copy.size for copy in copies.values())),
            )
        time.sleep(_POLL_SECONDS)


def _link(tree: pathlib.Path, copies: Mapping[str, Copy]) -> None:
    """Make a tree of links to copies; other files in it, such as indexes, stay."""
    for name, copy in copies.items():
        link = tree / name
        target = os.path.relpath(copy.path("copy"), link.parent)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not (link.is_symlink() and str(link.readlink()) == target):
            link.unlink(missing_ok=True)
            link.symlink_to(target)


class _Stopped(Exception):
    """Another thread has failed, or a person has stopped the command."""


class _Work:
    """Copying and verifying of all copies of a source, by threads of one process of the machine."""

    def __init__(self, folder: pathlib.Path, copies: list[Copy], spec: str) -> None:
        self._folder, self._copies, self._spec = folder, copies, spec
        self._total = sum(copy.size for copy in copies)
        self._done: dict[str, float] = {}
        self._lock, self._is_stopped = threading.Lock(), threading.Event()
        self._began = self._told = time.monotonic()

    def run(self, max_bytes: int) -> None:
        """Do all of it; see `keep_files`."""
        missing = self._reserve(max_bytes)
        self._tell_missing(missing)
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            jobs = {pool.submit(self._look_after, copy): copy for copy in self._copies}
            try:
                for job in futures.as_completed(jobs):
                    try:
                        job.result()
                    except OSError as error:
                        raise self._refusal(jobs[job], error) from error
            except BaseException:
                self._end(pool)
                raise
        if missing:
            seconds = time.monotonic() - self._began
            _log.warning("data.cache_dir: %s is copied, in %.0f seconds", printable(self._spec), seconds)

    def _end(self, pool: futures.ThreadPoolExecutor) -> None:
        self._is_stopped.set()
        pool.shutdown(cancel_futures=True)
        for copy in self._copies:  # half a copy stays, an empty one need not
            with locked(copy.path("lock")) as is_ours:
                if is_ours and not copy.path("json").exists():
                    copy.discard()

    def _reserve(self, max_bytes: int) -> list[Copy]:
        """Make room for all copies, and return those that have to be made.

        Raises:
            ValueError: there is none.
        """
        with room_lock(self._folder):
            over = make_room(self._folder, self._total, max_bytes, own={copy.name for copy in self._copies})
            if over > 0:
                raise ValueError(describe_lack(max_bytes, self._total, over, f"source {self._spec!r}"))
            missing = [copy for copy in self._copies if not copy.is_there()]
            needed = sum(copy.size - _taken(copy.path("part")) for copy in missing)
            if (free := shutil.disk_usage(self._folder).free) < needed:
                raise ValueError(
                    f"data.cache_dir={self._folder}: its disk has {_gib(free)} GiB free, and the copies of source "
                    f"{self._spec!r} take {_gib(needed)} GiB more; delete something, or name a folder on another disk"
                )
            for copy in missing:
                copy.reserve()
        return missing

    def _tell_missing(self, missing: list[Copy]) -> None:
        if not missing:
            return
        known = recorded_places(self._folder)
        for copy in missing:
            if known.get(copy.place, copy.version) != copy.version:
                _log.warning("%s has changed since it was copied: it is copied anew", printable(copy.place))
        _log.warning(
            "data.cache_dir: copying %d files of %s to %s, %s GiB",
            len(missing),
            printable(self._spec),
            printable(str(self._folder)),
            _gib(sum(copy.size for copy in missing)),
        )

    def _look_after(self, copy: Copy) -> None:
        """Make a copy, or find the one that is there whole."""
        while True:
            self._count(copy, -math.inf)
            with locked(copy.path("lock")) as is_ours:  # another source may have the same object
                if is_ours:
                    count = functools.partial(self._count, copy)
                    if not copy.is_whole(count):
                        self._count(copy, -math.inf)
                        copy.make(open_file(copy.place, Listed(copy.size, copy.version)).read, count)
                    copy.path("part").unlink(missing_ok=True)
                    os.utime(copy.path("lock"))
                    return
            time.sleep(_POLL_SECONDS)

    def _count(self, copy: Copy, size: float) -> None:
        """Count bytes of a copy that are there; -inf: none is.

        Raises:
            _Stopped: another thread has failed.
        """
        if self._is_stopped.is_set():
            raise _Stopped
        with self._lock:
            self._done[copy.name] = max(0, self._done.get(copy.name, 0) + size)
            if time.monotonic() - self._told < _TOLD_SECONDS:
                return
            self._told = time.monotonic()
            done = sum(self._done.values())
        shown = printable(self._spec)
        _log.warning("data.cache_dir: %s of %s GiB of %s are copied, or verified", _gib(done), _gib(self._total), shown)

    def _refusal(self, copy: Copy, error: OSError) -> ValueError:
        reason = error.strerror or str(error)
        if isinstance(error, FileChanged):
            copy.discard()
            reason, remedy = f"{reason} since this start has looked it up", "let that finish, then start again"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            copy.discard()
            remedy = f"make room on the disk of {self._folder}, or name a folder on another one"
        else:
            remedy = "the same command goes on with what has been copied"
        return ValueError(
            f"source {self._spec!r}: {copy.place} cannot be copied to data.cache_dir={self._folder}: {reason}; {remedy}"
        )


def describe_lack(max_bytes: int, total: int, over: int, what: str) -> str:
    """Return in words that copies do not fit.

    Args:
        max_bytes: that all copies may take.
        total: bytes of the copies that are wanted.
        over: bytes for which there is no room.
        what: names those in a sentence.
    """
    held = max_bytes + over - total
    others = f", besides {_gib(held)} GiB that other sources and runs use" if held > 0 else ""
    given = f"{max_bytes / _GIB:.9f}".rstrip("0").rstrip(".")
    return (
        f"data.cache_gib={given} is too small: all files of {what}, {_gib(total)} GiB, have to be in "
        f"data.cache_dir before they are read{others}; set at least {_gib(max_bytes + over)}"
    )


def _gib(size: float) -> str:
    """Return bytes in GiB, rounded up."""
    return f"{math.ceil(size / _GIB * 1000) / 1000:g}"


def _taken(path: pathlib.Path) -> int:
    """Return the bytes that a file takes on its disk, 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_blocks * 512
    return 0
