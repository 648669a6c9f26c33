"""Lists of the samples that a rollback leaves out, in `WORKDIR/left_out/`, for a person to look at."""

import collections
import pathlib

import jax
import numpy as np

from clipjax.data.sample import Source
from clipjax.runtime import process_log
from clipjax.training.decisions import Rollback

FOLDER = "left_out"


class RecentBatches:
    """The samples of the last batches of this process.

    Args:
        number: how many batches are kept.
    """

    def __init__(self, number: int) -> None:
        self._batches: collections.deque[tuple[int, np.ndarray]] = collections.deque(maxlen=number)

    def add(self, batch: int, index: np.ndarray) -> None:
        """Keep a batch.

        Args:
            batch: number of the global batch, from 0.
            index: number in the source of each sample of this process.
        """
        self._batches.append((batch, index))

    def write(self, workdir: pathlib.Path, decision: Rollback, source: Source) -> None:
        """Write a line per sample of the batches that a decision leaves out: batch, shard, key."""
        first, last = decision.first_batch, decision.last_batch
        path = workdir / FOLDER / f"batches-{first}-{last}-rank-{jax.process_index():05d}.txt"
        lines = [
            f"batch {batch}: {source.location(int(i))}\n"
            for batch, index in self._batches
            if first <= batch <= last
            for i in index
        ]
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(lines))
        except OSError as error:  # the decision itself is on disk
            process_log.info(f"{path} cannot be written: {error}")
