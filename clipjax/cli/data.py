"""Prepare data: `clipjax data scenes | tokenizer | show`.

`scenes` makes the embedded dataset, `tokenizer` trains a SentencePiece model on a source's captions, `show` looks into
a source.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence

from clipjax.config import DataConfig
from clipjax.data.sample import BadSample, Source
from clipjax.data.sources import build_source

PROGRAM = "clipjax data"


def main(argv: Sequence[str] | None = None) -> int:
    """The front door; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        match arguments.command:
            case "scenes":
                return _scenes(arguments)
            case "tokenizer":
                return _tokenizer(arguments)
            case _:
                return _show(arguments)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Prepare and inspect data.")
    commands = parser.add_subparsers(dest="command", required=True)
    scenes = commands.add_parser("scenes", help="make the embedded dataset of captioned pictures (tfds:scenes)")
    scenes.add_argument("--tfds_dir", help="where to put it; TFDS's own default if left out")
    scenes.add_argument("--config", default="default", help="default, tiny for trials, or large for batches of 32,768")
    tokenizer = commands.add_parser("tokenizer", help="train a SentencePiece tokenizer on a source's captions")
    tokenizer.add_argument("--source", required=True, help="tfds:NAME/SPLIT, or a path, glob or brace pattern of tars")
    tokenizer.add_argument("--vocab_size", type=int, required=True, help="all ids, start and end included")
    tokenizer.add_argument("--output", required=True, help="the .model file to write")
    show = commands.add_parser("show", help="look into a source: how many samples, and the first few")
    show.add_argument("--source", required=True, help="tfds:NAME/SPLIT, or a path, glob or brace pattern of tars")
    show.add_argument("--num", type=int, default=5, help="how many samples to print")
    for command in (tokenizer, show):
        command.add_argument("--tfds_dir", help="where prepared TFDS data lies")
    return parser


def _scenes(arguments: argparse.Namespace) -> int:
    from clipjax.data.scenes.builder import build_scenes

    builder = build_scenes(arguments.tfds_dir, arguments.config)
    sizes = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
    print(f"scenes lies in {builder.data_dir}: {sizes}")
    return 0


def _open(arguments: argparse.Namespace) -> Source:
    return build_source(arguments.source, data=DataConfig(tfds_dir=arguments.tfds_dir))


def _captions(source: Source) -> Iterator[str]:
    for index in range(len(source)):
        try:
            yield from source[index].captions
        except BadSample:
            continue  # training counts it; a tokenizer can do without


def _tokenizer(arguments: argparse.Namespace) -> int:
    from clipjax.data.tokenizers.training import train_sentencepiece

    output = pathlib.Path(arguments.output)
    model = train_sentencepiece(_captions(_open(arguments)), arguments.vocab_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_bytes(model)
    temporary.replace(output)
    print(f"sentencepiece:{output} has {arguments.vocab_size} ids")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    source = _open(arguments)
    print(f"{arguments.source}: {len(source)} samples")
    for index in range(min(arguments.num, len(source))):
        try:
            sample = source[index]
            print(f"{source.location(index)}: label {sample.label}; " + " | ".join(sample.captions))
        except BadSample as error:
            print(f"{source.location(index)}: unusable, {error.reason}")
    return 0
