"""Speed of the training stream on this machine, beside a bare loop that decodes and resizes the same pictures.

Reading order: `measure_loading`, `LoadingRate`, `_measure_stream`, `_measure_bare`.
"""

import dataclasses
import io
import itertools
import multiprocessing
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.config import Config, Interpolation
from clipjax.data.digests import spread
from clipjax.data.images import make_decoder
from clipjax.data.mixture import sizes_of
from clipjax.data.sample import BadSample, Source
from clipjax.data.tokenizers.protocol import TextToTokens, Tokenizer
from clipjax.data.training_order import choose_order
from clipjax.data.training_stream import TrainStream

_BATCH = 64
_PICTURES = 256  # of the bare loop
_PICTURE_BYTES = 256 * 2**20
_WARM_BATCHES = 2  # besides those that lie ready


@dataclass(frozen=True)
class LoadingRate:
    """The result of one measurement.

    Attributes:
        name: of what was measured.
        num_workers: worker processes; None: a loop in this one.
        with_tokens: whether captions became tokens.
        images: that came out.
        seconds: of time.
        cpu_seconds: of this process and its workers; None: this system does not tell.
        unusable: images that another one stood in for.
    """

    name: str
    num_workers: int | None
    with_tokens: bool
    images: int
    seconds: float
    cpu_seconds: float | None
    unusable: int = 0

    @property
    def images_per_second(self) -> float:
        """Images per second of time."""
        return self.images / self.seconds

    @property
    def images_per_core_second(self) -> float | None:
        """Images per second of a core's time."""
        return self.images / self.cpu_seconds if self.cpu_seconds else None

    def to_record(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        rates = {name: getattr(self, name) for name in ("images_per_second", "images_per_core_second")}
        return dataclasses.asdict(self) | rates


def measure_loading(
    source: Source,
    tokenizer: Tokenizer,
    config: Config,
    *,
    is_remote: Sequence[bool],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[LoadingRate]:
    """Measure the bare loop, and the stream without and with tokens, in threads and in the config's workers.

    Args:
        source: of the pairs.
        tokenizer: of their captions.
        config: the run.
        is_remote: for each source of the config, whether its samples lie in an object store.
        seconds: of each measurement.
        clock: tells the time.

    Raises:
        ValueError: hardly any sample is usable.
    """
    yield _measure_bare(source, config, seconds, clock)
    batch_size, unit = max(1, min(_BATCH, config.global_batch_size, len(source))), config.data.images_per_row
    batch_size = max(unit, batch_size // unit * unit)
    for num_workers in dict.fromkeys((0, config.data.num_workers)):
        data = dataclasses.replace(config.data, num_workers=num_workers)
        smaller = dataclasses.replace(config, data=data, global_batch_size=batch_size)
        for with_tokens in (False, True):
            tokenize = TextToTokens(tokenizer, config.model.text.context_length) if with_tokens else _no_tokens
            order = choose_order(smaller, sizes_of(source), is_remote)
            stream = TrainStream(source, tokenize=tokenize, config=smaller, order=order)
            try:
                yield _measure_stream(stream, smaller, seconds, clock, with_tokens=with_tokens)
            finally:
                stream.close()


def _no_tokens(text: str, *rest: Any) -> np.ndarray:
    return np.zeros(1, np.int32)


def _measure_stream(
    stream: TrainStream, config: Config, seconds: float, clock: Callable[[], float], *, with_tokens: bool
) -> LoadingRate:
    for _ in range(config.data.prefetch_batches * max(1, config.data.num_workers) + _WARM_BATCHES):
        next(stream)  # what lies ready before the clock runs would count too much
    start, used, images, unusable = clock(), _cpu_seconds(), 0, 0
    while (spent := clock() - start) < seconds or not images:
        batch = next(stream)
        images += len(batch["index"])
        unusable += int((batch["skip_reason"] >= 0).sum())
    after = _cpu_seconds()
    return LoadingRate(
        "training stream",
        config.data.num_workers,
        with_tokens,
        images,
        max(spent, 1e-9),
        None if used is None or after is None else after - used,
        unusable,
    )


def _measure_bare(source: Source, config: Config, seconds: float, clock: Callable[[], float]) -> LoadingRate:
    """Decode and resize pictures that lie in memory, with one thread and Pillow alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about odd files
        pictures, images, spent = _pictures(source, config), 0, 0.0
        start, used = clock(), time.process_time()
        for picture in itertools.cycle(pictures):
            _decode_and_resize(picture, config)
            images += 1
            if (spent := clock() - start) >= seconds:
                break
    return LoadingRate(
        "bare decode + resize", None, False, images, max(spent, 1e-9), max(time.process_time() - used, 1e-9)
    )


def _pictures(source: Source, config: Config) -> Sequence[bytes | np.ndarray]:
    """Return pictures from all over a source that can be decoded.

    Raises:
        ValueError: there is none.
    """
    decode, found, size = make_decoder(config.data), [], 0
    for index in spread(len(source), _PICTURES):
        try:
            picture = source[index].image
            decode(picture)  # which has limits
            _decode_and_resize(picture, config)
        except (BadSample, OSError, ValueError, SyntaxError):  # Pillow's errors, for what only our decoder takes
            continue
        found.append(picture)
        size += len(picture) if isinstance(picture, bytes) else picture.nbytes
        if size > _PICTURE_BYTES:
            break
    if not found:
        raise ValueError(f"none of {min(len(source), _PICTURES)} samples has an image that can be decoded")
    return found


def _decode_and_resize(picture: bytes | np.ndarray, config: Config) -> np.ndarray:
    from PIL import Image

    is_bicubic = config.data.interpolation is Interpolation.BICUBIC
    kind, size = Image.Resampling.BICUBIC if is_bicubic else Image.Resampling.BILINEAR, config.model.image.image_size
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else Image.fromarray(picture)
    return np.asarray(image.convert("RGB").resize((size, size), kind))


def _cpu_seconds() -> float | None:
    """Return the time that this process and its workers have spent on cores; None if the system does not tell."""
    total = time.process_time()
    for process in multiprocessing.active_children():
        try:
            fields = pathlib.Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
