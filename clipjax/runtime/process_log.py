"""A log file for every process: `WORKDIR/logs/rank-00000.log`, with its messages, warnings, and its last traceback.

A command opens a `session`; `open_log` starts the file once the workdir is known. Only the first process talks to the
terminal; `info` is for the file alone, and does nothing where none is open. The file is a handler of Python's own
logging: of the logger `clipjax.process_log`, which passes nothing on, and of the root, for the warnings of libraries.
"""

import contextlib
import logging
import pathlib
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from clipjax.runtime.terminal import printable

FOLDER = "logs"

_logger = logging.getLogger("clipjax.process_log")
_open_files: list["_LogFile"] = []


def info(text: str) -> None:
    """Write lines to the log of this process. A full disk silences the log, never the run."""
    if text:
        _logger.info(text)


def path_of(workdir: pathlib.Path, rank: int) -> pathlib.Path:
    """Return the path of a process's log."""
    return workdir / FOLDER / f"rank-{rank:05d}.log"


def open_log(workdir: pathlib.Path, *, rank: int, header: Mapping[str, Any]) -> None:
    """Start or continue the log of this process; the session closes it.

    Args:
        workdir: of the run.
        rank: number of the process.
        header: facts about this start, a line each.

    Raises:
        OSError: the file cannot be opened.
    """
    path = path_of(workdir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _LogFile(path)
    _open_files.append(file)
    for logger in (_logger, logging.root):
        logger.addHandler(file)
    info("\n".join(["---- start ----", *(f"{name}: {value}" for name, value in header.items())]))


def open_file() -> TextIO | None:
    """Return the open log of this process, for what writes to a file descriptor; None if none is open."""
    return _open_files[-1].stream if _open_files else None


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Allow a log while this lasts; write warnings, and an error that leaves it, there in full.

    Warnings go on to the terminal as well, so `logging.captureWarnings`, which takes them away from it, does not do.
    """
    show = warnings.showwarning
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    # The root's last resort shows warnings only as long as there is no other handler.
    last_resort = None if logging.root.handlers else logging.lastResort
    if last_resort is not None:
        logging.root.addHandler(last_resort)

    def show_and_log(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        info(warnings.formatwarning(message, category, filename, lineno))
        show(message, category, filename, lineno, *rest)

    warnings.showwarning = show_and_log
    try:
        yield
    except Exception:
        info(traceback.format_exc())
        raise
    finally:
        warnings.showwarning = show
        if last_resort is not None:
            logging.root.removeHandler(last_resort)
        while _open_files:
            file = _open_files.pop()
            for logger in (_logger, logging.root):
                logger.removeHandler(file)
            file.close()


class _LogFile(logging.FileHandler):
    """The file of this process: messages of `info`, and of libraries those at the level of a warning or above."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(_LineFormatter("%(levelname)s %(name)s: %(message)s"))

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name == _logger.name or record.levelno >= logging.WARNING

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on in silence: the disk is full, or a library's message does not fit its arguments."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # whatever is still buffered finds the disk full too
            super().close()


class _LineFormatter(logging.Formatter):
    """The time before every line; a terminal that shows the file is steered by none."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage() if record.name == _logger.name else super().format(record)
        time = self.formatTime(record, "%Y-%m-%d %H:%M:%S")
        return "\n".join(f"{time}  {printable(line)}" for line in text.splitlines())
