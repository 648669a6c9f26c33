"""One owner for a folder of an object store: a lease, which its holder renews and which else passes to the next one.

A store has no locks that end with a process. So process 0 of a run keeps an object `.owner` in its workdir, and writes
it anew three times within the lease's time, on condition that nobody else has. Who finds an object there looks at it
for that time: if it changes, its holder lives; if not, it is taken over, again on condition. No clocks are compared.

A start on the machine of the run before needs not wait: it holds the lock of that run's local folder, so that run is
gone if the lease is that folder's.
"""

import contextlib
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clipjax.runtime import objects, owner

FILE = owner.FILE
SECONDS = 30.0
"""Time after which a lease that is not renewed may pass to another run."""

VARIABLE = "CLIPJAX_LEASE_SECONDS"
"""Environment variable that sets another time."""

_MAX_BYTES = 65_536
_MAX_SECONDS = 3600.0
_LOOKS = 6  # within the time of a lease
_WORKERS = 8


class LeaseLost(OSError):
    """Another run has taken the folder over."""


class Lease:
    """The lease of a folder of a store, held from the constructor on until `release`.

    Args:
        place: address of the folder.
        own_token: of the last holder whose local folder this process has locked; empty: there was none.
        tell: shows a line while this waits for another holder.
        is_locked: that folder's file system has locks, so that its last user is gone.

    Attributes:
        token: names this holding.
        retry_seconds: after which no write to the folder may be tried again without `require`.
        continues: the last holder was the one of `own_token`, and nobody has held the lease since.

    Raises:
        ValueError: another run holds it.
        OSError: the store cannot be used.
    """

    def __init__(
        self, place: str, own_token: str = "", tell: Callable[[str], None] = print, *, is_locked: bool = True
    ) -> None:
        self._place, self._object, self._is_locked = place, objects.join(place, FILE), is_locked
        self._seconds = _seconds(os.environ.get(VARIABLE))
        self.retry_seconds = self._seconds / 2
        self.token, self._number = secrets.token_hex(16), 0
        self._about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join(sys.argv),
            "token": self.token,
            "seconds": self._seconds,
        }
        self._lock = threading.Lock()
        self._lost = ""
        self.continues = self._is_new = False
        self._renewed_at = 0.0
        self._version = self._take(own_token, tell)
        self._ended = threading.Event()
        self._on_lost: Callable[[str], None] | None = None
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    def _content(self, **more: Any) -> bytes:
        self._number += 1  # else two contents, and so their etags, would be equal
        return json.dumps({**self._about, "number": self._number, **more}).encode()

    def _take(self, own_token: str, tell: Callable[[str], None]) -> Any:
        """Return the version of the object, which is now this holder's."""
        while True:
            self._renewed_at = _now()
            if version := objects.create(self._object, self._content()):
                self._is_new = True
                return version
            found = _read(self._object)
            if found is None:
                continue
            holder, version = found
            if holder.get("token") == self.token:  # only an answer was lost
                return version
            self.continues = bool(own_token) and own_token in (holder.get("token"), holder.get("follows"))
            if not (self.continues and self._is_locked) and not holder.get("released"):
                _watch({self._place: found}, tell)
            self._renewed_at = _now()
            follows = own_token if self.continues else ""  # a kill may come before this token is kept
            if taken := objects.replace(self._object, self._content(follows=follows), version):
                return taken

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Call a function, in another thread, with the reason once the lease is lost."""
        with self._lock:
            self._on_lost = on_lost
        if self._lost:
            on_lost(self._lost)

    def require(self) -> None:
        """Make sure that the lease is held now, before something is written to the folder.

        Raises:
            LeaseLost: it is not.
            OSError: the store does not tell.
        """
        if _now() - self._renewed_at > self._seconds / 2:
            self._renew()
        if self._lost:
            raise LeaseLost(None, self._lost, self._place)

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            with contextlib.suppress(Exception):  # the next try, or whoever writes, sees it again
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            if self._lost or self._ended.is_set():
                return
            start = _now()
            version = objects.replace(self._object, self._content(), self._version)
            if version is None:
                found = _read(self._object)
                if found is None:  # somebody has deleted the object, and nobody has taken its place
                    version = objects.create(self._object, self._content())
                    found = None if version else _read(self._object)
                elif found[0].get("token") == self.token:  # only an answer was lost
                    version = found[1]
            if version is not None:
                self._version, self._renewed_at = version, start
                return
            by = "its file .owner comes and goes" if found is None else _describe(found[0])
            self._lost = (
                f"{self._place} is not this run's any more ({by}); nothing more is written there, so that the two do "
                "not mix"
            )
            on_lost = self._on_lost
        if on_lost is not None:
            on_lost(self._lost)

    def release(self, *, delete: bool = False) -> None:
        """Give the folder up, if the store can be reached; with `delete` leave no object that was not there before."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            if not self._lost:
                with contextlib.suppress(OSError):  # it passes after its time
                    released = objects.replace(self._object, self._content(released=True), self._version)
                    if released is not None and delete and self._is_new:
                        objects.delete(self._object)


def refuse_held(places: Sequence[str], tell: Callable[[str], None] = print) -> None:
    """Refuse folders of stores that another run holds, without taking them; write nothing.

    Args:
        places: addresses of the folders, which are looked at together.
        tell: shows a line while this waits to see whether a holder is alive.

    Raises:
        ValueError: another run holds one.
        OSError: a store cannot be used.
    """
    with ThreadPoolExecutor(_WORKERS) as pool:
        found = dict(zip(places, pool.map(lambda place: _read(objects.join(place, FILE)), places), strict=True))
    held = {place: each for place, each in found.items() if each is not None and not each[0].get("released")}
    if held:
        _watch(held, tell)


def _watch(held: dict[str, tuple[dict[str, Any], Any]], tell: Callable[[str], None]) -> None:
    """Return once the leases of some folders have not changed for their time, or are given up.

    Args:
        held: content and version of each lease, by its folder; those that are given up are removed.
        tell: shows a line first.

    Raises:
        ValueError: one has changed.
    """
    seconds = max(_seconds(holder.get("seconds")) for holder, _ in held.values())
    until = time.monotonic() + seconds
    more = f" (and {len(held) - 1} more like it)" if len(held) > 1 else ""
    tell(f"{next(iter(held))} has an owner{more}; waiting up to {seconds:.0f} s to see whether it is alive")
    while held and time.monotonic() < until:
        time.sleep(min(seconds / _LOOKS, max(0.0, until - time.monotonic())))
        for place, (_, version) in list(held.items()):
            now = _read(objects.join(place, FILE))
            if now is None or now[0].get("released"):
                del held[place]
            elif now[1] != version:
                raise ValueError(f"--workdir={place}: {_describe(now[0])}")


def _now() -> float:
    """Return seconds of a clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _read(place: str) -> tuple[dict[str, Any], Any] | None:
    """Return the content of a lease and its version; None if there is none."""
    try:
        content, version = objects.read_versioned(place, _MAX_BYTES)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}, version


def _describe(holder: dict[str, Any]) -> str:
    try:
        return owner.describe(holder)
    except LookupError:
        return f"another run holds it, and its file {FILE} does not say which; use another workdir"


def _seconds(value: Any) -> float:
    """Return the time of a lease from a text or a number that others may have written."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return SECONDS
    return seconds if 0 < seconds <= _MAX_SECONDS else SECONDS
