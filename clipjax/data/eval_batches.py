"""Evaluation batches: one pass through a source, in its order. Axes: b batch of this process, s image_size."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from clipjax.data.images import Decoder
from clipjax.data.patches import Pixels, stack_pixels
from clipjax.data.sample import REASONS, BadSample, Sample, Source
from clipjax.data.training_batches import GOOD
from clipjax.data.training_stream import per_process


def eval_batches(
    source: Source,
    *,
    view: Callable[[np.ndarray], Pixels] | None,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    max_examples: int | None = None,
    max_image_pixels: int,
    background: tuple[int, int, int] | None = None,
    exif_orientation: bool = False,
    frames: int | None = None,
    num_threads: int,
) -> Iterator[dict[str, Any]]:
    """Go once through a source, in its order; every process gets as many batches.

    Process p's part of global batch g is positions g * batch_size + p, + p + process_count, and so on. Bad samples
    and the padding of the last batch are black pictures with a false `mask`.

    Args:
        source: samples; they need no captions and no labels.
        view: transform of the images: `clipjax.data.patches.make_view`; None: none is decoded, and there is no `image`.
        batch_size: size of a batch over all processes.
        process_index: number of this process, from 0.
        process_count: number of processes that share each batch.
        max_examples: number of samples to read, from the start; None reads all.
        max_image_pixels: limit of an image; larger ones are bad.
        background: colour behind transparent pixels; None drops the alpha.
        exif_orientation: turn pictures as their EXIF data says.
        frames: number of frames of each sample, a video; `image` is then [b, frames, s, s, 3]. None: pictures.
        num_threads: number of decoding threads.

    Returns:
        Batches of `image`, uint8 [b, s, s, 3] or what else `view` gives, `label` int32 [b] (-1: none), `mask` bool [b],
        `index` int64 [b] in the source (-1: padding), `skip_reason` int32 [b] (why a sample is bad, an index into
        `REASONS`; -1: it is not), `captions`, a list of b tuples of texts, `labels`, one of b tuples of classes (None
        where the data does not tell several), and `key`, one of b names.

    Raises:
        ValueError: `batch_size` is not divisible by `process_count`.
    """
    local_size = per_process("batch_size", batch_size, process_count)
    total = len(source) if max_examples is None else min(len(source), max_examples)
    parts = [range(start + process_index, start + batch_size, process_count) for start in range(0, total, batch_size)]
    assert all(len(part) == local_size for part in parts)
    see = _make_reader(view, Decoder(max_image_pixels, background, exif_orientation), is_video=frames is not None)
    black = np.zeros((1, 1, 3), np.uint8)
    blank = see(Sample(black, (), frames=(black,) * (frames or 0)))

    def read(index: int) -> dict[str, Any]:
        if index >= total:
            return _eval_row(blank, index=-1)
        try:
            sample = source[index]
            image = see(sample)
        except BadSample as bad:
            return _eval_row(blank, index=index, reason=REASONS.index(bad.reason))
        found = {"label": sample.label, "labels": sample.labels, "captions": sample.captions, "key": sample.key}
        return _eval_row(blank, index=index) | {"image": image, "mask": True} | found

    return _read_ahead(parts, read, num_threads)


def _make_reader(
    view: Callable[[np.ndarray], Pixels] | None, decode: Decoder, *, is_video: bool
) -> Callable[[Sample], Pixels | None]:
    """Return what gives the pixels of a sample, those of all frames of a video; None where nothing is to be seen."""
    if view is None:
        return lambda sample: None
    if is_video:
        return lambda sample: stack_pixels([view(decode(frame)) for frame in sample.frames])
    return lambda sample: view(decode(sample.image))


def _eval_row(blank: Pixels | None, *, index: int, reason: int = GOOD) -> dict[str, Any]:
    row = {"image": blank, "label": -1, "mask": False, "index": index, "skip_reason": reason}
    return {**row, "captions": (), "labels": None, "key": ""}


def _read_ahead(
    parts: Sequence[range], read: Callable[[int], dict[str, Any]], num_threads: int
) -> Iterator[dict[str, Any]]:
    """Stack each part's rows, while threads read the next part's."""
    pool = futures.ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="eval-read")
    try:
        waiting: collections.deque[list[futures.Future[dict[str, Any]]]] = collections.deque()
        for part in itertools.chain(parts, [None]):
            if part is not None:
                waiting.append([pool.submit(read, index) for index in part])
            if waiting and (part is None or len(waiting) > 1):
                yield _stack_rows([row.result() for row in waiting.popleft()])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _stack_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    has_images = rows[0]["image"] is not None
    return {
        **({"image": stack_pixels([row["image"] for row in rows])} if has_images else {}),
        "label": np.array([row["label"] for row in rows], np.int32),
        "mask": np.array([row["mask"] for row in rows], np.bool_),
        "index": np.array([row["index"] for row in rows], np.int64),
        "skip_reason": np.array([row["skip_reason"] for row in rows], np.int32),
        "captions": [row["captions"] for row in rows],
        "labels": [row["labels"] for row in rows],
        "key": [row["key"] for row in rows],
    }
