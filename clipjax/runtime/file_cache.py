"""Copies of objects on this machine's own disk, for the next time that they are read: shared by all its processes.

A copy is made in the background while the object itself is read on, by one process of the machine. It is used once its
digest has been compared with the one that was computed while it came from the store. The folder holds, for each object
by a hash of its address and version, `HASH.copy`, `HASH.json` (what it is a copy of, with the digest), `HASH.lock`, and
`HASH.part` while it is being made.

Reading order: `FileCache`, `CachedFile`, `_Copier`.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import xxhash

from clipjax.runtime import process_log
from clipjax.runtime.files import read_bounded, write_atomic
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import FileChanged, OpenFile, open_file
from clipjax.runtime.terminal import printable

_PART_BYTES = 16 * 2**20
_MAX_RECORD_BYTES = 2**16
_FULL_SECONDS = 600.0  # till an object that has not fitted is tried again
_LOOK_AGAIN_SECONDS = 30.0  # for a copy that another process makes


class FileCache:
    """A folder of copies of objects.

    It can be pickled; each process has a thread of its own that copies.

    Args:
        folder: on a disk of this machine; it is made if it is not there.
        max_bytes: of all copies together; what does not fit is read from its store each time.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self.folder, self.max_bytes = pathlib.Path(folder), max_bytes
        self._copier: _Copier | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def open(self, place: str, listed: Listed | None = None) -> OpenFile:
        """Open an object, or its copy where there is one.

        Args:
            place: its address.
            listed: size and version of the object, where they are known.

        Raises:
            OSError: it cannot be opened.
        """
        return CachedFile(place, open_file(place, listed), self)

    def copy_later(self, file: "CachedFile") -> None:
        """Let the thread that copies look after a file, unless it looks after one of the same object already."""
        with self._lock:
            if self._copier is None:
                self._copier = _Copier(self.folder, self.max_bytes)
        self._copier.ask(file)


class CachedFile:
    """An object that is open for reading: from its copy once there is one, till then from its store.

    Args:
        place: its address.
        file: the object.
        cache: of the copies.

    Attributes:
        size: bytes of the object.
        version: of the object, as its store tells it.
    """

    def __init__(self, place: str, file: OpenFile, cache: FileCache) -> None:
        self.place, self.size, self.version = place, file.size, file.version
        self._object, self._cache = file, cache
        self._copy: OpenFile | None = None
        self._asked_at = -_LOOK_AGAIN_SECONDS
        self.gives_up = False

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes from an offset on, fewer only where the object ends; errors as those of the object."""
        copy = self._copy
        if copy is not None:
            with contextlib.suppress(OSError):  # somebody has changed or deleted the copy, or its disk fails
                content = copy.read(offset, size)
                if len(content) == max(0, min(size, self.size - offset)):
                    return content
            self._copy, self.gives_up = None, True
            process_log.info(f"the copy of {printable(self.place)} in data.cache_dir cannot be read any more")
        now = time.monotonic()
        if not self.gives_up and now - self._asked_at > _LOOK_AGAIN_SECONDS:
            self._asked_at = now
            self._cache.copy_later(self)
        return self._object.read(offset, size)

    def read_object(self, offset: int, size: int) -> bytes:
        """Return bytes of the object itself."""
        return self._object.read(offset, size)

    def use(self, copy: OpenFile) -> None:
        """Read from a verified copy from now on."""
        self._copy = copy


class _Copier:
    """The thread of a process that makes and verifies copies."""

    def __init__(self, folder: pathlib.Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self.jobs: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._began = time.time()
        self._verified: set[str] = set()
        self._asked: dict[tuple[str, str], weakref.ref[CachedFile]] = {}
        self._no_room: dict[tuple[str, str], float] = {}
        threading.Thread(target=self._run, daemon=True, name="copy-shards").start()

    def ask(self, file: CachedFile) -> None:
        """Look after a file when its turn comes; one of an object that has not fitted lately is left alone."""
        key = (file.place, file.version)
        if time.monotonic() < self._no_room.get(key, 0.0):
            return
        waiting = self._asked.get(key)
        self._asked[key] = weakref.ref(file)  # the newest is the one that is read
        if waiting is None:
            self.jobs.put(key)

    def _run(self) -> None:
        told: set[str] = set()
        while True:
            reference = self._asked.pop(self.jobs.get(), None)
            file = None if reference is None else reference()
            if file is None:  # it is closed again
                continue
            try:
                self._look_after(file)
            except (FileChanged, FileNotFoundError):  # whoever reads it next is told
                file.gives_up = True
            except (OSError, ValueError) as error:  # the run reads on from the store
                file.gives_up = True
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                if reason not in told:
                    told.add(reason)
                    process_log.info(f"data.cache_dir={printable(str(self._folder))} gets no copies: {reason}")

    def _look_after(self, file: CachedFile) -> None:
        """Give a file its copy, which is made if nobody else does so at this time."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = xxhash.xxh3_128_hexdigest(f"{file.place} {file.version} {file.size}".encode())
        paths = {kind: self._folder / f"{name}.{kind}" for kind in ("copy", "json", "part", "lock")}
        with _locked(paths["lock"]) as is_ours:
            if not is_ours:
                return  # it is asked for again
            digest = _recorded_digest(paths["json"], file)
            if digest is None or not self._is_whole(name, paths["copy"], digest):
                if not self._make_room(file.size, name):
                    file.gives_up = True
                    self._no_room[file.place, file.version] = time.monotonic() + _FULL_SECONDS
                    return
                self._copy(file, paths)
            os.utime(paths["lock"])  # the copy itself stays as it is, for those who read it
            self._verified.add(name)
            file.use(open_file(str(paths["copy"])))

    def _is_whole(self, name: str, copy: pathlib.Path, digest: str) -> bool:
        if name in self._verified and copy.exists():
            return True
        try:
            return _digest(copy) == digest
        except FileNotFoundError:
            return False

    def _copy(self, file: CachedFile, paths: dict[str, pathlib.Path]) -> None:
        total = xxhash.xxh3_128()
        paths["json"].unlink(missing_ok=True)
        try:
            with paths["part"].open("wb") as part:
                part.truncate(file.size)  # others see what it is going to take
                for offset in range(0, file.size, _PART_BYTES):
                    content = file.read_object(offset, _PART_BYTES)
                    if len(content) != min(_PART_BYTES, file.size - offset):
                        raise OSError(errno.EIO, "the store gave a part of an object")
                    total.update(content)
                    part.write(content)
            if _digest(paths["part"]) != total.hexdigest():
                raise OSError(errno.EIO, "the disk gives other bytes than it was given")
            paths["part"].replace(paths["copy"])
        finally:
            paths["part"].unlink(missing_ok=True)
        record = {"address": file.place, "version": file.version, "size": file.size, "digest": total.hexdigest()}
        write_atomic(paths["json"], json.dumps(record))

    def _make_room(self, size: int, own: str) -> bool:
        """Return whether a copy fits; copies that nobody has used since this process began make room for it."""
        sizes: dict[pathlib.Path, tuple[float, int]] = {}
        for path in self._folder.iterdir():
            if path.suffix in (".copy", ".part") and path.stem != own:
                with contextlib.suppress(FileNotFoundError):
                    sizes[path] = (path.with_suffix(".lock").stat().st_mtime, path.stat().st_size)
        total = sum(each for _, each in sizes.values())
        for path, (used, each) in sorted(sizes.items(), key=lambda item: item[1]):
            if total + size <= self._max_bytes or used >= self._began:
                break
            with _locked(path.with_suffix(".lock")) as is_ours:
                if is_ours:
                    path.with_suffix(".json").unlink(missing_ok=True)
                    path.unlink(missing_ok=True)  # who reads it keeps what is open
                    total -= each
        return total + size <= self._max_bytes


def _digest(path: pathlib.Path) -> str:
    """Return the digest of what lies in a file."""
    total = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while part := file.read(_PART_BYTES):
            total.update(part)
    return total.hexdigest()


def _recorded_digest(path: pathlib.Path, file: CachedFile) -> str | None:
    """Return the digest of the copy of an object; None if there is none."""
    try:
        record = json.loads(read_bounded(path, _MAX_RECORD_BYTES))
        known = (record["address"], record["version"], record["size"])
        return str(record["digest"]) if known == (file.place, file.version, file.size) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[bool]:
    """Hold a lock for all processes of the machine; the value tells whether it is free. A killed holder holds none."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
