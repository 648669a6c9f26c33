"""The known models: `clipjax presets`."""

import math
import sys
from collections.abc import Sequence

import jax

from clipjax.cli import arguments
from clipjax.cli.errors import refusals
from clipjax.cli.output import show
from clipjax.config import presets
from clipjax.models.clip import abstract_params
from clipjax.models.flops import caption_flops, tower_flops
from clipjax.runtime.terminal import format_table

PROGRAM = "clipjax presets"


def count_params(name: str) -> int:
    """Parameters of a preset; running statistics are none."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(presets.model(name))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = arguments.Parser(PROGRAM, "List the known models.")
    if arguments.wants_help(argv):
        show(parser.format_help())
        return 0
    with refusals(PROGRAM):
        parser.read(argv)
    show(_table())
    return 0


def _table() -> str:
    rows = []
    for name, preset in presets.MODELS.items():
        of_image, of_text = tower_flops(preset.config)
        of_caption = caption_flops(preset.config)
        rows.append(
            [
                name,
                f"{count_params(name) / 1e6:.1f}",
                f"{of_image / 1e9:.2f}",
                f"{of_text / 1e9:.2f}",
                f"{of_caption / 1e9:.2f}" if of_caption else "-",
                str(preset.config.image.image_size),
                str(preset.config.text.context_length),
                preset.source,
            ]
        )
    header = ("model", "million params", "GFLOP/image", "GFLOP/text", "GFLOP/caption", "pixels", "context", "source")
    return format_table(rows, header)
