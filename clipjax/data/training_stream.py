"""Training batches of one process: the integer step is the only state; Grain reads ahead, in threads or processes.

Reading order: `TrainStream`, `batch_number`, `BadSampleLimit`. The order is in `clipjax.data.training_order`, decoding
and augmentation in `clipjax.data.training_batches`, worker processes in `clipjax.data.workers`. Axes: b batch of this
process, s image_size, l tokens.
"""

import atexit
import collections
import contextlib
import functools
import math
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.config import Config, SamePair
from clipjax.data import workers
from clipjax.data.images import make_eval_transform
from clipjax.data.mixture import sizes_of
from clipjax.data.sample import NUM_COUNTERS, REASONS, Source, count_by_reason
from clipjax.data.training_batches import GOOD, Augment, Batches, TooManyBadSamples, substituted
from clipjax.data.training_order import DISK_ORDER, RunOrder, make_order, shuffled_by_grain
from clipjax.data.workers import WorkersDie

_JUDGED_READS = 1000  # the bad share of fewer samples says little
_LATEST = 3


def batch_number(position: int, left_out: Sequence[tuple[int, int]]) -> int:
    """Return the number of the global batch at a position of the stream: numbers that are left out have no position.

    Args:
        position: completed updates before this batch, so counted from 0.
        left_out: ranges of batch numbers, first and last, in any order; they may overlap.
    """
    number, seen = position, -1
    for first, last in sorted(left_out):
        first = max(first, seen + 1)
        if first > number:
            break
        number += max(0, last - first + 1)
        seen = max(seen, last)
    return number


class _Share:
    """The batches of one process by their position in its stream, as a source for Grain."""

    def __init__(self, batches: Any, process_index: int, process_count: int, left_out: Sequence[tuple[int, int]]):
        self._batches = batches
        self._process_index, self._process_count = process_index, process_count
        self._left_out = tuple(left_out)

    def __len__(self) -> int:
        return len(self._batches) // self._process_count - sum(last - first + 1 for first, last in self._left_out)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._batches[batch_number(index, self._left_out) * self._process_count + self._process_index]


def _close_if_alive(stream: "weakref.ReferenceType[TrainStream]") -> None:
    if (alive := stream()) is not None:
        alive.close()


class TrainStream:
    """Endless training batches of one process, in an order that the seed alone decides.

    Each epoch is a new order of the source, cut to whole global batches so that none spans two epochs. Process p has
    the p-th contiguous part of a global batch: joined in the order of the processes, the parts are the same array for
    any number of processes, worker processes and threads. The augmentation at a position depends on the seed and the
    position only. Step s reads global batch s - 1, or a later one if batches are left out (`batch_number`).

    When a worker process dies (the kernel kills it if memory is short), all of them start again at the next batch.

    A bad sample is replaced by another one of the source, always the same, and marked with the reason.

    Iterating gives `image` uint8 [b, s, s, 3], `tokens` int32 [b, l], `index` int64 [b], the index in the source
    of the pair that was used, and `skip_reason` int32 [b], the fault of the pair that was due: an index into
    `REASONS`, or -1 if it was used itself; of source k of a mixture it is k * `NUM_COUNTERS` more.

    Args:
        source: pairs, at least one global batch of them.
        tokenize: function from a text to int32 [l]; picklable if `config.data.num_workers` is not 0.
        config: the run: its `seed`, `global_batch_size`, `data` and image size.
        order: of the run.
        process_index: number of this process, from 0.
        process_count: number of processes that share each global batch.
        start_step: completed updates; the stream goes on from there without reading what came before.
        left_out: ranges (first, last) of global batch numbers, counted from 0, that are never used.
        on_restart: function that gets a line about each restart of the workers.

    Raises:
        ValueError: at construction: the batch does not divide, the source is too small, or a range is impossible.
        NoUsableSample: from iteration: hardly anything is usable.
        WorkersDie: from iteration: more deaths than `recovery.max_worker_restarts`; `read_here` goes on without them.

    Attributes:
        wait_seconds: total time that iteration has waited for data.
        worker_restarts: how often the workers were started again.
    """

    def __init__(
        self,
        source: Source,
        *,
        tokenize: Callable[[str], np.ndarray],
        config: Config,
        order: RunOrder = DISK_ORDER,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
        left_out: Sequence[tuple[int, int]] = (),
        on_restart: Callable[[str], None] | None = None,
    ):
        import grain

        batch_size, data = config.global_batch_size, config.data
        local_size = per_process("global_batch_size", batch_size, process_count)
        if len(source) < batch_size:
            raise ValueError(
                f"global_batch_size={batch_size} is larger than the {len(source)} samples of {data.shown_train};"
                f" set global_batch_size to at most {len(source)} or give more data"
            )
        if impossible := [(first, last) for first, last in left_out if not 0 <= first <= last]:
            raise ValueError(f"left_out={impossible} must be ranges of batch numbers, first and last, from 0")
        augment = Augment(tokenize, make_eval_transform(config), data.crop, data.min_crop_area)
        samples = substituted(source, data.max_image_pixels)
        if order is None:
            # The random map comes before the share, else its randomness would depend on the number of processes; the
            # batch comes before the workers, else the stream would depend on their number.
            batches = shuffled_by_grain(samples, config).random_map(augment).batch(local_size, drop_remainder=True)
        else:
            numbers = make_order(sizes_of(source), config, order)
            batches = Batches(samples, augment, numbers, config.seed, (local_size, process_count))
        self._share = grain.MapDataset.source(_Share(batches, process_index, process_count, left_out))
        self._source, self._data, self._position = source, data, start_step
        self._process_index, self._on_restart = process_index, on_restart
        self._max_restarts = config.recovery.max_worker_restarts
        self._latest: collections.deque[tuple[str, int]] = collections.deque(maxlen=_LATEST)
        self.wait_seconds = 0.0
        self.worker_restarts = 0
        self._batches: Any = self._start(data.num_workers)
        # Before multiprocessing's own exit, which ends what takes shared memory out of the file system.
        self._close = atexit.register(functools.partial(_close_if_alive, weakref.ref(self)))

    def _start(self, num_workers: int) -> Any:
        """Start to read at the next position."""
        import grain

        data = self._data
        stream = self._share.slice(slice(self._position, None)).to_iter_dataset(
            grain.ReadOptions(
                num_threads=data.num_threads,
                prefetch_buffer_size=max(data.num_threads, 0 if num_workers else data.prefetch_batches),
            )
        )
        if num_workers:
            workers.mark_flags_as_parsed()
            per_worker = max(1, data.prefetch_batches // num_workers)
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(num_workers, per_worker), worker_init_fn=workers.begin_worker
            )
        batches = iter(stream)
        batches.start_prefetch()
        return batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._batches is None:
            raise ValueError("the stream is closed")
        start = time.perf_counter()
        batch = self._read()
        self._position += 1
        self.wait_seconds += time.perf_counter() - start
        reasons, requested = batch["skip_reason"], batch.pop("requested")
        self._latest.extend(
            (REASONS[reasons[i] % NUM_COUNTERS], int(requested[i])) for i in np.flatnonzero(reasons != GOOD)
        )
        return {name: workers.own_memory(array) for name, array in batch.items()}

    def _read(self) -> dict[str, Any]:
        """Return the next batch; start workers again that have died."""
        while True:
            try:
                # Grain starts the workers when the first batch is asked for.
                with workers.signals_blocked() if self._data.num_workers else contextlib.nullcontext():
                    return next(self._batches)
            except RuntimeError as error:
                code = workers.exit_code_of_death(error)
                if code is None:
                    raise
                death = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._batches.close()
            if self.worker_restarts >= self._max_restarts:
                raise WorkersDie(
                    f"recovery.max_worker_restarts={self._max_restarts}: a loader worker of process "
                    f"{self._process_index} died again ({death}); signal 9 mostly means that memory was short: lower "
                    "data.num_workers or data.prefetch_batches, or raise recovery.max_worker_restarts"
                )
            self.worker_restarts += 1
            if self._on_restart is not None:
                self._on_restart(
                    f"a loader worker of process {self._process_index} died ({death}): all of them start again at "
                    f"step {self._position + 1}, restart {self.worker_restarts} of {self._max_restarts}"
                )
            self._batches = self._start(self._data.num_workers)

    def read_here(self) -> None:
        """Go on without worker processes, at the same place: for the last steps after `WorkersDie`."""
        self._batches = self._start(num_workers=0)

    def latest_bad(self) -> list[str]:
        """Return the last few unusable samples that this process met: reason and place, the latest first."""
        return [f"{reason} in {self._source.location(index)}" for reason, index in reversed(self._latest)]

    def close(self) -> None:
        """Stop threads and worker processes; nothing can be read any more. Runs at exit, too."""
        atexit.unregister(self._close)
        batches, self._batches = self._batches, None  # lets go of the batches that lay ready
        if batches is not None:
            batches.close()


def pair_groups(batch: Mapping[str, np.ndarray], same_pair: SamePair) -> np.ndarray | None:
    """Return int32 [b], equal for pairs that are no negatives of each other; None if all pairs are.

    A caption stands for itself by the CRC-32 of its tokens: of 32,768 different ones, two share a value in one batch of
    eight, and then are merely left out of each other's negatives.
    """
    match same_pair:
        case SamePair.NONE:
            return None
        case SamePair.INDEX:
            return batch["index"].astype(np.int32)
        case SamePair.CAPTION:
            return np.array([zlib.crc32(tokens.tobytes()) for tokens in batch["tokens"]], np.uint32).view(np.int32)


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

    def check(self, step: int, skipped: Sequence[int], latest: Sequence[str]) -> None:
        """Judge the counts of all processes after a step, in windows of 1000 samples or one epoch if that is less.

        Args:
            step: completed updates.
            skipped: unusable samples by reason up to there.
            latest: last few of them, for the message.

        Raises:
            TooManyBadSamples: their share is above the limit.
        """
        counts = count_by_reason(np.asarray(skipped) - self._skipped)
        read, bad = (step - self._start_step) * self._batch_size, sum(counts.values())
        # Whole windows: in the middle of one, the bad samples may just have come first.
        if bad <= self._max_fraction * math.ceil(read / self._window) * self._window:
            return
        by_reason = ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)
        seen = f"the latest: {'; '.join(latest)}" if latest else "other processes name them"
        raise TooManyBadSamples(
            f"data.max_bad_fraction={self._max_fraction}: {bad} of the {read} samples read are unusable, "
            f"{bad / read:.1%} ({by_reason}); {seen}. Raise data.max_bad_fraction to go on without them, or repair or "
            "remove them and start anew in another workdir: the run in this one goes on with the same data only"
        )


def per_process(field: str, batch_size: int, process_count: int) -> int:
    """Return the number of a batch's samples that each process gets.

    Raises:
        ValueError: the batch does not divide.
    """
    if batch_size < process_count or batch_size % process_count:
        nearest = max(1, round(batch_size / process_count)) * process_count
        raise ValueError(f"{field}={batch_size} must be divisible by {process_count} processes; nearest: {nearest}")
    return batch_size // process_count
