"""The limit of unusable samples in a run."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from clipjax.config import Config
from clipjax.data.sample import count_by_reason
from clipjax.data.training_batches import TooManyBadSamples

_JUDGED_READS = 1000  # the bad share of fewer samples says little


class BadSampleLimit:
    """The limit of unusable samples in a run, counted from the start of this process.

    Args:
        config: the run: its `global_batch_size` and `data.max_bad_fraction`.
        num_samples: size of the source.
        start_step: completed updates.
        skipped: unusable samples by reason up to `start_step`; those of an earlier start do not count again.
    """

    def __init__(self, config: Config, *, num_samples: int, start_step: int, skipped: Sequence[int]):
        self._max_fraction = config.data.max_bad_fraction
        self._batch_size = config.global_batch_size
        self._window = min(_JUDGED_READS, num_samples - num_samples % config.global_batch_size)
        self._start_step = start_step
        self._skipped = np.asarray(skipped)

    def check(self, step: int, skipped: Sequence[int], latest: Callable[[], Sequence[str]]) -> None:
        """Judge the counts of all processes after a step, in windows of 1000 samples or one epoch if that is less.

        Args:
            step: completed updates.
            skipped: unusable samples by reason up to there.
            latest: gives the last few of them, for the message; that may read the data.

        Raises:
            TooManyBadSamples: their share is above the limit.
        """
        counts = count_by_reason(np.asarray(skipped) - self._skipped)
        read, bad = (step - self._start_step) * self._batch_size, sum(counts.values())
        # Whole windows: in the middle of one, the bad samples may just have come first.
        if bad <= self._max_fraction * math.ceil(read / self._window) * self._window:
            return
        by_reason = ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)
        named = latest()
        seen = f"the latest: {'; '.join(named)}" if named else "other processes name them"
        remedy = (
            "repair or remove them and start anew in another workdir: the run in this one goes on with the same data "
            "only"
        )
        if counts["unreadable"] > bad / 2:
            remedy = "see to the storage of the data and start the same command again"
        raise TooManyBadSamples(
            f"data.max_bad_fraction={self._max_fraction}: {bad} of the {read} samples read are unusable, "
            f"{bad / read:.1%} ({by_reason}); {seen}. Raise data.max_bad_fraction to go on without them, or {remedy}"
        )
