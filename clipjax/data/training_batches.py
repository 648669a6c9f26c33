"""Batches of decoded and augmented pairs by number: what threads and worker processes of the training stream compute.

Reading order: `Batches`, `SubstitutedSamples` (decoding and the substitution of bad samples), `MixedSamples`, `Augment`
(crop and caption). Axes: b batch of this process, s image_size, l tokens.
"""

import functools
import itertools
import logging
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipjax.config import Config, Crop, TextTruncation
from clipjax.data.augmentations import Augmentations
from clipjax.data.batch_memory import BatchWriter, SentColumns, new_columns
from clipjax.data.block_reader import BlockReader
from clipjax.data.canvas import CanvasTransform
from clipjax.data.caption_fields import draw_captions
from clipjax.data.file_errors import to_unreadable
from clipjax.data.images import Decoder, EvalTransform, random_resized_crop
from clipjax.data.mixture import MixedSource
from clipjax.data.order import derive_key
from clipjax.data.patch_rows import PatchRows
from clipjax.data.sample import (
    NUM_COUNTERS,
    REASONS,
    BadSample,
    ChangedData,
    FieldCaptions,
    Sample,
    Source,
    UnreadableData,
)
from clipjax.data.tokenizers.truncation import choose_tokens
from clipjax.data.training_order import TrainingOrder, batch_number

GOOD = -1
"""The reason of a sample that is not bad."""

UNREADABLE = REASONS.index("unreadable")
"""The reason of a sample in whose place another stands because storage did not give it, or its substitute, before."""

_MOST_TOLD = 20
_MAX_PROBES = 100  # bad samples in a row before giving up: nearly all of the data is unusable
_MAX_UNREADABLE = 10  # probes in a row that storage does not give: it gives nothing at all
_MAX_AWAY = 2  # of them those that took all tries, which is minutes
_AHEAD = 4  # batches whose blocks are asked for before they are needed
_BEHIND = 16  # batches that other threads may still be making
_AUGMENT_KEY = 16  # what a key is for, beside those of an order
_log = logging.getLogger(__name__)


class TooManyBadSamples(ValueError):
    """The error of data of which more is unusable than `data.max_bad_fraction` allows; all processes raise it."""


class NoUsableSample(TooManyBadSamples):
    """The error of one process that finds no sample to take the place of a bad one; the others may find one."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A decoded sample: `requested` is the index in the stream, `index` the one used instead if that was bad."""

    image: np.ndarray
    captions: tuple[str, ...]
    index: int
    requested: int
    reason: int
    fields: tuple[FieldCaptions, ...] = ()


class SubstitutedSamples:
    """The decoded samples of a source, with a fixed substitute for each bad one, so that batches keep their shape.

    Args:
        source: of the samples.
        decoder: of their images.
        skips_unreadable: a sample that storage does not give has a substitute, too; else it is an error.
    """

    def __init__(self, source: Source, decoder: Decoder, *, skips_unreadable: bool = False):
        self._source = source
        self._decoder = decoder
        self._skips_unreadable = skips_unreadable
        self._told = set[str]()
        size = len(source)
        # Steps of a golden-ratio share, made coprime, visit every sample once and do not stay in a bad shard.
        stride = max(1, round(size * (math.sqrt(5) - 1) / 2))
        self._stride = next(step for step in itertools.count(stride) if math.gcd(step, size) == 1)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        return self.get(index)

    def get(self, index: int, take: Callable[[], Sample] | None = None, stand_in: int | None = None) -> Pair:
        """Return a decoded sample, or its substitute.

        Args:
            index: of the sample.
            take: returns the sample itself, where it has been read already.
            stand_in: the substitute of an unreadable sample, as it was decided before; None: nothing was.

        Raises:
            NoUsableSample: it has none.
            UnreadableData: storage does not give it, and that is an error.
        """
        size = len(self._source)
        reason, met = GOOD, list[bool]()
        failure = ""
        for attempt in range(min(size, _MAX_PROBES) if stand_in is None else 1):
            probe = (index + attempt * self._stride) % size if stand_in is None else stand_in
            try:
                sample = self._source[probe] if attempt or take is None or stand_in is not None else take()
                if not sample.captions:
                    raise BadSample("missing_caption")
                image = self._decoder(sample.image)
                if stand_in is not None:
                    reason = UNREADABLE
                return Pair(image, sample.captions, probe, index, reason, sample.fields)
            except BadSample as bad:
                if reason == GOOD:
                    reason = REASONS.index(bad.reason)
                failure = f"{bad.reason} in {self._source.location(probe)}"
            except (OSError, UnreadableData) as error:
                unreadable = error if isinstance(error, UnreadableData) else to_unreadable(error, probe)
                if stand_in is not None:
                    told = f"{unreadable} (it stands in for sample {index}, as decided before)"
                    raise type(unreadable)(told) from error
                met.append(unreadable.is_away)
                self._pass_over(unreadable, met)
                reason = UNREADABLE  # also in place of another: that may be good tomorrow
                failure = str(unreadable)
        if stand_in is not None:
            raise ChangedData(
                f"{failure}, which stood in for another sample before: it has changed; bring it back as it was"
            )
        raise NoUsableSample(
            f"{min(size, _MAX_PROBES)} samples in a row are unusable, the last: {failure}; check the source and that "
            "its image and caption keys name what the data holds"
        )

    def _pass_over(self, unreadable: UnreadableData, met: Sequence[bool]) -> None:
        """Tell of a sample that storage does not give.

        Args:
            unreadable: its error.
            met: for each of these errors in a row, whether all tries were made.

        Raises:
            UnreadableData: nothing may stand in for it.
        """
        if isinstance(unreadable, ChangedData) or not self._skips_unreadable:
            raise unreadable
        if len(met) >= _MAX_UNREADABLE or sum(met) >= _MAX_AWAY:
            raise UnreadableData(
                f"data.on_unreadable=skip: {len(met)} samples from all over the source in a row cannot be read, so its "
                f"storage seems to be away; the last: {unreadable}"
            ) from unreadable
        if (text := str(unreadable)) not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(text)
            _log.warning("data.on_unreadable=skip: %s", text)


class MixedSamples:
    """The decoded samples of a mixture; the substitute of a bad one is of the same source.

    A reason tells the source, too: it is counted as `NUM_COUNTERS` times the source's number, and the reason's own.
    """

    def __init__(self, source: MixedSource, decoder: Decoder, *, skips_unreadable: bool = False):
        self._source = source
        self._parts = [SubstitutedSamples(part, decoder, skips_unreadable=skips_unreadable) for part in source.parts]

    def get(self, index: int, take: Callable[[], Sample] | None = None, stand_in: int | None = None) -> Pair:
        """Return a decoded sample, or its substitute; see `SubstitutedSamples.get`."""
        number, inside = self._source.find(index)
        first = self._source.first[number]
        pair = self._parts[number].get(inside, take, None if stand_in is None else stand_in - first)
        return Pair(
            pair.image,
            pair.captions,
            index=first + pair.index,
            requested=first + pair.requested,
            reason=pair.reason if pair.reason == GOOD else pair.reason + NUM_COUNTERS * number,
            fields=pair.fields,
        )


@dataclass(frozen=True, slots=True)
class Augment:
    """The draw of captions and of changes of the picture; `rng` is keyed by the seed and the global position."""

    tokenize: Callable[..., np.ndarray]
    view: EvalTransform
    crop: Crop
    min_area: float
    augmentations: Augmentations
    captions_per_image: int = 1
    truncation: TextTruncation = TextTruncation.NONE
    canvas: CanvasTransform | None = None  # where the device crops and resizes
    patch_rows: PatchRows | None = None  # makes the pixels of several pairs together

    def __call__(self, pair: Pair, rng: np.random.Generator) -> dict[str, Any]:
        """Return the row of a batch, without pixels where `patch_rows` makes them."""
        captions = draw_captions(pair.captions, pair.fields, self.captions_per_image, rng)
        texts = [self._tokens(caption, rng) for caption in captions]
        if self.patch_rows is not None:
            pixels = {}
        elif self.canvas is not None:
            image, box = self.canvas(pair.image, rng)
            pixels = {"image": image, "crop": box}
        else:
            pixels = {"image": self.augmentations(self._resize(pair.image, rng), rng)}
        return {
            **pixels,
            "tokens": texts[0] if len(texts) == 1 else np.stack(texts),
            "index": np.int64(pair.index),
            "requested": np.int64(pair.requested),
            "skip_reason": np.int32(pair.reason),
        }

    def _tokens(self, caption: str, rng: np.random.Generator) -> np.ndarray:
        """Return the tokens of a caption; one that is too long loses some."""
        if self.truncation is TextTruncation.NONE:
            return self.tokenize(caption)
        return self.tokenize(caption, functools.partial(choose_tokens, self.truncation, rng))

    def _resize(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.crop is Crop.RANDOM_RESIZED:
            return random_resized_crop(
                image, self.view.size, min_area=self.min_area, rng=rng, interpolation=self.view.interpolation
            )
        return self.view(image)


def substituted(
    source: Source, decoder: Decoder, *, skips_unreadable: bool = False
) -> SubstitutedSamples | MixedSamples:
    """Return the decoded samples of a source or a mixture; see `SubstitutedSamples`."""
    if isinstance(source, MixedSource):
        return MixedSamples(source, decoder, skips_unreadable=skips_unreadable)
    return SubstitutedSamples(source, decoder, skips_unreadable=skips_unreadable)


@dataclass(frozen=True)
class Share:
    """The part of each global batch that one process reads.

    Attributes:
        size: pairs of the part.
        process_index: number of the process, from 0: its part is the contiguous one of that number.
        slices: pieces of the part, which worker processes read in turn.
        unit: pairs that stay together in a piece; it divides the part.
        left_out: ranges of batch numbers that are never used.
        stand_ins: by the number of a place, counted over all batches of all processes, the sample that stands there in
            for one that was unreadable.
    """

    size: int
    process_index: int = 0
    slices: int = 1
    left_out: tuple[tuple[int, int], ...] = ()
    unit: int = 1
    stand_ins: Mapping[int, int] = field(default_factory=dict)

    def rows(self, piece: int) -> range:
        """Return the rows of a piece in a global batch."""
        units = self.size // self.unit
        cut = [number * units // self.slices * self.unit for number in (piece, piece + 1)]
        return range(self.process_index * self.size + cut[0], self.process_index * self.size + cut[1])


class _Randomness:
    """Sources of randomness by number, `Philox(key=[key, number])`.

    Args:
        key: of all of them.
        reuse: each is the one before, set anew, which takes a fifth of the time; that is then used no more.
    """

    def __init__(self, key: int, *, reuse: bool):
        self._key, self._reuse = key, reuse
        self._generator = np.random.Generator(np.random.Philox(key=np.array([key, 0], np.uint64)))
        self._state: Any = self._generator.bit_generator.state

    def at(self, number: int) -> np.random.Generator:
        """Return the source of a number."""
        if not self._reuse:
            return np.random.Generator(np.random.Philox(key=np.array([self._key, number], np.uint64)))
        self._state["state"]["key"][1] = number
        self._generator.bit_generator.state = self._state
        return self._generator


def _set(columns: dict[str, np.ndarray], row: int, values: dict[str, Any]) -> None:
    for name, value in values.items():
        columns[name][row] = value


class Batches:
    """The pieces of the batches of one process by number: those of its batch at position p are p * slices and so on.

    Args:
        samples: decoded samples.
        augment: makes a row of a pair and a source of randomness.
        order: of the samples.
        config: the run: its `seed`, which with the position of a sample fixes the randomness, and batch size.
        share: of the process.
        reader: of the blocks of the source; None: samples are read one by one.
    """

    def __init__(
        self,
        samples: SubstitutedSamples | MixedSamples,
        augment: Augment,
        order: TrainingOrder,
        config: Config,
        *,
        share: Share,
        reader: BlockReader | None = None,
    ):
        self._samples, self._augment, self._order, self._share = samples, augment, order, share
        self._key = derive_key(config.seed, _AUGMENT_KEY)
        self._batch_size = config.global_batch_size
        self._reader = reader
        self._placed: dict[int, dict[int, np.ndarray]] = {}  # by piece and position
        self._lock = threading.Lock()
        self._writer: BatchWriter | None = None

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_lock", "_writer")
        return {name: value for name, value in self.__dict__.items() if name not in left_out} | {"_placed": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _writer=BatchWriter())  # it has come to a worker

    def __len__(self) -> int:
        left_out = sum(last - first + 1 for first, last in self._share.left_out)
        return sys.maxsize - left_out * self._share.slices

    def __getitem__(self, index: int) -> dict[str, np.ndarray] | SentColumns:
        position, piece = divmod(index, self._share.slices)
        batch, rows = batch_number(position, self._share.left_out), self._share.rows(piece)
        placed = self._read_ahead(position, piece, batch)
        patch_rows = self._augment.patch_rows
        size = 1 if patch_rows is None else patch_rows.images_per_row
        randomness = _Randomness(self._key, reuse=patch_rows is None)
        columns: dict[str, np.ndarray] = {}
        sent: SentColumns | None = None
        for first in range(0, len(rows), size):
            pairs, values = [], []
            for place in placed[first : first + size].tolist():
                number = batch * self._batch_size + rows[first + len(pairs)]  # the same for any number of processes
                rng = randomness.at(number)
                take = None if self._reader is None else functools.partial(self._reader.take, *place)
                pair = self._samples.get(place[0], take, self._share.stand_ins.get(number))
                values.append(self._augment(pair, rng))
                pairs.append((pair.image, rng))
            together = {} if patch_rows is None else patch_rows(pairs, position + 1)
            if not first:
                wanted = (values[0], len(rows)), (together, len(rows) // size)
                if self._writer is None:
                    columns = new_columns(*wanted)
                else:
                    sent, columns = self._writer.columns(*wanted)
            _set(columns, first // size, together)
            for row, each in enumerate(values, first):
                _set(columns, row, each)
        return columns if sent is None else sent

    def _read_ahead(self, position: int, piece: int, batch: int) -> np.ndarray:
        """Return the samples of a piece with their blocks, and begin to read the blocks of its next batches."""
        rows = self._share.rows(piece)
        if self._reader is None:
            return self._order.placed(batch, rows)
        with self._lock:
            known = self._placed.setdefault(piece, {})
            for at in range(position, position + _AHEAD + 1):
                if at not in known:
                    known[at] = self._order.placed(batch_number(at, self._share.left_out), rows)
                    self._reader.announce(known[at][:, 1:])
            for at in [at for at in known if at < position - _BEHIND]:
                del known[at]
            return known[position]
