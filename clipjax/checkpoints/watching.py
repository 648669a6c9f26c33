"""The complete checkpoints of a workdir that a run may still write to and delete from."""

import pathlib
import shutil

from clipjax.checkpoints.folder import is_complete, is_step, steps_in
from clipjax.checkpoints.manifest import FILE
from clipjax.checkpoints.mirrored import LAYOUT
from clipjax.checkpoints.records import FOLDER
from clipjax.runtime import objects, staging

_OLD_FORMAT = "old format"


def complete_steps(workdir: pathlib.Path | str) -> dict[int, str]:
    """Return the complete steps in order, each with a text that is another one if the step is written anew.

    A workdir that is not there yet has none.

    Args:
        workdir: path, or address on an object store.

    Raises:
        ValueError: it is the directory of one step, or a file.
        OSError: the file system or the store does not tell.
    """
    if isinstance(workdir, str):
        listed = objects.list_folder(workdir)
        if FILE in listed:
            raise ValueError(_one_step(workdir))
        complete = staging.find(listed, workdir, LAYOUT).complete
        seals = {int(name): listed.get(f"{FOLDER}/{name}/{FILE}") for name in complete}
        return {step: _OLD_FORMAT if seal is None else str(seal) for step, seal in sorted(seals.items())}
    if is_step(workdir):
        raise ValueError(_one_step(workdir))
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file; name the workdir of a run")
    found = dict[int, str]()
    for step in steps_in(workdir / FOLDER):
        directory = workdir / FOLDER / str(step)
        try:
            about = (directory / FILE).stat()
            found[step] = f"{about.st_ino} {about.st_mtime_ns} {about.st_size}"
        except FileNotFoundError:
            if is_complete(directory):
                found[step] = _OLD_FORMAT
    return found


def _one_step(place: pathlib.Path | str) -> str:
    return f"{place} is the directory of one checkpoint; name the workdir above it"


def step_place(workdir: pathlib.Path | str, step: int) -> pathlib.Path | str:
    """Return the path or the address of a step."""
    name = str(step)
    return objects.join(workdir, FOLDER, name) if isinstance(workdir, str) else workdir / FOLDER / name


def drop_copy(place: pathlib.Path | str) -> None:
    """Delete the local copy of a step on a store, which would fill the disk step after step; of a path nothing.

    Raises:
        OSError: it cannot be deleted.
        ValueError: the local folder cannot be used.
    """
    if isinstance(place, pathlib.Path):
        return
    folder = staging.folder_of(place)
    if not folder.is_dir():
        return
    name = place.rpartition("/")[2]
    with staging.locked(folder / ".lock"):
        copies = staging.Copies(folder, place)
        shutil.rmtree(folder / name, ignore_errors=True)
        copies.forget_folder(name)
        copies.write("")
