"""Stragglers: the time that each process's host spends per step, and the names of those that the others wait for.

Reading order: `StepTimes` (the measurement), `slow_ranks` (the rule), `RankTimes` (the way to the first process).

Every step ends when the slowest process has done its part, so all of them take the same time per step. They differ in
their use of it: one that is slow is busy (waits for its data, or works on the host), the others are blocked on
their devices, which wait for it. A device that is slow itself is not seen this way.
"""

import json
import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from clipjax.runtime import processes
from clipjax.runtime.terminal import format_table

SHARE = 0.1
"""Share of a step that a process must cost the others to be named, and may at most be blocked itself."""

IN_A_ROW = 2
"""Intervals in a row before a process is named: one alone is an accident."""

_MOST_ROWS = 16
_LAST_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Mean seconds per step of one process over an interval, and the digest of its samples.

    Attributes:
        host: name of its machine.
        step_seconds: the whole step.
        input_wait_seconds: wait for the next batch to be read and decoded.
        blocked_seconds: wait for the devices, and through them for other processes.
        samples: digest of the samples that it fed (`run_logger.sample_digest`).
    """

    host: str
    step_seconds: float
    input_wait_seconds: float
    blocked_seconds: float
    samples: str = ""

    @property
    def host_seconds(self) -> float:
        """Work of the host: copying batches to the devices, starting steps, logging, saving; at first compiling."""
        return max(0.0, self.step_seconds - self.input_wait_seconds - self.blocked_seconds)

    @property
    def busy_seconds(self) -> float:
        """Time that this process alone is the reason for."""
        return self.input_wait_seconds + self.host_seconds


def slow_ranks(spent: Sequence[StepTimes]) -> list[int]:
    """Return the processes that kept the others waiting in an interval.

    They are busy for longer than the median process by `SHARE` of a step, and they are blocked for less than that.
    """
    typical = statistics.median_low(each.busy_seconds for each in spent)
    return [
        rank
        for rank, each in enumerate(spent)
        if each.busy_seconds - typical > SHARE * each.step_seconds and each.blocked_seconds < SHARE * each.step_seconds
    ]


def rank_times() -> "RankTimes | None":
    """Return the times of a run of several processes; None for one alone."""
    return RankTimes() if jax.process_count() > 1 else None


class RankTimes:
    """The times of all processes on their way to the first one, through the coordinator: no device waits for them.

    An interval's times are taken up when the next one ends, and only once all processes have sent theirs.
    """

    def __init__(self) -> None:
        self._count = jax.process_count()
        self._totals = dict.fromkeys(("steps", "step_seconds", "input_wait_seconds", "blocked_seconds"), 0.0)
        self._sent = 0
        self._waiting: list[int] = []
        self._streaks = [0] * self._count
        self._slow = [0] * self._count
        self._intervals = 0

    def send(self, step: int, steps: int, spent: StepTimes) -> None:
        """Send this process's times of the interval of so many steps that ends with `step`; every process calls it."""
        # A step comes again after a rollback; its first times may still be there.
        processes.kv_set(f"times/{step}/{jax.process_index()}", json.dumps(asdict(spent)), overwrite=True)
        if self._sent == 1:  # the first interval compiled: it says nothing of the run
            self._totals = dict.fromkeys(self._totals, 0.0)
        self._sent += 1
        self._totals["steps"] += steps
        for name in ("step_seconds", "input_wait_seconds", "blocked_seconds"):
            self._totals[name] += steps * getattr(spent, name)
        self._waiting.append(step)

    def receive(self, before: int) -> tuple[dict[str, Any], list[str]]:
        """Return the oldest interval before a step that all have sent; the first process calls it.

        Returns:
            Fields for the log (none if nothing is complete), and a line for every process that is slow.
        """
        if not self._waiting or self._waiting[0] >= before:
            return {}, []
        step = self._waiting[0]
        found = processes.kv_list(f"times/{step}")
        if len(found) < self._count:
            return {}, []
        self._waiting.pop(0)
        processes.kv_delete(f"times/{step}")
        spent = [StepTimes(**json.loads(found[str(rank)])) for rank in range(self._count)]
        return {"ranks": {"step": step, **_columns(spent)}}, self._judge(step, spent)

    def _judge(self, step: int, spent: Sequence[StepTimes]) -> list[str]:
        slow = slow_ranks(spent) if self._intervals else []  # the first interval compiles
        typical = statistics.median_low(each.busy_seconds for each in spent)
        self._intervals += 1
        lines = []
        for rank, each in enumerate(spent):
            self._streaks[rank] = self._streaks[rank] + 1 if rank in slow else 0
            self._slow[rank] += rank in slow
            if self._streaks[rank] == IN_A_ROW:
                lines.append(
                    f"straggler: process {rank} ({each.host}) keeps the others waiting up to step {step}: of each "
                    f"step's {each.step_seconds:.3f} s it waits {each.input_wait_seconds:.3f} s for data and works "
                    f"{each.host_seconds:.3f} s on the host, {each.busy_seconds - typical:.3f} s more than the median"
                )
        return lines

    def table(self) -> str:
        """Return the table of the whole run on the first process, else nothing; every process calls it at the end.

        Means are over all intervals but the first.
        """
        steps = max(1, self._totals["steps"])
        mine = {name: self._totals[name] / steps for name in self._totals if name != "steps"}
        processes.kv_set(f"times/all/{jax.process_index()}", json.dumps({"host": socket.gethostname(), **mine}))
        if not processes.is_first():
            return ""
        try:
            spent = [
                StepTimes(**json.loads(processes.kv_get(f"times/all/{rank}", timeout_seconds=_LAST_SECONDS)))
                for rank in range(self._count)
            ]
        except TimeoutError as error:
            return f"no table of the processes: {error}"
        while self.receive(before=2**62)[0]:  # the last intervals
            pass
        order = sorted(range(self._count), key=lambda rank: -spent[rank].busy_seconds)[:_MOST_ROWS]
        rows = [
            [
                str(rank),
                spent[rank].host,
                *(f"{value:.4f}" for value in _numbers(spent[rank]).values()),
                f"{self._slow[rank]} of {max(0, self._intervals - 1)}",
            ]
            for rank in (order if self._count > _MOST_ROWS else range(self._count))
        ]
        header = ("rank", "host", "s/step", "input wait", "host work", "blocked", "kept others waiting")
        left_out = self._count - len(rows)
        return format_table(rows, header) + (f"\n({left_out} that are less busy)" if left_out else "")


def _numbers(spent: StepTimes) -> Mapping[str, float]:
    return {
        "step_seconds": spent.step_seconds,
        "input_wait_seconds": spent.input_wait_seconds,
        "host_seconds": spent.host_seconds,
        "blocked_seconds": spent.blocked_seconds,
    }


def _columns(spent: Sequence[StepTimes]) -> dict[str, list[Any]]:
    """Return a list over the processes of each number and digest."""
    numbers = {name: [round(_numbers(each)[name], 6) for each in spent] for name in _numbers(spent[0])}
    return numbers | {"samples": [each.samples for each in spent]}
