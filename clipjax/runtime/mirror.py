"""A local folder kept on an object store: a thread sends what has changed, at intervals, on request and at the end.

Plain files are sent whole when they have changed. A unit, such as a checkpoint, is sent once it is committed: plain
files first, then its own, and when the store has listed all of them, its seal. So a kill at any moment leaves a unit of
the store complete or without a seal. A unit is deleted on the store once a newer one is complete there, its seal first.

Trouble with the store is told once and tried again; it never stops the run, and never makes it wait, but for `send`.
"""

import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from clipjax.runtime import objects, process_log
from clipjax.runtime.lease import LeaseLost
from clipjax.runtime.staging import PINNED, Copies, Found, Layout, parts_of

INTERVAL_SECONDS = 30.0
"""Time between two looks for changed files; longer where sending them takes more than a tenth of it."""

VARIABLE = "CLIPJAX_MIRROR_SECONDS"
"""Environment variable that sets another time."""

CLOSE_SECONDS = 300.0
"""Time at the end of a run for which a store that takes nothing is tried again."""

_MAX_WAIT_SECONDS = 300.0  # between two tries
_RETRY_SECONDS = 1.0  # at the end
_WORKERS = 4
_LEFT_OUT = re.compile(r"\.|.*\.tmp$|(.*/)?\.[^/]*probe")
Work = Callable[[], None]


class Holder(Protocol):
    """The part of a `Lease` that a mirror needs."""

    @property
    def token(self) -> str:
        """Name of this holding."""
        ...

    def require(self) -> None:
        """Make sure that the lease is held now; raise `LeaseLost` if it is not."""

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Call a function with the reason once the lease is lost."""

    def release(self, *, delete: bool = False) -> None:
        """Give the folder up."""


class Mirror:
    """A local folder and its copy on a store, which this process alone writes to.

    Args:
        folder: the local one, filled by `staging.fill`.
        place: address of the folder of the store.
        lease: of that folder.
        layout: its units.
        copies: what was loaded.
        found: the units at the start.

    Attributes:
        folder: the local one.
        place: address of the folder of the store.
    """

    def __init__(
        self, folder: pathlib.Path, place: str, lease: Holder, *, layout: Layout, copies: Copies, found: Found
    ) -> None:
        self.folder, self.place, self._lease, self._layout, self._copies = folder, place, lease, layout, copies
        self._complete, self._leftovers = set(found.complete), set(found.incomplete)
        self._unsent = sorted(found.unsent)
        self._work: list[tuple[str, str, Work]] = []  # kind, unit, what to do; in order
        self._doomed: set[str] = set()
        self._sending = ""
        self._wake, self._lock, self._pass_lock = threading.Condition(), threading.Lock(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._ending, self._gave_up, self._told, self._error = False, False, False, ""
        self._say: Callable[[str], None] = print
        self._seconds = _interval(os.environ.get(VARIABLE))

    def start(self, *, say: Callable[[str], None], on_lost: Callable[[str], None]) -> None:
        """Begin to send.

        Args:
            say: shows a line about trouble with the store, in another thread.
            on_lost: gets the reason, in another thread, if another run takes the folder of the store over.
        """
        self._say = say
        self._lease.watch(on_lost)
        self._commit_unsent()
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")
        self._thread.start()

    def _commit_unsent(self) -> None:
        for unit in self._unsent:
            self.commit(unit)
        self._unsent = []

    def send_unsent(self) -> None:
        """Send what the last run on this machine had not sent yet, and wait until the store has it.

        Raises:
            OSError: the store does not take it.
        """
        self._commit_unsent()
        if error := self._pass():
            raise error

    def commit(self, unit: str, then: Work | None = None) -> None:
        """Send a unit that is complete in the local folder; it may be deleted there meanwhile.

        Args:
            unit: its name.
            then: is called in another thread once the unit is complete on the store.
        """
        source = self._pin(unit)
        self._add("commit", unit, lambda: self._send_unit(unit, source, then))

    def remove(self, unit: str) -> None:
        """Delete a unit on the store, once a newer one is complete there; one that waits to be sent is not sent."""
        with self._lock:
            waiting = [item for item in self._work if item[:2] == ("commit", unit) and unit != self._sending]
            self._work = [item for item in self._work if item not in waiting]
        if waiting:
            shutil.rmtree(self.folder / PINNED / unit, ignore_errors=True)
        self._add("remove", unit, lambda: self._doomed.add(unit))

    def rename(self, unit: str, new: str) -> None:
        """Rename a unit on the store to a name that is no unit's; its seal goes first."""
        self._add("rename", unit, lambda: self._rename_unit(unit, new))

    def send(self, path: pathlib.Path) -> None:
        """Send a file now, and wait until the store has it.

        Raises:
            OSError: the store does not take it.
        """
        self._lease.require()
        objects.write_file(objects.join(self.place, path.relative_to(self.folder).as_posix()), path)

    def flush(self, seconds: float | None = None) -> str:
        """Send all that is left; return why something is left after trying for some time, empty if nothing is.

        Args:
            seconds: for which a store that takes nothing is tried again; None: `CLOSE_SECONDS`.
        """
        limit = CLOSE_SECONDS if seconds is None and not self._gave_up else seconds or 0.0
        until, left = time.monotonic() + limit, None
        while (error := self._pass()) and not isinstance(error, LeaseLost):
            if left != (left := len(self._work)):
                until = time.monotonic() + limit
            if time.monotonic() >= until:
                self._gave_up = True
                break
            time.sleep(_RETRY_SECONDS)
        if not error:
            return ""
        if isinstance(error, LeaseLost):
            return str(error.strerror)
        return (
            f"not everything is on {self.place}: {_describe(error)}; what is missing lies in {self.folder}: the same "
            "command on this machine sends it"
        )

    def close(self, seconds: float | None = None) -> str:
        """Send what is left, end the thread and give the store's folder up; return what `flush` does."""
        with self._wake:
            self._ending = True
            self._wake.notify_all()
        if self._thread is None:
            self._lease.release(delete=True)  # nothing was written
            return ""
        self._thread.join()
        left = self.flush(seconds)
        self._lease.release()
        return left

    def _pin(self, unit: str) -> pathlib.Path:
        """Return a folder with the files of a unit that nobody deletes while they are being sent."""
        source, pinned = self.folder / self._layout.parent / unit, self.folder / PINNED / unit
        try:
            shutil.rmtree(pinned, ignore_errors=True)
            shutil.copytree(source, pinned, copy_function=os.link)
        except OSError:  # no hard links here: the unit is sent if it is there long enough
            shutil.rmtree(pinned, ignore_errors=True)
            return source
        return pinned

    def _add(self, kind: str, unit: str, work: Work) -> None:
        with self._lock:
            self._work.append((kind, unit, work))
        with self._wake:
            self._wake.notify_all()

    def _run(self) -> None:
        wait = 0.0
        while True:
            with self._wake:
                if not self._ending and not (self._work and not self._error):
                    self._wake.wait(wait)
                if self._ending:
                    return
            start = time.monotonic()
            failed = self._pass() is not None
            took = time.monotonic() - start
            wait = min(_MAX_WAIT_SECONDS, max(2 * wait, 1.0)) if failed else max(self._seconds, 10 * took)

    def _pass(self) -> OSError | None:
        """Send what there is; return the first error."""
        with self._pass_lock:
            try:
                self._lease.require()
                self._send_plain()
                while self._work:
                    with self._lock:
                        kind, unit, work = self._work[0]
                        self._sending = unit if kind == "commit" else ""
                    work()
                    with self._lock:
                        self._sending = ""
                        self._work.pop(0)
                self._send_marks()
                self._delete_doomed()
                self._copies.write(self._lease.token)
            except OSError as error:
                self._sending = ""
                self._tell(error)
                return error
            if self._told:
                self._say(f"{self.place} takes files again")
            self._told, self._error = False, ""
            return None

    def _tell(self, error: OSError) -> None:
        self._error = _describe(error)
        if not self._told and not isinstance(error, LeaseLost):
            self._told = True
            self._say(f"{self.place} does not take the run's files: {self._error}; training goes on, and tries again")

    def _send_plain(self) -> None:
        changed = [
            path
            for path in parts_of(self.folder, skip=(PINNED, self._layout.parent))
            if not _LEFT_OUT.match(path) and not self._copies.is_unchanged(path)
        ]
        self._send_all("", changed, self.folder)

    def _send_marks(self) -> None:
        """Send what has changed in units that are complete on the store: their seals, and files that mark them."""
        for unit in sorted(self._complete):
            inside = self.folder / self._layout.parent / unit
            for path in parts_of(inside) if inside.is_dir() else ():
                whole = f"{self._layout.parent}/{unit}/{path}"
                if "/" not in path and not _LEFT_OUT.match(path) and not self._copies.is_unchanged(whole):
                    self._send_all("", [whole], self.folder)

    def _send_all(self, inside: str, paths: list[str], source: pathlib.Path) -> None:
        """Send files, several at a time; those that are gone meanwhile are left out.

        Args:
            inside: folder on the store below the mirror's.
            paths: inside `source`, and there.
            source: the local folder.

        Raises:
            OSError: the store does not take one; the others are sent all the same.
        """

        def send(path: str) -> OSError | None:
            try:
                before = (source / path).stat()
                self._lease.require()
                objects.write_file(objects.join(self.place, *filter(None, (inside, path))), source / path)
            except FileNotFoundError as error:
                return None if not (source / path).exists() else error
            except OSError as error:
                return error
            if not inside:
                self._note(path, before)
            return None

        with ThreadPoolExecutor(_WORKERS) as pool:
            errors = [error for error in pool.map(send, paths) if error is not None]
        if errors:
            raise errors[0]

    def _note(self, path: str, before: os.stat_result) -> None:
        """Note that a file was sent, unless it has changed meanwhile; which version it became is not known."""
        try:
            now = (self.folder / path).stat()
            if (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
                self._copies.note(path, "")
        except OSError:
            pass

    def _send_unit(self, unit: str, source: pathlib.Path, then: Work | None) -> None:
        if not (source / self._layout.seal).exists():
            return  # deleted before it could be sent
        self._send_plain()  # so that a unit is never ahead of what it belongs to
        inside, seal = f"{self._layout.parent}/{unit}", self._layout.seal
        place = objects.join(self.place, inside)
        local = {path: (source / path).stat().st_size for path in parts_of(source)}
        before = objects.list_folder(place)
        if seal in before:
            objects.delete(objects.join(place, seal))
        self._complete.discard(unit)
        for path in before.keys() - local.keys():
            objects.delete(objects.join(place, path))
        self._send_all(inside, [path for path in local if path != seal], source)
        listed = objects.list_folder(place)
        for path, size in local.items():
            if path != seal and (path not in listed or listed[path].size != size):
                raise OSError(None, "the store does not list a file as it was sent", objects.join(place, path))
        self._lease.require()
        objects.write_file(objects.join(place, seal), source / seal)
        for path, each in objects.list_folder(place).items():
            if path in local and _is_same(source / path, self.folder / inside / path):
                self._copies.note(f"{inside}/{path}", each.version)
        self._complete.add(unit)
        self._leftovers.discard(unit)
        self._doomed.discard(unit)
        shutil.rmtree(self.folder / PINNED / unit, ignore_errors=True)
        if then is not None:
            try:
                then()
            except OSError as error:
                process_log.info(f"the commit of {inside} cannot be recorded: {_describe(error)}")

    def _delete_doomed(self) -> None:
        """Delete the units that the run has deleted, and what killed runs have left."""
        for unit in sorted(self._leftovers):
            self._delete(unit)
            self._leftovers.discard(unit)
        for unit in sorted(self._doomed):
            if any(_number(other) > _number(unit) for other in self._complete - self._doomed):
                self._delete(unit)
                self._complete.discard(unit)
                self._doomed.discard(unit)

    def _delete(self, unit: str) -> None:
        place = objects.join(self.place, self._layout.parent, unit)
        listed = objects.list_folder(place)
        for path in sorted(listed, key=lambda path: path != self._layout.seal):
            self._lease.require()
            objects.delete(objects.join(place, path))
            self._copies.forget(f"{self._layout.parent}/{unit}/{path}")

    def _rename_unit(self, unit: str, new: str) -> None:
        place = objects.join(self.place, self._layout.parent, unit)
        listed = objects.list_folder(place)
        seal, self._complete = self._layout.seal, self._complete - {unit}
        for path in sorted(listed, key=lambda path: path != seal):
            self._lease.require()
            objects.copy(objects.join(place, path), objects.join(self.place, self._layout.parent, new, path))
            if path == seal:
                objects.delete(objects.join(place, path))
        self._delete(unit)


def _is_same(sent: pathlib.Path, now: pathlib.Path) -> bool:
    try:
        return sent.samefile(now)
    except OSError:
        return False


def _number(unit: str) -> int:
    return int(unit) if unit.isdecimal() else -1


def _describe(error: OSError) -> str:
    return (error.strerror or str(error)) + (f": {error.filename}" if error.filename else "")


def _interval(text: str | None) -> float:
    try:
        seconds = float(text or INTERVAL_SECONDS)
    except ValueError:
        return INTERVAL_SECONDS
    return seconds if seconds > 0 else INTERVAL_SECONDS
