"""Checkpoints on an object store: a workdir's local folder with its mirror, and single steps loaded for reading.

Reading order: `open_mirror`, `fetch`.
"""

import json
import pathlib
from collections.abc import Callable, Collection, Mapping

from clipjax.checkpoints.folder import is_step_name
from clipjax.checkpoints.manifest import FILE, DamagedCheckpoint, Verdict, examine
from clipjax.checkpoints.records import FOLDER, RECORD_FILE
from clipjax.checkpoints.verdicts import all_damaged, going_on, refuse_undecided, warn
from clipjax.runtime import objects, staging
from clipjax.runtime.lease import Lease
from clipjax.runtime.mirror import Mirror
from clipjax.runtime.objects import Listed

_MAX_RECORD_BYTES = 64 * 2**20
_DATA = f"data/{RECORD_FILE}"


def _is_old_format(place: str, files: Mapping[str, Listed]) -> bool:
    """Return True for a step directory of an older format, which has no manifest."""
    if _DATA not in files:
        return False
    try:
        data = json.loads(objects.read_bytes(objects.join(place, _DATA), _MAX_RECORD_BYTES))
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "format" not in data


LAYOUT = staging.Layout(FOLDER, FILE, is_step_name, _is_old_format)
"""A step directory is a unit, and its manifest the seal."""


def open_mirror(
    place: str, folder: pathlib.Path, plain: Collection[str], tell: Callable[[str], None], *, is_locked: bool = True
) -> Mirror:
    """Take a workdir on a store, and fill its local folder, which this process has locked.

    Args:
        place: address of the workdir.
        folder: the local one.
        plain: names of the files and folders beside the checkpoints that a start needs.
        tell: shows a line while this waits.
        is_locked: the file system of the folder has locks.

    Raises:
        ValueError: another run holds it, or the store cannot be used.
    """
    known = staging.Copies(folder, place)
    try:
        lease = Lease(place, known.token, tell, is_locked=is_locked)
    except OSError as error:
        raise ValueError(_refusal("--workdir", place, error)) from error
    try:
        if lease.continues:  # so does the next start, if this one is refused or killed before it has loaded all
            known.write(lease.token)
        copies, found = staging.fill(folder, place, LAYOUT, plain=plain, continues=lease.continues)
        copies.write(lease.token)
        if found.lost_at is not None:
            tell(
                f"warning: {place} was used elsewhere before all checkpoints of the last run on this machine were "
                f"there; they are no part of this run any more, and lie in {found.lost_at}"
            )
    except OSError as error:
        lease.release()
        raise ValueError(_refusal("--workdir", place, error)) from error
    except BaseException:
        lease.release()
        raise
    return Mirror(folder, place, lease, layout=LAYOUT, copies=copies, found=found)


def _refusal(option: str, place: str, error: OSError) -> str:
    where = "" if error.filename in (None, place) else f" ({error.filename})"
    return f"{option}={place}: {error.strerror or error}{where}"


def fetch(place: str, step: int | None = None) -> tuple[pathlib.Path, str]:
    """Return the local directory of a step on a store, loaded and verified, and the address of the step.

    What was loaded before stays in the folder that `staging.folder_of` gives, and is loaded again only if it changed.

    Args:
        place: address of a workdir, its `checkpoints` folder, or a step; of the first two the newest complete step is
            taken, or if that is damaged the newest good one, with a warning.
        step: another step in the same place.

    Raises:
        DamagedCheckpoint: all steps are damaged, or the one that is named.
        UndecidedCheckpoint: one is of a newer format.
        ValueError: there is no checkpoint there, or the store cannot be used.
    """
    place = place.rstrip("/")
    try:
        directories = _find_steps(place, step)
        bad: dict[int, Verdict] = {}
        for number, address in directories:
            path = _load(address)
            verdict = examine(path, step=number if len(directories) > 1 else None)
            if verdict.usable:
                for worse, why in bad.items():
                    warn(going_on(pathlib.Path(str(worse)), why, path))
                return path, address
            refuse_undecided(path, verdict)
            bad[number] = verdict
    except OSError as error:
        raise ValueError(_refusal("checkpoint", place, error)) from error
    raise DamagedCheckpoint(all_damaged(pathlib.Path(place), bad))


def load_all(place: str) -> pathlib.Path:
    """Return a local folder like the `checkpoints` folder on a store, with all that lies there, whole or not.

    Args:
        place: address of a workdir, its `checkpoints` folder, or a step, which is returned alone.

    Raises:
        ValueError: there is no checkpoint there, or the store cannot be used.
    """
    place = place.rstrip("/")
    try:
        listed = objects.list_folder(place)
        if FILE in listed or "config/metadata" in listed:
            return _load(place)
        inside = any(path.startswith(f"{FOLDER}/") for path in listed)
        folder = _load(objects.join(place, FOLDER) if inside else place)
    except OSError as error:
        raise ValueError(_refusal("checkpoint", place, error)) from error
    for name in {path.split("/")[0] for path in staging.parts_of(folder)}:
        if is_step_name(name):
            return folder
    raise ValueError(
        f"no checkpoint at {place!r}: give a workdir that training has saved to, or one of its {FOLDER}/STEP "
        "directories"
    )


def _find_steps(place: str, step: int | None) -> list[tuple[int, str]]:
    """Return the steps to choose from with their addresses, the newest first.

    Raises:
        ValueError: there is none.
        OSError: the store does not tell.
    """
    listed = objects.list_folder(place)
    if FILE in listed or _is_old_format(place, listed):  # one step, by any name
        name = place.rpartition("/")[2]
        if step is None or name == str(step):
            return [(int(name) if is_step_name(name) else 0, place)]
        place = place.rpartition("/")[0]
        listed = objects.list_folder(place)
    if not any(path.startswith(f"{FOLDER}/") for path in listed):
        listed = {f"{FOLDER}/{path}": each for path, each in listed.items()}
        parent, place = place, place.rpartition("/")[0]
    else:
        parent = objects.join(place, FOLDER)
    found = staging.find(listed, place, staging.Layout(FOLDER, FILE, is_step_name, lambda *_: True))
    steps = sorted(
        (int(name) for name in found.complete if _is_complete(listed, name, objects.join(parent, name))), reverse=True
    )
    if step is not None:
        steps = [each for each in steps if each == step]
    if not steps:
        needed = "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}"
        raise ValueError(
            f"{needed} at {place!r}: give a workdir that training has saved to, or one of its {FOLDER}/STEP directories"
        )
    return [(each, objects.join(parent, str(each))) for each in steps]


def _is_complete(listed: Mapping[str, Listed], name: str, place: str) -> bool:
    start = f"{FOLDER}/{name}/"
    files = {path.removeprefix(start): each for path, each in listed.items() if path.startswith(start)}
    return FILE in files or _is_old_format(place, files)


def _load(place: str) -> pathlib.Path:
    """Return a local copy of a step directory; one process of this machine loads at a time.

    Raises:
        OSError: the store does not give it.
        ValueError: the local folder cannot be used.
    """
    name = place.rpartition("/")[2]
    folder = staging.folder_of(place)
    folder.mkdir(parents=True, exist_ok=True)
    with staging.locked(folder / ".lock"):
        copies, listed = staging.Copies(folder, place), objects.list_folder(place)
        wanted = {f"{name}/{path}": each for path, each in listed.items()}
        missing = {path: each for path, each in wanted.items() if not copies.is_true(path, each)}
        for path in staging.parts_of(folder / name):
            if f"{name}/{path}" not in wanted:
                (folder / name / path).unlink()
        staging.delete_empty(folder / name)
        staging.download(place.rpartition("/")[0], missing, folder, copies)
        copies.write("")
    return folder / name
