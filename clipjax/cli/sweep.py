"""`clipjax sweep`: trains the trials of a search, each in a process and folder of its own, and ranks them.

    clipjax sweep --config=FILE[:ARG] --sweep=FILE --workdir=DIR [--jobs=N] [--config.FIELD=VALUE ...]
    clipjax sweep ... --launcher=slurm [--sbatch_options='--time=60 --gpus=1'] [--wait] [--dry-run]

Reading order: `main`, `plan_trials` (what there is to do); `local.py` does it, `leaderboard.py` ranks. A trial is
finished when its `results.json` exists and its `trial.json` says "done"; running the same command again runs the
others only, and each goes on from its own checkpoint. Trials of one machine share its devices: with accelerators, give
`--jobs` more than 1 only where the devices are split among the processes by other means. With `--launcher=slurm` the
trials are an array job (`slurm.py`) whose index N runs this command with `--trial=N`, which trains that one alone.
A trial of several processes: `--train_command='launch/local.sh 4'`, `--train_command='srun clipjax train'`.
With a folder on an object store the trials are workdirs there, and any machine goes on with the sweep.
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence

from clipjax.cli import arguments
from clipjax.cli.errors import SIGNAL, UNUSABLE_DATA, print_error, refusals
from clipjax.cli.output import show
from clipjax.config.paths import expand, is_path_field, schemes_of
from clipjax.runtime.launchers import find_launch
from clipjax.runtime.storage import is_address
from clipjax.runtime.terminal import printable
from clipjax.sweeps import Sweep
from clipjax.sweeps.folder import Folder
from clipjax.sweeps.leaderboard import write_leaderboard
from clipjax.sweeps.local import run_trials
from clipjax.sweeps.plan import load_sweep, plan_trials, restore, restore_trials
from clipjax.sweeps.slurm import array_command, in_queue, require_slurm, submit_array
from clipjax.sweeps.trial import Trial

PROGRAM = "clipjax sweep"
LAUNCHERS = ("local", "slurm")
TRAIN_COMMAND = (sys.executable, "-m", "clipjax", "train")


def main(argv: Sequence[str] | None = None, *, command: Sequence[str] = TRAIN_COMMAND) -> int:
    """Run a sweep.

    Args:
        argv: Arguments without the program's name.
        command: What trains a trial unless `--train_command` says it; a trial's arguments are appended.

    Returns:
        The exit code: 0, 1 if a trial failed or lacks the metric, 2 for a user's error, 3 if the folder cannot be
        written to any more, 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(_parser().format_help())
        return 0
    lost: list[str] = []
    with contextlib.ExitStack() as stack:
        try:
            with refusals(PROGRAM):
                options, passed = _parse(argv)
                _refuse_several()
                sweep = load_sweep(options.sweep)
                home = Folder(options.workdir)
                trials = plan_trials(sweep, config=options.config, home=home, passed=passed)
                chosen = trials if options.trial is None else _choose(trials, options.trial)
                stack.enter_context(home.held(None if options.trial is None else chosen[0].folder, lost.append))
                restore_trials(trials, home, check=() if options.launcher == "slurm" else chosen)
                if not (options.dry_run or is_address(str(options.workdir))):
                    options.workdir.mkdir(parents=True, exist_ok=True)
        except KeyboardInterrupt:  # while it waits to see whether an owner is alive
            print("interrupted: no trial was started", file=sys.stderr)
            return SIGNAL + signal.SIGINT
        if options.launcher == "slurm":
            with refusals(PROGRAM):
                return _on_slurm(sweep, trials, options, passed)
        try:
            return _run_here(sweep, chosen, options, lost, command=command)
        except BrokenPipeError:  # of the standard output: nobody reads on
            raise
        except OSError as error:
            print_error(PROGRAM, OSError(lost[0]) if lost else error)
            return UNUSABLE_DATA


def _choose(trials: Sequence[Trial], index: int) -> Sequence[Trial]:
    if index >= len(trials):
        raise ValueError(f"--trial={index} must be from 0 to {len(trials) - 1}")
    return [trials[index]]


def _run_here(
    sweep: Sweep, trials: Sequence[Trial], options: argparse.Namespace, lost: Sequence[str], *, command: Sequence[str]
) -> int:
    """Train the trials that are not finished, and rank all; return the exit code.

    Raises:
        OSError: the folder of the sweep cannot be read or written, or, by `lost`, is not ours any more.
    """
    waiting = [trial for trial in trials if trial.status != "done"]
    direction = "larger" if sweep.maximize else "smaller"
    print(printable(f"{len(trials)} trials in {options.workdir}, {len(waiting)} to run, {options.jobs} at a time"))
    print(f"metric {sweep.metric}, {direction} is better", flush=True)
    command = shlex.split(options.train_command or "") or command
    interrupted = run_trials(waiting, metric=sweep.metric, jobs=options.jobs, command=command, lost=lost)
    if lost:
        raise OSError(lost[0])
    if options.trial is None:
        _rank(sweep, trials)
    if interrupted:
        print("interrupted: run the same command to go on", file=sys.stderr)
        return SIGNAL + signal.SIGINT
    return 0 if all(trial.status == "done" for trial in trials) and _all_measured(sweep, trials) else 1


def _rank(sweep: Sweep, trials: Sequence[Trial]) -> None:
    for trial in trials:
        if trial.status == "done":
            trial.read_results(sweep.metric)
    write_leaderboard(sweep, trials, trials[0].home)


def _all_measured(sweep: Sweep, trials: Sequence[Trial]) -> bool:
    for trial in trials:
        if trial.metric is None:
            trial.read_results(sweep.metric)
    return all(trial.metric is not None for trial in trials)


def _on_slurm(sweep: Sweep, trials: Sequence[Trial], options: argparse.Namespace, passed: Sequence[str]) -> int:
    """Gather what is finished, and submit the rest unless it is in the queue already."""
    waiting = [trial.index for trial in trials if trial.status != "done"]
    extra = shlex.split(options.sbatch_options)
    if options.dry_run:
        command = shlex.join(array_command(options.workdir, waiting, extra))
        print(printable(f"+ {command}") if waiting else "nothing to run")
        return 0
    require_slurm()
    job = in_queue(options.workdir)
    print(printable(f"{len(trials)} trials in {options.workdir}, {len(trials) - len(waiting)} finished"), flush=True)
    if job is None and waiting:
        named = ("config", "sweep", "workdir", *(("train_command",) if options.train_command else ()))
        own = [f"--{name}={getattr(options, name)}" for name in named]
        command = [sys.executable, "-m", "clipjax", "sweep", *own, *passed]
        job = submit_array(options.workdir, waiting, command=command, options=extra)
        if not options.wait:
            print(f"submitted {len(waiting)} trials as job {job}; the same command gathers the leaderboard")
            return 0
    while job is not None and options.wait:
        time.sleep(1)
        job = in_queue(options.workdir)
    for trial in trials:
        restore(trial, check_lock=False)
    _rank(sweep, trials)
    if job is not None:
        print(f"job {job} goes on; run the same command again to gather the rest")
        return 0
    return 0 if all(trial.metric is not None for trial in trials) else 1


def _refuse_several() -> None:
    """One process runs a sweep: several would train the same trials into the same folders."""
    if (launch := find_launch()) is not None:
        raise ValueError(
            f"{launch.launcher} started this sweep as one of {launch.num_processes or 'several'} processes, each of "
            "which would run all trials; start clipjax sweep once (srun --ntasks=1, or no launcher). Where a trial "
            "needs several processes, say so: --train_command='launch/local.sh 4', or 'srun clipjax train'"
        )


def _parser() -> arguments.Parser:
    parser = arguments.Parser(
        PROGRAM,
        "Train the trials of a search and rank them.",
        config="file",
        more="--config.FIELD=VALUE sets a field of the config in all trials.",
    )
    add = parser.add_argument
    path, whole_number = arguments.path, arguments.whole_number
    add(
        "--sweep",
        type=path,
        metavar="FILE",
        help="defines get_sweep()",
        missing="=FILE is missing: it defines get_sweep()",
    )
    add(
        "--workdir",
        type=arguments.place,
        metavar="DIR",
        help="one folder per trial in it, a folder or gs://, s3://, az://; a sweep found there goes on",
        missing="=DIR is missing: a folder for all trials",
    )
    add(
        "--train_command",
        type=_command,
        metavar="COMMAND",
        help="what trains a trial, its arguments after it: 'launch/local.sh 4', 'srun clipjax train' (clipjax train)",
    )
    add("--jobs", type=whole_number(1), default=1, metavar="N", help="trials at a time (default 1)")
    add(
        "--launcher",
        type=arguments.choice(LAUNCHERS),
        default="local",
        metavar="NAME",
        help="where trials run: local, slurm (local)",
    )
    add("--sbatch_options", default="", metavar="OPTIONS", help="slurm: passed to sbatch, like '--time=60 --gpus=1'")
    add("--wait", nargs=0, default=False, help="slurm: stay until the trials are over, then rank them")
    add("--dry-run", nargs=0, default=False, help="slurm: print the sbatch command and submit nothing")
    add("--trial", type=whole_number(0), metavar="N", help="train this trial alone, no ranking")
    return parser


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and the `--config.FIELD=VALUE` of every trial."""
    parsed = _parser().read(argv)
    options = parsed.options
    if options.launcher == "local" and (options.sbatch_options or options.wait or options.dry_run):
        raise ValueError("--sbatch_options, --wait and --dry-run need --launcher=slurm")
    if options.launcher == "slurm" and is_address(str(options.workdir)):
        raise ValueError(
            f"--workdir={options.workdir}: --launcher=slurm needs a folder on a disk, for the array's script and its "
            "logs; give one that all nodes see, or --launcher=local"
        )
    if options.launcher == "slurm" and (options.trial is not None or options.jobs != 1):
        raise ValueError("--trial and --jobs need --launcher=local; Slurm decides how many trials run at a time")
    for one in parsed.overrides:
        if is_path_field(one.path):
            expand(one.text, f"--config.{one.path}", schemes=schemes_of(one.path))
    return options, [str(one) for one in parsed.overrides]


def _command(text: str) -> str:
    """A command that exists, `~` in its first word expanded."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"={text}: {error}; write it as for a shell") from error
    if words:
        words[0] = arguments.source(words[0])
    if not words or shutil.which(words[0]) is None:
        raise argparse.ArgumentTypeError(f"={text}: there is no command {words[0] if words else ''!r} to run")
    return shlex.join(words)
