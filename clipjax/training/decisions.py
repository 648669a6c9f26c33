"""`WORKDIR/decisions.jsonl`: the rollbacks of a run. With config and contents they determine all that it computes.

The first process writes a decision to disk before it takes effect, and hands it to the others; every checkpoint holds a
copy of those before it. So a start after a kill at any moment does what the run would have done.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from clipjax.checkpoints import exchange
from clipjax.runtime import process_log, processes
from clipjax.runtime.files import read_bounded, write_atomic

FILE = "decisions.jsonl"
_MAX_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """A return to an earlier checkpoint, without the batches that led into trouble.

    Attributes:
        to_step: of the checkpoint; everything after it is computed anew.
        first_step: first step of the trouble.
        last_step: last one.
        first_batch: first global batch, counted from 0, that is never used again.
        last_batch: last one.
        reason: the trouble, in words.
    """

    to_step: int
    first_step: int
    last_step: int
    first_batch: int
    last_batch: int
    reason: str

    def __post_init__(self) -> None:
        for item in fields(self):
            if type(getattr(self, item.name)) is not (str if item.name == "reason" else int):
                raise ValueError(f"{item.name}={getattr(self, item.name)!r} is of another type")
        if not 0 <= self.first_batch <= self.last_batch or not 0 <= self.to_step < self.first_step <= self.last_step:
            raise ValueError("its steps or batches are out of order")


def parse(record: Any) -> Rollback:
    """Return the decision of a JSON object.

    Raises:
        ValueError: it is none, or of a kind that this version does not know.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{record!r} is no decision")
    try:
        values = dict(record)
        if (kind := values.pop("decision")) != "rollback":
            raise ValueError(f"decision={kind!r} is of another version of clipjax")
        return Rollback(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{record!r} is no decision: {error!r}") from error


def parse_all(records: Any) -> list[Rollback]:
    """Return the decisions of a checkpoint's copy.

    Raises:
        ValueError: it is no list of decisions.
    """
    if not isinstance(records, list):
        raise ValueError(f"{records!r} is no list of decisions")
    return [parse(record) for record in records]


def to_record(decision: Rollback) -> dict[str, Any]:
    """Return a decision as a JSON object."""
    return {"decision": "rollback", **asdict(decision)}


class Decisions:
    """The decisions of a run, in order. Every process has the same.

    Attributes:
        path: of the file.
        taken: the decisions.
        patience: makes what `take` does, with a name for it; the watchdog's, once there is one.

    Args:
        workdir: of the run.
        send: brings the file to where the workdir is kept, and returns when it is there; None: it is kept here.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, workdir: pathlib.Path, send: Callable[[pathlib.Path], None] | None = None) -> None:
        self.path, self._send = workdir / FILE, send
        self.patience: Callable[[str], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext()
        self.taken: list[Rollback] = []
        try:
            content = read_bounded(self.path, _MAX_BYTES)
        except FileNotFoundError:
            return
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):  # a kill came before it was on disk, and so before it took effect
                continue
            try:
                self.taken.append(parse(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: {error}; bring back the file, or copy the decisions of the newest "
                    "checkpoint (its record data/metadata) into it"
                ) from error

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """First and last global batches that are never used again."""
        return [(each.first_batch, each.last_batch) for each in self.taken]

    def forget_from(self, number: int) -> None:
        """Forget the decisions from this one on (the first is 0), here and not on disk, to look at an earlier run."""
        del self.taken[number:]

    def records(self) -> list[dict[str, Any]]:
        """Return all decisions as JSON objects, for a checkpoint."""
        return [to_record(each) for each in self.taken]

    def take(self, decide: Callable[[], Rollback | str]) -> Rollback | str:
        """Return what the first process decides; when this returns, a decision is on disk.

        Args:
            decide: gives a decision, or the reason why there is none. Every process calls `take` at the same step, but
                only the first calls this. One that cannot be written is such a reason, too.
        """

        def decide_and_write() -> dict[str, Any] | str:
            verdict = decide()
            if isinstance(verdict, str):
                return verdict
            try:
                self._write([*self.taken, verdict])
            except OSError as error:
                return f"a rollback cannot be recorded in {self.path} ({error.strerror})"
            return to_record(verdict)

        with self.patience("a decision"):  # a store may be slow to take it
            record = exchange.publish(f"decisions/{len(self.taken)}", decide_and_write)
        if isinstance(record, str):
            return record
        self.taken.append(parse(record))
        return self.taken[-1]

    def adopt(self, copy: list[Rollback]) -> None:
        """Take over a checkpoint's copy where the file has lost decisions.

        Raises:
            ValueError: the copy contradicts the file.
        """
        shared = min(len(copy), len(self.taken))
        if copy[:shared] != self.taken[:shared]:
            raise ValueError(
                f"{self.path} and the checkpoint's copy contradict each other; bring back the file of this run"
            )
        if len(copy) > len(self.taken):
            self.taken = copy
            if processes.is_first():
                try:
                    self._write(copy)
                except OSError as error:  # the checkpoints still hold it
                    process_log.info(f"{self.path} cannot be written: {error.strerror}")

    def is_current(self, step: int, num_known: int) -> bool:
        """Return True if a checkpoint belongs to the run that the decisions have left: none went back behind it.

        Args:
            step: of the checkpoint.
            num_known: decisions in its copy.
        """
        return all(decision.to_step >= step for decision in self.taken[num_known:])

    def _write(self, decisions: Sequence[Rollback]) -> None:
        write_atomic(self.path, _lines(decisions), sync=True)
        if self._send is None:
            return
        try:
            self._send(self.path)
        except OSError:  # the decision takes no effect, so the next start must not find it
            write_atomic(self.path, _lines(self.taken), sync=True)
            raise


def _lines(decisions: Sequence[Rollback]) -> str:
    return "".join(json.dumps(to_record(each)) + "\n" for each in decisions)


def rollbacks_to(taken: Sequence[Rollback], step: int) -> int:
    """Return the number of rollbacks to a step."""
    return sum(each.to_step == step for each in taken)
