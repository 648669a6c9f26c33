"""Weights in and out: `clipjax convert` and `clipjax export`.

A converted model is a checkpoint like any other (`checkpoint.py`), at step 0 and without a training state.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.cli import arguments
from clipjax.cli.errors import refusals
from clipjax.cli.output import show
from clipjax.config.validation import check_embeddings
from clipjax.convert import files, huggingface, open_clip_config
from clipjax.convert.exporter import TARGETS, export
from clipjax.convert.importer import SOURCES, read_peer, save
from clipjax.runtime import processes
from clipjax.runtime.terminal import printable

CONVERT = "clipjax convert"
EXPORT = "clipjax export"


def main_convert(argv: Sequence[str] | None = None) -> int:
    """Run `clipjax convert`; return the exit code."""
    return _main(_convert_parser(), _convert, argv)


def main_export(argv: Sequence[str] | None = None) -> int:
    """Run `clipjax export`; return the exit code."""
    return _main(_export_parser(), _export, argv)


def _main(parser: arguments.Parser, command: Callable[[Namespace], int], argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(parser.format_help())
        return 0
    with refusals(parser.prog):
        options = parser.read(argv).options
        processes.open_devices()
        return command(options)


def _convert_parser() -> arguments.Parser:
    parser = arguments.Parser(CONVERT, "Open a peer's weights as a clipjax checkpoint.")
    _add_choice(parser, "from", SOURCES, "whose weights")
    _add_place(parser, "input", "a directory with *.safetensors or *.npz and the peer's config, or one such file")
    _add_place(parser, "output", "the directory to make; clipjax.load, eval and config.init_from open it")
    parser.add_argument(
        "--model", metavar="NAME", help="a preset (`clipjax presets`) where there is no config beside the weights"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="KIND:PATH",
        type=arguments.data_source,
        help="clip:PATH, siglip:PATH, ... where the input holds no tokenizer",
    )
    return parser


def _export_parser() -> arguments.Parser:
    parser = arguments.Parser(EXPORT, "Write a checkpoint as a peer's own loader opens it.")
    _add_choice(parser, "to", TARGETS, "whose format")
    _add_place(parser, "checkpoint", "a workdir or one step of it")
    _add_place(parser, "output", "the directory to make")
    return parser


def _add_choice(parser: arguments.Parser, name: str, known: Sequence[str], text: str) -> None:
    parser.add_argument(
        f"--{name}",
        metavar="NAME",
        type=arguments.choice(known),
        help=f"{text}: {', '.join(known)}",
        missing=f" is missing; one of {', '.join(known)}",
    )


def _add_place(parser: arguments.Parser, name: str, text: str) -> None:
    text = f"{text}; a path, or gs://, s3://, az://"
    parser.add_argument(f"--{name}", metavar="PLACE", type=arguments.place, help=text, missing=f" is missing: {text}")


def _convert(options: Namespace) -> int:
    source, path, output = getattr(options, "from"), options.input, options.output
    files.check_new(output)
    with files.local_input(path) as local:
        peer = read_peer(source, local, model=options.model, tokenizer=options.tokenizer)
    save(peer, output)
    size = f"{peer.num_params / 1e6:.1f} million parameters"
    print(printable(f"{source} {path} -> {output}: {size}, {peer.describe_tokenizer()}"))
    return 0


def _export(options: Namespace) -> int:
    target, output = options.to, options.output
    saved = SavedCheckpoint(options.checkpoint)
    files.check_new(output)
    match target:  # what the peer cannot compute is refused here
        case "huggingface":
            huggingface.check_known(saved.config.model)
        case "open_clip":
            open_clip_config.check_known(saved.config.model)
    check_embeddings(saved.config)
    export(saved, target, output)
    without = ", both towers; not the decoder" if target == "stablehlo" and saved.config.model.caption else ""
    print(printable(f"{saved.place} ({saved.params_group}) -> {target} {output}{without}"))
    return 0
