"""Samples that storage does not give, with `data.on_unreadable=skip`: what stands in for them is decided once for all.

The process that reads such a place of the order asks the first one, which keeps the decision before the batch is used.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from clipjax.checkpoints import exchange
from clipjax.config import Config, OnUnreadable
from clipjax.data.sample import UnreadableData
from clipjax.runtime import processes
from clipjax.training.decisions import Decisions

_KEY = "stand_ins"
_LOOK_SECONDS = 0.5
_EACH_TIME = 3

Keep = Callable[[Mapping[int, int]], None]
Tell = Callable[[str, int], None]


class _Keeper:
    """The way of stand-ins into the decisions of a run.

    Args:
        decisions: of the run.
        config: of the run.
        tell: gets a line about samples that were skipped, and the number of all by now, on the first process and in
            any thread; each of the first few times, and whenever the number has doubled.
    """

    def __init__(self, decisions: Decisions, config: Config, tell: Tell):
        self._decisions, self._tell = decisions, tell
        self._batch_size, self._times, self._told_at = config.global_batch_size, 0, 0

    def keep(self, stand_ins: Mapping[int, int]) -> None:
        """Keep what stands in at some places of a batch; when this returns, it is on disk.

        Raises:
            UnreadableData: it cannot be kept.
        """
        with self._decisions.patience("a decision"):
            if processes.is_first():
                failure = self._keep_here(jax.process_index(), stand_ins)
            else:
                failure = exchange.ask(_KEY, [list(stand_ins), list(stand_ins.values())])
        if failure:
            raise UnreadableData(
                f"data.on_unreadable=skip: {failure}; see to the storage of the data, or stay at data.on_unreadable="
                "stop, and start the same command again"
            )
        if not processes.is_first():
            self._decisions.stand_ins |= stand_ins  # after a rollback, they stand here too

    def answer(self) -> None:
        """Keep what the other processes have asked for."""
        exchange.answer(_KEY, self._answer)

    def _answer(self, process: int, question: Any) -> str:
        places, samples = question
        return self._keep_here(process, dict(zip(places, samples, strict=True)))

    def _keep_here(self, process: int, stand_ins: Mapping[int, int]) -> str:
        failure = self._decisions.keep(stand_ins)
        total, self._times = len(self._decisions.stand_ins), self._times + 1
        if not failure and (self._times <= _EACH_TIME or total >= 2 * self._told_at):
            self._told_at = total
            batch, count = min(stand_ins) // self._batch_size, len(stand_ins)
            samples = "1 sample" if count == 1 else f"{count} samples"
            self._tell(
                f"global batch {batch}: storage does not give process {process} {samples}; others of the same source "
                f"stand in, there and in every later start ({total:,} by now)",
                total,
            )
        return failure


@contextlib.contextmanager
def keeping(decisions: Decisions, config: Config, tell: Tell) -> Iterator[Keep | None]:
    """Yield the function that keeps stand-ins; None where `data.on_unreadable` is `stop`."""
    if config.data.on_unreadable is OnUnreadable.STOP:
        yield None
        return
    keeper = _Keeper(decisions, config, tell)
    if jax.process_count() == 1 or not processes.is_first():
        yield keeper.keep
        return
    ends = threading.Event()

    def serve() -> None:
        while not ends.wait(_LOOK_SECONDS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator has gone: the run ends anyway
                keeper.answer()

    thread = threading.Thread(target=serve, daemon=True, name="stand-ins")
    thread.start()
    try:
        yield keeper.keep
    finally:
        ends.set()
        thread.join()
