"""Prepare data: `clipjax data scenes | tokenizer | show | index | dedup | verify`.

`scenes` makes the embedded dataset, `tokenizer` trains a SentencePiece model on a source's captions, `show` looks into
a source, `index` makes the index files of tars, `dedup` finds near-duplicates, `verify` compares all of its bytes with
those of an earlier day.
"""

import json
import pathlib
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence

from clipjax.cli import arguments, data_bench, data_dedup, data_index, data_pack
from clipjax.cli.errors import UNUSABLE_DATA, refusals
from clipjax.cli.output import show
from clipjax.config import DataConfig
from clipjax.config.data import unused_columns
from clipjax.config.filters import condition_errors
from clipjax.data.digests import ShardDigest, digest_files, find_differences, from_record
from clipjax.data.filter_results import filter_source
from clipjax.data.filters import FilteredSource
from clipjax.data.hash_workers import SourceSpec
from clipjax.data.images import make_decoder
from clipjax.data.sample import BadSample, Source
from clipjax.data.sources import build_source
from clipjax.runtime.storage import read_small, require_writable, write
from clipjax.runtime.terminal import printable

PROGRAM = "clipjax data"
COMMANDS = {
    "scenes": "make the embedded dataset of captioned pictures (tfds:scenes)",
    "tokenizer": "train a SentencePiece tokenizer on a source's captions",
    "show": "look into a source: how many samples, their sizes and captions, what is unusable, and the first few",
    "index": "make the index files of a source's tars, which the first start of a run would make",
    "dedup": "list near-duplicates inside a source, and what of evaluation sets is in it",
    "pack": "write any source as tars or ArrayRecord files",
    "bench": "measure how many images per second training gets from a source",
    "verify": "compare every byte of a source's files with a manifest",
}


VERIFY = """Compare every byte of a source's files with a manifest that --write has made.

A run that goes on looks at the keys, the sizes and 16 contents of each shard only: it does not see an edit of the same
size elsewhere, which this command does. Files may lie elsewhere and in another order. Exit code 3: a file has changed,
is missing or is additional."""
_MAX_MANIFEST_BYTES = 500_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command, rest = next(iter(argv), ""), argv[1:]
    if arguments.wants_help(argv):
        show(_parser(command).format_help() if command in COMMANDS else _help())
        return 0
    with refusals(PROGRAM):
        if command not in COMMANDS:
            given = f"{command!r} is none of" if command else "a command is missing, one of"
            raise ValueError(f"{given} {', '.join(COMMANDS)}; see {PROGRAM} --help")
        if command != "scenes":
            rest = data_index.name_source(rest)
        parsed = _parser(command).read(rest)
        options = parsed.options
        match command:
            case "bench":
                return data_bench.run(parsed)
            case "scenes":
                return _scenes(options)
            case "tokenizer":
                return _tokenizer(options)
            case "show":
                return _show(options)
            case "index":
                return data_index.run(options.source, options.num_workers)
            case "dedup":
                return data_dedup.run(options, _spec(options))
            case "pack":
                return data_pack.run(
                    options.source,
                    options.output,
                    data=read_source_options(options),
                    form=options.format,
                    samples_per_shard=options.samples_per_shard,
                )
            case _:
                return _verify(options)


def _help() -> str:
    lines = [f"  {PROGRAM} {name:<10} {about}" for name, about in COMMANDS.items()]
    return "\n".join(["Prepare and inspect data.", "", *lines, "", f"`{PROGRAM} COMMAND --help` tells more."])


def _parser(command: str) -> arguments.Parser:
    if command == "bench":
        parser = arguments.Parser(f"{PROGRAM} bench", data_bench.ABOUT, config="fields")
        data_bench.add_options(parser)
        return parser
    parser = arguments.Parser(f"{PROGRAM} {command}", COMMANDS[command])
    if command == "scenes":
        parser.add_argument(
            "--config",
            default="default",
            help="default, tiny for trials, large for batches of 32,768, or outlines: the same scenes in another style",
        )
        where = "where to put it; TFDS's own default if left out"
    else:
        add_source_options(parser)
        where = "where prepared TFDS data lies"
    if command == "tokenizer":
        _add_tokenizer_options(parser)
    if command == "show":
        parser.add_argument(
            "--num", metavar="N", type=arguments.whole_number(0), default=5, help="how many samples to print"
        )
        parser.add_argument(
            "--sheet",
            metavar="FILE.png",
            type=arguments.place,
            help="draw small pictures with their captions into a PNG",
        )
        _add_filter_options(parser)
    if command == "index":
        parser.description = data_index.ABOUT
        parser.add_argument(
            "--num_workers", metavar="N", type=arguments.whole_number(1), help="processes; one per core if left out"
        )
        return parser
    if command == "dedup":
        data_dedup.add_options(parser)
    if command == "pack":
        parser.description = data_pack.ABOUT
        data_pack.add_options(parser)
    if command == "verify":
        parser.description = VERIFY
        for name, about in (("write", "the manifest to write"), ("against", "the manifest to compare with")):
            parser.add_argument(f"--{name}", metavar="FILE", type=arguments.place, help=about)
    kind = arguments.path if command == "scenes" else arguments.place
    parser.add_argument("--tfds_dir", metavar="DIR", type=kind, help=where)
    if command != "scenes":
        add_cache_options(parser)
    return parser


def _add_tokenizer_options(parser: arguments.Parser) -> None:
    parser.add_argument(
        "--vocab_size",
        metavar="N",
        type=arguments.whole_number(1),
        help="all ids, start and end included",
        missing="=N is missing: how many ids, start and end included",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=arguments.place,
        help="the .model file to write",
        missing="=FILE is missing: the .model file to write",
    )


def add_cache_options(parser: arguments.Parser) -> None:
    """Add the options of the cache of copies."""
    copies = "on a disk, for copies of files in stores, as data.cache_dir; ArrayRecord and TFDS data there need it"
    parser.add_argument("--cache_dir", metavar="DIR", type=arguments.path, help=copies)
    parser.add_argument("--cache_gib", metavar="N", type=arguments.amount, help="most GiB of these copies")


def add_source_options(parser: arguments.Parser) -> None:
    """Add the option of a source, and those of its columns."""
    places = "tfds:NAME/SPLIT, folder:DIR, or a path, glob or brace pattern of tars, Parquet, CSV, TSV or JSONL"
    parser.add_argument(
        "--source",
        type=arguments.data_source,
        help=f"{places}; also as the first argument, without --source=",
        missing=f" is missing: {places}",
    )
    for name in ("image_field", "caption_field"):
        about = f"column of Parquet and tables, as data.{name}"
        parser.add_argument(f"--{name}", metavar="NAME", help=about)
    parser.add_argument(
        "--image_root", metavar="DIR", type=arguments.data_source, help="folder of the images that tables name"
    )


def _add_filter_options(parser: arguments.Parser) -> None:
    parser.add_argument(
        "--filters",
        metavar="CONDITIONS",
        help="look at the samples that meet these alone, as data.filters: 'width>=200,language==en'",
    )
    for name, about in (("keep_keys", "in this list"), ("drop_keys", "not in this list")):
        parser.add_argument(
            f"--{name}", metavar="FILE", type=arguments.path, help=f"look at the samples {about}, as data.{name}"
        )


def _filtered(options: Namespace, source: Source) -> Source:
    """Return the samples of a source that the options keep; tell how many those are.

    Raises:
        ValueError: a condition is none, nothing is kept, or the source has no metadata.
    """
    data = read_source_options(options)
    data.filters = () if options.filters is None else tuple(options.filters.split(","))
    data.keep_keys, data.drop_keys = (
        None if each is None else str(each) for each in (options.keep_keys, options.drop_keys)
    )
    if errors := condition_errors(data.filters, "--filters"):
        raise ValueError("\n".join(errors))
    line = data_index.ShardProgress()
    try:
        found = filter_source(source, data, options.source, progress=line.update)
    finally:
        line.close()
    if isinstance(found, FilteredSource):
        print(f"filters: {found.counts()}", flush=True)
    return found


def read_source_options(options: Namespace) -> DataConfig:
    """Return the config of the source that the options name.

    Raises:
        ValueError: an option would be ignored.
    """
    data = DataConfig(
        train=options.source,
        tfds_dir=_directory(options),
        image_field=options.image_field,
        caption_field=options.caption_field,
        image_root=None if options.image_root is None else str(options.image_root),
        cache_dir=None if options.cache_dir is None else str(options.cache_dir),
    )
    if options.cache_gib is not None:
        data.cache_gib = options.cache_gib
    against = getattr(options, "against", None)  # of dedup; that of verify is a manifest
    sources = [options.source, *(against if isinstance(against, list) else [])]
    if errors := [*unused_columns(data, [options.source], "--"), *data.cache_errors(sources, "--")]:
        raise ValueError("\n".join(errors))
    return data


def _spec(options: Namespace) -> SourceSpec:
    """Return the source for worker processes. Raise `ValueError` if an option would be ignored."""
    data = read_source_options(options)
    return SourceSpec(
        source=data.train,
        tfds_dir=data.tfds_dir,
        cache_dir=data.cache_dir,
        cache_gib=data.cache_gib,
        image_field=data.image_field,
        caption_field=data.caption_field,
        image_root=data.image_root,
    )


def _directory(options: Namespace) -> str | None:
    return None if options.tfds_dir is None else str(options.tfds_dir)


def _scenes(options: Namespace) -> int:
    from clipjax.data.scenes.builder import build_scenes

    builder = build_scenes(_directory(options), options.config)  # pyright: ignore[reportArgumentType]
    sizes = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
    print(printable(f"scenes lies in {builder.data_dir}: {sizes}"))
    return 0


def _open(options: Namespace) -> Source:
    return build_source(options.source, data=read_source_options(options))


def _captions(source: Source) -> Iterator[str]:
    for index in range(len(source)):
        try:
            yield from source[index].captions
        except BadSample:
            continue  # training counts it; a tokenizer can do without


def _tokenizer(options: Namespace) -> int:
    from clipjax.data.tokenizers.training import train_sentencepiece

    output: pathlib.Path | str = options.output
    require_writable(output, "--output", makes_folder=True)
    model = train_sentencepiece(_captions(_open(options)), options.vocab_size)
    write(output, model)
    print(printable(f"sentencepiece:{output} has {options.vocab_size} ids"))
    return 0


def _show(options: Namespace) -> int:
    from clipjax.data.contact_sheet import draw_sheet
    from clipjax.data.survey import survey

    sheet: pathlib.Path | str | None = options.sheet
    if sheet is not None:
        if not str(sheet).lower().endswith(".png"):
            raise ValueError(f"--sheet={sheet} must end in .png: it is drawn as one")
        require_writable(sheet, "--sheet")
    source, decoder = _open(options), make_decoder(read_source_options(options))
    print(f"{printable(options.source)}: {len(source)} samples", flush=True)
    source = _filtered(options, source)
    found = survey(source, decoder)
    print("\n".join(found.describe()), flush=True)
    for index in range(min(options.num, len(source))):
        try:
            sample = source[index]
            captions = " | ".join(map(printable, sample.captions))
            label = sample.label if sample.labels is None else list(sample.labels)
            print(f"{printable(source.location(index))}: label {label}; {captions}")
        except BadSample as error:
            print(f"{printable(source.location(index))}: unusable, {error.reason}")
    if sheet is not None:
        unusable = sum(found.reasons().values())
        about = f"{len(source):,} samples; {unusable:,} of {len(found.looks):,} that were looked at are unusable"
        write(sheet, draw_sheet(source, decoder, title=options.source, subtitle=about))
        print(f"contact sheet: {printable(str(sheet))}")
    return 0


def _verify(options: Namespace) -> int:
    write_to, against = options.write, options.against
    if (write_to is None) == (against is None):
        raise ValueError("give one of --write=FILE, to make a manifest, and --against=FILE, to compare with one")
    if write_to is not None:
        require_writable(write_to, "--write")
    recorded = [] if against is None else _read_manifest(against)
    found = digest_files(_open(options).files())
    if write_to is not None:
        write(write_to, json.dumps({"files": found}, indent=2) + "\n", sync=True)
        print(f"{printable(str(write_to))}: digests of {len(found)} files, {sum(file.size for file in found)} bytes")
        return 0
    differing = [(word, file.shown) for word, files in find_differences(recorded, found).items() for file in files]
    for word, name in differing:
        print(f"{word}: {printable(name)}")
    counts = f"{len(found)} files, {len(differing) or 'none'} differing"
    print(printable(f"{options.source}: {counts} from {against}"))
    return UNUSABLE_DATA if differing else 0


def _read_manifest(path: pathlib.Path) -> list[ShardDigest]:
    try:
        found = from_record(json.loads(read_small(path, _MAX_MANIFEST_BYTES))["files"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"--against={path} is no manifest that {PROGRAM} verify --write has made: {error}") from error
    return found or []
