"""Tell which of some labels fit pictures: `clipjax classify IMAGE... --checkpoint=PATH --labels=A,B`."""

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
from clipjax.evals.labels import PLAIN, probabilities, read_labels, read_templates
from clipjax.evals.zero_shot import zero_shot_classifier
from clipjax.runtime.terminal import format_table

PROGRAM = "clipjax classify"
ABOUT = """Tell which of some labels fit pictures, with probabilities.

IMAGE is a file, a glob, a folder, or an address. The probabilities are the softmax over the labels, so they sum to
one. A model of the sigmoid loss (SigLIP) judges each label by itself: several may fit, or none. A picture that cannot
be used is named, and the exit code is 3; the others go on."""
SOFTMAX, SIGMOID = "softmax", "sigmoid"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(_parser().format_help())
        return 0
    with refusals(PROGRAM):
        words, rest = arguments.split_words(argv)
        options = _parser().read(rest).options
        files = find_files(words)
        labels = read_labels(options.labels)
        templates = read_templates(options.templates, options.labels)
        opened = open_model(options.checkpoint, reads_texts=True)
        _refuse_one_label(labels, opened)
        require_output(options.output)
    with working(PROGRAM):
        results = classify(opened, files, labels, templates)
        print(_table(results, options.top), flush=True)
        write_output(options.output, results)
        return tell_unusable(PROGRAM, results["unusable"], opened.config)


def _parser() -> arguments.Parser:
    parser = arguments.Parser(PROGRAM, ABOUT)
    parser.usage = f"{PROGRAM} IMAGE... --checkpoint=WORKDIR_OR_STEP --labels=A,B|FILE [options]"
    add_checkpoint_option(parser)
    parser.add_argument(
        "--labels",
        metavar="A,B|FILE",
        type=arguments.data_source,
        help="labels with commas between, a file of them (a JSON list, or a line each), or a name such as imagenet",
        missing="=A,B|FILE is missing: the labels to choose from",
    )
    parser.add_argument(
        "--templates",
        metavar="NAME|FILE",
        type=arguments.data_source,
        help="sentences with {} for the label: a file, a name such as imagenet, or one sentence; if left out, those of "
        f"--labels' own name, else {PLAIN}",
    )
    parser.add_argument(
        "--top",
        metavar="N",
        type=arguments.whole_number(1),
        default=3,
        help="labels of each picture in the table, the likeliest first; 3 if left out",
    )
    add_output_option(parser)
    return parser


def _refuse_one_label(labels: Sequence[str], opened: OpenedModel) -> None:
    """Refuse a choice among one.

    Raises:
        ValueError: there is one label, and the probabilities are a softmax.
    """
    if len(labels) == 1 and opened.config.model.init_logit_bias is None:
        raise ValueError(
            f"--labels={labels[0]}: a single label has probability 1 whatever the picture; give at least two, for "
            f"example --labels={labels[0]},something else"
        )


def classify(
    opened: OpenedModel, files: Sequence[str], labels: Sequence[str], templates: Sequence[str]
) -> dict[str, Any]:
    """Return the results as JSON: the probability of each label for each picture.

    Raises:
        NotFiniteEmbeddings: some embeddings are not finite.
        OSError: a disk or a store fails.
    """
    encoder = opened.encoder()
    found = embed_files(opened, encoder, files)
    label_embed = zero_shot_classifier(encoder.embed_texts, labels, templates)
    bias = encoder.params.get("logit_bias")
    bias = None if bias is None else float(bias)
    shares = probabilities(found.rows, label_embed, encoder.logit_scale, bias)
    images = [
        {
            "image": file,
            "label": labels[int(np.argmax(row))],
            "probabilities": dict(zip(labels, row.tolist(), strict=True)),
        }
        for file, row in zip(found.files, shares, strict=True)
    ]
    return {
        **describe(opened.saved),
        "probabilities": SOFTMAX if bias is None else SIGMOID,
        "logit_scale": encoder.logit_scale,
        "logit_bias": bias,
        "templates": list(templates),
        "images": images,
        "unusable": found.unusable,
    }


def _table(results: dict[str, Any], top: int) -> str:
    """Return the likeliest labels of each picture, best first, and what the numbers are."""
    rows = []
    for image in results["images"]:
        ranked = sorted(image["probabilities"].items(), key=lambda pair: -pair[1])[:top]
        rows += [
            [image["image"] if number == 0 else "", label, f"{share:.4f}"]
            for number, (label, share) in enumerate(ranked)
        ]
    about = (
        "probability: softmax over the labels, which sum to one"
        if results["probabilities"] == SOFTMAX
        else "probability: sigmoid of each label by itself; they do not sum to one"
    )
    return f"{format_table(rows, ('image', 'label', 'probability'))}\n{about}" if rows else "no picture can be used"
