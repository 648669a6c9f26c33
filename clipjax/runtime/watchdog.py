"""The watchdog: ends all processes of a run that makes no progress, with the stacks of each in its log.

Reading order: `Watchdog` (the thread that watches), `Peers` (several processes); `deadline.py` has the rule, `work.py`
measures work. A sign of work is that of this process, its loader workers, or another process in a phase that may take
any time.

A file system that blocks may be what the run is stuck in, so nothing that the watchdog does waits for one: messages
are written by threads of their own, and a timer of the kernel ends the process if even Python itself is held up.
"""

import contextlib
import faulthandler
import json
import os
import pathlib
import queue
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import NoReturn, Self, TextIO

import jax

from clipjax.runtime import process_log, processes, stacks
from clipjax.runtime.deadline import MEDIAN_STEPS, READING, Deadline
from clipjax.runtime.work import WorkMeter, is_work, kill_workers

TICK_SECONDS = 2.0
"""Time between two looks of the watchdog, and between two signs of life of a process."""

SILENT_SECONDS = 20.0
"""Silence of a process before process 0 names it to all, which ends nothing: JAX does, some seconds later."""

END_SECONDS = 30.0
"""Time to tell why and to end; then SIGALRM ends the process, whatever it is held up by."""

SLOW_READ_SECONDS = 10.0
"""Time after which the reading of data is taken to wait for its storage."""

_SAY_SECONDS = 3.0  # for a message to be written
_PAUSE_SECONDS = 2.0  # a sleep that is longer by this much was a pause of the machine
_OWN_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # of JAX, which no other process causes
_LEFT = "left"  # in place of the sign of life of a process that watches no longer
_GRACE_TICKS = 3  # for the other processes to write their stacks, and to show which of them is silent


class Watchdog:
    """The thread that ends this process, and so the run, if it is stuck; a context manager.

    Args:
        stuck_seconds: limit of `recovery.stuck_seconds`; None: no limit, and only other processes are heard.
        log: file for the stacks of all threads; None: the log of this process, once it is open, or standard error.
        tick_seconds: time between two looks.
        storage_seconds: time that the storage of the data may take to answer, with all tries, before the limit counts.
    """

    def __init__(
        self,
        stuck_seconds: float | None,
        *,
        log: TextIO | None = None,
        tick_seconds: float = TICK_SECONDS,
        storage_seconds: float = 0.0,
    ) -> None:
        self._limited = stuck_seconds is not None
        self._storage_seconds, self._reads_since = storage_seconds, 0.0
        self._deadline = Deadline(stuck_seconds or 0.0, time.monotonic())
        self._lock = threading.Lock()
        self._log, self._tick = log, tick_seconds
        self._step = 0
        self._peers = Peers(tick_seconds) if jax.process_count() > 1 else None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Self:
        # JAX ends a process by SIGABRT when another one is dead; its stacks go to the log too.
        faulthandler.enable(self._log or sys.__stderr__ or 2)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._peers is not None:
            self._peers.close()
        faulthandler.enable(sys.__stderr__ or 2)

    def beat(self, step: int) -> None:
        """Tell that a step has been started; the loop calls it once in each turn."""
        with self._lock:
            self._step = step
            self._deadline.beat(time.monotonic())

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Allow the `with` block any time in which some process works.

        Args:
            phase: name of the block for messages, as in "evaluation".
        """
        with self._lock:
            self._deadline.enter(phase, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                self._deadline.leave(time.monotonic())

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Give the reading of data in the `with` block no more time in the first steps than in later ones.

        Where its storage may take long to answer, it has that time as well, and the other processes wait with it.
        """
        self._reads_since = time.monotonic()
        is_phase = self._storage_seconds or self._deadline.starting
        with self.paused(READING) if is_phase else contextlib.nullcontext():
            yield

    def _is_busy(self, now: float, *, works: bool) -> bool:
        """Return True in a phase in which some process works, or storage may still answer."""
        phases = self._deadline.phases
        if READING in phases and SLOW_READ_SECONDS < now - self._reads_since < self._storage_seconds:
            return True
        return works and bool(phases) and phases != [READING]

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Name the process whose death made an operation of all processes fail in the `with` block.

        An error says only that a connection was lost. The other processes wait a few seconds to see who is silent.
        After the block everything is closed, which can wait for the last save.
        """
        try:
            yield
        except Exception as error:
            if self._peers is not None:
                self._peers.leave(repr(error))
                if isinstance(error, jax.errors.JaxRuntimeError):
                    self._explain(self._peers)
            raise
        finally:
            with self._lock:
                self._deadline.enter("closing", time.monotonic())

    def _explain(self, peers: "Peers") -> None:
        """Name the processes that are dead, here and, as no error may have reached them yet, on the others."""
        lines = peers.explain()
        for line in lines:
            _say(line)
        if lines:
            peers.tell_at_once("; ".join(lines))
            # The end of process 0 takes its messages with it: they are read in one tick, and shown in another.
            time.sleep((_GRACE_TICKS if jax.process_index() == 0 else 1) * self._tick)

    def _watch(self) -> None:
        meter = WorkMeter()
        work = meter.read()
        while True:
            before = time.monotonic()
            if self._closed.wait(self._tick):
                return
            now = time.monotonic()
            took, done = now - before, meter.read()
            with self._lock:
                if took > self._tick + _PAUSE_SECONDS:
                    self._deadline.shift(took - self._tick)
                busy = self._is_busy(now, works=is_work(work, done, took))
                if busy:
                    self._deadline.worked(now)
                if self._peers is not None and self._peers.others_worked():
                    self._deadline.worked(now)
                waited, limit = self._deadline.waited(now), self._deadline.limit
            work = done
            if self._peers is not None:
                self._peers.tell(busy=busy, watching=self._limited and waited > limit / 6)
                for line in self._peers.news():
                    _say(line)
                if self._peers.stuck:
                    self._end(self._peers.stuck)
            if self._limited and waited > limit:
                self._end(self._describe(waited, limit))

    def _describe(self, waited: float, limit: float) -> str:
        phase = f" in {self._deadline.phases[-1]}" if self._deadline.phases else ""
        name = f"process {jax.process_index()} ({socket.gethostname()})"
        return (
            f"{name} is stuck after step {self._step}{phase}: no progress for {waited:.0f} s (at most {limit:.0f} s: "
            f"recovery.stuck_seconds, or {MEDIAN_STEPS} steps), it waits in {_place()}"
        )

    def _end(self, text: str) -> NoReturn:
        # A write that blocks below holds up all of Python. Without a handler SIGALRM ends the process with its threads.
        processes.end_within(END_SECONDS)
        if self._peers is not None:
            self._peers.announce(text)
        log = (self._log or process_log.open_file()) if _say(text) else None  # a log that blocks gets no stacks
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stacks.write(log or sys.__stderr__)  # pyright: ignore
        if self._peers is not None:
            time.sleep(_GRACE_TICKS * self._tick)
            for line in self._peers.silent_lines():
                _say(line)
            if jax.process_index() == 0:  # its end takes the messages of the others with it
                time.sleep(self._tick)
        kill_workers()
        os._exit(1)


class Peers:
    """The signs of life of all processes, through the coordinator, in a thread: the coordinator may not answer.

    Process 0, where they lie, always looks at them, and names to all those that are silent; the others look only when
    they wait for long. With a thousand processes the signs are many.
    """

    def __init__(self, tick_seconds: float) -> None:
        self._tick = tick_seconds
        self._rank, self._count = jax.process_index(), jax.process_count()
        self._beats = self._busy = 0
        self._watching = self._ending = self._others_worked = False
        self._announcement = ""
        self._moved: dict[int, tuple[float, str]] = {}  # by rank: when its sign of life last changed, and to what
        self._hosts: dict[int, str] = {}
        self._named: set[int] = set()
        self._told: dict[str, str] = {}  # by rank: what process 0 has said of it
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answered = time.monotonic()
        self.stuck = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="signs-of-life")
        self._thread.start()

    def tell(self, *, busy: bool, watching: bool) -> None:
        """Note that this process works in a phase, and whether it looks at the others."""
        self._busy += busy
        self._watching = watching or self._ending

    def others_worked(self) -> bool:
        """Return True once after another process has worked in a phase; only known while `watching`."""
        worked, self._others_worked = self._others_worked, False
        return worked

    def announce(self, text: str) -> None:
        """Tell all processes that one is stuck; they write their stacks and end."""
        self._announcement = text
        self._watching = self._ending = True

    def tell_at_once(self, text: str) -> None:
        """Announce in this thread, which may have to wait for the coordinator."""
        self.announce(text)
        with contextlib.suppress(jax.errors.JaxRuntimeError, RuntimeError):
            processes.kv_set(f"stuck/{self._rank}", text, overwrite=True)

    def leave(self, reason: str) -> None:
        """Tell the others that this process ends by an error of its own."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            processes.kv_set(f"left/{self._rank}", reason)

    def explain(self) -> list[str]:
        """Return a line for each process that ended or is silent; wait a few ticks to see who is.

        Most errors of JAX only tell of the death of another: who ended with one is named if there is nobody else.
        """
        self._watching = self._ending = True
        self._closed.wait((_GRACE_TICKS + 1) * self._tick)
        try:
            left = {int(rank): reason for rank, reason in processes.kv_list("left").items()}
        except jax.errors.JaxRuntimeError:
            left = {}
        ended = {
            rank: f"process {rank} ({self._host(rank)}) ended with {reason}"
            for rank, reason in sorted(left.items())
            if rank != self._rank
        }
        own = [line for rank, line in ended.items() if not _may_follow(left[rank])]
        return own + self.silent_lines(except_for=set(left)) or list(ended.values())

    def silent_lines(self, except_for: frozenset[int] | set[int] = frozenset()) -> list[str]:
        """Return a line for each process that gives no sign of life."""
        now = time.monotonic()
        if now - self._answered > (_GRACE_TICKS - 0.5) * self._tick:
            return ["process 0, which passes messages between the processes, does not answer: it is dead or stopped"]
        return [
            f"process {rank} ({self._host(rank)}) gives no sign of life: it is dead or stopped"
            for rank, (moved, _) in sorted(self._moved.items())
            if now - moved > (_GRACE_TICKS - 0.5) * self._tick and rank not in except_for
        ]

    def news(self) -> list[str]:
        """Return a line for each process that has become silent for `SILENT_SECONDS`, or is back, once."""
        lines = []
        with contextlib.suppress(queue.Empty):
            while True:
                lines.append(self._news.get_nowait())
        return lines

    def _host(self, rank: int) -> str:
        return self._hosts.get(rank, "host unknown")

    def _run(self) -> None:
        while not self._closed.wait(self._tick):
            try:
                self._exchange()
            except (jax.errors.JaxRuntimeError, RuntimeError):  # the coordinator is gone; JAX ends this process soon
                continue
            self._answered = time.monotonic()
        with contextlib.suppress(jax.errors.JaxRuntimeError, RuntimeError):
            processes.kv_set(f"alive/{self._rank}", _LEFT, overwrite=True)
            if self._rank == 0:  # what follows begins anew
                processes.kv_delete("silent")

    def _exchange(self) -> None:
        self._beats += 1
        sign = json.dumps({"host": socket.gethostname(), "beats": self._beats, "busy": self._busy})
        processes.kv_set(f"alive/{self._rank}", sign, overwrite=True)
        if self._announcement:
            processes.kv_set(f"stuck/{self._rank}", self._announcement, overwrite=True)
        else:
            self.stuck = next(iter(processes.kv_list("stuck").values()), "")
        if self._watching or self._rank == 0:
            self._look()
        else:
            self._moved.clear()
        if self._rank == 0:
            self._name_silent()
        lines = processes.kv_list("silent")
        for rank, line in lines.items():
            if self._told.get(rank) != line and rank != str(self._rank):
                self._news.put(line)
        self._told = lines

    def _look(self) -> None:
        """Note which signs of life have changed."""
        now = time.monotonic()
        signs = {int(name): text for name, text in processes.kv_list("alive").items() if text != _LEFT}
        signs.pop(self._rank, None)
        away = max(0.0, now - self._answered - self._tick - _PAUSE_SECONDS)  # this process itself was paused
        self._moved = {rank: (moved + away, text) for rank, (moved, text) in self._moved.items() if rank in signs}
        for rank, text in signs.items():
            sign = json.loads(text)
            self._hosts[rank] = sign["host"]
            known = self._moved.get(rank)
            if known is None or known[1] != text:
                if known is not None and json.loads(known[1])["busy"] != sign["busy"]:
                    self._others_worked = True
                self._moved[rank] = now, text

    def _name_silent(self) -> None:
        """Leave a line for all about each process that has become silent, and about each that is back."""
        now = time.monotonic()
        silent = {rank for rank, (moved, _) in self._moved.items() if now - moved > SILENT_SECONDS}
        for rank in silent ^ self._named:
            line = f"process {rank} ({self._host(rank)}) gives signs of life again, or has left"
            if rank in silent:
                seconds = now - self._moved[rank][0]
                line = f"process {rank} ({self._host(rank)}) has given no sign of life for {seconds:.0f} s"
            processes.kv_set(f"silent/{rank}", line, overwrite=True)
        self._named = silent

    def close(self) -> None:
        """End the thread, and with it the signs of life, which nobody is to miss then."""
        self._closed.set()
        self._thread.join(timeout=5)


def _may_follow(reason: str) -> bool:
    """Return True for an error that the death of another process may have caused."""
    return reason.startswith("JaxRuntimeError") and not any(code in reason for code in _OWN_ERRORS)


def _place() -> str:
    """Return the innermost line of clipjax that the main thread is in."""
    frame: types.FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    package = str(pathlib.Path(__file__).parents[1])
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    if frame is None:
        return "no line of clipjax"
    path = pathlib.Path(frame.f_code.co_filename).relative_to(pathlib.Path(package).parent)
    return f"{path}:{frame.f_lineno} ({frame.f_code.co_name})"


def _say(text: str) -> bool:
    """Write a line to the log and to standard error; return False if the log blocks."""
    written = _in_time(lambda: process_log.info(text))
    _in_time(lambda: processes.show(text))
    return written


def _in_time(work: Callable[[], None]) -> bool:
    """Do work in a thread of its own; return False if it takes longer than a message may."""
    thread = threading.Thread(target=work, daemon=True, name="message")
    thread.start()
    thread.join(_SAY_SECONDS)
    return not thread.is_alive()
