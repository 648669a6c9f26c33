"""Order pictures by a prompt: `clipjax rank "prompt" IMAGE... --checkpoint=PATH`."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipjax.cli import arguments
from clipjax.cli.errors import refusals
from clipjax.cli.opened_model import (
    OpenedModel,
    add_checkpoint_option,
    add_output_option,
    describe,
    embed_files,
    find_files,
    open_model,
    require_output,
    tell_unusable,
    working,
    write_output,
)
from clipjax.cli.output import show
from clipjax.runtime.terminal import format_table

PROGRAM = "clipjax rank"
ABOUT = """Order pictures, for instance generated ones, by their similarity to a prompt, the best first.

IMAGE is a file, a glob, a folder, or an address. The similarity is the cosine of both embeddings; among equals the
order of the arguments stays. A picture that cannot be used is named, and the exit code is 3; the others are ranked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(_parser().format_help())
        return 0
    with refusals(PROGRAM):
        words, rest = arguments.split_words(argv)
        options = _parser().read(rest).options
        prompt = _read_prompt(words)
        files = find_files(words[1:])
        opened = open_model(options.checkpoint, reads_texts=True)
        require_output(options.output)
    with working(PROGRAM):
        results = rank(opened, prompt, files)
        rows = [[str(each["rank"]), f"{each['similarity']:.4f}", each["image"]] for each in results["images"]]
        print(format_table(rows, ("rank", "similarity", "image")) if rows else "no picture can be used", flush=True)
        write_output(options.output, results)
        return tell_unusable(PROGRAM, results["unusable"], opened.config)


def _parser() -> arguments.Parser:
    parser = arguments.Parser(PROGRAM, ABOUT)
    parser.usage = f'{PROGRAM} "prompt" IMAGE... --checkpoint=WORKDIR_OR_STEP [options]'
    add_checkpoint_option(parser)
    add_output_option(parser)
    return parser


def _read_prompt(words: Sequence[str]) -> str:
    """Return the prompt of a command line.

    Raises:
        ValueError: it is missing, blank, or a file.
    """
    if not words:
        raise ValueError('a prompt and IMAGE are missing: clipjax rank "a red circle" photos/')
    prompt = words[0]
    if not prompt.strip():
        raise ValueError(f"the prompt {prompt!r} is blank; give it words")
    if os.path.isfile(prompt):  # noqa: PTH113  which takes any text
        raise ValueError(f"the prompt {prompt!r} is a file; the prompt comes first, and the pictures behind it")
    return prompt


def rank(opened: OpenedModel, prompt: str, files: Sequence[str]) -> dict[str, Any]:
    """Return the results as JSON: the pictures in their order, with similarities.

    Raises:
        NotFiniteEmbeddings: some embeddings are not finite.
        OSError: a disk or a store fails.
    """
    encoder = opened.encoder()
    found = embed_files(opened, encoder, files)
    similarities = found.rows.astype(np.float64) @ encoder.embed_texts([prompt])[0].astype(np.float64)
    order = np.argsort(-similarities, kind="stable").tolist()
    images = [
        {"rank": number, "similarity": float(similarities[place]), "image": found.files[place]}
        for number, place in enumerate(order, 1)
    ]
    return {**describe(opened.saved), "prompt": prompt, "images": images, "unusable": found.unusable}
