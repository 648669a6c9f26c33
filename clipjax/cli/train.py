"""Train a model: `clipjax train --config=FILE[:ARG] --workdir=DIR [--config.FIELD=VALUE ...]`.

Everything that can be refused is refused in the first `with`, by all processes together; the second one is the run.
Running the same command again goes on from the newest checkpoint.
"""

import contextlib
import pathlib
import sys
import traceback
from collections.abc import Sequence

from clipjax.checkpoints import saving
from clipjax.cli import arguments
from clipjax.cli.errors import SIGNAL, refusals, stops
from clipjax.cli.output import show
from clipjax.cli.overrides import describe_fields
from clipjax.config import Config
from clipjax.runtime import process_log, processes
from clipjax.runtime.terminal import printable
from clipjax.training import loop, preflight, replay

PROGRAM = "clipjax train"
ABOUT = """Train a model, or go on with the run that the workdir holds.

SIGTERM and Ctrl-C save a checkpoint and leave (exit code 128 + signal); the same command then goes on from there.
While a run starts there is nothing to save: all of its processes that have met leave, with the same code.
A second signal changes nothing, a third within 5 seconds leaves at once. SIGUSR1 writes stacks and a profile.
Exit code 2: arguments, config or files are refused; 3: a person has to look at the data, the checkpoints, the
updates, the storage or a device; 1: a defect, a stuck run, or the death of another process.
The workdir gets metrics.jsonl, events.jsonl, tensorboard/, checkpoints/, run.json, logs/ and, at the end,
results.json.
Several processes find each other by themselves under Slurm, Open MPI and on TPU pods, else by three options below."""
FIELDS = "--config.FIELD=VALUE sets a field of the config. Fields with their defaults (the config file sets its own):\n"


def console(argv: Sequence[str]) -> int:
    """Run the command as the work of this process, which storage that never answers a save does not keep.

    Such a save was given up, but some of its threads would be waited for at an ordinary exit.
    """
    try:
        code = main(argv)
    except SystemExit as stop:
        if not saving.is_unfinished():
            raise
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:
        if not saving.is_unfinished():
            raise
        traceback.print_exc()
        code = 1
    if saving.is_unfinished():
        processes.leave(code)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(_parser().format_help())
        return 0
    with processes.abort_on_error(), process_log.session(), contextlib.ExitStack() as stack:
        with refusals(PROGRAM):
            processes.start(arguments.launch_options(argv))
            replays = any(word.partition("=")[0] == "--replay" for word in argv)
            checked = preflight.check(lambda: _parse(argv), replays=replays)
            if checked.mirror is not None:
                stack.callback(checked.mirror.close)  # sends the last lines, too
            options = _parser().read(argv).options
        if processes.is_first():
            print(processes.describe_devices(), flush=True)
        with stops(PROGRAM):
            if options.replay is None:
                number = loop.train(checked)
            else:
                number = _replay(checked, options.replay, options.rollback)
    return 0 if number is None else SIGNAL + number


def _replay(checked: preflight.Checked, step: int, rollback: int | None) -> int | None:
    """Compute a step again, and show what is found; return the number of the signal that has stopped it."""

    def show_line(line: str) -> None:
        if processes.is_first():
            print(printable(line), flush=True)

    with refusals(PROGRAM):
        return replay.replay(checked, step, rollback, show=show_line)


def _parser() -> arguments.Parser:
    parser = arguments.Parser(PROGRAM, ABOUT, config="file", more=FIELDS + "\n".join(describe_fields()))
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        type=arguments.place,
        help="where checkpoints, metrics.jsonl and results.json go, a folder or gs://, s3://, az://; a run found there "
        "goes on",
        missing="=DIR is missing: checkpoints and metrics need a place, for example runs/first",
    )
    parser.add_argument(
        "--replay",
        metavar="STEP",
        type=arguments.whole_number(1),
        help="train nothing: compute this step again, and tell what in it is not finite",
    )
    parser.add_argument(
        "--rollback",
        metavar="N",
        type=arguments.whole_number(1),
        help="with --replay: the step as it was before the run's N-th rollback",
    )
    arguments.add_launch_options(parser)
    return parser


def _parse(argv: Sequence[str]) -> tuple[Config, pathlib.Path | str]:
    """The config and the workdir."""
    parsed = _parser().read(argv)
    if parsed.options.rollback is not None and parsed.options.replay is None:
        raise ValueError(f"--rollback={parsed.options.rollback} needs --replay=STEP, the step to compute again")
    return parsed.config(), parsed.options.workdir
