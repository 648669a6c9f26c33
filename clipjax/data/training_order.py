"""The order of a run: the samples of each global batch, over all epochs, and how it is named in checkpoints.

Reading order: `OrderFormat`, `MixtureFormat`, `parse_order`, `TrainingOrder`, `make_order`, `choose_order`,
`batch_number`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from clipjax.config import Config
from clipjax.data.mixture import MixtureOrder, part_seed
from clipjax.data.order import BlockOrder, blocks_of

STORE_BLOCK = 64
"""Samples that one request reads from an object store, where a request takes as long as many samples."""

_MOST_LANES = 256
_SHARE = 32  # samples of a batch that a lane should give at least
_AHEAD = 2  # batches among whose samples those of an object store are shuffled, at least
_MIN_WINDOW = 4
_LARGEST = 2**31


@dataclass(frozen=True)
class OrderFormat:
    """The choices that fix the order of a run besides its seed and its data; its checkpoints keep them.

    Attributes:
        block: consecutive samples that stay together until the shuffle inside a window; 1: a full permutation.
        window: blocks of a lane whose samples are shuffled among each other.
        lanes: parts of a batch with blocks of their own.
    """

    block: int = 1
    window: int = 1024
    lanes: int = 1

    def to_record(self) -> dict[str, int]:
        """Return the format as a JSON object."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Any) -> "OrderFormat":
        """Return the format of a JSON record.

        Raises:
            ValueError: the record is damaged.
        """
        names = ("block", "window", "lanes")
        if not isinstance(record, Mapping) or sorted(record) != sorted(names):
            raise ValueError(f"data.order={record!r} must be an object of {', '.join(names)}")
        for name in names:
            if type(record[name]) is not int or not 1 <= record[name] < _LARGEST:
                raise ValueError(f"data.order.{name}={record[name]!r} must be a whole number from 1")
        return cls(**record)


DISK_ORDER = OrderFormat()
"""The order of data on disks: every epoch is a permutation of all samples."""


@dataclass(frozen=True)
class MixtureFormat:
    """The choices that fix the order of a mixture.

    Attributes:
        parts: formats of its sources, with the same number of lanes.
        shards: numbers of shards of its sources, which tell the sources apart in the list of all digests.
    """

    parts: tuple[OrderFormat, ...]
    shards: tuple[int, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """Return the format as a JSON object."""
        return {"parts": [part.to_record() for part in self.parts], "shards": list(self.shards)}


RunOrder = OrderFormat | MixtureFormat | None
"""The choices that fix the order of a run; None is Grain's order, of runs that began before it was recorded."""


def parts_of(order: RunOrder) -> tuple[OrderFormat, ...]:
    """Return the formats of the sources of a run."""
    return order.parts if isinstance(order, MixtureFormat) else () if order is None else (order,)


def parse_order(record: Any) -> RunOrder:
    """Return the order of a run from the JSON value in its checkpoints.

    Raises:
        ValueError: the record is damaged.
    """
    if record is None:
        return None
    if not isinstance(record, Mapping) or "parts" not in record:
        return OrderFormat.from_record(record)
    parts, shards = record["parts"], record.get("shards")
    if record.keys() != {"parts", "shards"} or not isinstance(parts, list) or not parts:
        raise ValueError(f"data.order={record!r} must be an object of parts, a list, and shards")
    if not isinstance(shards, list) or any(type(count) is not int or count < 0 for count in shards):
        raise ValueError(f"data.order.shards={shards!r} must be a list of whole numbers")
    found = MixtureFormat(tuple(OrderFormat.from_record(part) for part in parts), tuple(shards))
    if len({part.lanes for part in found.parts}) > 1:
        raise ValueError(f"data.order={record!r} must have the same lanes in all parts")
    return found


def require_places(order: RunOrder) -> None:
    """Refuse to skip samples in Grain's order, which knows no places at which others could stand in.

    Raises:
        ValueError: it is that order.
    """
    if order is None:
        raise ValueError(
            "data.on_unreadable=skip: the run began with the order of an older version, which cannot keep what stands "
            "in for a sample; leave it at stop, or start anew in another workdir"
        )


class TrainingOrder(Protocol):
    """The samples of each global batch."""

    def placed(self, number: int, rows: range | None = None) -> np.ndarray:
        """Return samples of a global batch, each with the first sample and the length of its block: int64 [rows, 3].

        Args:
            number: of the batch, from 0 over all epochs.
            rows: of the batch; None: all of them.
        """
        ...


class _EndlessBlocks:
    """Epochs of a `BlockOrder`, one after the other."""

    def __init__(self, order: BlockOrder, batch_size: int):
        self._order, self._batch_size = order, batch_size
        self._per_epoch = order.num_batches(batch_size)

    def placed(self, number: int, rows: range | None = None) -> np.ndarray:
        """Return samples of a global batch with their blocks."""
        epoch, in_epoch = divmod(number, self._per_epoch)
        samples = self._order.batch(epoch, in_epoch, self._batch_size, rows)
        return _with_blocks(samples, self._order.size, self._order.block)


class _GrainOrder:
    """The order of runs that began before it was recorded."""

    def __init__(self, size: int, config: Config):
        self._samples, self._size = shuffled_by_grain(range(size), config), size
        self._batch_size = config.global_batch_size

    def placed(self, number: int, rows: range | None = None) -> np.ndarray:
        """Return samples of a global batch, each a block of its own."""
        rows = range(self._batch_size) if rows is None else rows
        samples = [self._samples[number * self._batch_size + row] for row in rows]
        return _with_blocks(np.array(samples, np.int64), self._size, 1)


def _with_blocks(samples: np.ndarray, size: int, block: int) -> np.ndarray:
    return np.column_stack([samples, blocks_of(samples, size, block)])


def shuffled_by_grain(source: Any, config: Config) -> Any:
    """Return the items of a source in Grain's order, without end; none is read before it is asked for.

    Position p belongs to global batch p // `config.global_batch_size`.

    Args:
        source: has a length and items by number, at least one global batch of them.
        config: the run: its `seed` and `global_batch_size`.
    """
    import grain

    epoch_size = len(source) - len(source) % config.global_batch_size
    return grain.MapDataset.source(source).seed(config.seed).shuffle().slice(slice(epoch_size)).repeat()


def make_order(sizes: Sequence[int], config: Config, order: RunOrder) -> TrainingOrder:
    """Return the order of a run.

    Args:
        sizes: numbers of samples of the sources, all together at least one global batch.
        config: the run: its `seed`, `global_batch_size` and the weights in `data.mixture`.
        order: as it was chosen or recorded.

    Raises:
        ValueError: the batch does not divide by the lanes, or the sources are others.
    """
    batch_size, seed = config.global_batch_size, config.seed
    if order is None:
        return _GrainOrder(sum(sizes), config)
    parts = parts_of(order)
    if batch_size % parts[0].lanes:
        raise ValueError(
            f"global_batch_size={batch_size} must be divisible by the {parts[0].lanes} lanes of the order that the run "
            "was begun with; go on with the batch size of the run, or start anew in another workdir"
        )
    if len(parts) != len(sizes):
        raise ValueError(f"the run was begun with {len(parts)} sources, and now there are {len(sizes)}")
    if isinstance(order, OrderFormat):
        return _EndlessBlocks(BlockOrder(sizes[0], seed, **order.to_record()), batch_size)
    weights = [config.data.mixture[name].weight for name in sorted(config.data.mixture)]
    orders = [
        BlockOrder(size, part_seed(seed, number), **part.to_record())
        for number, (size, part) in enumerate(zip(sizes, parts, strict=True))
    ]
    return MixtureOrder(orders, weights, seed, batch_size)


def choose_order(config: Config, sizes: Sequence[int], is_remote: Sequence[bool]) -> OrderFormat | MixtureFormat:
    """Return the order of a run that begins.

    Args:
        config: the run: its `data.order_block`, `data.mixture` and `global_batch_size`.
        sizes: for each source, the number of its samples.
        is_remote: for each source, whether its samples lie in an object store.
    """
    blocks = [config.data.order_block or (STORE_BLOCK if remote else 1) for remote in is_remote]
    batch_size, lanes = config.global_batch_size, 1
    if max(blocks) > 1:
        # Each worker of each process reads the blocks of its own lanes; every source has samples for all of them.
        most = min(_MOST_LANES, *sizes, batch_size // _SHARE)
        lanes = max((n for n in range(1, most + 1) if batch_size % n == 0), default=1)
    if config.data.mixture or config.data.order_block is None:
        # Of a small source, blocks are so short that each lane has some.
        blocks = [max(1, min(block, size // (_MIN_WINDOW * lanes))) for block, size in zip(blocks, sizes, strict=True)]
    formats = [
        OrderFormat(block, max(_MIN_WINDOW, math.ceil(_AHEAD * batch_size / (lanes * block))), lanes)
        if block > 1
        else OrderFormat(lanes=lanes)
        for block in blocks
    ]
    return MixtureFormat(tuple(formats)) if config.data.mixture else formats[0]


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
