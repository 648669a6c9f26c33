"""Train a model: `clipjax train --config=FILE[:ARG] --workdir=DIR [--config.FIELD=VALUE ...]`.

Read `prepare` (all that can be refused before training), `train` (a line per noun), `train`. Running the same command
again goes on from the newest checkpoint.
"""

import pathlib
import sys
from collections.abc import Sequence

from clipjax.cli import arguments
from clipjax.cli.errors import refusals, stops
from clipjax.config import Config
from clipjax.runtime import launchers, process_log, processes
from clipjax.training import loop, preflight, run

PROGRAM = "clipjax train"


OPTIONS = {
    "workdir": "where checkpoints, metrics.jsonl and results.json go; a run found there goes on",
    **launchers.OPTIONS,
}


HELP = f"""Train a model, or go on with the run that the workdir holds.

  {PROGRAM} --config=FILE[:ARG] --workdir=DIR [--config.FIELD=VALUE ...]
      [--coordinator=HOST:PORT --num_processes=N --process_id=I]

SIGTERM and Ctrl-C save a checkpoint and leave (exit code 128 + signal); the same command then goes on from there.
Exit code 2: arguments, config or files are refused; 3: a checkpoint or too much of the data is unusable; 1: a defect.
The workdir gets metrics.jsonl, tensorboard/, checkpoints/, run.json, logs/ and, at the end, results.json.
Several processes find each other by themselves under Slurm, Open MPI and on TPU pods, else by the last three options.

Fields of the config with their defaults (the config file sets its own):
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The front door; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        print(HELP + "\n".join(arguments.describe_fields()))
        return 0
    with processes.abort_on_error(), process_log.session():
        with refusals(PROGRAM):
            processes.start(arguments.option_values(argv, launchers.OPTIONS))
            checked = preflight.check(lambda: _parse(argv))
        with stops(PROGRAM), run.build(checked) as parts:
            return loop.train(parts)


def _parse(argv: Sequence[str]) -> tuple[Config, pathlib.Path]:
    """The config and the workdir."""
    parsed = arguments.parse(PROGRAM, argv, options=OPTIONS)
    if not parsed.options["workdir"]:
        raise ValueError("--workdir=DIR is missing: checkpoints and metrics need a place, for example runs/first")
    return parsed.config, pathlib.Path(parsed.options["workdir"])
