"""`WORKDIR/decisions.jsonl`: what a run has decided on its way. With config and contents it determines all it computes.

There are two kinds: a `Rollback`, and `StandIns` for samples that storage did not give. The first process writes a
decision to disk before it takes effect, and hands it to the others; every checkpoint holds a copy of those before it.
So a start after a kill at any moment does what the run would have done.
"""

import contextlib
import hashlib
import json
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from clipjax.checkpoints import exchange
from clipjax.runtime import process_log, processes
from clipjax.runtime.files import read_bounded, reason_of, write_atomic

FILE = "decisions.jsonl"
MOST_STAND_INS = 100_000
"""Samples for which others stand in, in a run: each decision writes the file anew, and each checkpoint has a copy."""

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


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """The samples that stand in for others that storage did not give.

    Attributes:
        places: of those that were due: number of the global batch * its size + row, counted from 0.
        samples: index in the source of the one that stands in at each place.
    """

    places: Sequence[int]
    samples: Sequence[int]

    def __post_init__(self) -> None:
        for name in ("places", "samples"):
            values = getattr(self, name)
            if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
                raise ValueError(f"{name}={values!r} is no list of whole numbers")
        if not self.places or len(self.places) != len(self.samples) or len({*self.places}) < len(self.places):
            raise ValueError("its places and samples do not fit each other")


Decision = Rollback | StandIns
_KINDS: Mapping[str, type[Decision]] = {"rollback": Rollback, "stand_ins": StandIns}


def parse(record: Any) -> Decision:
    """Return the decision of a JSON object.

    Raises:
        ValueError: it is none, or of a kind that this version does not know.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{record!r} is no decision")
    try:
        values = dict(record)
        kind = values.pop("decision")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"decision={kind!r} is of another version of clipjax")
        return _KINDS[kind](**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{record!r} is no decision: {error!r}") from error


def parse_all(records: Any) -> list[Decision]:
    """Return the decisions of a checkpoint's copy.

    Raises:
        ValueError: it is no list of decisions.
    """
    if not isinstance(records, list):
        raise ValueError(f"{records!r} is no list of decisions")
    return [parse(record) for record in records]


def to_record(decision: Decision) -> dict[str, Any]:
    """Return a decision as a JSON object."""
    kind = next(name for name, each in _KINDS.items() if isinstance(decision, each))
    return {"decision": kind, **asdict(decision)}


class Decisions:
    """The decisions of a run. Every process has the same rollbacks, and the stand-ins in its own part of the batches.

    Attributes:
        path: of the file.
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
        self._all: list[Decision] = []
        self._stand_ins: dict[int, int] = {}
        self._lock = threading.Lock()  # of the file, and of what it holds
        try:
            content = read_bounded(self.path, _MAX_BYTES)
        except FileNotFoundError:
            return
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):  # a kill came before it was on disk, and so before it took effect
                continue
            try:
                self._add(parse(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: {error}; bring back the file, or copy the decisions of the newest "
                    "checkpoint (its record data/metadata) into it"
                ) from error

    def _add(self, decision: Decision) -> None:
        """Add a decision.

        Raises:
            ValueError: it contradicts an earlier one.
        """
        if isinstance(decision, StandIns):
            new = {}
            for place, sample in zip(decision.places, decision.samples, strict=True):
                if self._stand_ins.get(place, sample) != sample:
                    raise ValueError(f"two samples, {self._stand_ins[place]} and {sample}, stand in at place {place}")
                if place not in self._stand_ins:
                    new[place] = sample
            if not new:
                return
            self._stand_ins = {**self._stand_ins, **new}
            decision = StandIns(places=list(new), samples=list(new.values()))
        self._all.append(decision)

    @property
    def taken(self) -> list[Rollback]:
        """The rollbacks, in order."""
        return rollbacks_of(self._all)

    @property
    def stand_ins(self) -> Mapping[int, int]:
        """Index of the sample that stands in, by place (see `StandIns`). The first process has those of all."""
        return self._stand_ins

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """First and last global batches that are never used again."""
        return [(each.first_batch, each.last_batch) for each in self.taken]

    def forget_from(self, number: int) -> None:
        """Forget the rollbacks from this one on (the first is 0), and what was decided after it, to look at before.

        Nothing of this goes to the disk.
        """
        kept = self._all[: [i for i, each in enumerate(self._all) if isinstance(each, Rollback)][number]]
        self._all, self._stand_ins = [], {}
        for decision in kept:
            self._add(decision)

    def forget_stand_ins(self) -> None:
        """Forget all stand-ins, here and on disk: no checkpoint was saved with them, so they belong to no run.

        Raises:
            OSError: the file cannot be written.
        """
        with self._lock:
            self._all, self._stand_ins = list(self.taken), {}
            if processes.is_first():
                self._write(self._all)

    def records(self) -> list[dict[str, Any]]:
        """Return all decisions as JSON objects, for a checkpoint."""
        with self._lock:
            return [to_record(each) for each in self._all]

    def describe(self) -> str:
        """Return the numbers of the decisions by kind, and a digest of them all."""
        with self._lock:
            if not self._all:
                return "none"
            rollbacks, stand_ins = num_decided(self._all)
            digest = hashlib.sha256(_lines(self._all).encode()).hexdigest()[:16]
        return f"{rollbacks} rollbacks and {stand_ins} stand-ins ({digest})"

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
                with self._lock:
                    self._write([*self._all, verdict])
                    self._add(verdict)  # before another thread writes
            except OSError as error:
                return f"a rollback cannot be recorded in {self.path} ({reason_of(error)})"
            return to_record(verdict)

        with self.patience("a decision"):  # a store may be slow to take it
            record = exchange.publish(f"decisions/{len(self.taken)}", decide_and_write)
        if isinstance(record, str):
            return record
        decision = parse(record)
        assert isinstance(decision, Rollback)
        if not processes.is_first():
            self._add(decision)
        return decision

    def keep(self, stand_ins: Mapping[int, int]) -> str:
        """Keep more stand-ins, on the first process and in any of its threads; when this returns, they are on disk.

        Returns:
            Why they cannot be kept; empty if they are.
        """
        with self._lock:
            more = {place: sample for place, sample in stand_ins.items() if place not in self._stand_ins}
            if not more:
                return ""
            if len(self._stand_ins) + len(more) > MOST_STAND_INS:
                return f"others stand in for {MOST_STAND_INS:,} samples already, and a run keeps no more"
            decisions, last = [*self._all], dict[int, int]()
            if decisions and isinstance(newest := decisions[-1], StandIns):
                last = dict(zip(newest.places, newest.samples, strict=True))
                del decisions[-1]
            places = sorted(last := {**last, **more})
            decisions.append(StandIns(places=places, samples=[last[place] for place in places]))
            try:
                self._write(decisions)
            except OSError as error:
                return f"what stands in for a sample cannot be recorded in {self.path} ({reason_of(error)})"
            self._all, self._stand_ins = decisions, {**self._stand_ins, **more}
            return ""

    def note(self, stand_ins: Mapping[int, int]) -> None:
        """Take note of stand-ins that the first process has kept for this one."""
        self._add(StandIns(places=list(stand_ins), samples=list(stand_ins.values())))

    def adopt(self, copy: Sequence[Decision]) -> None:
        """Take over a checkpoint's copy where the file has lost decisions.

        Raises:
            ValueError: the copy contradicts the file.
        """
        contradiction = f"{self.path} and the checkpoint's copy contradict each other; bring back the file of this run"
        with self._lock:
            rollbacks, known, before = rollbacks_of(copy), self.taken, num_decided(self._all)
            shared = min(len(rollbacks), len(known))
            if rollbacks[:shared] != known[:shared]:
                raise ValueError(contradiction)
            try:
                for decision in (*rollbacks[shared:], *(each for each in copy if isinstance(each, StandIns))):
                    self._add(decision)
            except ValueError as error:
                raise ValueError(f"{contradiction} ({error})") from error
            if num_decided(self._all) != before and processes.is_first():
                try:
                    self._write(self._all)
                except OSError as error:  # the checkpoints still hold it
                    process_log.info(f"{self.path} cannot be written: {reason_of(error)}")

    def is_current(self, step: int, num_known: int) -> bool:
        """Return True if a checkpoint belongs to the run that the decisions have left: none went back behind it.

        Args:
            step: of the checkpoint.
            num_known: rollbacks in its copy.
        """
        return all(decision.to_step >= step for decision in self.taken[num_known:])

    def _write(self, decisions: Sequence[Decision]) -> None:
        write_atomic(self.path, _lines(decisions), sync=True)
        if self._send is None:
            return
        try:
            self._send(self.path)
        except OSError:  # the decision takes no effect, so the next start must not find it
            write_atomic(self.path, _lines(self._all), sync=True)
            raise


def _lines(decisions: Sequence[Decision]) -> str:
    return "".join(json.dumps(to_record(each)) + "\n" for each in decisions)


def rollbacks_of(decisions: Sequence[Decision]) -> list[Rollback]:
    """Return those decisions that are rollbacks."""
    return [each for each in decisions if isinstance(each, Rollback)]


def num_decided(decisions: Sequence[Decision]) -> tuple[int, int]:
    """Return the numbers of rollbacks and of stand-ins."""
    return len(rollbacks_of(decisions)), sum(len(each.places) for each in decisions if isinstance(each, StandIns))


def rollbacks_to(taken: Sequence[Rollback], step: int) -> int:
    """Return the number of rollbacks to a step."""
    return sum(each.to_step == step for each in taken)
