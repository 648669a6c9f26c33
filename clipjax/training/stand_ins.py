"""Samples that storage does not give, with `data.on_unreadable=skip`: what stands in for them is decided once for all.

The process that reads such a place of the order asks the first one, which keeps the decision before the batch is used.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from clipjax.checkpoints import exchange
from clipjax.config import Config, OnUnreadable
from clipjax.data.sample import UnreadableData
from clipjax.runtime import processes
from clipjax.training.decisions import Decisions

_KEY = "stand_ins"
_LOOK_SECONDS, _LOOK_SOON = 0.5, 0.02
_EACH_TIME = 3


class Keeper:
    """The way of stand-ins into the decisions of a run; it lives through every rollback, as others may be asking.

    Args:
        decisions: of the run.
        config: of the run.
    """

    def __init__(self, decisions: Decisions, config: Config):
        self._decisions, self._batch_size = decisions, config.global_batch_size
        self._times, self._told_at = 0, 0
        self._tell = _announce

    @contextlib.contextmanager
    def telling(self, tell: Callable[[str, int], None]) -> Iterator[None]:
        """Tell of samples that are skipped in the `with` block by a function; else they are announced.

        Args:
            tell: gets a line, and the number of all by now, on the first process and in any thread; each of the first
                few times, and whenever the number has doubled.
        """
        self._tell = tell
        try:
            yield
        finally:
            self._tell = _announce

    def keep(self, stand_ins: Mapping[int, int]) -> None:
        """Keep what stands in at some places of a batch; when this returns, it is on disk.

        Raises:
            UnreadableData: it cannot be kept.
        """
        with self._decisions.patience("a decision"):
            if processes.is_first():
                failure = self._keep_all([(0, stand_ins)])
            else:
                failure = exchange.ask(_KEY, [list(stand_ins), list(stand_ins.values())])
        if failure:
            raise UnreadableData(f"data.on_unreadable=skip: samples cannot be read, and {failure}")
        if not processes.is_first():
            self._decisions.note(stand_ins)  # after a rollback, they stand here too

    def answer(self) -> bool:
        """Keep what the other processes have asked for; return whether there was anything."""
        return exchange.answer(_KEY, self._answer)

    def _answer(self, asked: Sequence[tuple[int, Any]]) -> str:
        return self._keep_all([(rank, dict(zip(*question, strict=True))) for rank, question in asked])

    def _keep_all(self, asked: Sequence[tuple[int, Mapping[int, int]]]) -> str:
        """Keep the stand-ins of several processes at once; return why they cannot be kept."""
        together = {place: sample for _, each in asked for place, sample in each.items()}
        failure = self._decisions.keep(together)
        total, self._times = len(self._decisions.stand_ins), self._times + 1
        if not failure and (self._times <= _EACH_TIME or total >= 2 * self._told_at):
            self._told_at = total
            ranks = sorted({rank for rank, _ in asked})
            whose = f"process {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} processes"
            samples = "1 sample" if len(together) == 1 else f"{len(together)} samples"
            self._tell(
                f"global batch {min(together) // self._batch_size}: storage does not give {whose} {samples}; others of "
                f"the same source stand in, there and in every later start ({total:,} by now)",
                total,
            )
        return failure


def _announce(text: str, _: int) -> None:
    processes.announce(text)


@contextlib.contextmanager
def open_keeper(decisions: Decisions, config: Config) -> Iterator[Keeper | None]:
    """Yield the keeper of a start of a process; None where `data.on_unreadable` is `stop`."""
    if config.data.on_unreadable is OnUnreadable.STOP:
        yield None
        return
    keeper = Keeper(decisions, config)
    if jax.process_count() == 1 or not processes.is_first():
        yield keeper
        return
    ends = threading.Event()

    def serve() -> None:
        wait = _LOOK_SECONDS
        while not ends.wait(wait):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator has gone: the run ends anyway
                wait = _LOOK_SOON if keeper.answer() else min(_LOOK_SECONDS, 1.2 * wait)

    thread = threading.Thread(target=serve, daemon=True, name="stand-ins")
    thread.start()
    try:
        yield keeper
    finally:
        ends.set()
        thread.join()
