"""Weights in and out: `clipjax convert` and `clipjax export`.

A converted model is a checkpoint like any other (`checkpoint.py`), at step 0 and without a training state. Reading
order: `convert` (peer's directory to checkpoint), `export` (checkpoint to peer's directory).
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence

from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.cli import arguments
from clipjax.cli.errors import refusals
from clipjax.config.validation import check_embeddings
from clipjax.convert import files, huggingface, open_clip_config
from clipjax.convert.exporter import TARGETS, export
from clipjax.convert.importer import SOURCES, read_peer, save

CONVERT = "clipjax convert"


EXPORT = "clipjax export"


CONVERT_OPTIONS = {
    "from": f"whose weights: {', '.join(SOURCES)}",
    "input": "a directory with *.safetensors or *.npz and the peer's config, or one such file",
    "output": "the directory to make; clipjax.load, eval and config.init_from open it",
    "model": "a preset (`clipjax presets`) where there is no config beside the weights",
    "tokenizer": "clip:PATH, siglip:PATH, ... where the input holds no tokenizer",
}


EXPORT_OPTIONS = {
    "to": f"whose format: {', '.join(TARGETS)}",
    "checkpoint": "a workdir or one step of it",
    "output": "the directory to make",
}


def main_convert(argv: Sequence[str] | None = None) -> int:
    """Run `clipjax convert`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        about = "Open a peer's weights as a clipjax checkpoint."
        print(arguments.options_help(CONVERT, about, CONVERT_OPTIONS))
        return 0
    with refusals(CONVERT):
        return _convert(arguments.parse_options(CONVERT, argv, options=CONVERT_OPTIONS))


def main_export(argv: Sequence[str] | None = None) -> int:
    """Run `clipjax export`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        about = "Write a checkpoint as a peer's own loader opens it."
        print(arguments.options_help(EXPORT, about, EXPORT_OPTIONS))
        return 0
    with refusals(EXPORT):
        return _export(arguments.parse_options(EXPORT, argv, options=EXPORT_OPTIONS))


def _needed(options: Mapping[str, str | None], name: str, known: Sequence[str] = ()) -> str:
    value = options[name]
    if not value:
        raise ValueError(f"--{name} is missing" + (f"; one of {', '.join(known)}" if known else ""))
    if known and value not in known:
        raise ValueError(f"--{name}={value} must be one of {', '.join(known)}")
    return value


def _convert(options: Mapping[str, str | None]) -> int:
    source, path = _needed(options, "from", SOURCES), pathlib.Path(_needed(options, "input"))
    output = pathlib.Path(_needed(options, "output"))
    files.check_new(output)
    peer = read_peer(source, path, model=options["model"], tokenizer=options["tokenizer"])
    save(peer, output)
    print(f"{source} {path} -> {output}: {peer.num_params / 1e6:.1f} million parameters, {peer.describe_tokenizer()}")
    return 0


def _export(options: Mapping[str, str | None]) -> int:
    target, output = _needed(options, "to", TARGETS), pathlib.Path(_needed(options, "output"))
    saved = SavedCheckpoint(_needed(options, "checkpoint"))
    files.check_new(output)
    match target:  # what the peer cannot compute is refused here
        case "huggingface":
            huggingface.check_known(saved.config.model)
        case "open_clip":
            open_clip_config.check_known(saved.config.model)
    check_embeddings(saved.config)
    export(saved, target, output)
    without = ", both towers; not the decoder" if target == "stablehlo" and saved.config.model.caption else ""
    print(f"{saved.path} ({saved.params_group}) -> {target} {output}{without}")
    return 0
