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
from clipjax.sweeps.trial import Trial, format_overrides


def open_log(trial: Trial) -> Any:
    """Open and lock `log.txt`. The trial's process inherits the lock, so it outlives a killed sweep.

    Raises:
        ValueError: another process trains the trial.
    """
    log = (trial.folder / "log.txt").open("ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        raise ValueError(f"{trial.folder} is still being trained by another process; wait for it or stop it") from None
    return log


def run_trials(waiting: Sequence[Trial], *, metric: str, jobs: int, command: Sequence[str]) -> bool:
    """Train trials, `jobs` at a time, and print a line at the start and end of each.

    SIGINT or SIGTERM asks all of them to stop (SIGTERM: training saves and returns) and waits; a second one kills.

    Returns:
        True if a signal interrupted it.
    """
    queue, running = list(waiting), dict[Trial, subprocess.Popen[bytes]]()
    received: list[int] = []
    handled = 0
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while running or (queue and not received):
            while queue and len(running) < jobs and not received:
                trial = queue.pop(0)
                running[trial] = _start(trial, command)
            if len(received) > handled:
                _stop(running.values(), signal.SIGKILL if len(received) > 1 else signal.SIGTERM)
                handled = len(received)
            for trial in [trial for trial, process in running.items() if process.poll() is not None]:
                _finish(trial, running.pop(trial).returncode, metric=metric, interrupted=bool(received))
            time.sleep(0.05)
    finally:
        _stop(running.values(), signal.SIGTERM)  # only after an error of our own
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return bool(received)


def _start(trial: Trial, command: Sequence[str]) -> "subprocess.Popen[bytes]":
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "results.json").unlink(missing_ok=True)
    full = [*command, *trial.arguments]
    with open_log(trial) as log:
        trial.status, trial.problem, trial.started = "running", "", time.monotonic()
        trial.save()
        log.write(f"$ {shlex.join(full)}\n".encode())
        log.flush()
        # Its own session keeps the terminal's Ctrl-C from the trial's data workers; it needs them to save.
        process = subprocess.Popen(
            full, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    _say(trial, "started", format_overrides(trial.overrides))
    return process


def _finish(trial: Trial, exit_code: int, *, metric: str, interrupted: bool) -> None:
    trial.seconds += time.monotonic() - trial.started
    if exit_code == 0 and (trial.folder / "results.json").is_file():
        trial.status = "done"
        trial.read_results(metric)
        outcome = trial.problem if trial.metric is None else f"{metric} {trial.metric:.4f}"
    elif interrupted:
        trial.status, outcome = "interrupted", "not finished"
    else:
        trial.status = "failed"
        trial.problem = f"exit code {exit_code}: {_last_line(trial.folder / 'log.txt')}"
        outcome = f"{trial.problem} [{trial.folder / 'log.txt'}]"
    trial.save()
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
