"""A local folder kept on an object store: a thread sends what has changed, at intervals, on request and at the end.

Plain files are sent whole when they have changed. A unit, such as a checkpoint, is sent once it is committed: plain
files first, then its own, and when the store has listed all of them, its seal. So a kill at any moment leaves a unit of
the store complete or without a seal. A unit is deleted on the store once a newer one is complete there, its seal first.

Trouble with the store is told once and tried again; it never stops the run, and never makes it wait, but for `send`.
"""

import contextlib
import itertools
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from clipjax.runtime import process_log
from clipjax.runtime.lease import LeaseLost
from clipjax.runtime.sender import Holder, Sender, Unreadable, describe
from clipjax.runtime.staging import PINNED, Copies, Found, Layout

INTERVAL_SECONDS = 30.0
"""Time between two looks for changed files; longer where sending them takes more than a tenth of it."""

VARIABLE = "CLIPJAX_MIRROR_SECONDS"
"""Environment variable that sets another time."""

CLOSE_SECONDS = 300.0
"""Time at the end of a run for which a store that takes nothing is tried again."""

_MAX_WAIT_SECONDS = 300.0  # between two tries
_RETRY_SECONDS = 1.0  # at the end
Work = Callable[[], None]


@dataclass(frozen=True, eq=False)
class _Item:
    """A change of a unit on the store; `source` are the files of one that is sent."""

    unit: str
    work: Work
    source: pathlib.Path | None = None


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
        self._sender = Sender(folder, place, lease, layout=layout, copies=copies, found=found, say=self._tell_line)
        self._unsent = sorted(found.unsent, key=_number)
        self._work = [self._renaming(unit, new) for unit, new in found.renames.items()]  # in order
        self._doomed = set[str]()
        self._current: _Item | None = None
        self._wake, self._lock, self._pass_lock = threading.Condition(), threading.Lock(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._ending, self._gave_up, self._told, self._error = False, False, False, ""
        self._say: Callable[[str], None] = print
        self._pins = itertools.count()
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
        self._drop_waiting(unit)  # an earlier unit of this name
        self._add(_Item(unit, lambda: self._send_unit(unit, source, then), source))

    def remove(self, unit: str) -> None:
        """Delete a unit on the store, once a newer one is complete there; one that waits to be sent is not sent."""
        self._drop_waiting(unit)
        self._add(_Item(unit, lambda: self._doomed.add(unit)))

    def rename(self, unit: str, new: str) -> None:
        """Rename a unit on the store to a name that is no unit's; its seal goes first.

        One that waits to be sent is not sent. A start that goes on from here does what a kill has left undone.
        """
        self._drop_waiting(unit)
        self._copies.forget_folder(f"{self._layout.parent}/{unit}")
        self._copies.renames[unit] = new
        with contextlib.suppress(OSError):  # the disk is full: it is done if this process lives
            self._copies.write(self._lease.token)
        self._add(self._renaming(unit, new))

    def _renaming(self, unit: str, new: str) -> _Item:
        def rename() -> None:
            self._sender.rename(unit, new)
            if self._copies.renames.get(unit) == new:
                del self._copies.renames[unit]
            self._copies.write(self._lease.token)  # else another start would rename what is sent next

        return _Item(unit, rename)

    def _drop_waiting(self, unit: str) -> None:
        with self._lock:
            dropped = [item for item in self._work if item.unit == unit and item.source and item is not self._current]
            self._work = [item for item in self._work if item not in dropped]
        for item in dropped:
            self._unpin(item.source)

    def send(self, path: pathlib.Path) -> None:
        """Send a file now, and wait until the store has it.

        Raises:
            OSError: the store does not take it.
        """
        self._sender.send_file(path)

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
            f"not everything is on {self.place}: {describe(error)}; what is missing lies in {self.folder}: the same "
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
        source = self.folder / self._layout.parent / unit
        pinned = self.folder / PINNED / f"{unit}.{next(self._pins)}"
        try:
            shutil.copytree(source, pinned, copy_function=os.link)
        except OSError:  # no hard links here: the unit is sent if it is there long enough
            shutil.rmtree(pinned, ignore_errors=True)
            return source
        return pinned

    def _unpin(self, source: pathlib.Path | None) -> None:
        if source is not None and source.parent == self.folder / PINNED:
            shutil.rmtree(source, ignore_errors=True)

    def _add(self, item: _Item) -> None:
        with self._lock:
            self._work.append(item)
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
                self._sender.send_plain()
                while self._work:
                    with self._lock:
                        self._current = item = self._work[0]
                    try:
                        item.work()
                    except Unreadable as error:
                        self._say(f"{self._layout.parent}/{item.unit} is not on {self.place}: {describe(error)}")
                        self._unpin(item.source)
                    with self._lock:
                        self._current = None
                        self._work.remove(item)
                self._sender.send_marks()
                self._delete_doomed()
                self._copies.write(self._lease.token)
            except Exception as error:  # a thread that ends would send nothing any more
                self._current = None
                told = error if isinstance(error, OSError) else OSError(None, f"{type(error).__name__}: {error}")
                self._tell(told)
                return told
            if self._told:
                self._say(f"{self.place} takes files again")
            self._told, self._error = False, ""
            return None

    def _tell(self, error: OSError) -> None:
        self._error = describe(error)
        if not self._told and not isinstance(error, LeaseLost):
            self._told = True
            self._say(f"{self.place} does not take the run's files: {self._error}; training goes on, and tries again")

    def _send_unit(self, unit: str, source: pathlib.Path, then: Work | None) -> None:
        is_sent = self._sender.send_unit(unit, source)
        self._unpin(source)
        if not is_sent:
            return
        self._doomed.discard(unit)
        if then is not None:
            try:
                then()
            except OSError as error:
                process_log.info(f"the commit of {self._layout.parent}/{unit} cannot be recorded: {describe(error)}")

    def _delete_doomed(self) -> None:
        """Delete the units that the run has deleted, and what killed runs have left."""
        sender = self._sender
        for unit in sorted(sender.leftovers):
            self._say(f"{self.place}: {self._layout.parent}/{unit} was never sent whole; it is deleted there")
            sender.delete(unit)
            sender.leftovers.discard(unit)
        for unit in sorted(self._doomed):
            if any(_number(other) > _number(unit) for other in sender.complete - self._doomed):
                sender.delete(unit)
                sender.complete.discard(unit)
                self._doomed.discard(unit)

    def _tell_line(self, line: str) -> None:
        self._say(line)


def _number(unit: str) -> int:
    return int(unit) if unit.isdecimal() else -1


def _interval(text: str | None) -> float:
    try:
        seconds = float(text or INTERVAL_SECONDS)
    except ValueError:
        return INTERVAL_SECONDS
    return seconds if 0 < seconds <= _MAX_WAIT_SECONDS else INTERVAL_SECONDS
