"""Tasks that an evaluation has done so far, in a file beside its results, so that a killed one goes on behind them."""

import json
import math
import pathlib
from typing import Any

from clipjax.runtime import objects, process_log, storage

ENDING = ".unfinished"
"""Of the file, behind the name of the one for the results."""

_MAX_BYTES = 2**28


class Progress:
    """The tasks that are done. Only the first process keeps them.

    Args:
        output: path or address of the results.
        key: of everything that the results depend on; a file with another one is of another evaluation.

    Attributes:
        results: metrics of tasks that were done before this start.
        details: of those.
    """

    def __init__(self, output: pathlib.Path | str, key: str) -> None:
        place = f"{output}{ENDING}"
        self._place = place if isinstance(output, str) else pathlib.Path(place)
        self._key = key
        self.results: dict[str, dict[str, float]] = {}
        self.details: dict[str, Any] = {}
        try:
            content = json.loads(storage.read_small(self._place, _MAX_BYTES))
            if content["key"] == key and all(map(_is_metrics, content["tasks"].values())):
                self.results, self.details = dict(content["tasks"]), dict(content["details"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            process_log.info(f"{self._place} cannot be used: {error!r}; all tasks are done anew")

    def add(self, name: str, metrics: dict[str, float], details: Any) -> None:
        """Keep a task's outcome; if that fails, a killed evaluation does it again."""
        self.results[name] = metrics
        if details is not None:
            self.details[name] = details
        content = {"key": self._key, "tasks": self.results, "details": self.details}
        try:
            storage.write(self._place, json.dumps(content, allow_nan=False))
        except OSError as error:
            process_log.info(f"{self._place} cannot be written: {error}")

    def finish(self) -> None:
        """Remove the file: the results are complete where they belong."""
        try:
            if isinstance(self._place, str):
                objects.delete(self._place)
            else:
                self._place.unlink(missing_ok=True)
        except OSError as error:
            process_log.info(f"{self._place} cannot be removed: {error}")


def _is_metrics(metrics: Any) -> bool:
    return isinstance(metrics, dict) and all(
        isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
        for value in metrics.values()
    )
