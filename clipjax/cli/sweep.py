"""`clipjax sweep`: trains the trials of a search, each in a process and folder of its own, and ranks them.

    clipjax sweep --config=FILE[:ARG] --sweep=FILE --workdir=DIR [--jobs=N] [--config.FIELD=VALUE ...]
    clipjax sweep ... --launcher=slurm [--sbatch_options='--time=60 --gpus=1'] [--wait] [--dry-run]

Reading order: `main`, `plan_trials` (what there is to do); `trial_runner.py` does it, `trials.py` ranks. A trial is
finished when its `results.json` exists and its `trial.json` says "done"; running the same command again runs the
others only, and each goes on from its own checkpoint. Trials of one machine share its devices: with accelerators, give
`--jobs` more than 1 only where the devices are split among the processes by other means. With `--launcher=slurm` the
trials are an array job (`slurm.py`) whose index N runs this command with `--trial=N`, which trains that one alone.
A trial of several processes: `--train_command='launch/local.sh 4'`, `--train_command='srun clipjax train'`.
"""

import argparse
import pathlib
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from clipjax.config import Config
from clipjax.config.serialization import field_type
from clipjax.runtime.launchers import find_launch
from clipjax.sweeps import Sweep
from clipjax.sweeps.leaderboard import write_leaderboard
from clipjax.sweeps.local import run_trials
from clipjax.sweeps.plan import load_sweep, path_of, plan_trials, restore
from clipjax.sweeps.slurm import array_command, in_queue, require_slurm, submit_array
from clipjax.sweeps.trial import Trial

TRAIN_COMMAND = (sys.executable, "-m", "clipjax", "train")


def main(argv: list[str], *, command: Sequence[str] = TRAIN_COMMAND) -> int:
    """Runs a sweep.

    Args:
        argv: Arguments without the program's name.
        command: What trains a trial unless `--train_command` says it; a trial's arguments are appended.

    Returns:
        The exit code: 0, 1 if a trial failed or lacks the metric, 2 for a user's error, 130 if interrupted.
    """
    try:
        options, passed = _parse(argv)
        _refuse_several()
        sweep = load_sweep(options.sweep)
        only = options.trial if options.launcher == "local" else ()
        trials = plan_trials(sweep, config=options.config, workdir=options.workdir, passed=passed, check=only)
        if not options.dry_run:
            options.workdir.mkdir(parents=True, exist_ok=True)
        if options.launcher == "slurm":
            return _on_slurm(sweep, trials, options, passed)
    except (ValueError, OSError) as error:
        print(f"clipjax sweep: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.trial is not None:
        trials = [trials[options.trial[0]]]
    waiting = [trial for trial in trials if trial.status != "done"]
    direction = "larger" if sweep.maximize else "smaller"
    print(f"{len(trials)} trials in {options.workdir}, {len(waiting)} to run, {options.jobs} at a time")
    print(f"metric {sweep.metric}, {direction} is better", flush=True)
    interrupted = run_trials(
        waiting, metric=sweep.metric, jobs=options.jobs, command=shlex.split(options.train_command or "") or command
    )
    if options.trial is None:
        _rank(sweep, trials, options.workdir)
    if interrupted:
        print("interrupted: run the same command to go on", file=sys.stderr)
        return 130
    return 0 if all(trial.status == "done" for trial in trials) and _all_measured(sweep, trials) else 1


def _rank(sweep: Sweep, trials: Sequence[Trial], workdir: pathlib.Path) -> None:
    for trial in trials:
        if trial.status == "done":
            trial.read_results(sweep.metric)
    write_leaderboard(sweep, trials, workdir)


def _all_measured(sweep: Sweep, trials: Sequence[Trial]) -> bool:
    for trial in trials:
        if trial.metric is None:
            trial.read_results(sweep.metric)
    return all(trial.metric is not None for trial in trials)


def _on_slurm(sweep: Sweep, trials: Sequence[Trial], options: argparse.Namespace, passed: Sequence[str]) -> int:
    """Gathers what is finished, and submits the rest unless it is in the queue already."""
    waiting = [trial.index for trial in trials if trial.status != "done"]
    extra = shlex.split(options.sbatch_options)
    if options.dry_run:
        print(f"+ {shlex.join(array_command(options.workdir, waiting, extra))}" if waiting else "nothing to run")
        return 0
    require_slurm()
    job = in_queue(options.workdir)
    print(f"{len(trials)} trials in {options.workdir}, {len(trials) - len(waiting)} finished", flush=True)
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
    _rank(sweep, trials, options.workdir)
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see clipjax sweep --help")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own flags, and the `--config.FIELD=VALUE` of every trial."""
    parser = _Parser(
        prog="clipjax sweep", allow_abbrev=False, description="Train the trials of a search and rank them."
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the config that each trial starts from")
    parser.add_argument("--sweep", required=True, type=pathlib.Path, metavar="FILE", help="defines get_sweep()")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, metavar="DIR", help="one folder per trial in it")
    parser.add_argument(
        "--train_command",
        metavar="COMMAND",
        help="what trains a trial, its arguments after it: 'launch/local.sh 4', 'srun clipjax train' (clipjax train)",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time (default 1)")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help="where trials run")
    parser.add_argument(
        "--sbatch_options", default="", metavar="OPTIONS", help="slurm: passed to sbatch, like '--time=60 --gpus=1'"
    )
    parser.add_argument("--wait", action="store_true", help="slurm: stay until the trials are over, then rank them")
    parser.add_argument("--dry-run", action="store_true", help="slurm: print the sbatch command and submit nothing")
    parser.add_argument(
        "--trial", type=lambda text: (int(text),), metavar="N", help="train this trial alone, no ranking"
    )
    parser.epilog = "--config.FIELD=VALUE overrides a field of the config in all trials."
    options, passed = parser.parse_known_args(argv)
    if options.jobs < 1:
        raise ValueError(f"--jobs={options.jobs} must be at least 1")
    if options.launcher == "local" and (options.sbatch_options or options.wait or options.dry_run):
        raise ValueError("--sbatch_options, --wait and --dry-run need --launcher=slurm")
    if options.launcher == "slurm" and (options.trial is not None or options.jobs != 1):
        raise ValueError("--trial and --jobs need --launcher=local; SLURM decides how many trials run at a time")
    _check_command(options.train_command)
    for argument in passed:
        if not re.match(r"--config\.[^=]+=", argument):
            raise ValueError(f"unknown argument {argument}; fields of the config are set by --config.FIELD=VALUE")
        field_type(Config, path_of(argument))
    return options, passed


def _check_command(command: str | None) -> None:
    try:
        words = None if command is None else shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--train_command={command}: {error}; write it as for a shell") from error
    if words is not None and (not words or shutil.which(words[0]) is None):
        raise ValueError(f"--train_command={command}: there is no command {words[0] if words else ''!r} to run")
