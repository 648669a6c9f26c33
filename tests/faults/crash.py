"""kill -9 again and again: at random steps, while starting, and at chosen moments of a save."""

import itertools
import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from tests.faults.kill_points import POINTS
from tests.faults.tiny_run import (
    LAST_STEP,
    SAVE_EVERY,
    TinyRun,
    complete_steps,
    differences,
    ended,
    read_lines,
    wait_until,
)

UNDISTURBED = "undisturbed"


@dataclass
class Outcome:
    """Findings of one run that was killed several times.

    Attributes:
        kills: the moments, in order.
        lost_steps: steps that each kill cost.
        wrong: everything that should not be; empty if all is well.
    """

    kills: list[str] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {"kills": self.kills, "lost_steps": self.lost_steps, "wrong": self.wrong}


def draw_kills(rng: random.Random, count: int) -> list[tuple[str, int]]:
    """Draw the moments of kills for one run: at least a third inside a save."""
    inside = (count + 2) // 3
    kills: list[tuple[str, int]] = [(rng.choice(POINTS), rng.randint(1, 3)) for _ in range(inside)]
    steps = sorted(rng.randint(1, LAST_STEP - 1) for _ in range(count - inside))
    kills += [("step", step) if rng.random() < 0.9 else ("start", 0) for step in steps]
    rng.shuffle(kills)
    return kills


def crash_run(run: TinyRun, name: str, *, seed: int, count: int, every_other: tuple[str, ...] = ()) -> Outcome:
    """Train in a workdir with so many kills on the way, and compare the end with the undisturbed run.

    Args:
        run: its files.
        name: of the workdir.
        seed: of the moments.
        count: of kills.
        every_other: options of the second start, the fourth, and so on.
    """
    rng = random.Random(seed)
    outcome = Outcome()
    for start, (point, number) in enumerate(draw_kills(rng, count)):
        options = every_other if start % 2 else ()
        killed_at = _start_and_kill(run, name, point, number, options, rng)
        if killed_at is None:  # it came to its end before
            break
        newest = max(complete_steps(run.workdir(name)), default=0)
        outcome.kills.append(f"{point} {number}".strip())
        outcome.lost_steps.append(max(0, killed_at - newest))
        # The save that had begun last need not be complete, but the one before is; where storage is so slow that saves
        # are left out, which is told, one of those before.
        begun = killed_at - 1 - (killed_at - 1) % SAVE_EVERY  # that of the last step in the log need not have begun
        if newest < begun - (1 + _left_out(run, name, newest)) * SAVE_EVERY:
            outcome.wrong.append(f"killed at step {killed_at}, but the newest checkpoint is that of {newest}")
    run.finish(name)
    starts = run.first_steps(name)
    if any(later < earlier for earlier, later in itertools.pairwise(starts)):
        outcome.wrong.append(f"a start went on from an earlier step than the one before: {starts}")
    outcome.wrong += differences(run, name, UNDISTURBED)
    return outcome


def _left_out(run: TinyRun, name: str, newest: int) -> int:
    """Return the number of saves after the newest checkpoint that the last start has left out."""
    found = 0
    for event in read_lines(run.workdir(name) / "events.jsonl"):
        found = 0 if event["event"] == "start" else found + (event["event"] == "failed_save" and event["step"] > newest)
    return found


def _start_and_kill(
    run: TinyRun, name: str, point: str, number: int, options: tuple[str, ...], rng: random.Random
) -> int | None:
    """Start it, and kill it at a moment; return the last step in its log, or None if it ended by itself."""
    before = run.logged_step(name)
    if point in POINTS:
        number = max(1, min(number, (LAST_STEP - before) // SAVE_EVERY // 2))  # the run must not end before
        process = run.start(name, *options, prefix=("-m", "tests.faults.kill_points", point, str(number)))
        with ended(process):
            process.wait(300)
    else:
        process = run.start(name, *options)
        with ended(process):
            if point == "start":
                time.sleep(rng.uniform(0.2, 4.0))
            else:
                target = before + 1 + number * (LAST_STEP - before) // LAST_STEP // 2
                wait_until(lambda: run.logged_step(name) >= target, seconds=240, process=process)
                time.sleep(rng.uniform(0, 0.05))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode == 0:
        return None
    assert process.returncode == -signal.SIGKILL, f"exit code {process.returncode}\n{run.output(name)}"
    return run.logged_step(name)
