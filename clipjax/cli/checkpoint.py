"""Look at checkpoints: `clipjax checkpoint verify WORKDIR_OR_STEP [--json]`.

Reads every byte and changes nothing; needs no accelerator, and for a path on a disk no JAX.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from clipjax.checkpoints.folder import GOOD, find_checkpoint, is_step, set_aside_in, steps_in
from clipjax.checkpoints.manifest import State, best_of, examine, list_files
from clipjax.cli import arguments
from clipjax.cli.errors import UNUSABLE_DATA, refusals
from clipjax.cli.output import show
from clipjax.runtime.terminal import format_table

PROGRAM = "clipjax checkpoint"
VERIFY = "verify"
ABOUT = """Compare every file of one or all checkpoints with the checksums of its save, and tell the state of each step.

Exit code 0: all complete checkpoints are as they were written; 3: one is not."""
_HELP = f"""Look at checkpoints.

  {PROGRAM} {VERIFY} WORKDIR_OR_STEP   compare every file with its checksum

`{PROGRAM} COMMAND --help` tells more."""

ASIDE = "set aside"
FINE = (State.VERIFIED, State.UNVERIFIED, ASIDE)


@dataclass(frozen=True)
class Row:
    """One step directory.

    Attributes:
        step: its name.
        state: in words.
        fault: the first file that is wrong and how; empty where none is.
        bytes: of all its files.
        good: training found the state to be good.
        best: the metric that chooses the best step and its value, if it was measured.
    """

    step: str
    state: str
    fault: str
    bytes: int
    good: bool
    best: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if arguments.wants_help(argv):
        show(_parser().format_help() if argv[0] == VERIFY else _HELP)
        return 0
    with refusals(PROGRAM):
        if argv[:1] != [VERIFY]:
            given = f"{argv[0]!r} is not a command" if argv else "a command is missing"
            raise ValueError(f"{given}; the one there is: {VERIFY}; see {PROGRAM} --help")
        options = _parser().read(argv[1:]).options
        rows = verify(options.path)
    if options.json:
        show(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(_table(rows))
    return UNUSABLE_DATA if any(row.state not in FINE for row in rows) else 0


def _parser() -> arguments.Parser:
    parser = arguments.Parser(f"{PROGRAM} {VERIFY}", ABOUT)
    parser.add_argument(
        "path",
        metavar="WORKDIR_OR_STEP",
        type=arguments.place,
        help="a workdir, its checkpoints folder, or the directory of one step; a path, or gs://, s3://, az://",
    )
    parser.add_argument("--json", nargs=0, default=False, help="print the table as JSON")
    return parser


def verify(path: pathlib.Path | str) -> list[Row]:
    """Examine the step that a path or an address names, or all of a workdir; those on a store are loaded for that.

    Raises:
        ValueError: there is none.
    """
    if isinstance(path, str):
        from clipjax.checkpoints.mirrored import load_all  # which needs JAX

        path = load_all(path)
    if is_step(path):
        return [_row(path, None)]
    folder, _ = find_checkpoint(path)
    rows = [_row(folder / str(step), step) for step in steps_in(folder)]
    return [*rows, *(_row(aside, None, aside=True) for aside in set_aside_in(folder))]


def _row(directory: pathlib.Path, step: int | None, *, aside: bool = False) -> Row:
    state, fault = ASIDE, ""
    if not aside:
        verdict = examine(directory, step=step)
        state, fault = verdict.state.value, verdict.fault
    best = best_of(directory)
    size = sum((directory / file).stat().st_size for file in list_files(directory))
    best_text = "" if best is None else f"{best[0]} {best[1]:.6g}"
    return Row(directory.name, state, fault, size, (directory / GOOD).exists(), best_text)


def _table(rows: Sequence[Row]) -> str:
    cells = [
        (
            row.step,
            f"{row.state}: {row.fault}" if row.fault else row.state,
            f"{row.bytes:,}",
            "yes" if row.good else "",
            row.best,
        )
        for row in rows
    ]
    return format_table(cells, ("step", "state", "bytes", "good", "best"))
