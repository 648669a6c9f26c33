"""The plan of a sweep: its file to its trials, with the results of earlier runs of them."""

import hashlib
import json
import pathlib
import re
import runpy
import shlex
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clipjax.config import Config
from clipjax.config.paths import expand, is_path_field, schemes_of
from clipjax.config.serialization import canonical_path, check_override, split_assignment
from clipjax.sweeps.folder import Folder
from clipjax.sweeps.local import open_log
from clipjax.sweeps.space import Sweep
from clipjax.sweeps.trial import RECORD, RESULTS, Trial, formatted, read_json

_WORKERS = 8


def path_of(argument: str) -> str:
    """Return the field's path of a `--config.FIELD=VALUE`."""
    field = argument.removeprefix("--config.")
    return field.removesuffix(split_assignment(field)[1])


def load_sweep(path: pathlib.Path) -> Sweep:
    """Run a sweep file, which is the user's own Python, and return the sweep of its `get_sweep()`.

    Raises:
        ValueError: there is no such file or function, it fails, or it returns something else.
    """
    if not path.is_file():
        raise ValueError(f"--sweep={path} must be a Python file; there is none")
    try:
        names = runpy.run_path(str(path))
        sweep = names["get_sweep"]() if "get_sweep" in names else None
    except Exception as error:  # whatever the user's code raises is theirs to see, with its line
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise ValueError(f"--sweep={where}: {type(error).__name__}: {error}") from error
    if not isinstance(sweep, Sweep):
        raise ValueError(f"--sweep={path} must define get_sweep() that returns a Sweep; it gave {type(sweep).__name__}")
    return sweep


def plan_trials(sweep: Sweep, *, config: str, home: Folder, passed: Sequence[str]) -> list[Trial]:
    """Return the trials of a sweep, without what earlier runs of them have left; read nothing in its folder.

    Args:
        sweep: definition of the sweep.
        config: config file, FILE or FILE:ARG.
        home: folder of the sweep.
        passed: options `--config.FIELD=VALUE` for all trials.

    Raises:
        ValueError: a field or value does not fit the config.
    """
    all_overrides = sweep.trials()
    _check_fields(all_overrides, passed)
    config_path = pathlib.Path(config.partition(":")[0])
    if not config_path.is_file():
        raise ValueError(f"--config={config} must be a Python file, or FILE:ARG; there is no {config_path}")
    source = hashlib.sha256(config_path.read_bytes()).hexdigest()
    trials = []
    for index, overrides in enumerate(all_overrides):
        folder = f"trial-{index:04d}-{_slug(overrides)}"
        arguments = [f"--config={config}", f"--workdir={home.at(folder)}", *passed]
        arguments += [f"--config.{path}={value}" for path, value in formatted(overrides).items()]
        identity = [source, config.partition(":")[2], list(passed), formatted(overrides)]
        definition = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        trials.append(
            Trial(
                index=index, home=home, folder=folder, overrides=overrides, arguments=arguments, definition=definition
            )
        )
    return trials


def restore_trials(trials: Sequence[Trial], home: Folder, *, check: Sequence[Trial]) -> None:
    """Take over status and time of trials from earlier runs; write nothing.

    Args:
        trials: all of a sweep.
        home: folder of the sweep.
        check: those that nobody else may be training now.

    Raises:
        ValueError: the folder holds trials of another definition, or somebody else trains one of `check`.
        OSError: it cannot be read.
    """
    _check_folders(trials, home)
    with ThreadPoolExecutor(_WORKERS) as pool:
        list(pool.map(lambda trial: restore(trial, check_lock=trial in check), trials))
    home.refuse_trained([trial.folder for trial in check if trial.status != "done"])


def _check_fields(all_overrides: Sequence[dict[str, Any]], passed: Sequence[str]) -> None:
    problems: dict[str, None] = {}  # an ordered set
    fixed = {canonical_path(Config, path_of(argument)) for argument in passed}
    spellings: dict[str, str] = {}
    for path, value in (item for overrides in all_overrides for item in overrides.items()):
        try:
            check_override(Config, path, value)
            if is_path_field(name := canonical_path(Config, path)) and isinstance(value, str):
                expand(value, path, schemes=schemes_of(name))
        except ValueError as error:
            problems[str(error)] = None
            continue
        if name in fixed:
            problems[f"{path} is both in the sweep and on the command line; remove --config.{path}"] = None
        if spellings.setdefault(name, path) != path:
            problems[f"{path} is in the sweep twice, as {spellings[name]} too; remove one of them"] = None
    if problems:
        raise ValueError("; ".join(problems))


def _check_folders(trials: Sequence[Trial], home: Folder) -> None:
    planned = {trial.folder for trial in trials}
    for name in home.names():
        if re.match(r"trial-[0-9]", name) and name not in planned:
            raise ValueError(
                f"{home.at(name)} is a trial of another sweep definition; give another --workdir, undo the change of "
                "the sweep, or delete that folder"
            )


def restore(trial: Trial, *, check_lock: bool) -> None:
    """Take over status and time of a trial from an earlier run.

    Raises:
        ValueError: the folder holds another trial, or another process trains it.
        OSError: it cannot be read.
    """
    record = read_json(trial.home, trial.path(RECORD))
    if not record:
        return
    if record.get("definition") != trial.definition:
        changed = [
            argument
            for argument in sorted(set(record.get("arguments", [])) ^ set(trial.arguments))
            if not argument.startswith("--workdir=")
        ]
        what = f"its arguments differ in {shlex.join(changed)}" if changed else "the config file has changed since"
        raise ValueError(
            f"{trial.place} was trained by another definition: {what}; give another --workdir, undo the change, or "
            "delete that folder"
        )
    trial.seconds = float(record.get("seconds", 0.0))
    if record.get("status") == "done" and trial.home.exists(trial.path(RESULTS)):
        trial.status = "done"
    elif check_lock:
        open_log(trial).close()
    else:  # only for the table
        left = record.get("status", "waiting")
        trial.status, trial.problem = "waiting" if left == "done" else left, record.get("problem", "")


def _slug(overrides: dict[str, Any]) -> str:
    text = "-".join(f"{path.rpartition('.')[2]}-{value}" for path, value in formatted(overrides).items())
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)[:60].strip("-.")
