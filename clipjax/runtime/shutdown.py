"""Signals: SIGTERM and SIGINT ask for a stop at a step that all processes agree on, SIGUSR1 for stacks and a profile.

Reading order: `Shutdown` (the signals), `_Agreement` (the step at which several processes stop). Until a session has
made a `Shutdown`, `start_signals` acts on them.

Python's handlers run in the main thread, which may be compiling or waiting for a device. So a thread reads the signals
from the pipe that Python writes their numbers to, and acts on them at once.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import types
from typing import Any, TextIO

import jax

from clipjax.runtime import process_log, processes, stacks
from clipjax.runtime.start_signals import STOP_SIGNALS

PROFILE_SIGNAL = signal.SIGUSR1

INSIST_SECONDS = 5.0
"""Third and later signals to stop end the process at once if they come this soon after the one before."""

_POLL_SECONDS = 0.5  # how often a process asks whether another one is to stop
_END = 0  # no signal has this number


class Shutdown:
    """The requests to stop that a process gets by signals, or makes itself, and the step at which all processes stop.

    The first signal is remembered, so that the loop can save and leave. A second one changes nothing: a save in
    progress is not lost. A third within `INSIST_SECONDS` ends the process at once. Only the main thread may make one.

    Args:
        log: file for the stacks of all threads, which SIGUSR1 writes at once; None: standard error.
        effect: of the first signal, for its message.

    Attributes:
        number: the signal that stops the run, on all processes the same; None: none does.
        error: the reason given to `request`, on all processes the same; None: none was.
    """

    def __init__(self, log: TextIO | None = None, *, effect: str = "the run saves and leaves") -> None:
        self.number: int | None = None
        self.error: str | None = None
        self._agreement = _Agreement(self) if jax.process_count() > 1 else None
        self._profile, self._log = threading.Event(), log or sys.__stderr__
        self._count, self._latest, self._effect = 0, 0.0, effect
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        self._write = write
        self._previous = {number: signal.signal(number, _wake) for number in (*STOP_SIGNALS, PROFILE_SIGNAL)}
        faulthandler.register(PROFILE_SIGNAL, file=self._log or 2, all_threads=True, chain=True)
        self._previous_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="signals")
        self._thread.start()

    def _listen(self) -> None:
        while (number := os.read(self._read, 1)[0]) != _END:
            if number == PROFILE_SIGNAL:
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stacks.write_missing(self._log)  # pyright: ignore[reportArgumentType]
                self._profile.set()
            elif number in STOP_SIGNALS:
                self.receive(number)

    def receive(self, number: int) -> None:
        """Act on a signal to stop."""
        now = time.monotonic()
        self._count += 1
        if self._count > 2 and now - self._latest <= INSIST_SECONDS:
            os._exit(128 + number)
        self._latest = now
        if self._count == 1:
            self._request(number, None)
            text = f"signal {number}: {self._effect}; a third within {INSIST_SECONDS:.0f} s ends it at once"
            # In a thread of its own: a file system or a terminal may block, and this one waits for the next signal.
            threading.Thread(target=_tell, args=(text,), daemon=True, name="message").start()

    def request(self, error: str) -> None:
        """Ask all processes to save and stop, because of trouble of this one; the first request counts."""
        self._request(None, error)

    def _request(self, number: int | None, error: str | None) -> None:
        if self._agreement is not None:
            self._agreement.request(number, error)
        elif self.number is None and self.error is None:
            self.number, self.error = number, error

    def due(self) -> bool:
        """Return True if the run is to stop after the step that this process has just started.

        All processes call it once after each step, and get the same answers. It can wait for the threads of the
        other processes, but never for a device.
        """
        if self._agreement is not None:
            return self._agreement.reached()
        return self.number is not None or self.error is not None

    @property
    def profile_requested(self) -> bool:
        """True after SIGUSR1, until `take_profile_request`."""
        return self._profile.is_set()

    def take_profile_request(self) -> bool:
        """Return True once for each SIGUSR1 (several before the call count as one)."""
        requested = self._profile.is_set()
        self._profile.clear()
        return requested

    def close(self) -> None:
        """Restore the handlers that were there before, unless a signal stops the run.

        Then this process leaves by itself, and another signal must not end it before it has.
        """
        faulthandler.unregister(PROFILE_SIGNAL)
        if self._agreement is not None:
            self._agreement.close()
        if self.number is not None:
            return
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._write, bytes([_END]))
        self._thread.join()
        os.close(self._write)
        os.close(self._read)


def _wake(number: int, frame: types.FrameType | None) -> None:
    """Do nothing: the thread that reads the pipe acts on the signal."""


def _tell(text: str) -> None:
    processes.show(text)
    process_log.info(text)


class _Agreement:
    """The agreement of several processes on the step to stop at, through the coordinator: no device takes part.

    A thread of each process looks for a request. Then it posts how many steps its main thread has passed, and from
    there the main thread goes at most one step on before it knows the posts of all: the step after the highest post
    is the one, and nobody has passed it. Threads post whatever their main thread waits for, so this cannot hang on a
    step, a compilation, an evaluation or a save.

    Steps are counted by the calls of `reached`, which are the same on all processes even if step numbers repeat.
    """

    def __init__(self, owner: Shutdown) -> None:
        self._owner = owner
        self._rank, self._count = jax.process_index(), jax.process_count()
        self._changed = threading.Condition()
        self._passed = 0
        self._posted: int | None = None
        self._agreed: int | None = None
        self._failure: Exception | None = None
        self._own_request = ""
        self._woken, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="stop-agreement")
        self._thread.start()

    def request(self, number: int | None, error: str | None) -> None:
        self._own_request = self._own_request or json.dumps({"number": number, "error": error})
        self._woken.set()

    def reached(self) -> bool:
        with self._changed:
            self._passed += 1
            self._changed.wait_for(lambda: self._posted is None or self._agreed is not None or self._failure)
            if self._failure is not None:
                raise RuntimeError("the processes cannot agree on a step to stop at") from self._failure
            return self._agreed is not None and self._passed >= self._agreed

    def _run(self) -> None:
        try:
            self._agree()
        except Exception as error:  # the coordinator is gone; JAX ends this process soon
            with self._changed:
                self._failure = None if self._closed.is_set() else error
                self._changed.notify_all()

    def _agree(self) -> None:
        while not (request := self._look()):
            self._woken.wait(_POLL_SECONDS)
            self._woken.clear()
            if self._closed.is_set():
                return
        with self._changed:
            posted = self._posted = self._passed
        processes.kv_set(f"stop_at/{self._rank}", str(posted))
        while len(posts := processes.kv_list("stop_at")) < self._count:
            if self._closed.wait(_POLL_SECONDS / 5):
                return
        with self._changed:
            self._owner.number, self._owner.error = request["number"], request["error"]
            self._agreed = max(map(int, posts.values())) + 1
            self._changed.notify_all()

    def _look(self) -> dict[str, Any] | None:
        """Return the request of this run, if there is one; leave that of this process, if it is the first."""
        if self._own_request:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                processes.kv_set("stop/request", self._own_request)
        text = processes.kv_list("stop").get("request")
        return json.loads(text) if text else None

    def close(self) -> None:
        self._closed.set()
        self._woken.set()
        self._thread.join(timeout=5)
