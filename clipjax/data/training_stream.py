"""Training batches of one process: the integer step is the only state; Grain reads ahead, in threads or processes.

Reading order: `TrainStream`. The order is in `clipjax.data.training_order`, decoding
and augmentation in `clipjax.data.training_batches`, worker processes in `clipjax.data.workers`. Axes: b batch of this
process, s image_size, l tokens.
"""

import atexit
import collections
import contextlib
import functools
import logging
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.config import Config, ResizeOn, SamePair, most_patches
from clipjax.data import workers
from clipjax.data.augmentations import make_augmentations
from clipjax.data.batch_memory import ReceivedColumns, forget_the_dead
from clipjax.data.block_reader import MOST_BYTES, BlockReader
from clipjax.data.canvas import make_canvas_transform
from clipjax.data.images import make_eval_transform, make_training_decoder
from clipjax.data.mixture import sizes_of
from clipjax.data.patch_rows import make_patch_rows
from clipjax.data.sample import NUM_COUNTERS, REASONS, Source
from clipjax.data.training_batches import (
    GOOD,
    UNREADABLE,
    Augment,
    Batches,
    Share,
    substituted,
)
from clipjax.data.training_order import (
    DISK_ORDER,
    OrderFormat,
    RunOrder,
    batch_number,
    make_order,
    parts_of,
    require_places,
    shuffled_by_grain,
)
from clipjax.data.workers import WorkersDie

_LATEST = 3
_MOST_GROUPS = 2**31
"""Samples that can be told apart by an int32, which the loss compares: another type would cost the device more."""

_KEPT_WINDOWS = 3  # the one that is used, the one that is read ahead, and half used ones at the borders
_SPARE_BLOCKS = 16
_log = logging.getLogger(__name__)


class _GrainBatches:
    """The batches of one process by their position in its stream, in Grain's order."""

    def __init__(self, samples: Any, augment: Augment, config: Config, share: Share, process_count: int):
        # The random map comes before the share, else its randomness would depend on the number of processes; the
        # batch comes before the workers, else the stream would depend on their number.
        pairs = shuffled_by_grain(samples, config).random_map(augment)
        self._batches = pairs.batch(share.size, drop_remainder=True)
        self._share, self._process_count = share, process_count

    def __len__(self) -> int:
        left_out = sum(last - first + 1 for first, last in self._share.left_out)
        return len(self._batches) // self._process_count - left_out

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = batch_number(index, self._share.left_out) * self._process_count
        return self._batches[number + self._share.process_index]


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

    A bad sample is replaced by another one of the source, always the same, and marked with the reason. One that storage
    does not give today may be there tomorrow: it is replaced only where the choice can be kept, by `keep_stand_ins`.

    Iterating gives `image` uint8 [b, s, s, 3], `tokens` int32 [b, l], `index` int64 [b], the index in the source
    of the pair that was used, and `skip_reason` int32 [b], the fault of the pair that was due: an index into
    `REASONS`, or -1 if it was used itself; of source k of a mixture it is k * `NUM_COUNTERS` more. With two captions
    per image `tokens` is int32 [b, 2, l]. With `data.resize_on=device` the image is a canvas
    with its `crop`, as `clipjax.data.canvas` makes them. With `model.image.max_patches` there are `patches`, `segment`,
    `place` and `grid` in its place, as `clipjax.data.patch_rows` makes them; the other arrays stay as they are.

    Args:
        source: pairs, at least one global batch of them.
        tokenize: function from a text to int32 [l]; picklable if `config.data.num_workers` is not 0. With
            `config.data.text_truncation` it gets the `Choose` of a sight as its second argument.
        config: the run: its `seed`, `global_batch_size`, `data` and image size.
        order: of the run.
        process_index: number of this process, from 0.
        process_count: number of processes that share each global batch.
        start_step: completed updates; the stream goes on from there without reading what came before.
        left_out: ranges (first, last) of global batch numbers, counted from 0, that are never used.
        stand_ins: of samples that storage did not give before: by the place, batch number * global batch size + row,
            the index of the sample that stands in.
        keep_stand_ins: keeps more of them before their batch is used; what it raises, iteration raises. None: a sample
            that storage does not give is an error.
        on_restart: function that gets a line about each restart of the workers.

    Raises:
        ValueError: at construction: a batch that does not divide, a source too small or large, an impossible range.
        NoUsableSample: from iteration: hardly anything is usable.
        UnreadableData: from iteration: storage does not give a sample, and none stands in for it; or the data changed.
        WorkersDie: from iteration: more deaths than `recovery.max_worker_restarts`; `read_here` goes on without them.

    Attributes:
        wait_seconds: total time that iteration has waited for data.
        worker_restarts: how often the workers were started again.
    """

    def __init__(
        self,
        source: Source,
        *,
        tokenize: Callable[..., np.ndarray],
        config: Config,
        order: RunOrder = DISK_ORDER,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
        left_out: Sequence[tuple[int, int]] = (),
        stand_ins: Mapping[int, int] | None = None,
        keep_stand_ins: Callable[[Mapping[int, int]], None] | None = None,
        on_restart: Callable[[str], None] | None = None,
    ):
        import grain

        batch_size, data = config.global_batch_size, config.data
        local_size, unit = per_process("global_batch_size", batch_size, process_count), data.images_per_row
        _check_rows(config, order, local_size, process_count)
        if keep_stand_ins is not None:
            require_places(order)
        _check_size(config, source)
        if impossible := [(first, last) for first, last in left_out if not 0 <= first <= last]:
            raise ValueError(f"left_out={impossible} must be ranges of batch numbers, first and last, from 0")
        augment = _make_augment(config, tokenize)
        samples = substituted(source, make_training_decoder(config), skips_unreadable=keep_stand_ins is not None)
        blocks = [part for part in parts_of(order) if part.block > 1]
        # Where blocks are read, each worker has rows of its own in every batch, so that none reads another's blocks.
        self._slices = min(max(1, data.num_workers), local_size // unit) if blocks else 1
        self._reader: BlockReader | None = None
        self._stand_ins, self._keep_stand_ins = dict(stand_ins or {}), keep_stand_ins
        share = Share(local_size, process_index, self._slices, tuple(left_out), unit, self._stand_ins)
        if order is None:
            batches = _GrainBatches(samples, augment, config, share, process_count)
        else:
            if blocks:
                self._reader = BlockReader(source, _most_blocks(blocks, share, batch_size), MOST_BYTES // self._slices)
            numbers = make_order(sizes_of(source), config, order)
            batches = Batches(samples, augment, numbers, config, share=share, reader=self._reader)
        self._pieces = grain.MapDataset.source(batches)
        self._source, self._data, self._position = source, data, start_step
        self._process_index, self._on_restart, self._left_out = process_index, on_restart, share.left_out
        self._batch_size, self._first_row = batch_size, process_index * local_size
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
        stream = self._pieces.slice(slice(self._position * self._slices, None)).to_iter_dataset(
            grain.ReadOptions(
                num_threads=data.num_threads,
                prefetch_buffer_size=max(data.num_threads, 0 if num_workers else data.prefetch_batches),
            )
        )
        if num_workers:
            workers.mark_flags_as_parsed()
            per_worker = data.prefetch_batches if self._slices > 1 else max(1, data.prefetch_batches // num_workers)
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
        self.wait_seconds += time.perf_counter() - start
        reasons, requested = batch["skip_reason"], batch.pop("requested")
        self._keep_new(batch)
        self._position += 1
        self._latest.extend(
            (REASONS[reasons[i] % NUM_COUNTERS], int(requested[i])) for i in np.flatnonzero(reasons != GOOD)
        )
        return batch

    def _keep_new(self, batch: Mapping[str, np.ndarray]) -> None:
        """Keep what stands in for samples that storage did not give, before the batch is used."""
        rows = np.flatnonzero(batch["skip_reason"] % NUM_COUNTERS == UNREADABLE).tolist()
        if not rows:
            return
        first = batch_number(self._position, self._left_out) * self._batch_size + self._first_row
        new = {first + row: int(batch["index"][row]) for row in rows if first + row not in self._stand_ins}
        if new and self._keep_stand_ins is not None:
            self._keep_stand_ins(new)
            self._stand_ins |= new

    def _read(self) -> dict[str, np.ndarray]:
        """Return the next batch; start workers again that have died."""
        while True:
            try:
                # Grain starts the workers when the first batch is asked for.
                with workers.signals_blocked() if self._data.num_workers else contextlib.nullcontext():
                    pieces = [self._next_piece() for _ in range(self._slices)]
                return pieces[0] if len(pieces) == 1 else _join(pieces)
            except RuntimeError as error:
                code = workers.exit_code_of_death(error)
                if code is None:
                    raise
                death = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._batches.close()
            forget_the_dead()
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

    def _next_piece(self) -> dict[str, np.ndarray]:
        piece = next(self._batches)
        if isinstance(piece, ReceivedColumns):
            return piece.arrays()
        return {name: workers.own_memory(array) for name, array in piece.items()}

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
            forget_the_dead()
        if self._reader is not None:
            self._reader.close()


def _make_augment(config: Config, tokenize: Callable[..., np.ndarray]) -> Augment:
    """Return the draw of captions and of changes of the picture that a config asks for."""
    data, view = config.data, make_eval_transform(config)
    return Augment(
        tokenize,
        view,
        data.crop,
        data.min_crop_area,
        make_augmentations(config),
        captions_per_image=data.captions_per_image,
        truncation=data.text_truncation,
        canvas=make_canvas_transform(config, view) if data.resize_on is ResizeOn.DEVICE else None,
        patch_rows=make_patch_rows(config),
    )


def _check_rows(config: Config, order: RunOrder, local_size: int, process_count: int) -> None:
    """Refuse rows of several pictures that a process cannot fill, and pictures of variable aspect in Grain's order."""
    if local_size % (unit := config.data.images_per_row):
        raise ValueError(
            f"data.images_per_row={unit} must divide the {local_size} pairs of each process: global_batch_size="
            f"{config.global_batch_size} / {process_count} processes"
        )
    if order is None and most_patches(config.model.image) is not None:
        raise ValueError(
            "model.image.max_patches: the run began with the order of an older version, which knows squares only; "
            "start anew in another workdir"
        )


def _check_size(config: Config, source: Source) -> None:
    """Refuse a source that fills no batch, or whose samples cannot be told apart."""
    if len(source) < config.global_batch_size:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} is larger than the {len(source)} samples of "
            f"{config.data.shown_train}; set global_batch_size to at most {len(source)} or give more data"
        )
    if config.loss.same_pair is SamePair.INDEX and len(source) > _MOST_GROUPS:
        raise ValueError(
            f"loss.same_pair=index tells {_MOST_GROUPS:,} samples apart, and {config.data.shown_train} has "
            f"{len(source):,}; set loss.same_pair to caption or none, or train on a part"
        )


def _join(pieces: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _most_blocks(parts: Sequence[OrderFormat], share: Share, batch_size: int) -> int:
    """Return how many blocks a process keeps at most: some windows of each lane of which it reads rows."""
    in_lane = batch_size // parts[0].lanes
    pieces = [share.rows(piece) for piece in range(share.slices)]
    lanes = sum(-(-rows.stop // in_lane) - rows.start // in_lane for rows in pieces)
    readers = in_lane * share.slices // share.size
    if readers > 1 and not share.process_index:
        _log.warning(
            "each block of samples is read by %d workers, as global_batch_size=%d gives %d lanes only; a batch size "
            "with more divisors, or fewer data.num_workers, spares the store",
            readers,
            batch_size,
            parts[0].lanes,
        )
    return _KEPT_WINDOWS * lanes * sum(part.window for part in parts) + _SPARE_BLOCKS


def pair_groups(batch: Mapping[str, np.ndarray], same_pair: SamePair) -> np.ndarray | None:
    """Return int32 [b], equal for pairs that are no negatives of each other; None if all pairs are.

    With two captions per image, groups by caption are those of each: int32 [b, 2].

    A caption stands for itself by the CRC-32 of its tokens: of 32,768 different ones, two share a value in one batch of
    eight, and then are merely left out of each other's negatives.
    """
    match same_pair:
        case SamePair.NONE:
            return None
        case SamePair.INDEX:
            return batch["index"].astype(np.int32)
        case SamePair.CAPTION:
            tokens = batch["tokens"]
            rows = tokens.reshape(-1, tokens.shape[-1])
            found = np.array([zlib.crc32(row.tobytes()) for row in rows], np.uint32).view(np.int32)
            return found.reshape(tokens.shape[:-1])


def per_process(field: str, batch_size: int, process_count: int) -> int:
    """Return the number of a batch's samples that each process gets.

    Raises:
        ValueError: the batch does not divide.
    """
    if batch_size < process_count or batch_size % process_count:
        nearest = max(1, round(batch_size / process_count)) * process_count
        raise ValueError(f"{field}={batch_size} must be divisible by {process_count} processes; nearest: {nearest}")
    return batch_size // process_count
