"""`WORKDIR/events.jsonl`: starts, skipped updates, rollbacks, failed saves, restarted workers, stops; never trimmed."""

import collections
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from clipjax.runtime import process_log

FILE = "events.jsonl"


class Events:
    """The events of a run, a JSON object a line: `time` (seconds since 1970), `event`, and facts.

    Attributes:
        counts: events of this start by name.

    Args:
        workdir: of the run.
        enabled: False writes nothing (all processes but the first).
        clock: seconds since 1970.
    """

    def __init__(self, workdir: pathlib.Path, *, enabled: bool, clock: Callable[[], float] = time.time) -> None:
        self._path = workdir / FILE if enabled else None
        self._clock = clock
        self.counts: collections.Counter[str] = collections.Counter()

    def add(self, event: str, **facts: Any) -> None:
        """Append an event. A line that cannot be written goes to the log alone, and never stops the run."""
        line = json.dumps({"time": round(self._clock(), 3), "event": event, **facts})
        self.counts[event] += 1
        process_log.info(f"event {line}")
        if self._path is None:
            return
        try:
            with self._path.open("ab+", buffering=0) as file:
                file.write(_line_end(file) + line.encode() + b"\n")
        except OSError as error:
            process_log.info(f"{self._path} cannot be written: {error}")

    def sync(self) -> None:
        """Wait until all events are on the disk; one that is lost in a crash of the machine is never worth the run."""
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            process_log.info(f"{self._path} cannot be written: {error}")


def _line_end(file: Any) -> bytes:
    """Return the line end that a kill or a full disk has kept from the last line."""
    if not file.seek(0, os.SEEK_END):
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the events of a workdir, in order; lines that are damaged are left out."""
    try:
        lines = (workdir / FILE).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # cut off by a kill
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            found.append(event)
    return found
