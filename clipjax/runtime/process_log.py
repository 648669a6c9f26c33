"""A log file for every process: `WORKDIR/logs/rank-00000.log`, with what it says, warnings, and its last traceback.

A command opens a `session`; `open_log` starts the file once the workdir is known. Only the first process talks to
the terminal; `info` is for the file alone, and does nothing where none is open.
"""

import contextlib
import logging
import pathlib
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

FOLDER = "logs"

_open_files: list[TextIO] = []


def info(text: str) -> None:
    """Write lines to the log of this process. A full disk silences the log, never the run."""
    for file in _open_files:
        with contextlib.suppress(OSError, ValueError):
            for line in text.splitlines():
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
            file.flush()


def path_of(workdir: pathlib.Path, rank: int) -> pathlib.Path:
    """Where a process logs."""
    return workdir / FOLDER / f"rank-{rank:05d}.log"


def open_log(workdir: pathlib.Path, *, rank: int, header: Mapping[str, Any]) -> None:
    """Start or continue the log of this process; the session closes it.

    Args:
        workdir: of the run.
        rank: number of the process.
        header: what is known about this start, a line each.

    Raises:
        OSError: the file cannot be opened.
    """
    path = path_of(workdir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    _open_files.append(path.open("a", encoding="utf-8", errors="backslashreplace"))
    info("\n".join(["---- start ----", *(f"{name}: {value}" for name, value in header.items())]))


@contextlib.contextmanager
def session() -> Iterator[None]:
    """While it lasts there may be a log; warnings, and an error that leaves it, are written there in full."""
    handler, show = _Warnings(logging.WARNING), warnings.showwarning
    added: list[logging.Handler] = [handler]
    if not logging.root.handlers and logging.lastResort is not None:
        added.append(logging.lastResort)  # it shows warnings only as long as there is no other handler

    def show_and_note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        info(warnings.formatwarning(message, category, filename, lineno))
        show(message, category, filename, lineno, *rest)

    for each in added:
        logging.root.addHandler(each)
    warnings.showwarning = show_and_note
    try:
        yield
    except Exception:
        info(traceback.format_exc())
        raise
    finally:
        warnings.showwarning = show
        for each in added:
            logging.root.removeHandler(each)
        while _open_files:
            _open_files.pop().close()


class _Warnings(logging.Handler):
    """What libraries log at the level of a warning or above."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            info(f"{record.levelname} {record.name}: {record.getMessage()}")
