"""Counts of a run's samples for the log: how many of each source were due, and how many of them could not be used."""

from typing import Any

import numpy as np

from clipjax.config import Config
from clipjax.data.mixture import MixtureOrder, sizes_of
from clipjax.data.sample import NUM_COUNTERS, count_by_reason
from clipjax.data.training_order import batch_number, make_order
from clipjax.training.decisions import Decisions
from clipjax.training.inputs import Inputs


class SampleCounts:
    """Counts of samples for a line of the log.

    Args:
        config: the run.
        inputs: of the run.
        decisions: of the run; batches that they leave out count as due, as they are gone.
    """

    def __init__(self, config: Config, inputs: Inputs, decisions: Decisions):
        self._names = sorted(config.data.mixture)
        order = make_order(sizes_of(inputs.source), config, inputs.order) if self._names else None
        self._order = order if isinstance(order, MixtureOrder) else None
        self._decisions = decisions

    def __call__(self, step: int, counters: np.ndarray) -> dict[str, Any]:
        """Return `samples_skipped` by reason, and of a mixture `samples_due` and `samples_skipped_by_source`.

        Args:
            step: completed updates.
            counters: unusable samples up to there: whole numbers [sources * NUM_COUNTERS].
        """
        told: dict[str, Any] = {"samples_skipped": count_by_reason(counters)}
        if self._order is not None:
            due = self._order.counts(batch_number(step - 1, self._decisions.left_out) + 1)
            told["samples_due"] = dict(zip(self._names, due, strict=True))
            rows = np.reshape(counters, (len(self._names), NUM_COUNTERS))
            told["samples_skipped_by_source"] = {
                name: {reason: count for reason, count in count_by_reason(row).items() if count}
                for name, row in zip(self._names, rows, strict=True)
            }
        return told
