"""The search of a sweep: a grid or a random search over config fields, as data.

A sweep file defines `get_sweep() -> Sweep`; `clipjax sweep` runs it. Fields are dotted paths into the config, such as
"optim.learning_rate". The same definition gives the same trials on every machine and Python version.
"""

import enum
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Uniform:
    """A number between `low` and `high`, rounded to a ten-thousandth of the range or finer."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, self.low < self.high)

    def at_quantile(self, q: float) -> float:
        """Return the value at `q` (0 to 1) of the way."""
        decimals = 4 - math.floor(math.log10(self.high - self.low))
        return _clamped(round(self.low + q * (self.high - self.low), decimals), self.low, self.high)


@dataclass(frozen=True, slots=True)
class LogUniform:
    """A positive number between `low` and `high`, uniform in its logarithm, rounded to 4 digits."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, 0 < self.low < self.high)

    def at_quantile(self, q: float) -> float:
        """Return the value at `q` (0 to 1) of the way."""
        return _clamped(float(f"{self.low * (self.high / self.low) ** q:.4g}"), self.low, self.high)


@dataclass(frozen=True, slots=True)
class IntUniform:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_range(self, self.low < self.high)

    def at_quantile(self, q: float) -> int:
        """Return the value at `q` (0 to 1, 1 excluded) of the way."""
        return self.low + int(q * (self.high - self.low + 1))


@dataclass(frozen=True, slots=True)
class Choice:
    """One of `values`."""

    values: Sequence[Any]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("Choice([]) has no values; give at least one")

    def at_quantile(self, q: float) -> Any:
        """Return the value at `q` (0 to 1, 1 excluded) of the way."""
        return self.values[int(q * len(self.values))]


Distribution = Uniform | LogUniform | IntUniform | Choice


@dataclass(frozen=True, slots=True)
class Grid:
    """Every combination of the values of each field; the last field varies fastest."""

    fields: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        _check_fields(self.fields)
        for path, values in self.fields.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"Grid: {path}={values!r} must be a list with at least one value")
            if any(value in values[:index] for index, value in enumerate(values)):
                raise ValueError(f"Grid: {path}={values!r} has a value twice; remove one of them")

    def trials(self) -> list[dict[str, Any]]:
        """Return the overrides of each trial."""
        return [dict(zip(self.fields, values, strict=True)) for values in itertools.product(*self.fields.values())]


@dataclass(frozen=True, slots=True)
class RandomSearch:
    """`num_trials` independent draws. More trials, or another field, leave the other draws as they were."""

    fields: Mapping[str, Distribution]
    num_trials: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fields(self.fields)
        for path, distribution in self.fields.items():
            if not isinstance(distribution, Distribution):
                raise ValueError(
                    f"RandomSearch: {path}={distribution!r} must be a Uniform, LogUniform, IntUniform or Choice"
                )
        if self.num_trials < 1:
            raise ValueError(f"RandomSearch: num_trials={self.num_trials} must be at least 1")

    def trials(self) -> list[dict[str, Any]]:
        """Return the overrides of each trial."""
        return [
            {path: distribution.at_quantile(self._quantile(trial, path)) for path, distribution in self.fields.items()}
            for trial in range(self.num_trials)
        ]

    def _quantile(self, trial: int, path: str) -> float:
        # Python promises that seeding by a string and `random()` stay the same in later versions, and only that.
        return random.Random(f"{self.seed}/{trial}/{path}").random()


@dataclass(frozen=True, slots=True)
class Sweep:
    """A search and its aim.

    Args:
        search: trials to run.
        metric: "TASK:METRIC" of a trial's `results.json`, or a key of its `metrics.jsonl` such as "loss".
        maximize: True if a larger metric is better.
    """

    search: Grid | RandomSearch
    metric: str
    maximize: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.search, Grid | RandomSearch):
            raise ValueError(f"Sweep: search={self.search!r} must be a Grid or a RandomSearch")
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(f'Sweep: metric={self.metric!r} must be "TASK:METRIC" or a name such as "loss"')

    def trials(self) -> list[dict[str, Any]]:
        """Return the overrides of each trial, by field."""
        return self.search.trials()

    def is_log(self, path: str) -> bool:
        """Return True for a field on a log scale: LogUniform, or a grid of more even ratios than differences."""
        if isinstance(self.search, RandomSearch):
            return isinstance(self.search.fields[path], LogUniform)
        values = self.search.fields[path]
        if len(values) < 3 or any(isinstance(v, bool) or not isinstance(v, int | float) or v <= 0 for v in values):
            return False
        ordered = sorted(values)
        return _unevenness([math.log(value) for value in ordered]) < _unevenness(ordered)


def _unevenness(ordered: Sequence[float]) -> float:
    """Return the largest over the smallest gap between sorted, distinct numbers."""
    gaps = [after - before for before, after in itertools.pairwise(ordered)]
    return max(gaps) / min(gaps)


def _check_fields(fields: Mapping[str, Any]) -> None:
    if not isinstance(fields, Mapping) or not fields:
        raise ValueError(f'a search over {fields!r} has no fields; give a dict such as {{"optim.learning_rate": ...}}')


def _check_range(distribution: Any, is_valid: bool) -> None:
    if not is_valid:
        positive = "0 < " if isinstance(distribution, LogUniform) else ""
        raise ValueError(f"{distribution} must have {positive}low < high")


def _clamped(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def format_value(value: Any) -> str:
    """Return a value as `--config.FIELD=VALUE` takes it."""
    return value.name if isinstance(value, enum.Enum) else str(value)
