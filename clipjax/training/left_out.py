"""Lists of the samples that rollbacks leave out, in `WORKDIR/left_out/`, for a person to look at."""

import functools
import pathlib
from collections.abc import Sequence
from concurrent import futures

from clipjax.config import Config
from clipjax.data.mixture import sizes_of
from clipjax.data.sample import Source
from clipjax.data.training_order import RunOrder, TrainingOrder, make_order
from clipjax.runtime import process_log
from clipjax.runtime.files import write_atomic
from clipjax.runtime.storage import is_address
from clipjax.training.decisions import Rollback

FOLDER = "left_out"
MOST_SAMPLES = 2**20
"""Samples in a list; finding the key of each takes up to 0.1 ms."""

MOST_REMOTE = 2**12
"""The same in an object store, where it takes a request."""

_THREADS = 64


def write_missing(
    workdir: pathlib.Path,
    taken: Sequence[Rollback],
    source: Source,
    config: Config,
    order: RunOrder,
) -> None:
    """Write the list of every decision that has none: a kill may have come between a decision and its list.

    A list has a line per sample, in the order of the batches: batch, shard, key. It follows from the seed and the size
    of the source. No picture is read, so a sample that cannot be used is listed itself, and not what took its place.

    Args:
        workdir: of the run, for process 0 to write to.
        taken: decisions of the run.
        source: of all samples.
        config: the run: its `seed` and `global_batch_size`.
        order: of the run.
    """
    for decision in taken:
        path = workdir / FOLDER / f"batches-{decision.first_batch}-{decision.last_batch}.txt"
        try:
            if path.exists():  # and whole, as it was written at once
                continue
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, "".join(_lines(decision, source, make_order(sizes_of(source), config, order))))
        except OSError as error:  # the decision itself is on disk, and the next start tries again
            process_log.info(f"{path} cannot be written: {error}")


def _lines(decision: Rollback, source: Source, order: TrainingOrder) -> list[str]:
    is_remote = any(map(is_address, source.files()))
    most, lines = MOST_REMOTE if is_remote else MOST_SAMPLES, []
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        locate = functools.partial(pool.map, source.location) if is_remote else functools.partial(map, source.location)
        for number in range(decision.first_batch, decision.last_batch + 1):
            samples = order.placed(number)[:, 0].tolist()
            if len(lines) + len(samples) > most:
                kept = samples[: most - len(lines)]
                lines += [f"batch {number}: {place}\n" for place in locate(kept)]
                more = (decision.last_batch + 1 - number) * len(samples) - len(kept)
                return [*lines, f"and {more} samples more\n"]
            lines += [f"batch {number}: {place}\n" for place in locate(samples)]
    return lines
