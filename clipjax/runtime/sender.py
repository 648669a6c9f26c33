"""Files and units of a local folder, sent to a folder of an object store, deleted and renamed there.

`mirror.py` says what is sent and when; this is how, so that a kill at any moment leaves a unit complete or without a
seal.
"""

import os
import pathlib
import re
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from clipjax.runtime import connections, objects
from clipjax.runtime.staging import PINNED, Copies, Found, Layout, parts_of

_WORKERS = 4
_LEFT_OUT = re.compile(r"\.|.*\.tmp$|(.*/)?\.[^/]*probe")


class Holder(Protocol):
    """The part of a `Lease` that a mirror needs."""

    @property
    def token(self) -> str:
        """Name of this holding."""
        ...

    @property
    def retry_seconds(self) -> float | None:
        """Time after which no write may be tried again without `require`; None: any time."""
        ...

    def require(self) -> None:
        """Make sure that the lease is held now; raise `LeaseLost` if it is not."""

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Call a function with the reason once the lease is lost."""

    def release(self, *, delete: bool = False) -> None:
        """Give the folder up."""


class Unreadable(OSError):
    """A file of a unit cannot be read here, whatever the store does."""


class Sender:
    """A local folder and its place on a store, which this process alone writes to.

    Args:
        folder: the local one.
        place: address of the folder of the store.
        lease: of that folder.
        layout: its units.
        copies: what is there as it is here.
        found: the units at the start.
        say: shows a line.

    Attributes:
        complete: units that are whole on the store.
        leftovers: others that are there, which killed runs have left.
        copies: what is there as it is here.
        say: shows a line.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        place: str,
        lease: Holder,
        *,
        layout: Layout,
        copies: Copies,
        found: Found,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._place, self._lease, self._layout, self.copies = folder, place, lease, layout, copies
        self.complete, self.leftovers = set(found.complete), set(found.incomplete)
        self.say = say
        self._unread = set[str]()
        self._locks: dict[str, threading.Lock] = {}

    def send_file(self, path: pathlib.Path) -> None:
        """Send a file, whether it has changed or not.

        Raises:
            OSError: the store does not take it.
        """
        inside = path.relative_to(self._folder).as_posix()
        with self._lock_of(inside):
            self._write(objects.join(self._place, inside), path)

    def send_plain(self) -> None:
        """Send the files that have changed, but those of units.

        Raises:
            OSError: the store does not take one.
        """
        changed = [
            path
            for path in parts_of(self._folder, skip=(PINNED, self._layout.parent))
            if not _LEFT_OUT.match(path) and not self.copies.is_unchanged(path)
        ]
        self._send_all("", changed, self._folder)

    def send_marks(self) -> None:
        """Send what has changed in units that are complete on the store: their seals, and files that mark them."""
        for unit in sorted(self.complete):
            inside = f"{self._layout.parent}/{unit}"
            parts = parts_of(self._folder / inside) if (self._folder / inside).is_dir() else []
            changed = [path for path in parts if not self.copies.is_unchanged(f"{inside}/{path}")]
            if any("/" in path for path in changed):
                continue  # it is being made anew: its seal would stand for the contents of the old one
            for path in changed:
                if not _LEFT_OUT.match(path):
                    self._send_all("", [f"{inside}/{path}"], self._folder)

    def _send_all(self, inside: str, paths: list[str], source: pathlib.Path) -> None:
        """Send files, several at a time; those that are gone meanwhile are left out.

        Args:
            inside: folder on the store below the mirror's.
            paths: inside `source`, and there.
            source: the local folder.

        Raises:
            Unreadable: one in a unit cannot be read; others are told, once.
            OSError: the store does not take one; the others are sent all the same, if it can be reached.
        """

        away = threading.Event()  # else each file would wait as long as the first

        def send(path: str) -> OSError | None:
            with self._lock_of(path):
                error = None if away.is_set() else send_locked(path)
            if error is not None and connections.is_away(error):
                away.set()
            return error

        def send_locked(path: str) -> OSError | None:
            try:
                before = (source / path).stat()
                if not stat.S_ISREG(before.st_mode):
                    return Unreadable(None, "it is no regular file; it is not sent", str(source / path))
                with (source / path).open("rb"):
                    pass
            except FileNotFoundError:
                return None
            except OSError as error:
                return Unreadable(None, f"{error.strerror}; it is not sent", str(source / path))
            try:
                self._write(objects.join(self._place, *filter(None, (inside, path))), source / path)
            except FileNotFoundError as error:
                return None if not (source / path).exists() else error
            except OSError as error:
                return error
            if not inside:
                self._note(path, before)
            return None

        with ThreadPoolExecutor(_WORKERS) as pool:
            errors = [error for error in pool.map(send, paths) if error is not None]
        unread = [error for error in errors if isinstance(error, Unreadable)]
        if others := [error for error in errors if error not in unread]:
            raise others[0]
        if inside and unread:
            raise unread[0]
        for error in unread:
            if error.filename not in self._unread:
                self._unread.add(error.filename)
                self.say(describe(error))

    def _write(self, place: str, path: pathlib.Path) -> None:
        self._lease.require()
        objects.write_file(place, path, self._lease.retry_seconds)

    def _remove(self, place: str) -> None:
        self._lease.require()
        objects.delete(place, self._lease.retry_seconds)

    def _lock_of(self, path: str) -> threading.Lock:
        """Return the lock of a file: what is sent last must be what was read last."""
        return self._locks.setdefault(path, threading.Lock())

    def _note(self, path: str, before: os.stat_result) -> None:
        """Note that a file was sent, unless it has changed meanwhile; which version it became is not known."""
        try:
            now = (self._folder / path).stat()
            if (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
                self.copies.note(path, "")
        except OSError:
            pass

    def send_unit(self, unit: str, source: pathlib.Path) -> bool:
        """Send a unit; return False if it was deleted before it could be sent.

        Args:
            unit: its name.
            source: folder with its files.

        Raises:
            Unreadable: a file of it cannot be read.
            OSError: the store does not take it.
        """
        if not (source / self._layout.seal).exists():
            return False
        self.send_plain()  # so that a unit is never ahead of what it belongs to
        inside, seal = f"{self._layout.parent}/{unit}", self._layout.seal
        place = objects.join(self._place, inside)
        local = {path: (source / path).stat().st_size for path in parts_of(source)}
        before = objects.list_folder(place)
        if seal in before:
            self._remove(objects.join(place, seal))
        self.complete.discard(unit)
        for path in before.keys() - local.keys():
            self._remove(objects.join(place, path))
        self._send_all(inside, [path for path in local if path != seal], source)
        listed = objects.list_folder(place)
        for path, size in local.items():
            if path != seal and (path not in listed or listed[path].size != size):
                raise OSError(None, "the store does not list a file as it was sent", objects.join(place, path))
        self._write(objects.join(place, seal), source / seal)
        for path, each in objects.list_folder(place).items():
            if path in local and _is_same(source / path, self._folder / inside / path):
                self.copies.note(f"{inside}/{path}", each.version)
        self.complete.add(unit)
        self.leftovers.discard(unit)
        return True

    def delete(self, unit: str) -> None:
        """Delete a unit on the store, its seal first.

        Raises:
            OSError: the store does not do it.
        """
        place = objects.join(self._place, self._layout.parent, unit)
        listed = objects.list_folder(place)
        for path in sorted(listed, key=lambda path: path != self._layout.seal):
            self._remove(objects.join(place, path))
            self.copies.forget(f"{self._layout.parent}/{unit}/{path}")

    def rename(self, unit: str, new: str) -> None:
        """Rename a unit on the store, its seal first; what the store cannot copy is told, and deleted.

        Raises:
            OSError: the store cannot be reached.
        """
        place, target = (objects.join(self._place, self._layout.parent, name) for name in (unit, new))
        listed = objects.list_folder(place)
        seal, self.complete = self._layout.seal, self.complete - {unit}
        failed: OSError | None = None
        for path in sorted(listed, key=lambda path: path != seal):
            self._lease.require()
            try:
                objects.copy(objects.join(place, path), objects.join(target, path), self._lease.retry_seconds)
            except OSError as error:
                if connections.is_away(error):
                    raise
                failed = error  # not allowed, or too large for the store: it must not stand in the way
            if path == seal:
                self._remove(objects.join(place, path))
        if failed is not None:
            self.say(f"{target} does not hold all of {unit}, which is deleted: {describe(failed)}")
        self.delete(unit)


def _is_same(sent: pathlib.Path, now: pathlib.Path) -> bool:
    try:
        return sent.samefile(now)
    except OSError:
        return False


def describe(error: OSError) -> str:
    """Return the reason and the place of an error."""
    return (error.strerror or str(error)) + (f": {error.filename}" if error.filename else "")
