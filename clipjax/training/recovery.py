"""Judgement of a run's updates, two steps late or before they are saved, and the way back after trouble.

The step skips an update that is not finite by itself (`training.step`). `Recovery` sees its counters: it tells which
checkpoints are good, and ends the run's current part with `RollBack` after too many skips in a row or a loss spike. All
processes see the same numbers at the same step, so all decide alike and no device waits.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from clipjax.checkpoints import exchange
from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.manifest import UnusableCheckpoint
from clipjax.config import Config
from clipjax.data.training_order import batch_number
from clipjax.monitoring.events import Events
from clipjax.training.decisions import Decisions, Rollback, rollbacks_to, to_record

GOOD_AFTER = 10
"""Updates in a row that must be finite after a checkpoint before it counts as good."""
_rejections = itertools.count()


class RollBack(Exception):
    """The end of a run's current part: its decision is on disk, and a new start goes on from an earlier checkpoint."""

    def __init__(self, decision: Rollback) -> None:
        super().__init__(
            f"{decision.reason}; back to the checkpoint of step {decision.to_step}, without the batches of steps "
            f"{decision.first_step} to {decision.last_step}"
        )
        self.decision = decision


class RunStopped(RuntimeError):
    """The end of a run that a person has to look at: started again, it would end at the same place."""


class Recovery:
    """The judgement of one start of a run.

    Args:
        config: the run.
        checkpoints: of the workdir.
        decisions: taken so far.
        events: gets skipped updates and rollbacks.
        start_step: completed updates.
        settle: waits for the save in progress, so that `checkpoints` knows it.
    """

    def __init__(
        self,
        config: Config,
        *,
        checkpoints: Checkpoints,
        decisions: Decisions,
        events: Events,
        start_step: int,
        settle: Callable[[], None],
    ) -> None:
        self._limits = config.recovery
        self._checkpoints, self._decisions, self._events = checkpoints, decisions, events
        self._settle = settle
        self._finite_since = start_step  # every update after this step was finite
        self._good_up_to = -1  # checkpoints up to this step are good, also those that are still being written
        self._equal_at = start_step  # the last step at which all copies of the state were equal

    def judge(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Judge an update by its metrics, which are there already.

        Args:
            step: completed updates.
            metrics: `skipped_in_a_row`, `loss_spike`, `loss` and `param_norm` of that step.

        Raises:
            RollBack: a new start goes on from an earlier checkpoint; the decision is on disk.
            RunStopped: there is no good checkpoint, or going back has not helped.
        """
        in_a_row = int(metrics["skipped_in_a_row"])
        if in_a_row:
            self._finite_since = step
            self._events.add("skipped_update", step=step, in_a_row=in_a_row)
        if in_a_row >= self._limits.max_skipped_in_a_row:
            self._go_back(step - in_a_row + 1, step, f"{in_a_row} updates in a row, up to step {step}, were not finite")
        if not math.isfinite(float(metrics["param_norm"])):  # gradients were finite, what the update made of them not
            self._go_back(step, step, f"the parameters after step {step} were not finite, or too large for their norm")
        if int(metrics["loss_spike"]):
            self._go_back(step, step, f"the loss jumped to {float(metrics['loss']):.4g} at step {step}")
        if step - GOOD_AFTER >= self._finite_since:
            self._good_up_to = step - GOOD_AFTER
        self._mark()

    def end(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Judge the last update of a run: one that ends in the middle of skipped updates has not ended well.

        Raises:
            RollBack: a new start goes on from an earlier checkpoint.
            RunStopped: there is no good checkpoint, or going back has not helped.
        """
        in_a_row = int(metrics["skipped_in_a_row"])
        if in_a_row:
            self._go_back(step - in_a_row + 1, step, f"the last {in_a_row} updates, up to step {step}, were not finite")

    def judge_replicas(self, step: int, difference: str | None) -> None:
        """Judge the copies of the state after a step.

        Args:
            step: completed updates.
            difference: device and leaf that differ, in words; None: none does.

        Raises:
            RunStopped: one does; checkpoints since the last check without a difference are set aside, if an older one
                is left.
        """
        if difference is None:
            self._equal_at = step
            return
        self._settle()  # or the next start would find the save that has just begun
        left = self._reject(self._unequal_steps)
        self._events.add("replicas_differ", step=step, equal_at=self._equal_at, difference=difference)
        raise RunStopped(
            f"{difference} after step {step}; all copies were equal at step {self._equal_at}. The device or its memory "
            f"may be broken: take its machine out and start again{left}"
        )

    def _unequal_steps(self) -> list[int]:
        """The checkpoints since the last check that fitted; none of them, if there is no older one."""
        steps = self._checkpoints.steps()
        return [each for each in steps if each > self._equal_at] if min(steps, default=0) <= self._equal_at else []

    def mark_all(self) -> None:
        """Mark every checkpoint as good: the run has ended well."""
        self._good_up_to = max(self._checkpoints.steps(), default=-1)
        self._mark()

    def _mark(self) -> None:
        """Mark the checkpoints that are good."""
        good = set(self._checkpoints.good_steps())
        for each in self._checkpoints.steps():
            if each <= self._good_up_to and each not in good:
                self._checkpoints.mark_good(each)

    def _go_back(self, first_step: int, last_step: int, trouble: str) -> None:
        """End this part of the run.

        The batch before the trouble is left out, too: its update may be what broke the parameters.
        """
        self._settle()  # where the run goes back to does not depend on how long a save takes
        self._mark()
        cause = max(1, first_step - 1)
        verdict = self._decisions.take(lambda: self._decide(cause, last_step, trouble))
        if isinstance(verdict, Rollback):
            facts = to_record(verdict)
            self._events.add(facts.pop("decision"), **facts)
            raise RollBack(verdict)
        left = self._reject(lambda: self._bad_steps(cause))
        self._events.add("no_way_back", step=last_step, trouble=trouble, why=verdict)
        raise RunStopped(
            f"{trouble}, and {verdict}; `clipjax train ... --replay={first_step}` tells what went wrong first. A lower "
            f"optim.learning_rate, a longer warmup_examples or an optim.max_grad_norm, in a new workdir, may help{left}"
        )

    def _bad_steps(self, cause: int) -> list[int]:
        good = self._checkpoints.good_steps()
        return [step for step in self._checkpoints.steps() if step >= cause and step not in good]

    def _reject(self, choose: Callable[[], list[int]]) -> str:
        """Set the steps aside that process 0 chooses; return what to add to the run's last message where that failed.

        Which old steps are still there depends on when a process saw the end of a save.
        """
        refused = []
        for step in exchange.publish(f"rejected/{next(_rejections)}", choose):
            try:
                self._checkpoints.set_aside(step, "rejected")
            except UnusableCheckpoint as error:
                refused.append(str(error))
        return "".join(f"\n{text}" for text in refused)

    def _decide(self, cause: int, last_step: int, trouble: str) -> Rollback | str:
        """Return where to go on from, or why there is no such place."""
        good = [step for step in self._checkpoints.good_steps() if step < cause]
        limit, taken = self._limits.max_rollbacks, self._decisions
        if not good:
            return "there is no good checkpoint from before to go back to"
        if rollbacks_to(taken.taken, good[-1]) >= limit:
            return f"recovery.max_rollbacks={limit}: going back to the checkpoint of step {good[-1]} has not helped"
        return Rollback(
            to_step=good[-1],
            first_step=cause,
            last_step=last_step,
            first_batch=batch_number(cause - 1, taken.left_out),
            last_batch=batch_number(last_step - 1, taken.left_out),
            reason=trouble,
        )
