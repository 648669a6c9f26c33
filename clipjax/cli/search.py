"""Search in embeddings: `clipjax search DIR "a query"`, or `clipjax search DIR --image=FILE`."""

import pathlib
import sys
from argparse import Namespace
from collections.abc import Sequence

import numpy as np

from clipjax.cli import arguments
from clipjax.cli.errors import UNUSABLE_DATA, refusals
from clipjax.cli.opened_model import (
    OpenedModel,
    add_checkpoint_option,
    add_output_option,
    describe,
    digest_of,
    embed_files,
    open_model,
    require_output,
    tell_unusable,
    working,
    write_output,
)
from clipjax.cli.output import show
from clipjax.data.image_lists import find_images
from clipjax.evals.embedding_folder import KINDS, EmbeddingFolder
from clipjax.evals.search import nearest
from clipjax.runtime.terminal import format_table

PROGRAM = "clipjax search"
ABOUT = """Search in a folder that clipjax embed has written, by a text or by a picture.

Every embedding is compared with the query, in blocks, so the result is exact. The query is embedded by the checkpoint
that the folder names; another one is refused, since its embeddings mean something else."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(_parser().format_help())
        return 0
    with refusals(PROGRAM):
        words, rest = arguments.split_words(argv)
        options = _parser().read(rest).options
        folder, query = _read_words(words, options.image)
        kind = _choose_kind(folder, options.among)
        image = None if options.image is None else _find_image(options.image)
        opened = _open_checkpoint(folder, options, reads_texts=query is not None)
        require_output(options.output)
    with working(PROGRAM):
        embedding = _embed(opened, query, image)
        if embedding is None:
            return UNUSABLE_DATA
        scores, places = nearest(embedding, folder.blocks(kind), options.top)
        found = [
            {"rank": rank, "similarity": float(score), **row}
            for rank, (score, row) in enumerate(zip(scores[0], folder.rows(kind, places[0].tolist()), strict=True), 1)
        ]
        rows = [[str(each["rank"]), f"{each['similarity']:.4f}", each["id"], each["caption"]] for each in found]
        print(format_table(rows, ("rank", "similarity", "id", "caption")))
        print(f"the best {len(found):,} of {folder.count(kind):,} {kind}", flush=True)
        asked = {"query": query} if image is None else {"image": image}
        write_output(options.output, {**describe(opened.saved), **asked, "among": kind, "found": found})
    return 0


def _parser() -> arguments.Parser:
    parser = arguments.Parser(PROGRAM, ABOUT)
    parser.usage = f'{PROGRAM} DIR "a query" [options], or {PROGRAM} DIR --image=FILE [options]'
    parser.add_argument("--image", metavar="FILE", type=arguments.data_source, help="a picture instead of a query")
    parser.add_argument(
        "--among",
        type=arguments.choice(KINDS),
        help=f"{' or '.join(KINDS)} of the folder; its images if it has any, else its texts",
    )
    parser.add_argument(
        "--top", metavar="N", type=arguments.whole_number(1), default=10, help="how many to show; 10 if left out"
    )
    add_checkpoint_option(parser, missing=None)
    add_output_option(parser)
    return parser


def _read_words(words: Sequence[str], image: str | None) -> tuple[EmbeddingFolder, str | None]:
    """Return the folder and the query of a command line; no query where a picture is given.

    Raises:
        ValueError: one is missing or blank, there are more, or the folder is none of embeddings.
    """
    if not words:
        raise ValueError("DIR is missing: name a folder that clipjax embed has written")
    folder, *queries = words
    if image is not None and queries:
        raise ValueError(f"the query {queries[0]!r} and --image={image}: give one of them")
    if image is None and not queries:
        raise ValueError("a query is missing: give a text behind the folder, or --image=FILE")
    if len(queries) > 1:
        raise ValueError(f"{len(queries)} queries are given; put the words of one into quotes: {' '.join(queries)!r}")
    if queries and not queries[0].strip():
        raise ValueError(f"the query {queries[0]!r} is blank; give it words")
    return EmbeddingFolder(arguments.path(folder)), queries[0] if queries else None


def _choose_kind(folder: EmbeddingFolder, wanted: str | None) -> str:
    """Return the kind of embeddings to search among.

    Raises:
        ValueError: the folder has none of this kind.
    """
    kind = wanted or folder.kinds[0]
    if kind not in folder.kinds:
        raise ValueError(
            f"--among={kind}: the folder has {' and '.join(folder.kinds)} only; clipjax embed --what={kind} makes them"
        )
    if not folder.count(kind):
        raise ValueError(f"the folder has no {kind}: no sample of its source could be used")
    return kind


def _find_image(name: str) -> str:
    """Return the file of the picture to search by.

    Raises:
        ValueError: it is not there, or there are several.
    """
    files = find_images([name], "--image")
    if len(files) != 1:
        raise ValueError(f"--image={name} stands for {len(files)} pictures; name one")
    return files[0]


def _open_checkpoint(folder: EmbeddingFolder, options: Namespace, *, reads_texts: bool) -> OpenedModel:
    """Open the checkpoint that made the embeddings.

    Raises:
        ValueError: it is not there, or is another one.
    """
    made_by = folder.about["checkpoint"]
    if options.checkpoint is None and "://" not in made_by and not pathlib.Path(made_by).is_dir():
        raise ValueError(
            f"the embeddings are those of the checkpoint {made_by}, which is not there; give its place: "
            "--checkpoint=WORKDIR_OR_STEP"
        )
    opened = open_model(options.checkpoint or made_by, reads_texts=reads_texts)
    if digest_of(opened.saved) != folder.about["checkpoint_digest"]:
        named = f"--checkpoint={options.checkpoint}" if options.checkpoint else f"the checkpoint {made_by}"
        raise ValueError(
            f"{named} (step {opened.saved.step}) is not the one that made the embeddings ({made_by}, step "
            f"{folder.about['step']}), so they mean something else to it; give that one, or embed again"
        )
    return opened


def _embed(opened: OpenedModel, query: str | None, image: str | None) -> np.ndarray | None:
    """Return the embedding of the query or the picture, float32 [1, e]; None if the picture cannot be used."""
    encoder = opened.encoder()
    if image is None:
        return encoder.embed_texts([query or ""])
    found = embed_files(opened, encoder, [image])
    return None if tell_unusable(PROGRAM, found.unusable, opened.config) else found.rows
