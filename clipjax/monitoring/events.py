"""`WORKDIR/events.jsonl`: starts, skipped updates, rollbacks, failed saves, restarted workers, stops; never trimmed."""

import json
import pathlib
import time
from typing import Any

from clipjax.runtime import process_log

FILE = "events.jsonl"


class Events:
    """The events of a run, a JSON object a line: `time` (seconds since 1970), `event`, and facts.

    Args:
        workdir: of the run.
        enabled: False writes nothing (all processes but the first).
    """

    def __init__(self, workdir: pathlib.Path, *, enabled: bool) -> None:
        self._path = workdir / FILE if enabled else None

    def add(self, event: str, **facts: Any) -> None:
        """Append an event. A line that cannot be written goes to the log alone, and never stops the run."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts})
        process_log.info(f"event {line}")
        if self._path is None:
            return
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode() + b"\n")
        except OSError as error:
            process_log.info(f"{self._path} cannot be written: {error}")


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
        if isinstance(event, dict) and "event" in event:
            found.append(event)
    return found
