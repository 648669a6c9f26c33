"""Goodput: the ledger of a run's wall-clock time by cause, over all of its starts. Nothing here knows JAX.

Reading order: `CAUSES`, `History` (earlier starts, read back from `events.jsonl`), `Goodput` (this start),
`goodput_table`.

Every moment from the first start on belongs to exactly one cause, so the causes add up to wall-clock time. A number of
a step is productive once: the time of a step that is done again, after a restart or a rollback, is `lost`. `saving` and
`waiting_for_data` are the time for which the loop is blocked, although devices may still compute by then.
"""

import contextlib
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clipjax.monitoring.events import Events
from clipjax.runtime.terminal import format_table

CAUSES = ("initialisation", "compile", "steps", "waiting_for_data", "saving", "evaluation", "lost", "stopped")
"""Causes of time; `stopped` lies between two starts, and `lost` also holds the end of a start that was killed, from its
last ledger to its last event."""

_OFFSET = time.time() - time.monotonic()
_TOO_LARGE = 1e12  # for seconds since 1970, a step or devices


def wall_clock() -> float:
    """Return the seconds since 1970 by a clock that never jumps within a process."""
    return _OFFSET + time.monotonic()


def process_start() -> float:
    """Return the time at which this process began, in seconds since 1970; now, where the system does not tell."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return wall_clock()
    return wall_clock() - max(age, 0.0)


@dataclass
class History:
    """The time of a run before this start.

    Attributes:
        seconds: by cause.
        end: time of the last event; None before the first start.
        last_step: the highest step that was begun, as far as it was recorded.
        device_seconds: time of all starts, times their devices.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    end: float | None = None
    last_step: int = 0
    device_seconds: float = 0.0

    @classmethod
    def from_events(cls, events: Sequence[Mapping[str, Any]]) -> "History":
        """Return the history that the events of a workdir tell; events without a usable time are left out."""
        history = cls()
        own: Mapping[str, float] = {}
        began, devices = math.nan, 1
        for event in events:
            moment = _number(event.get("time"))
            if moment is None:
                continue
            if event["event"] == "start":
                history._add_start(began, own, devices)
                began = history.begin(_number(event.get("began")) or moment)
                own, devices = {}, int(_number(event.get("devices")) or 1)
            elif math.isnan(began):
                continue
            elif event["event"] in ("ledger", "stop"):
                own = _causes(event.get("seconds"))
                history.last_step = max(history.last_step, int(_number(event.get("step")) or 0))
            history.end = max(history.end or 0.0, moment, began + sum(own.values()))
        history._add_start(began, own, devices)
        return history

    def begin(self, began: float) -> float:
        """Count the time up to a start as stopped; return when it began, which is not before the end of the last."""
        if self.end is None:
            self.end = began
        self.seconds["stopped"] += max(began - self.end, 0.0)
        self.end = max(self.end, began)
        return self.end

    def _add_start(self, began: float, own: Mapping[str, float], devices: int) -> None:
        if math.isnan(began) or self.end is None:
            return
        for cause, seconds in own.items():
            self.seconds[cause] += seconds
        self.seconds["lost"] += self.end - began - sum(own.values())
        self.device_seconds += devices * (self.end - began)


class Goodput:
    """The ledger of this start; use it from one thread, read it from any.

    The base cause is `initialisation` until the first `step`, then that of the step; `phase` puts another on top.

    Args:
        events: where starts and times are kept.
        past: events of earlier starts.
        began: the time at which this start began; None: the start of the process.
        devices: of the run, for the cost.
        clock: seconds since 1970; the same as that of `events`.
    """

    def __init__(
        self,
        events: Events,
        past: Sequence[Mapping[str, Any]] = (),
        *,
        began: float | None = None,
        devices: int = 1,
        clock: Callable[[], float] = wall_clock,
    ) -> None:
        self._events, self._clock, self._devices = events, clock, devices
        self._history = History.from_events(past)
        self._last_step = self._history.last_step
        self._own: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self._base = self._cause = "initialisation"
        self._began = self._since = self._history.begin(process_start() if began is None else began)
        events.add("start", began=round(self._began, 3), devices=devices)

    def _switch(self, cause: str) -> str:
        """Count the time up to now, and go on with another cause; return the one before."""
        now = max(self._clock(), self._since)
        self._own[self._cause] += now - self._since
        before, self._since, self._cause = self._cause, now, cause
        return before

    @contextlib.contextmanager
    def phase(self, cause: str) -> Iterator[None]:
        """Count the time of the `with` block under this cause; a block inside it takes its own time out."""
        assert cause in CAUSES, cause
        outer = self._switch(cause)
        try:
            yield
        finally:
            self._switch(outer)

    def step(self, step: int) -> None:
        """Count the time from now on, outside of phases, as work on this step (from 1), done again or not."""
        assert self._cause == self._base, self._cause
        self._base = "steps" if step > self._last_step else "lost"
        self._switch(self._base)
        self._last_step = max(self._last_step, step)

    def seconds(self) -> dict[str, float]:
        """Return the time of the whole run until now, by cause."""
        found = {cause: self._history.seconds[cause] + self._own[cause] for cause in CAUSES}
        found[self._cause] += max(self._clock() - self._since, 0.0)
        return found

    def fraction(self) -> float:
        """Return the share of productive steps in the whole run until now, 0 to 1."""
        seconds = self.seconds()
        return seconds["steps"] / max(sum(seconds.values()), 1e-9)

    def record(self, event: str = "ledger", **facts: Any) -> None:
        """Keep the times of this start until now: what a kill takes away later is time since then."""
        self._switch(self._cause)
        seconds = {cause: round(value, 3) for cause, value in self._own.items() if value}
        self._events.add(event, step=self._last_step, seconds=seconds, **facts)

    def table(self, *, pairs: int, price_per_hour: float | None = None) -> str:
        """Return the time of the whole run by cause; with a price per device and hour its cost per million pairs.

        Args:
            pairs: pairs that the run has trained on.
            price_per_hour: of a device; time between starts is free.
        """
        device_seconds = self._history.device_seconds + self._devices * (self._clock() - self._began)
        price = None if price_per_hour is None else price_per_hour * device_seconds / 3600
        return goodput_table(self.seconds(), pairs=pairs, price=price)


def goodput_table(seconds: Mapping[str, float], *, pairs: int, price: float | None = None) -> str:
    """Return times by cause as a table, and under it the price of a million pairs if the price of the run is given."""
    total = sum(seconds.values())
    rows = [
        [name.replace("_", " "), f"{value / 3600:.3f}", f"{100 * value / max(total, 1e-9):.1f} %"]
        for name, value in [*seconds.items(), ("all", total)]
    ]
    table = format_table(rows, ("time", "hours", "share"))
    if price is None or not pairs:
        return table
    return f"{table}\ncost: {price:.2f}, which is {1e6 * price / pairs:.2f} for a million pairs"


def _number(value: Any) -> float | None:
    """Return a recorded time or count; None if it is none, or one that only a damaged file can hold."""
    plausible = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE
    return float(value) if plausible else None


def _causes(seconds: Any) -> dict[str, float]:
    """Return the times of a recorded ledger; causes that this version does not know count as lost."""
    found: dict[str, float] = {}
    for name, value in seconds.items() if isinstance(seconds, dict) else ():
        cause = name if name in CAUSES else "lost"
        found[cause] = found.get(cause, 0.0) + max(_number(value) or 0.0, 0.0)
    return found
