"""The work of `clipjax data pack`: any source as tars or ArrayRecord files, with progress."""

import pathlib
import signal
import sys

from clipjax.cli import arguments
from clipjax.cli.data_index import ShardProgress
from clipjax.cli.errors import SIGNAL
from clipjax.config import DataConfig
from clipjax.data.pack_manifest import FORMATS, MANIFEST
from clipjax.data.packing import describe_unusable, pack
from clipjax.runtime.terminal import printable

ABOUT = """Write a source as shards: clipjax data pack 'cc3m/*.tar.gz' --output=packed

Takes every source, and compressed tars (.tar.gz, .tgz), which are read from front to back. Images and the JSON of tars
stay as they are; unusable samples are left out and counted. The same command goes on where it was stopped:
manifest.jsonl in the folder has a line for each finished shard."""


def add_options(parser: arguments.Parser) -> None:
    """Add the options of the command, besides those of the source."""
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=arguments.place,
        help="folder of the shards; a path, or gs://, s3://, az://",
        missing="=DIR is missing: the folder of the shards",
    )
    parser.add_argument("--format", type=arguments.choice(FORMATS), default="tar", help="tar or array_record (tar)")
    parser.add_argument(
        "--samples_per_shard",
        metavar="N",
        type=arguments.whole_number(1),
        default=10_000,
        help="samples of the source for each shard (10000)",
    )


def run(source: str, output: pathlib.Path | str, *, data: DataConfig, form: str, samples_per_shard: int) -> int:
    """Write the shards that are missing; return the exit code.

    Args:
        source: names the samples.
        output: folder of the shards, a path or an address of a store.
        data: limits and columns.
        form: one of `FORMATS`.
        samples_per_shard: of the source.

    Raises:
        ValueError: the source cannot be used, the folder holds something else, the disk is full, or the store takes no
            more.
        OSError: a file cannot be read.
    """
    line = ShardProgress()
    try:
        shards, old = pack(
            source, output, data=data, form=form, samples_per_shard=samples_per_shard, progress=line.update
        )
    except KeyboardInterrupt:
        line.close()
        print("clipjax data: stopped; finished shards stay, the same command goes on from here", file=sys.stderr)
        return SIGNAL + signal.SIGINT
    finally:
        line.close()
    samples, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
    made = f" ({old:,} were there)" if old else ""
    print(printable(f"{output}: {len(shards):,} shards{made}, {samples:,} samples, {size:,} bytes; see {MANIFEST}"))
    if unusable := describe_unusable(shards):
        print(f"left out as unusable: {unusable}")
    if renamed := sum(shard.renamed for shard in shards):
        print(f"{renamed:,} keys were changed: no dots, no odd characters, at most 80 bytes, none twice in a shard")
    return 0
