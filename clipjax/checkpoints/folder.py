"""The folder of step directories: their names, and moves that a kill at any moment leaves whole.

`STEP` is a checkpoint; `STEP.orbax-checkpoint-tmp` is being written, `STEP.deleting` is being deleted, and
`STEP.damaged`, `STEP.incomplete` and `STEP.rejected` are set aside, for a person to look at.
"""

import pathlib
import shutil
from typing import Literal

from clipjax.checkpoints.manifest import FILE, State, examine
from clipjax.checkpoints.records import FOLDER
from clipjax.runtime.files import sync_folder

GOOD = "good"
"""Empty file in the directory of a step whose state training has found to be good."""

TEMPORARY = ".orbax-checkpoint-tmp"
DELETING = ".deleting"
ASIDE = ("damaged", "incomplete", "rejected")
Aside = Literal["damaged", "incomplete", "rejected"]


def is_step_name(name: str) -> bool:
    """Return True if training gives a step's directory this name: 7, and not 007."""
    return name.isascii() and name.isdecimal() and name == str(int(name))


def steps_in(folder: pathlib.Path) -> list[int]:
    """Return the steps whose directories lie in a folder, in order; none where there is no folder."""
    children = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(child.name) for child in children if is_step_name(child.name))


def is_step(path: pathlib.Path) -> bool:
    """Return True if a directory is that of a step, by any name."""
    named = is_step_name(path.name) or (path / "tokenizer").is_dir()
    return (path / FILE).is_file() or (named and (path / "config").is_dir())


def find_checkpoint(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Return the folder of steps and the step that a path means.

    Raises:
        ValueError: there is none.
    """
    if is_step_name(path.name) and is_step(path):
        return path.parent, int(path.name)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = steps_in(folder)
    if not steps:
        raise ValueError(
            f"no checkpoint at {str(path)!r}: give a workdir that training has saved to, or one of its "
            f"{FOLDER}/STEP directories"
        )
    return folder, max(steps)


def set_aside_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the step directories of a folder that were set aside, in order."""
    children = folder.iterdir() if folder.is_dir() else ()
    parts = [(child.name.split("."), child) for child in children]
    found = [
        (int(name[0]), child) for name, child in parts if len(name) > 1 and is_step_name(name[0]) and name[1] in ASIDE
    ]
    return [child for _, child in sorted(found)]


def is_complete(directory: pathlib.Path) -> bool:
    """Return True if a save ended here: there is a manifest, or the format is an older one. No content is verified."""
    return (directory / FILE).is_file() or examine(directory, contents=False).state is State.UNVERIFIED


def set_aside(folder: pathlib.Path, step: int, reason: Aside) -> pathlib.Path:
    """Rename the directory of a step so that nothing restores it, and return its new path."""
    taken = [path.name for path in folder.glob(f"{step}.{reason}*")]
    number = next(i for i in range(1, len(taken) + 2) if _aside_name(step, reason, i) not in taken)
    path = folder / _aside_name(step, reason, number)
    (folder / str(step)).rename(path)
    sync_folder(folder)
    return path


def _aside_name(step: int, reason: str, number: int) -> str:
    return f"{step}.{reason}" + ("" if number == 1 else f".{number}")


def delete(folder: pathlib.Path, step: int) -> None:
    """Delete the directory of a step; a kill in the middle leaves no half of it under its name."""
    path = folder / f"{step}{DELETING}"
    shutil.rmtree(path, ignore_errors=True)  # of a deletion before
    (folder / str(step)).rename(path)
    shutil.rmtree(path)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Delete what a killed run was writing or deleting. Only the owner of the folder may do this."""
    for child in folder.iterdir() if folder.is_dir() else ():
        if is_step_name(child.name.partition(".")[0]) and (TEMPORARY in child.name or child.name.endswith(DELETING)):
            shutil.rmtree(child, ignore_errors=True)


def sync_tree(directory: pathlib.Path) -> None:
    """Wait until the names in a directory and in all below it are on the disk."""
    for path in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        sync_folder(path)
