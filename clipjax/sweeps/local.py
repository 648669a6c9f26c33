"""Trials of a sweep on this machine: each in a process and folder of its own, some at a time."""

import contextlib
import fcntl
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from typing import Any

from clipjax.runtime.terminal import format_duration, printable
from clipjax.sweeps.trial import LOG, RESULTS, Trial, format_overrides


def open_log(trial: Trial) -> Any:
    """Open and lock `log.txt`. The trial's process inherits the lock, so it outlives a killed sweep.

    Raises:
        ValueError: another process trains the trial.
        OSError: it cannot be written.
    """
    path = trial.home.local / trial.path(LOG)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        raise ValueError(f"{trial.place} is still being trained by another process; wait for it or stop it") from None
    return log


def run_trials(
    waiting: Sequence[Trial], *, metric: str, jobs: int, command: Sequence[str], lost: Sequence[str] = ()
) -> bool:
    """Train trials, `jobs` at a time, and print a line at the start and end of each.

    SIGINT or SIGTERM asks all of them to stop (SIGTERM: training saves and returns) and waits; a second one kills.
    A trial that cannot be started or recorded counts as failed.

    Args:
        waiting: the trials.
        metric: by which they are ranked.
        jobs: number of trials at a time.
        command: what trains a trial; its arguments are appended.
        lost: gets, in another thread, the reason why the folder of the sweep is not ours any more, which asks all of
            them to stop, too.

    Returns:
        True if a signal or a reason interrupted it.
    """
    queue, running = list(waiting), dict[Trial, subprocess.Popen[bytes]]()
    received: list[int] = []
    handled = 0
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while running or (queue and not (received or lost)):
            while queue and len(running) < jobs and not (received or lost):
                trial = queue.pop(0)
                if process := _start(trial, command):
                    running[trial] = process
            if (asked := max(len(received), len(lost))) > handled:
                _stop(running.values(), signal.SIGKILL if asked > 1 else signal.SIGTERM)
                handled = asked
            for trial in [trial for trial, process in running.items() if process.poll() is not None]:
                _finish(trial, running.pop(trial).returncode, metric=metric, interrupted=bool(received or lost))
            time.sleep(0.05)
    finally:
        _stop(running.values(), signal.SIGTERM)  # only after an error of our own
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return bool(received or lost)


def _start(trial: Trial, command: Sequence[str]) -> "subprocess.Popen[bytes] | None":
    """Return the process of a trial; None if it cannot be started."""
    full = [*command, *trial.arguments]
    try:
        with open_log(trial) as log:
            trial.home.load(trial.path(LOG), log)
            trial.home.delete(trial.path(RESULTS))
            trial.status, trial.problem, trial.started = "running", "", time.monotonic()
            trial.save()
            log.write(f"$ {shlex.join(full)}\n".encode())
            log.flush()
            # Its own session keeps the terminal's Ctrl-C from the trial's data workers; it needs them to save.
            process = subprocess.Popen(
                full, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
    except OSError as error:
        trial.status, trial.problem = "failed", f"cannot be started: {error}"
        _say(trial, trial.status, trial.problem)
        return None
    _say(trial, "started", format_overrides(trial.overrides))
    return process


def _finish(trial: Trial, exit_code: int, *, metric: str, interrupted: bool) -> None:
    trial.seconds += time.monotonic() - trial.started
    try:
        trial.home.send(trial.path(LOG))
        if exit_code == 0 and trial.home.exists(trial.path(RESULTS)):
            trial.status = "done"
            trial.read_results(metric)
            outcome = trial.problem if trial.metric is None else f"{metric} {trial.metric:.4f}"
        elif interrupted:
            trial.status, outcome = "interrupted", "not finished"
        else:
            trial.status = "failed"
            trial.problem = f"exit code {exit_code}: {_last_line(trial.home.local / trial.path(LOG))}"
            outcome = f"{trial.problem} [{trial.home.at(trial.path(LOG))}]"
        trial.save()
        if trial.status == "done":
            trial.home.drop_copy(trial.folder)
    except OSError as error:
        trial.status, trial.metric, trial.problem = "failed", None, f"cannot be recorded: {error}"
        outcome = trial.problem
    _say(trial, trial.status, f"{format_duration(trial.seconds)}  {outcome}")


def _say(trial: Trial, event: str, text: str) -> None:
    print(f"{trial.name}  {event:<11}  {printable(text)}", flush=True)


def _stop(processes: Iterable["subprocess.Popen[bytes]"], number: int) -> None:
    """Signal trials: SIGTERM the process alone, which looks after its workers; SIGKILL the whole session."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)


def _last_line(path: pathlib.Path) -> str:
    """Return the last line of a log that is not empty, fit for a terminal."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 8192))
        lines = log.read().decode(errors="replace").splitlines()
    shown = ("".join(filter(str.isprintable, line)).strip() for line in reversed(lines))
    return next(filter(None, shown), "")[:200]
