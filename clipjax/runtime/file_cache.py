"""Copies of objects on this machine's own disk, for the next time that they are read: shared by all its processes.

A copy is made in the background while the object itself is read on, by one process of the machine. It is used once its
digest has been compared with the one that was computed while it came from the store. `copy_folder.py` tells how the
folder is laid out.

Reading order: `FileCache`, `CachedFile`, `_Copier`.
"""

import contextlib
import os
import pathlib
import queue
import threading
import time
import weakref
from typing import Any

from clipjax.runtime import process_log
from clipjax.runtime.copy_folder import Copy, locked, make_room, room_lock
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import FileChanged, OpenFile, open_file
from clipjax.runtime.terminal import printable

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
        copy = Copy(self._folder, file.place, file.version, file.size)
        with locked(copy.path("lock")) as is_ours:
            if not is_ours:
                return  # it is asked for again
            if not (copy.name in self._verified and copy.is_there()) and not copy.is_whole():
                if not self._make_room(copy):
                    file.gives_up = True
                    self._no_room[file.place, file.version] = time.monotonic() + _FULL_SECONDS
                    return
                try:
                    copy.make(file.read_object)
                except BaseException:
                    copy.discard()
                    raise
            os.utime(copy.path("lock"))  # the copy itself stays as it is, for those who read it
            self._verified.add(copy.name)
            file.use(open_file(str(copy.path("copy"))))

    def _make_room(self, copy: Copy) -> bool:
        """Return whether a copy fits; copies that nobody has used since this process began make room for it."""
        with room_lock(self._folder):
            own = {copy.name}
            if make_room(self._folder, copy.size, self._max_bytes, own=own, before=self._began) > 0:
                return False
            copy.reserve()
            return True
