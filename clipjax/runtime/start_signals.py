"""Signals before training can save: SIGTERM and SIGINT end all processes of a start soon, SIGUSR1 writes stacks.

Reading order: `session` (from the first line of a command on), `hand_over` (to `shutdown.Shutdown`), `_Start`.

The main thread may wait for hours in a file system or for another process, so threads act on the signals. A text with
the coordinator, which the first writer sets for good, decides for all processes: the start is stopped, or training has
begun, and then a signal is the business of `Shutdown`. Nothing here imports JAX, which takes seconds.
"""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping

from clipjax.runtime import process_log, stacks
from clipjax.runtime.terminal import printable
from clipjax.runtime.work import kill_workers

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STACKS_SIGNAL = signal.SIGUSR1
_BEGUN = "begun"
_POLL_SECONDS = 0.5  # how often a process asks whether another one has stopped the start
_SAY_SECONDS = 3.0  # for a line to be written
_LAST_SECONDS = 3.0  # for the others to read why: the end of process 0 takes the coordinator away
_END = 0  # no signal has this number

_open: list["_Start"] = []


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Let signals end the start in the `with` block, until `hand_over`. Only the main thread may enter."""
    start = _Start()
    _open.append(start)
    try:
        yield
    finally:
        _open.remove(start)
        start.close()


def connected(kv_set: Callable[[str, str], None], kv_list: Callable[[str], Mapping[str, str]]) -> None:
    """Let the processes of this start stop together from now on; JAX ends one that asks before it is connected.

    Args:
        kv_set: leaves a text with the coordinator; a `RuntimeError` if there is one under this key.
        kv_list: gives the texts of a folder of keys.
    """
    for start in _open:
        start.connect(kv_set, kv_list)


def joined(*, first: bool) -> None:
    """Tell which process this is; from now on only the first one shows the line, and leaves last."""
    for start in _open:
        start.is_first = first


def hand_over(receive: Callable[[int], None]) -> None:
    """Let training answer signals from now on; do not return if the start was stopped.

    Args:
        receive: gets the number of a signal that came too late to stop the start.
    """
    for start in _open:
        start.hand_over(receive)


class _Start:
    """The signals of one start of this process.

    Attributes:
        is_first: this process shows why it leaves, and leaves last; None: nobody knows yet, and all do.
    """

    def __init__(self) -> None:
        self.is_first: bool | None = None
        self._store: tuple[Callable[[str, str], None], Callable[[str], Mapping[str, str]]] | None = None
        self._outcome = ""
        self._deciding, self._leaving, self._passing = threading.Lock(), threading.Lock(), threading.Lock()
        self._count = 0
        self._late: list[int] = []
        self._receive: Callable[[int], None] = self._late.append
        self._closed = threading.Event()
        self._follower: threading.Thread | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)  # before any is caught
        self._previous = {number: signal.signal(number, _wake) for number in (*STOP_SIGNALS, STACKS_SIGNAL)}
        self._thread = threading.Thread(target=self._listen, daemon=True, name="start-signals")
        self._thread.start()

    def connect(self, kv_set: Callable[[str, str], None], kv_list: Callable[[str], Mapping[str, str]]) -> None:
        """See `connected`."""
        self._store = kv_set, kv_list
        self._follower = threading.Thread(target=self._follow, daemon=True, name="start-outcome")
        self._follower.start()

    def _listen(self) -> None:
        while (number := os.read(self._read, 1)[0]) != _END:
            if number == STACKS_SIGNAL:
                with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
                    stacks.write(sys.__stderr__)  # pyright: ignore
            elif number in STOP_SIGNALS:
                self._count += 1
                if self._count > 2 and self._outcome != _BEGUN:  # the coordinator may hold up an orderly end
                    os._exit(128 + number)
                threading.Thread(target=self._stop, args=(number,), daemon=True, name="stop").start()

    def _stop(self, number: int) -> None:
        outcome = self._decide(str(number))
        if outcome != _BEGUN:
            self._leave(int(outcome))
        with self._passing:
            self._receive(number)

    def _decide(self, proposal: str) -> str:
        """Return the outcome of the start, which is the proposal if there was none."""
        with self._deciding:
            if not self._outcome:
                with contextlib.suppress(RuntimeError):  # it is decided, or the coordinator is gone
                    if self._store is not None:
                        self._store[0]("start/outcome", proposal)
                self._outcome = self._look() or proposal
            return self._outcome

    def _look(self) -> str:
        """Return the outcome that some process has left; empty without one, or without a coordinator."""
        with contextlib.suppress(RuntimeError):
            return "" if self._store is None else self._store[1]("start").get("outcome", "")
        return ""

    def _follow(self) -> None:
        while not self._outcome and not self._closed.wait(_POLL_SECONDS):
            outcome = self._look()
            if outcome and outcome != _BEGUN:
                self._leave(int(outcome))

    def hand_over(self, receive: Callable[[int], None]) -> None:
        """See `hand_over`."""
        outcome = self._decide(_BEGUN)
        if outcome != _BEGUN:
            self._leave(int(outcome))
        with self._passing:
            self._receive = receive
            while self._late:
                receive(self._late.pop(0))

    def _leave(self, number: int) -> None:
        """End this process."""
        with self._leaving:
            text = (
                f"stopped by signal {number} before the first step of this start; there is nothing to save, and the "
                "same command starts again"
            )
            message = threading.Thread(target=self._tell, args=(text,), daemon=True, name="message")
            message.start()
            message.join(_SAY_SECONDS)  # a file system or a terminal may block
            kill_workers()
            if self.is_first is not False and self._store is not None:
                self._closed.wait(_LAST_SECONDS)
            os._exit(128 + number)

    def _tell(self, text: str) -> None:
        if self.is_first is not False:
            with contextlib.suppress(OSError, ValueError):  # a broken pipe, a closed stream
                print(f"clipjax: {printable(text)}", file=sys.stderr, flush=True)
        process_log.info(text)

    def close(self) -> None:
        """Restore the handlers that were there before, unless those of `Shutdown` are to stay to the end."""
        self._closed.set()
        if self._follower is not None:
            self._follower.join(timeout=5)
        if signal.getsignal(STOP_SIGNALS[0]) is not _wake:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._write, bytes([_END]))
        self._thread.join()
        os.close(self._write)
        os.close(self._read)


def _wake(number: int, frame: types.FrameType | None) -> None:
    """Do nothing: the thread that reads the pipe acts on the signal."""
