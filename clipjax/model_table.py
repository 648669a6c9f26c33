"""The known models: `clipjax presets`."""

import math
import sys
from collections.abc import Sequence

import jax

from clipjax import flags, presets
from clipjax.flops import caption_flops, tower_flops
from clipjax.metrics import format_table
from clipjax.models.clip import abstract_params

PROGRAM = "clipjax presets"


def count_params(name: str) -> int:
    """Parameters of a preset; running statistics are none."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(presets.model(name))))


def main(argv: Sequence[str] | None = None) -> int:
    """The front door; returns the exit code."""
    return flags.options_door(PROGRAM, "List the known models.", {}, lambda _: _print, argv)


def _print() -> int:
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
    print(format_table(rows, header))
    return 0


if __name__ == "__main__":
    sys.exit(main())
