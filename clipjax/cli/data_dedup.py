"""The work of `clipjax data dedup`: near-duplicates of a source and leaks of evaluation sets, as a list and a picture.

Reading order: `add_options`, `run`, `_drop_lines`.
"""

import dataclasses
import os
import pathlib
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence

import numpy as np

from clipjax.cli import arguments
from clipjax.cli.errors import SIGNAL
from clipjax.data.duplicates import DEFAULT_DISTANCE, MAX_DISTANCE, Duplicates, Example, find_duplicates
from clipjax.data.hash_store import hash_source, shards_of
from clipjax.data.hash_workers import SourceSpec
from clipjax.data.picture_rows import USABLE, PictureHashes
from clipjax.data.sample import NUM_COUNTERS, BadSample, Source, count_by_reason
from clipjax.data.sources import check_copies
from clipjax.evals.overlap import Overlap, TrainingPart, picture_digests, to_json
from clipjax.monitoring.progress import Progress
from clipjax.runtime.storage import require_writable, write
from clipjax.runtime.terminal import printable

ABOUT = """Find near-duplicates inside a source, and samples of evaluation sets among them:

  clipjax data dedup 'cc3m/{00000..00331}.tar' --against=tfds:scenes/test --output=drop.txt --report=pairs.png

Pictures are alike if their 64-bit hashes differ in at most --distance bits: copies that were scaled or compressed, and
most of those that lost a margin of one percent. Captions are not looked at. Of pictures that a chain of pairs joins the
first one stays. Hashes are kept beside the indexes, so that a second search decodes no picture.

The other way round, what an evaluation set shares with training data goes into a file for eval.tasks.NAME.overlap:

  clipjax data dedup tfds:scenes/test --against='cc3m/{00000..00331}.tar' --overlap=overlap.json"""
_IN_PLACE_SECONDS = 0.1  # between two updates
_PLAIN_SECONDS = 10.0
_MAX_KEY_BYTES = 4096  # of a line that data.drop_keys reads


def add_options(parser: arguments.Parser) -> None:
    """Add the options that only this command has."""
    parser.description = ABOUT
    parser.add_argument(
        "--against",
        metavar="SOURCE",
        action="append",
        default=[],
        type=arguments.data_source,
        help="an evaluation set whose pictures must not be in the source, or training data; may be given several times",
    )
    parser.add_argument(
        "--distance",
        metavar="N",
        type=arguments.whole_number(0),
        default=DEFAULT_DISTANCE,
        help=f"most bits in which hashes of a pair differ, up to {MAX_DISTANCE}; {DEFAULT_DISTANCE} if left out",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=arguments.place, help="the list of keys to write, for data.drop_keys"
    )
    parser.add_argument(
        "--overlap",
        metavar="FILE.json",
        type=arguments.place,
        help="write which samples of the source, an evaluation set, are in the sources of --against, training data",
    )
    parser.add_argument("--report", metavar="FILE.png", type=arguments.place, help="draw pairs side by side into a PNG")
    parser.add_argument(
        "--num_workers", metavar="N", type=arguments.whole_number(1), help="processes; one per core if left out"
    )


def run(options: Namespace, spec: SourceSpec) -> int:
    """Find duplicates; return the exit code.

    Args:
        options: of the command.
        spec: the source.

    Raises:
        ValueError: an option or a source cannot be used.
        OSError: a file cannot be read or written.
    """
    _check(options)
    plain = dataclasses.replace(spec, image_field=None, caption_field=None, image_root=None)
    specs = [spec, *(dataclasses.replace(plain, source=each) for each in options.against)]
    check_copies([(each.source, spec.data()) for each in specs])
    sources = [each.open() for each in specs]
    hashes: list[PictureHashes] = []
    for each, source in zip(specs, sources, strict=True):
        line = _Line()
        try:
            hashes.append(hash_source(each, source, num_workers=_workers(options), progress=line.update))
        except KeyboardInterrupt:
            line.close()
            print("clipjax data: stopped; the same command goes on with the next shard", file=sys.stderr)
            return SIGNAL + signal.SIGINT
        finally:
            line.close()
        _tell_unusable(each.source, hashes[-1])
    found = find_duplicates(hashes[0], hashes[1:], options.distance)
    dropped = found.dropped()
    for each, leaked in zip(options.against, found.leaked, strict=True):
        print(f"{printable(each)}: {len(leaked):,} samples of the source are in it, or nearly so")
    print(
        f"{printable(spec.source)}: {len(sources[0]):,} samples, {found.pairs:,} pairs within {options.distance} bits, "
        f"{found.groups:,} groups, {len(dropped):,} samples to drop"
    )
    if options.output is not None:
        lines, unwritable = _drop_lines(sources[0], dropped)
        write(options.output, b"".join(lines))
        print(f"list for data.drop_keys: {printable(str(options.output))}, {len(lines):,} keys")
        if unwritable:
            print(f"{unwritable:,} keys are not in the list: they are empty, or no line of text can hold them")
    if options.overlap is not None:
        _write_overlap(options, sources[0], hashes, found)
    if options.report is not None:
        _draw(options.report, sources, found.examples, options)
    return 0


def _check(options: Namespace) -> None:
    """Refuse options before anything is read.

    Raises:
        ValueError: one cannot be used.
    """
    if options.distance > MAX_DISTANCE:
        raise ValueError(
            f"--distance={options.distance} must be at most {MAX_DISTANCE}: above, pictures are alike by mere chance"
        )
    for name in ("output", "overlap", "report"):
        if (path := getattr(options, name)) is not None:
            require_writable(path, f"--{name}")
    report: pathlib.Path | str | None = options.report
    if report is not None and not str(report).lower().endswith(".png"):
        raise ValueError(f"--report={report} must end in .png: it is drawn as one")
    if options.overlap is not None and not options.against:
        raise ValueError(f"--overlap={options.overlap} needs --against, the training data that the source may overlap")
    if options.overlap is not None and options.overlap in (options.output, options.report):
        raise ValueError(f"--overlap={options.overlap} is the file of another option, too; give each its own")
    if repeated := {each for each in options.against if options.against.count(each) > 1}:
        raise ValueError(f"--against={sorted(repeated)[0]} is given twice; give it once")
    if options.source in options.against:
        raise ValueError(f"--against={options.source} is the source itself: all of it would be dropped; name another")


def _workers(options: Namespace) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return options.num_workers or cores or 1


def _tell_unusable(source: str, hashes: PictureHashes) -> None:
    counters = np.bincount(hashes.reasons[hashes.reasons != USABLE], minlength=NUM_COUNTERS)
    counts = {reason: count for reason, count in count_by_reason(counters).items() if count}
    if counts:
        shown = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
        print(f"{printable(source)}: {sum(counts.values()):,} unusable samples are no duplicates: {shown}")


def _drop_lines(source: Source, dropped: np.ndarray) -> tuple[list[bytes], int]:
    """Return a line for each sample, SHARD/KEY or KEY, and how many samples no line can name."""
    shards = shards_of(source)
    firsts = np.array([shard.first for shard in shards])
    lines, unwritable = [], 0
    for index in dropped.tolist():
        shard = shards[int(np.searchsorted(firsts, index, "right")) - 1]
        try:
            key = source[index].key
        except BadSample:  # it was usable when it was hashed
            key = ""
        prefix = f"{os.path.basename(shard.path)}/" if shard.path else ""  # noqa: PTH119 - it may be an address
        line = (prefix + key).encode("utf-8", "replace")
        if not key or b"\n" in line or line != line.strip() or len(line) >= _MAX_KEY_BYTES:
            unwritable += 1
        else:
            lines.append(line + b"\n")
    return lines, unwritable


def _write_overlap(options: Namespace, source: Source, hashes: Sequence[PictureHashes], found: Duplicates) -> None:
    unusable = [np.flatnonzero(each.reasons != USABLE).tolist() for each in hashes]
    overlap = Overlap(
        source=options.source,
        num_samples=len(source),
        pictures=picture_digests(source),
        distance=options.distance,
        not_compared=unusable[0],
        against=[
            TrainingPart(name, len(each.reasons), len(bad), leaked.tolist())
            for name, each, bad, leaked in zip(options.against, hashes[1:], unusable[1:], found.leaked, strict=True)
        ],
    )
    write(options.overlap, to_json(overlap))
    number = len(np.unique(np.concatenate(found.leaked)))
    print(
        f"file for eval.tasks.NAME.overlap: {printable(str(options.overlap))}, "
        f"{number:,} of {len(source):,} samples overlap"
    )


def _draw(path: pathlib.Path, sources: Sequence[Source], examples: Sequence[Example], options: Namespace) -> None:
    from clipjax.data.pair_sheet import choose_examples, draw_pairs

    subtitle = f"pairs within {options.distance} bits, the most different ones first"
    if options.against:
        subtitle += "; evaluation sets: " + ", ".join(f"{i + 1} {each}" for i, each in enumerate(options.against))
    drawn = draw_pairs(sources[0], sources[1:], choose_examples(examples), title=options.source, subtitle=subtitle)
    write(path, drawn)
    print(f"pairs side by side: {printable(str(path))}")


class _Line:
    """The progress on the standard error: a line in place on a terminal, else one from time to time."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._start = self._shown = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Take how many samples have been hashed, of how many."""
        now = time.monotonic()
        if self._progress is None:
            self._progress = Progress(total, unit="sample")
        if now - self._shown >= (_IN_PLACE_SECONDS if sys.stderr.isatty() else _PLAIN_SECONDS):
            self._shown, rate = now, done / max(now - self._start, 1e-3)
            self._progress.update(done, {"examples_per_second": rate, "seconds_left": (total - done) / rate})

    def close(self) -> None:
        """Leave the line."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
