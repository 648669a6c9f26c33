"""Training batches: Grain decides order, shares and prefetch; the integer step is the only state.

Reading order: `TrainStream`, `_SubstitutedSamples` (decoding and the substitution of bad samples), `_Augment` (crop and
caption), `BadSampleLimit`. Axes: b batch of this process, s image_size, l tokens.
"""

import atexit
import collections
import functools
import itertools
import math
import multiprocessing
import os
import signal
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.config import Config, Crop, SamePair
from clipjax.data.images import EvalTransform, decode, make_eval_transform, random_resized_crop
from clipjax.data.sample import REASONS, BadSample, Source

GOOD = -1
"""The reason of a sample that is not bad."""

_MAX_PROBES = 100  # bad samples in a row before giving up: nearly all of the data is unusable
_JUDGED_READS = 1000  # the bad share of fewer samples says little
_LATEST = 3


@dataclass(frozen=True, slots=True)
class _Pair:
    """A decoded sample: `requested` is the index in the stream, `index` the one used instead if that was bad."""

    image: np.ndarray
    captions: tuple[str, ...]
    index: int
    requested: int
    reason: int


class TooManyBadSamples(ValueError):
    """The error of data of which more is unusable than `data.max_bad_fraction` allows."""


class _SubstitutedSamples:
    """The decoded samples of a source, with a fixed substitute for each bad one, so that batches keep their shape."""

    def __init__(self, source: Source, max_image_pixels: int):
        self._source = source
        self._max_image_pixels = max_image_pixels
        size = len(source)
        # Steps of a golden-ratio share, made coprime, visit every sample once and do not stay in a bad shard.
        stride = max(1, round(size * (math.sqrt(5) - 1) / 2))
        self._stride = next(step for step in itertools.count(stride) if math.gcd(step, size) == 1)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> _Pair:
        size = len(self._source)
        first_reason = GOOD
        failure = ""
        for attempt in range(min(size, _MAX_PROBES)):
            probe = (index + attempt * self._stride) % size
            try:
                sample = self._source[probe]
                if not sample.captions:
                    raise BadSample("missing_caption")
                image = decode(sample.image, max_pixels=self._max_image_pixels)
                return _Pair(image, sample.captions, probe, index, first_reason)
            except BadSample as bad:
                if first_reason == GOOD:
                    first_reason = REASONS.index(bad.reason)
                failure = f"{bad.reason} in {self._source.location(probe)}"
        raise TooManyBadSamples(
            f"{min(size, _MAX_PROBES)} samples in a row are unusable, the last: {failure}; check data.train and that "
            "its image and caption keys name what the data holds"
        )


@dataclass(frozen=True, slots=True)
class _Augment:
    """The draw of a caption and a crop. Grain keys `rng` by the seed and the sample's global position."""

    tokenize: Callable[[str], np.ndarray]
    view: EvalTransform
    crop: Crop
    min_area: float

    def __call__(self, pair: _Pair, rng: np.random.Generator) -> dict[str, Any]:
        caption = pair.captions[int(rng.integers(len(pair.captions)))]
        if self.crop is Crop.RANDOM_RESIZED:
            image = random_resized_crop(
                pair.image, self.view.size, min_area=self.min_area, rng=rng, interpolation=self.view.interpolation
            )
        else:
            image = self.view(pair.image)
        return {
            "image": image,
            "tokens": self.tokenize(caption),
            "index": np.int64(pair.index),
            "requested": np.int64(pair.requested),
            "skip_reason": np.int32(pair.reason),
        }


def _begin_worker(worker_index: int, worker_count: int) -> None:
    """Prepare a worker process: it ignores Ctrl-C and ends with the training process.

    Ctrl-C reaches every process of a terminal; the training process saves first and then ends its workers. A training
    process that is killed can end nobody, and its workers would wait for it for ever, with all their memory.
    """
    del worker_index, worker_count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True, name="end-with-parent").start()


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)


def _own_memory(array: np.ndarray) -> np.ndarray:
    """Return the array, with its shared memory, if it lies in any, taken out of the file system at once.

    The memory stays as long as the array does. Grain takes it out when the array is deleted, which never happens to one
    that outlives the loop; Python then warns at exit of "leaked shared_memory objects".
    """
    memory = getattr(array, "shm", None)
    if memory is not None:
        memory.unlink()
        memory.unlink = _do_nothing  # Grain's own call, later
    return np.asarray(array)


def _do_nothing() -> None: ...


def _close_if_alive(stream: "weakref.ReferenceType[TrainStream]") -> None:
    if (alive := stream()) is not None:
        alive.close()


class TrainStream:
    """Endless training batches of one process, in an order that the seed alone decides.

    Each epoch is a new permutation of the source, cut to whole global batches so that none spans two epochs.
    Global batch g is positions g * B to (g + 1) * B - 1 of the stream, and process p has the p-th contiguous part of
    it: joined in the order of the processes, the parts are the same array for any number of processes, worker
    processes and threads. The augmentation at a position depends on the seed and the position only.

    A bad sample is replaced by another one of the source, always the same, and marked with the reason.

    Iterating gives `image` uint8 [b, s, s, 3], `tokens` int32 [b, l], `index` int64 [b], the index in the source
    of the pair that was used, and `skip_reason` int32 [b], the fault of the pair that was due: an index into
    `REASONS`, or -1 if it was used itself.

    Args:
        source: pairs, at least one global batch of them.
        tokenize: function from a text to int32 [l]; picklable if `config.data.num_workers` is not 0.
        config: the run: its `seed`, `global_batch_size`, `data` and image size.
        process_index: number of this process, from 0.
        process_count: number of processes that share each global batch.
        start_step: completed updates; the stream goes on from there without reading what came before.

    Raises:
        ValueError: at construction: the batch does not divide, or the source is too small.
        TooManyBadSamples: from iteration: hardly anything is usable.

    Attributes:
        wait_seconds: total time that iteration has waited for data.
    """

    def __init__(
        self,
        source: Source,
        *,
        tokenize: Callable[[str], np.ndarray],
        config: Config,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
    ):
        import grain

        batch_size, data = config.global_batch_size, config.data
        local_size = per_process("global_batch_size", batch_size, process_count)
        if len(source) < batch_size:
            raise ValueError(
                f"global_batch_size={batch_size} is larger than the {len(source)} samples of data.train={data.train!r};"
                f" set global_batch_size to at most {len(source)} or give more data"
            )
        augment = _Augment(tokenize, make_eval_transform(config), data.crop, data.min_crop_area)
        samples = (
            grain.MapDataset.source(_SubstitutedSamples(source, data.max_image_pixels)).seed(config.seed).shuffle()
        )
        epoch_size = len(source) - len(source) % batch_size
        epoch = samples.slice(slice(epoch_size)).repeat()
        # The random map comes before the slice, else its randomness would depend on the number of processes; the
        # batch comes before the workers, else the stream would depend on their number.
        batches = epoch.random_map(augment).batch(local_size, drop_remainder=True)
        share = batches.slice(slice(start_step * process_count + process_index, None, process_count))
        stream = share.to_iter_dataset(
            grain.ReadOptions(
                num_threads=data.num_threads,
                prefetch_buffer_size=max(data.num_threads, 0 if data.num_workers else data.prefetch_batches),
            )
        )
        if data.num_workers:
            _mark_flags_as_parsed()
            per_worker = max(1, data.prefetch_batches // data.num_workers)
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(data.num_workers, per_worker), worker_init_fn=_begin_worker
            )
        self._source = source
        self._latest: collections.deque[tuple[str, int]] = collections.deque(maxlen=_LATEST)
        self.wait_seconds = 0.0
        self._batches: Any = iter(stream)
        self._batches.start_prefetch()
        # Before multiprocessing's own exit, which ends what takes shared memory out of the file system.
        self._close = atexit.register(functools.partial(_close_if_alive, weakref.ref(self)))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._batches is None:
            raise ValueError("the stream is closed")
        start = time.perf_counter()
        batch = next(self._batches)
        self.wait_seconds += time.perf_counter() - start
        reasons, requested = batch["skip_reason"], batch.pop("requested")
        self._latest.extend((REASONS[reasons[i]], int(requested[i])) for i in np.flatnonzero(reasons != GOOD))
        return {name: _own_memory(array) for name, array in batch.items()}

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
        counts = np.asarray(skipped) - self._skipped
        read, bad = (step - self._start_step) * self._batch_size, int(counts.sum())
        # Whole windows: in the middle of one, the bad samples may just have come first.
        if bad <= self._max_fraction * math.ceil(read / self._window) * self._window:
            return
        by_reason = ", ".join(f"{reason} {count}" for reason, count in zip(REASONS, counts, strict=True) if count)
        seen = f"the latest: {'; '.join(latest)}" if latest else "other processes name them"
        raise TooManyBadSamples(
            f"data.max_bad_fraction={self._max_fraction}: {bad} of the {read} samples read are unusable, "
            f"{bad / read:.1%} ({by_reason}); {seen}. Repair or remove them, or raise data.max_bad_fraction"
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


def _mark_flags_as_parsed() -> None:
    """Mark absl's flags as parsed: Grain's workers read them, an error in a program that never parsed any."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
