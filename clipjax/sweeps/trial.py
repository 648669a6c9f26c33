"""A trial of a sweep: its record and its result."""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipjax.sweeps.folder import Folder
from clipjax.sweeps.space import format_value

RECORD, RESULTS, LOG, METRICS = "trial.json", "results.json", "log.txt", "metrics.jsonl"
"""Files of a trial's folder. Training writes results and metrics, the sweep its record, and both the log."""


@dataclass(kw_only=True, slots=True, eq=False)
class Trial:
    """One training run of a sweep. `status` is waiting, running, done, failed or interrupted."""

    index: int
    home: Folder  # of the sweep
    folder: str  # its own one in there
    overrides: dict[str, Any]
    arguments: list[str]  # of the training command
    definition: str  # hash of all that makes this trial what it is
    status: str = "waiting"
    seconds: float = 0.0  # of training, over all attempts
    metric: float | None = None
    loss: float | None = None
    problem: str = ""
    started: float = 0.0  # monotonic seconds

    @property
    def name(self) -> str:
        """The number of the trial, as in its folder's name."""
        return f"trial-{self.index:04d}"

    @property
    def place(self) -> Path | str:
        """Path or address of its folder."""
        return self.home.at(self.folder)

    def path(self, name: str) -> str:
        """Return the path of one of its files in the folder of the sweep."""
        return f"{self.folder}/{name}"

    def save(self) -> None:
        """Write `trial.json` so that a kill leaves either the old one or the new one.

        Raises:
            OSError: it cannot be written.
        """
        record = {"status": self.status, "seconds": round(self.seconds, 3), "definition": self.definition}
        record |= {"overrides": formatted(self.overrides), "arguments": self.arguments, "problem": self.problem}
        self.home.write(self.path(RECORD), json.dumps(record, indent=2) + "\n")

    def read_results(self, metric: str) -> None:
        """Fill in `metric` and `loss` of a finished trial; without it, `problem` names those that are there.

        A trial whose task failed counts as failed.

        Raises:
            OSError: they cannot be read.
        """
        try:
            results = read_json(self.home, self.path(RESULTS))
            tasks, failures = results["tasks"], dict(results.get("failed", {}))
            found = {f"{task}:{name}": value for task, values in tasks.items() for name, value in values.items()}
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # a broken trial must not end the sweep
            self.problem = f"{RESULTS} cannot be read: {error!r}"
            return
        with contextlib.suppress(FileNotFoundError), self.home.stream(self.path(METRICS)) as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    found |= json.loads(line)
        numbers = {
            name: float(value)
            for name, value in found.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self.metric, self.loss = numbers.get(metric), numbers.get("loss")
        task = metric.rpartition(":")[0]
        if self.metric is None and task in failures:
            self.status, self.problem = "failed", f"its evaluation task {task} failed: {failures[task]}"
        elif self.metric is None:
            self.problem = f"has no {metric}; the sweep's metric may be {', '.join(sorted(numbers)) or 'nothing'}"


def read_json(home: Folder, path: str) -> dict[str, Any]:
    """Read a JSON object in the folder of a sweep; empty if there is no such file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        content = json.loads(home.read(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{home.at(path)} is not JSON ({error}); delete it to run that trial again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{home.at(path)} must hold a JSON object; delete it to run that trial again")
    return content


def formatted(overrides: dict[str, Any]) -> dict[str, str]:
    """Return overrides with values as the command line takes them."""
    return {path: format_value(value) for path, value in overrides.items()}


def format_overrides(overrides: dict[str, Any]) -> str:
    """Return overrides in a line: `a.b=1 c=2`."""
    return " ".join(f"{path}={value}" for path, value in formatted(overrides).items())
