"""Embed a source: `clipjax embed SOURCE --checkpoint=PATH --output=DIR`."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.cli import arguments
from clipjax.cli.data import add_cache_options, add_source_options, read_source_options
from clipjax.cli.data_index import name_source
from clipjax.cli.errors import SIGNAL, UNUSABLE_DATA, print_error, refusals
from clipjax.cli.opened_model import (
    MOST_AT_ONCE,
    OpenedModel,
    add_checkpoint_option,
    describe,
    digest_of,
    open_model,
    working,
)
from clipjax.cli.output import show
from clipjax.config import DataConfig
from clipjax.data.digests import ShardDigest
from clipjax.data.eval_batches import eval_batches
from clipjax.data.image_lists import ImageListSource, find_images
from clipjax.data.index_store import locked
from clipjax.data.patches import make_view
from clipjax.data.sample import REASONS, Sample, Source
from clipjax.data.sources import build_source, image_folder
from clipjax.evals.embedding_folder import FORMS, IMAGES, KINDS, LOCK, PARQUET, EmbeddingWriter, Rows
from clipjax.evals.encoder import Encoder
from clipjax.monitoring.progress import Progress
from clipjax.runtime.files import require_writable
from clipjax.runtime.storage import is_address

PROGRAM = "clipjax embed"
ABOUT = """Embed the images, the captions or both of a source: clipjax embed SOURCE --checkpoint=PATH --output=DIR

SOURCE is any that training takes, or a folder of pictures without captions. The work is split over the devices of this
machine. A run that is stopped or killed goes on with the next part when the same command is given again, and gives the
same bytes; with another checkpoint, source or option the folder is refused. Samples that cannot be used are left out
and counted; the exit code is 3 if none is left."""
BOTH = "both"
SAMPLES_PER_PART = 16_384
_IN_PLACE_SECONDS = 0.1  # between two updates
_PLAIN_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(_parser().format_help())
        return 0
    with contextlib.ExitStack() as held:
        with refusals(PROGRAM):
            options = _parser().read(name_source(argv)).options
            given = read_source_options(options)
            opened = open_model(
                options.checkpoint,
                reads_texts=options.what != IMAGES,
                all_devices=True,
                batch_size=options.batch_size,
            )
            source = open_source(options.source, given, opened, options.what)
            about = describe_work(opened, source, options)
            _hold(options.output, held)
            writer = EmbeddingWriter(options.output, about)
        try:
            with working(PROGRAM):
                return embed(opened, source, writer, about)
        except KeyboardInterrupt:
            print(f"{PROGRAM}: stopped; the same command goes on with the next part", file=sys.stderr)
            return SIGNAL + signal.SIGINT


def _parser() -> arguments.Parser:
    parser = arguments.Parser(PROGRAM, ABOUT)
    parser.usage = f"{PROGRAM} SOURCE --checkpoint=WORKDIR_OR_STEP --output=DIR [options]"
    add_source_options(parser)
    parser.add_argument("--tfds_dir", metavar="DIR", type=arguments.place, help="where prepared TFDS data lies")
    add_cache_options(parser)
    add_checkpoint_option(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=arguments.path,
        help="folder of the embeddings, on a disk",
        missing="=DIR is missing: the folder of the embeddings",
    )
    parser.add_argument(
        "--what", type=arguments.choice((*KINDS, BOTH)), default=IMAGES, help=f"{', '.join(KINDS)} or {BOTH} ({IMAGES})"
    )
    parser.add_argument(
        "--format", type=arguments.choice(FORMS), default=PARQUET, help=f"{' or '.join(FORMS)} ({PARQUET})"
    )
    parser.add_argument(
        "--batch_size",
        metavar="N",
        type=arguments.whole_number(1),
        help="samples per forward pass over all devices; the checkpoint's eval.batch_size if left out, at most "
        f"{MOST_AT_ONCE} a device",
    )
    parser.add_argument(
        "--samples_per_part",
        metavar="N",
        type=arguments.whole_number(1),
        help=f"samples of the source for each part, a multiple of the batch; {SAMPLES_PER_PART} if left out, or the "
        "next multiple",
    )
    return parser


def open_source(spec: str, given: DataConfig, opened: OpenedModel, what: str) -> Source:
    """Open a source with the checkpoint's limits; a folder of pictures needs no captions where none are read.

    Raises:
        ValueError: it cannot be used, or is empty.
        OSError: a file cannot be read.
    """
    own = opened.config.data
    data = dataclasses.replace(
        given,
        max_image_pixels=own.max_image_pixels,
        max_caption_bytes=own.max_caption_bytes,
        tfds_image_key=own.tfds_image_key,
        tfds_caption_key=own.tfds_caption_key,
    )
    try:
        source = build_source(spec, data=data)
    except ValueError:
        folder = image_folder(spec) if what == IMAGES else None
        if folder is None or is_address(folder):
            raise
        source = ImageListSource(find_images([folder], "SOURCE"), max_image_pixels=data.max_image_pixels)
        print("the folder has neither captions nor classes: its pictures are taken alone", flush=True)
    if not len(source):
        raise ValueError(f"source {spec!r} has no sample")
    return source


def describe_work(opened: OpenedModel, source: Source, options: Namespace) -> dict[str, Any]:
    """Return everything that the bytes depend on, for the manifest.

    Raises:
        ValueError: parts do not consist of whole batches.
        OSError: a file cannot be read.
    """
    batch_size = opened.config.eval.batch_size
    samples_per_part = options.samples_per_part or -(-SAMPLES_PER_PART // batch_size) * batch_size
    if samples_per_part % batch_size:
        near = -(-samples_per_part // batch_size) * batch_size
        raise ValueError(
            f"--samples_per_part={samples_per_part} must be a multiple of {batch_size}, the batch; the next is {near}"
        )
    digests = [[shard.digest, shard.size] for shard in source.digests()]
    return {
        **describe(opened.saved),
        "checkpoint_digest": digest_of(opened.saved),
        "source": options.source,
        "source_digest": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        "num_samples": len(source),
        "image_field": options.image_field,
        "caption_field": options.caption_field,
        "what": options.what,
        "format": options.format,
        "embed_dim": opened.config.model.embed_dim,
        "batch_size": batch_size,
        "samples_per_part": samples_per_part,
    }


def embed(opened: OpenedModel, source: Source, writer: EmbeddingWriter, about: Mapping[str, Any]) -> int:
    """Write the parts that are missing, and the map; return the exit code.

    Raises:
        NotFiniteEmbeddings: some embeddings are not finite.
        UnreadableData: a part, or the data, cannot be read.
        OSError: a disk or a store fails.
    """
    old = writer.start
    if old:
        print(f"{old:,} of {len(source):,} samples were done before", flush=True)
    rate = _write_parts(opened, source, writer, about) if old < len(source) else None
    counts = writer.finish()
    made = ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS if kind in counts)
    print(f"{made} of {len(source):,} samples" + ("" if rate is None else f"; {rate:,.0f} samples/s"))
    for kind, reasons in counts["unusable"].items():
        if reasons:
            print(f"left out of the {kind}: " + ", ".join(f"{reason} {count:,}" for reason, count in reasons.items()))
    if any(not counts[kind] for kind in KINDS if kind in counts):
        print_error(PROGRAM, ValueError("nothing was embedded: no sample can be used"))
        return UNUSABLE_DATA
    return 0


def _write_parts(
    opened: OpenedModel, source: Source, writer: EmbeddingWriter, about: Mapping[str, Any]
) -> float | None:
    """Write the parts that are missing; return the samples per second, None for a single batch."""
    encoder, data, first, total = opened.encoder(), opened.config.data, writer.start, len(source)
    kinds = KINDS if about["what"] == BOTH else (about["what"],)
    batches = eval_batches(
        _Tail(source, first),
        view=make_view(opened.config) if IMAGES in kinds else None,
        batch_size=about["batch_size"],
        max_image_pixels=data.max_image_pixels,
        background=data.background,
        exif_orientation=data.exif_orientation,
        num_threads=data.num_threads,
    )
    part, line, done = {kind: _Part(about["embed_dim"]) for kind in kinds}, _Line(total), first
    try:
        for batch in batches:
            for kind in kinds:
                (_add_images if kind == IMAGES else _add_texts)(part[kind], encoder, batch, first)
            done = min(done + about["batch_size"], total)
            if done == total or (done - first) % about["samples_per_part"] == 0:
                rows = {kind: each.rows() for kind, each in part.items()}
                writer.add(done, rows, {kind: each.unusable for kind, each in part.items()})
                part = {kind: _Part(about["embed_dim"]) for kind in kinds}
            line.update(done)
    finally:
        line.close()
    return line.rate


class _Tail:
    """The samples of a source from one on."""

    def __init__(self, source: Source, start: int) -> None:
        self._source, self._start = source, start

    def __len__(self) -> int:
        return len(self._source) - self._start

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._start + index]

    def location(self, index: int) -> str:
        return self._source.location(self._start + index)

    def digests(self) -> Sequence[ShardDigest]:
        return self._source.digests()

    def files(self) -> Sequence[str]:
        return self._source.files()


class _Part:
    """Rows of a part so far."""

    def __init__(self, dim: int) -> None:
        self.ids: list[str] = []
        self.index: list[int] = []
        self.captions: list[str] = []
        self.embeddings = [np.zeros((0, dim), np.float32)]
        self.unusable = collections.Counter[str]()

    def rows(self) -> Rows:
        return Rows(self.ids, self.index, self.captions, np.concatenate(self.embeddings))


def _add_images(part: _Part, encoder: Encoder, batch: Mapping[str, Any], first: int) -> None:
    _count_unusable(part, batch)
    mask = batch["mask"]
    if mask.any():
        part.embeddings.append(encoder.embed_images(batch["image"])[mask])
    for row in np.flatnonzero(mask).tolist():
        index = int(batch["index"][row]) + first
        part.ids.append(batch["key"][row] or str(index))
        part.index.append(index)
        part.captions.append(next(iter(batch["captions"][row]), ""))


def _add_texts(part: _Part, encoder: Encoder, batch: Mapping[str, Any], first: int) -> None:
    _count_unusable(part, batch)
    texts: list[str] = []
    for row in np.flatnonzero(batch["mask"]).tolist():
        index, captions = int(batch["index"][row]) + first, batch["captions"][row]
        part.ids += [batch["key"][row] or str(index)] * len(captions)
        part.index += [index] * len(captions)
        texts += captions
        part.unusable.update([] if captions else ["missing_caption"])
    part.captions += texts
    if texts:
        part.embeddings.append(encoder.embed_texts(texts))


def _count_unusable(part: _Part, batch: Mapping[str, Any]) -> None:
    part.unusable.update(REASONS[reason] for reason in batch["skip_reason"].tolist() if reason >= 0)


def _hold(output: pathlib.Path, held: contextlib.ExitStack) -> None:
    """Hold the folder against other processes until the stack is closed.

    Raises:
        ValueError: another one writes there, or it cannot be written to.
    """
    require_writable(output, "--output")
    try:
        held.enter_context(locked(str(output / LOCK), may_wait=False))
    except BlockingIOError as error:
        raise ValueError(f"--output={output}: another {PROGRAM} writes there; wait for it, or name another") from error


class _Line:
    """The progress on the standard error: a line in place on a terminal, else one from time to time.

    Attributes:
        rate: samples per second behind the first batch, for which the model was compiled; None before the second one.
    """

    def __init__(self, total: int) -> None:
        self._progress, self._total = Progress(total, unit="sample"), total
        self._first: tuple[int, float] | None = None
        self._shown = time.monotonic()
        self.rate: float | None = None

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
            return
        self.rate = (done - self._first[0]) / max(now - self._first[1], 1e-3)
        if now - self._shown >= (_IN_PLACE_SECONDS if sys.stderr.isatty() else _PLAIN_SECONDS):
            self._shown, left = now, (self._total - done) / self.rate
            self._progress.update(done, {"examples_per_second": self.rate, "seconds_left": left})

    def close(self) -> None:
        self._progress.close()
