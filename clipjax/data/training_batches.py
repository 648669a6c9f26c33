"""Batches of decoded and augmented pairs by number: what threads and worker processes of the training stream compute.

Reading order: `Batches`, `SubstitutedSamples` (decoding and the substitution of bad samples), `MixedSamples`, `Augment`
(crop and caption). Axes: b batch of this process, s image_size, l tokens.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.config import Crop
from clipjax.data.images import EvalTransform, decode, random_resized_crop
from clipjax.data.mixture import MixedSource
from clipjax.data.order import derive_key
from clipjax.data.sample import NUM_COUNTERS, REASONS, BadSample, Source
from clipjax.data.training_order import TrainingOrder

GOOD = -1
"""The reason of a sample that is not bad."""

_MAX_PROBES = 100  # bad samples in a row before giving up: nearly all of the data is unusable
_AUGMENT_KEY = 16  # what a key is for, beside those of an order


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


class SubstitutedSamples:
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

    def __getitem__(self, index: int) -> Pair:
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
                return Pair(image, sample.captions, probe, index, first_reason)
            except BadSample as bad:
                if first_reason == GOOD:
                    first_reason = REASONS.index(bad.reason)
                failure = f"{bad.reason} in {self._source.location(probe)}"
        raise NoUsableSample(
            f"{min(size, _MAX_PROBES)} samples in a row are unusable, the last: {failure}; check the source and that "
            "its image and caption keys name what the data holds"
        )


class MixedSamples:
    """The decoded samples of a mixture; the substitute of a bad one is of the same source.

    A reason tells the source, too: it is counted as `NUM_COUNTERS` times the source's number, and the reason's own.
    """

    def __init__(self, source: MixedSource, max_image_pixels: int):
        self._source = source
        self._parts = [SubstitutedSamples(part, max_image_pixels) for part in source.parts]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        number, inside = self._source.find(index)
        pair, first = self._parts[number][inside], self._source.first[number]
        return Pair(
            pair.image,
            pair.captions,
            index=first + pair.index,
            requested=first + pair.requested,
            reason=pair.reason if pair.reason == GOOD else pair.reason + NUM_COUNTERS * number,
        )


@dataclass(frozen=True, slots=True)
class Augment:
    """The draw of a caption and a crop; `rng` is keyed by the seed and the sample's global position."""

    tokenize: Callable[[str], np.ndarray]
    view: EvalTransform
    crop: Crop
    min_area: float

    def __call__(self, pair: Pair, rng: np.random.Generator) -> dict[str, Any]:
        """Return the row of a batch."""
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


def substituted(source: Source, max_image_pixels: int) -> SubstitutedSamples | MixedSamples:
    """Return the decoded samples of a source or a mixture."""
    if isinstance(source, MixedSource):
        return MixedSamples(source, max_image_pixels)
    return SubstitutedSamples(source, max_image_pixels)


class Batches:
    """The batches of all processes by number: those of global batch g are g * `process_count` and the next ones.

    Args:
        samples: decoded samples.
        augment: makes a row of a pair and a source of randomness.
        order: of the samples.
        seed: of the run; with the position of a sample it fixes the randomness.
        shape: size of a process's part of a batch, and number of processes.
    """

    def __init__(
        self,
        samples: SubstitutedSamples | MixedSamples,
        augment: Augment,
        order: TrainingOrder,
        seed: int,
        shape: tuple[int, int],
    ):
        self._samples, self._augment, self._order = samples, augment, order
        self._key = derive_key(seed, _AUGMENT_KEY)
        self._size, self._process_count = shape

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        batch, process = divmod(number, self._process_count)
        first = process * self._size
        columns: dict[str, np.ndarray] = {}
        for row, index in enumerate(self._order.batch(batch)[first : first + self._size].tolist()):
            position = number * self._size + row  # of the stream: the same for any number of processes
            rng = np.random.Generator(np.random.Philox(key=np.array([self._key, position], np.uint64)))
            for name, value in self._augment(self._samples[index], rng).items():
                if not row:
                    columns[name] = np.empty((self._size, *value.shape), value.dtype)
                columns[name][row] = value
        return columns
