"""The rule of the watchdog, free of clocks: when a run counts as stuck.

The rule: between two steps no more than the limit may pass, `stuck_seconds` or ten median steps if that is longer. In
a phase that may take any time (the first steps with their compiling, an evaluation, a save) the limit counts from the
last sign of work. Time in which the whole machine was paused does not count.

The host runs ahead of the devices, so its steps take a moment, or the time of several; three in a row are timed
together. Until three are timed nobody knows how long a step takes, so the devices get ten times `stuck_seconds`.
"""

import collections
import statistics

MEDIAN_STEPS = 10
"""The limit in median steps, if that is longer than `stuck_seconds`."""

READING = "the reading of data"
"""The phase of the first steps that needs no device, and so has the limit of later ones."""

_START = "the first steps"
_UNTIMED = 3  # the first one and the second may compile; by then the host has not waited for a device


class Deadline:
    """The time of the last progress and the limit from there; every method gets the time as `now`.

    Attributes:
        phases: that the run is in, the innermost last.
    """

    def __init__(self, stuck_seconds: float, now: float) -> None:
        self._stuck_seconds = stuck_seconds
        self._since = now
        self._steps = 0
        self._counted, self._step_seconds = now, 0.0  # the time outside of phases since the last step, up to a moment
        self._clean = True  # and no other process was in a phase then
        self._seconds: collections.deque[float] = collections.deque(maxlen=64)
        self.phases = [_START]

    @property
    def starting(self) -> bool:
        """True until it is known how long a step takes."""
        return _START in self.phases

    @property
    def limit(self) -> float:
        """Seconds without progress after which the run counts as stuck."""
        if self._steps and self.starting and self.phases[-1] != READING:
            return MEDIAN_STEPS * self._stuck_seconds
        each = list(self._seconds)
        threes = [sum(three) / 3 for three in zip(each, each[1:], each[2:], strict=False)]
        return max(self._stuck_seconds, MEDIAN_STEPS * statistics.median(threes) if threes else 0.0)

    def beat(self, now: float) -> None:
        """Count a step."""
        self._count(now)
        self._steps += 1
        if self._steps > _UNTIMED and self._clean:
            self._seconds.append(self._step_seconds)
        if self.starting and len(self._seconds) == 3:
            self.phases.remove(_START)
        self._since, self._step_seconds, self._clean = now, 0.0, True

    def enter(self, phase: str, now: float) -> None:
        """Begin a phase that may take any time as long as somebody works."""
        self._count(now)
        self.phases.append(phase)
        self._since = now

    def leave(self, now: float) -> None:
        """End the latest phase."""
        self._count(now)
        self.phases.pop()
        self._since = now

    def _count(self, now: float) -> None:
        if {*self.phases} <= {_START, READING}:
            self._step_seconds += max(0.0, now - self._counted)
        self._counted = now

    def worked(self, now: float) -> None:
        """Count a sign of work in a phase, or of another process in one."""
        self._since = now
        self._clean = self._clean and bool(self.phases)

    def shift(self, seconds: float) -> None:
        """Leave out a pause of the machine."""
        self._since += seconds
        self._counted += seconds

    def waited(self, now: float) -> float:
        """Return the seconds since the last progress."""
        return now - self._since
