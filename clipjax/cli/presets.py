"""The known models: `clipjax presets`. Their numbers come from arithmetic on their configs, so JAX is not imported."""

import sys
from collections.abc import Sequence

from clipjax.cli import arguments
from clipjax.cli.errors import refusals
from clipjax.cli.output import show
from clipjax.config.presets import MODELS, Preset
from clipjax.runtime.terminal import format_table

PROGRAM = "clipjax presets"
HEADER = ("model", "million params", "GFLOP/image", "GFLOP/text", "GFLOP/caption", "pixels", "context", "source")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = arguments.Parser(PROGRAM, "List the known models.")
    if arguments.wants_help(argv):
        show(parser.format_help())
        return 0
    with refusals(PROGRAM):
        parser.read(argv)
    rows = [_row(name, preset) for name, preset in MODELS.items()]
    show(format_table(rows, HEADER))
    return 0


def _row(name: str, preset: Preset) -> list[str]:
    model, caption = preset.config, preset.config.caption_flops()
    return [
        name,
        f"{model.num_params() / 1e6:.1f}",
        f"{model.image.flops(model.embed_dim) / 1e9:.2f}",
        f"{model.text.flops(model.embed_dim) / 1e9:.2f}",
        f"{caption / 1e9:.2f}" if caption else "-",
        str(model.image.image_size),
        str(model.text.context_length),
        preset.source,
    ]
