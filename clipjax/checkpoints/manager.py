"""Checkpoints: arrays, data position, config, tokenizer and preprocessing, all in one step directory.

`WORKDIR/checkpoints/STEP/` holds groups of arrays (`params`, `train`, where there are any `ema` and `batch_stats`), the
records `config`, `data`, `tokenizer`, `preprocessing` as JSON, and `manifest.json`. A step directory is complete or
absent (`saving.py`), and verified before an array of it is used (`manifest.py`). Nothing is ever unpickled.

All methods that change something are called by all processes, in the same order; all of them see the same outcome.
"""

import contextlib
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clipjax.checkpoints import exchange, first, folder, manifest, saving
from clipjax.checkpoints.folder import GOOD, Aside
from clipjax.checkpoints.manifest import (
    DamagedCheckpoint,
    Manifest,
    State,
    UnusableCheckpoint,
    Verdict,
    best_of,
    best_step,
    examine,
)
from clipjax.checkpoints.reading import restore_arrays
from clipjax.checkpoints.records import FOLDER, RECORDS, read_record
from clipjax.checkpoints.saving import OnCommit, OnFailure, Save, SavesFail, describe, temporary_path
from clipjax.checkpoints.verdicts import all_damaged, examine_together, going_on, refuse_damaged, refuse_undecided, warn
from clipjax.config import CheckpointConfig
from clipjax.runtime import processes

WAIT_SECONDS = 2.0
"""Time that a save waits for the one before it, or as long as copying takes if that is longer; then it is left out.

So a save blocks the loop for at most twice the time of copying. Where that is short, so little a wait costs less than
the steps that a kill would lose, and where a run goes back to does not depend on every delay.
"""

SILENT_SECONDS = 10.0
"""Time without a new byte after which a save that is left out counts as a failure."""

STALLED_SECONDS = 120.0
"""Time without a new byte after which a save is given up where nothing may be left out."""

_instances = itertools.count()


class Checkpoints:
    """The checkpoints of one run: saved in the background, verified, the last few good ones and the best one kept.

    Args:
        workdir: of the run, which this process and its peers alone write to.
        config: what to keep.
        max_failed_saves: failures in a row that are borne.
        on_failure: gets the step and the reason of each failure, maybe in another thread.
        on_commit: gets each step that is complete, in another thread of process 0.
        copy: of the steps elsewhere, which follows what happens to them here.
        apart: process 0 alone sees the workdir.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: CheckpointConfig,
        *,
        max_failed_saves: int = 3,
        on_failure: OnFailure | None = None,
        on_commit: OnCommit | None = None,
        copy: saving.Steps | None = None,
        apart: bool = False,
    ) -> None:
        self._folder = (workdir / FOLDER).absolute()
        self._workdir, self._config, self._max_failed_saves, self._apart = workdir, config, max_failed_saves, apart
        self._on_failure, self._on_commit, self._copy = on_failure or saving.tell_failure, on_commit, copy
        if processes.is_first():
            folder.remove_leftovers(self._folder)
        complete = [step for step in folder.steps_in(self._folder) if folder.is_complete(self._folder / str(step))]
        self._steps = {step: best_of(self._folder / str(step)) for step in complete}
        self._good = {step for step in complete if (self._folder / str(step) / GOOD).exists()}
        self._save: Save | None = None
        self._failures, self._unsaved, self._stalled = 0, "", False  # stalled: the save in progress was given up
        self._seen_bytes, self._seen_at = 0, 0.0  # of the save in progress, and when a byte was new
        self._copy_seconds = 0.0  # of the last save
        self._verified: int | None = None
        self._keys = (f"checkpoints/{number}/{i}" for number in [next(_instances)] for i in itertools.count())
        self._spent_keys: list[str] = []

    def steps(self) -> list[int]:
        """Return the complete steps, in order."""
        if self._save is not None and self._save.finished.is_set():
            self._settle()
        return sorted(self._steps)

    def good_steps(self) -> list[int]:
        """Return the complete steps that are good: those marked so, and all before one of them.

        Training came through those to a good state, and what a rollback rejects is set aside: they can be gone on from.
        """
        newest = max(self._good & self._steps.keys(), default=-1)
        return [step for step in self.steps() if step <= newest]

    def latest_step(self) -> int | None:
        """Return the newest complete step, or None."""
        return max(self._steps, default=None)

    def path(self, step: int) -> pathlib.Path:
        """Return the directory of a step."""
        return self._workdir / FOLDER / str(step)

    def mark_good(self, step: int) -> None:
        """Note that the state of a step is good; only good steps push out older ones."""
        self._good.add(step)
        if processes.is_first() and step in self._steps:
            with contextlib.suppress(OSError):  # without the mark the step is kept for longer, that is all
                (self._folder / str(step) / GOOD).touch()

    def settle(self) -> None:
        """Wait for the save in progress as long as it writes, so that `steps` knows it."""
        if self._join(STALLED_SECONDS, patient=True):
            self._settle()

    def add_best(self, step: int, value: float | None) -> None:
        """Note the metric that chooses the best step for one that was saved before it was measured."""
        metric = self._config.best_metric
        if metric is None or value is None or step not in self._steps:
            return
        self._steps[step] = (metric, float(value))
        if processes.is_first():
            directory = self._folder / str(step)
            with contextlib.suppress(OSError, UnusableCheckpoint):  # the step may then be deleted, that is all
                manifest.write(directory, replace(manifest.read(directory), best=self._steps[step]))

    def set_aside(self, step: int, reason: Aside) -> None:
        """Rename a step so that nothing restores it.

        Raises:
            UnusableCheckpoint: on all processes: the storage refuses.
        """
        if self._save is not None and self._save.step == step:
            self.settle()

        def rename() -> str:
            try:
                self._rename(step, reason)
            except OSError as error:
                return describe(error)
            return ""

        if refusal := exchange.publish(f"{next(self._keys)}/aside", rename):
            raise UnusableCheckpoint(
                f"checkpoint {self.path(step)} must not be restored ({reason}), but cannot be renamed: {refusal}; make "
                "its folder writable, or move it away yourself, and start again"
            )
        self._steps.pop(step, None)
        self._good.discard(step)

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any],
        records: Mapping[str, Any],
        best_value: float | None = None,
        *,
        last: bool = False,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        """Start saving, and return when the arrays may change again; trouble with the storage is told, not raised.

        Args:
            step: completed updates; nothing is done if they are saved already.
            arrays: pytrees of arrays by group.
            records: JSON values by name.
            best_value: the metric that chooses the best step, if it was measured at this step.
            last: the run ends here, so wait for the save before as long as it writes.
            before_commit: is called in another thread of process 0 when only the commit is left.

        Raises:
            SavesFail: on all processes: too many saves in a row have failed.
        """
        if step in self._steps or (self._save is not None and self._save.step == step):
            return
        key = next(self._keys)
        start = exchange.publish(f"{key}/start", lambda: self._prepare(step, last=last))
        if not processes.is_first() and not start["busy"]:
            self._join(math.inf)  # process 0 has the outcome, so it is here at once
            self._settle()
        self._failures = start["failures"]
        if start["reason"]:
            self._unsaved = f"step {step}: {start['reason']}"
            self._on_failure(step, start["reason"])
        if self._failures >= self._max_failed_saves:
            raise SavesFail(f"{self._failures} saves in a row have failed, the last one of {self._unsaved}")
        if start["reason"]:
            return
        metric = self._config.best_metric
        best = None if metric is None or best_value is None else (metric, float(best_value))
        self._unsaved, self._seen_bytes, self._seen_at = "", 0, time.monotonic()
        self._spent_keys.append(key)
        if processes.is_first() and len(self._spent_keys) > 2:
            # All processes have sent their part of the save before this one, so they are done with the one before that.
            exchange.forget(self._spent_keys[0])
        del self._spent_keys[:-2]
        content = Manifest(step, best, {})
        doomed = self._take_doomed()
        self._save = Save(
            self._folder,
            content,
            first.gather(arrays) if self._apart else arrays,
            records,
            key=key,
            doomed=doomed,
            on_failure=self._on_failure,
            on_commit=self._on_commit,
            before_commit=before_commit,
        )
        self._copy_seconds = time.monotonic() - self._seen_at

    def _prepare(self, step: int, *, last: bool) -> dict[str, Any]:
        """Decide on process 0 whether a save begins, and make its directory."""
        patience = STALLED_SECONDS if last else max(WAIT_SECONDS, self._copy_seconds)
        reason, busy = "", not self._join(patience, patient=last)
        if busy:
            assert self._save is not None
            seen, now = self._save.written_bytes(), time.monotonic()
            if seen != self._seen_bytes:
                self._seen_bytes, self._seen_at = seen, now
            elif now - self._seen_at >= SILENT_SECONDS:
                self._failures, self._seen_at = self._failures + 1, now
            reason = f"left out, since step {self._save.step} is still being written"
        else:
            self._settle()
            try:
                if self._failures < self._max_failed_saves:
                    self._make_directory(step)
            except OSError as error:
                self._failures += 1
                reason = describe(error)
        return {"busy": busy, "failures": self._failures, "reason": reason}

    def _make_directory(self, step: int) -> None:
        if (self._folder / str(step)).exists():  # or it would be among the complete ones
            self._rename(step, "incomplete")
        self._folder.mkdir(parents=True, exist_ok=True)
        folder.remove_leftovers(self._folder)
        temporary_path(self._folder, step).mkdir()

    def _rename(self, step: int, reason: Aside) -> None:
        path = folder.set_aside(self._folder, step, reason)
        if self._copy is not None:
            self._copy.rename(str(step), path.name)

    def _join(self, seconds: float, *, patient: bool = False) -> bool:
        """Wait for the save in progress; return False if it does not end in time; patience begins anew with a byte."""
        if self._save is None:
            return True
        until, seen = time.monotonic() + seconds, 0
        while not self._save.finished.wait(max(0.0, min(1.0, until - time.monotonic()))):
            if patient and seen != (seen := self._save.written_bytes()):
                until = time.monotonic() + seconds
            if time.monotonic() >= until:
                return False
        return True

    def _settle(self) -> None:
        """Take note of the outcome of the save that has ended."""
        save, self._save = self._save, None
        if save is None:
            return
        if save.reason:
            self._failures += 1
            self._unsaved = f"step {save.step}: {save.reason}"
            return
        self._failures = 0
        self._steps[save.step] = save.best
        if save.step in self._good:
            self.mark_good(save.step)

    def _take_doomed(self) -> list[int]:
        """Return the steps that are no longer to be kept, and forget them."""
        good = self.good_steps()
        kept = {*good[-self._config.keep_last :], best_step(self._steps, self._config.best_metric)}
        doomed = [step for step in good if step not in kept]
        for step in doomed:
            del self._steps[step]
            self._good.discard(step)
            if self._copy is not None:
                self._copy.remove(str(step))
        return doomed

    def read_data(self, name: str, default: Any, steps: Sequence[int] | None = None) -> dict[int, Any]:
        """Return a field of the `data` record of every step whose records are unchanged, as process 0 sees them.

        Args:
            name: of the field.
            default: for a record without it.
            steps: to read; None: all.
        """

        def read() -> list[Any]:
            found = []
            for step in self.steps() if steps is None else steps:
                with contextlib.suppress(OSError, ValueError, TypeError):  # damaged: found when it is verified
                    if examine(self._folder / str(step), step=step, contents=False).usable:
                        found.append([step, dict(read_record(self.path(step), "data")).get(name, default)])
            return found

        return dict(exchange.publish(f"{next(self._keys)}/data", read))

    def newest_verified(self, steps: Sequence[int] | None = None) -> int | None:
        """Return the newest step whose files are unchanged; those after it are set aside with a warning.

        Args:
            steps: to choose from; None: all.

        Returns:
            The same step on all processes; None if there is none at all.

        Raises:
            DamagedCheckpoint: there are some, and all of them are damaged; none is set aside.
            UndecidedCheckpoint: the storage does not give one, or it is of a newer format; none is set aside.
            UnusableCheckpoint: one cannot be set aside.
        """
        key = next(self._keys)
        known = exchange.publish(
            f"{key}/steps", lambda: [list(self._steps.items()), sorted(self._good), folder.steps_in(self._folder)]
        )
        self._steps = {step: None if best is None else (best[0], best[1]) for step, best in known[0]}
        self._good = set(known[1])
        bad: dict[int, Verdict] = {}
        for step in sorted(known[2] if steps is None else steps, reverse=True):
            verdict = self._examine(step)
            if verdict.usable:
                self._set_aside_all(bad, step)
                refuse_damaged(self.path(step), verdict)  # warns of one that is not verified
                self._verified = step
                return step
            refuse_undecided(self.path(step), verdict)
            bad[step] = verdict
        if bad:
            raise DamagedCheckpoint(all_damaged(self._workdir / FOLDER, bad))
        return None

    def _set_aside_all(self, bad: Mapping[int, Verdict], chosen: int) -> None:
        for step, verdict in bad.items():
            warn(going_on(self.path(step), verdict, self.path(chosen)))
            self.set_aside(step, "incomplete" if verdict.state is State.INCOMPLETE else "damaged")

    def _examine(self, step: int) -> Verdict:
        return examine_together(self._folder / str(step), next(self._keys), step=step, apart=self._apart)

    def restore(self, step: int, abstract_arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arrays, placed by the shardings of `abstract_arrays`, and the records.

        Raises:
            DamagedCheckpoint: a file has changed, or a group or array is missing or misshapen.
        """
        if self._verified != step:
            refuse_damaged(self.path(step), self._examine(step))
        self._verified = None
        restore = first.restore if self._apart else restore_arrays
        arrays = restore(self.path(step), abstract_arrays)
        try:
            return arrays, {name: self.read_record(step, name) for name in RECORDS}
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"checkpoint {self.path(step)} is damaged: {error}") from error

    def read_record(self, step: int, name: str) -> Any:
        """Return a JSON record of a step; all processes call this. Raises what `records.read_record` does."""
        return (first.read_first if self._apart else read_record)(self.path(step), name)

    def wait(self) -> None:
        """Wait until everything saved so far is on disk, as long as it is being written.

        Raises:
            SavesFail: the last save has failed.
        """
        self.close()
        if self._unsaved:
            raise SavesFail(f"the last checkpoint is not saved; {self._unsaved}")

    def close(self) -> None:
        """Wait, and delete what is no longer to be kept; raise nothing. Storage that was given up gets no more time."""
        given_up = self._failures >= self._max_failed_saves or self._stalled
        if not self._join(0.0 if given_up else STALLED_SECONDS, patient=not given_up):
            assert self._save is not None
            if not given_up:
                self._stalled = True
                self._unsaved = f"step {self._save.step}: nothing was written for {STALLED_SECONDS:.0f} seconds"
            return
        self._settle()
        for step in self._take_doomed():
            if processes.is_first():
                with contextlib.suppress(OSError):
                    folder.delete(self._folder, step)
