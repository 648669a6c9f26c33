"""The local folder of a workdir on an object store: filled from the store at a start, before anything reads it.

`FOLDER/.mirror.json` records which file is a copy of which version of an object. A start keeps those copies that are
still true, and loads or deletes the rest, so that nothing of another run leaks in: the store wins. Only what the last
holder of the workdir has left in its own folder and had not sent yet is kept, if nobody has held the workdir since.

A *unit* is a folder that counts as a whole, such as a checkpoint: it is complete once its *seal*, the file that is
written last, is there. Units that are not complete are not loaded.

Reading order: `folder_of`, `Layout`, `Copies`, `fill`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from clipjax.runtime import objects, owner
from clipjax.runtime.files import read_bounded, write_atomic
from clipjax.runtime.objects import Listed

VARIABLE = "CLIPJAX_STAGING"
"""Environment variable that names the folder of these folders; left out, one in the system's temporary folder."""

STATE = ".mirror.json"
PINNED = ".pinned"
"""Folder of the units that are being sent."""

_PART_BYTES = 8 * 2**20  # of a download, each with its own time limit, so that slow lines do
_WORKERS = 8
_MAX_STATE_BYTES = 2**28
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_OWN = (owner.FILE, STATE, PINNED)


def folder_of(place: str) -> pathlib.Path:
    """Return the local folder of an address, the same on each call.

    Raises:
        ValueError: its parent is not this user's alone, or cannot be made.
    """
    base = os.environ.get(VARIABLE)
    parent = pathlib.Path(base or pathlib.Path(tempfile.gettempdir()) / f"clipjax-staging-{os.getuid()}").absolute()
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = parent.lstat()
    except OSError as error:
        raise ValueError(f"{VARIABLE}={parent}: the folder cannot be made ({error.strerror}); set another") from error
    if base is None and (not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise ValueError(f"{parent} is not a folder that only you can write to; remove it, or set {VARIABLE}")
    name = _UNSAFE.sub("-", place.partition("://")[2].strip("/"))[-60:]
    return parent / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Layout:
    """The units of a folder.

    Attributes:
        parent: the folder in which they lie.
        seal: path inside a unit of the file that is written last.
        is_unit: tells by a name in `parent` whether it is a unit; what else lies in there is not copied.
        is_whole: tells by address and listing of a unit without a seal whether it is complete all the same.
    """

    parent: str
    seal: str
    is_unit: Callable[[str], bool]
    is_whole: Callable[[str, Mapping[str, Listed]], bool]


class Copies:
    """Record of the files of a local folder that are true copies of objects; kept in `FOLDER/.mirror.json`.

    Args:
        folder: the local one.
        place: address of the folder of the store.

    Attributes:
        token: of the lease under which the folder was used.
        renames: units that are to be renamed on the store, with their new names.
    """

    def __init__(self, folder: pathlib.Path, place: str) -> None:
        self._folder, self._place = folder, place
        self.token = ""
        self.renames: dict[str, str] = {}
        self._known: dict[str, tuple[int, int, str]] = {}
        self._lock = threading.Lock()
        try:
            found = json.loads(read_bounded(folder / STATE, _MAX_STATE_BYTES))
            if found["place"] == place:
                self.token = str(found["token"])
                self._known = {str(path): (int(a), int(b), str(c)) for path, (a, b, c) in found["files"].items()}
                self.renames = {str(unit): str(new) for unit, new in found.get("renames", {}).items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass  # nothing is known: everything is loaded

    def note(self, path: str, version: str) -> None:
        """Note that a file as it is now is a copy of a version of its object."""
        about = (self._folder / path).stat()
        with self._lock:
            self._known[path] = (about.st_size, about.st_mtime_ns, version)

    def forget(self, path: str) -> None:
        """Forget a file."""
        with self._lock:
            self._known.pop(path, None)

    def forget_folder(self, folder: str) -> None:
        """Forget all files in a folder."""
        with self._lock:
            self._known = {path: about for path, about in self._known.items() if not path.startswith(f"{folder}/")}

    def is_unchanged(self, path: str) -> bool:
        """Return True if a file is as it was when it was noted."""
        try:
            about = (self._folder / path).stat()
        except OSError:
            return False
        return self._known.get(path, ())[:2] == (about.st_size, about.st_mtime_ns)

    def is_true(self, path: str, listed: Listed) -> bool:
        """Return True if a file is a copy of the object that is listed."""
        return self.is_unchanged(path) and self._known[path][2] == listed.version

    def write(self, token: str) -> None:
        """Write the record.

        Args:
            token: of the lease under which this folder is used.
        """
        with self._lock:
            self.token = token
            record = {"place": self._place, "token": token, "renames": self.renames, "files": self._known}
            write_atomic(self._folder / STATE, json.dumps(record))


def fill(
    folder: pathlib.Path, place: str, layout: Layout, *, plain: Collection[str], continues: bool = False
) -> tuple[Copies, "Found"]:
    """Make a local folder a copy of a folder of a store.

    Args:
        folder: the local one, which this process has locked.
        place: address of the folder of the store.
        layout: its units.
        plain: names of the files and folders beside the units; what else lies there is left alone.
        continues: nobody but the last user of this local folder has written to the store.

    Raises:
        OSError: the store does not give something, or the disk takes it not.
        ValueError: the store has names that no file can have.
    """
    copies = Copies(folder, place)
    shutil.rmtree(folder / PINNED, ignore_errors=True)
    listed = {
        path: each
        for path, each in objects.list_folder(place).items()
        if path.partition("/")[0] in (*plain, layout.parent) and path not in _OWN
    }
    found = find(listed, place, layout)
    copies.renames = copies.renames if continues else {}
    found = replace(found, complete=set(found.complete) - copies.renames.keys(), renames=dict(copies.renames))
    unsent = _unsent_units(folder, layout, found.complete, copies)
    lost_at = None
    if unsent and not continues:
        unsent, lost_at = set(), _set_aside(folder, layout, unsent)
    mine = {f"{layout.parent}/{unit}" for unit in unsent}
    wanted = {path: each for path, each in listed.items() if _unit_of(path, layout) in (None, *found.complete)}
    kept = set()
    for path in _files(folder):
        unit = _unit_of(path, layout)
        is_own = unit in unsent if unit is not None else continues and not copies.is_unchanged(path)
        if is_own or (path in wanted and copies.is_true(path, wanted[path])):
            kept.add(path)
        else:
            (folder / path).unlink()
            copies.forget(path)
    delete_empty(folder, keep=mine)
    download(place, {path: each for path, each in wanted.items() if path not in kept}, folder, copies)
    for name in (*found.aside, *found.renames.values()):  # so that their names are taken
        (folder / layout.parent / name).mkdir(parents=True, exist_ok=True)
    return copies, replace(found, unsent=frozenset(unsent), lost_at=lost_at)


def _set_aside(folder: pathlib.Path, layout: Layout, units: Collection[str]) -> pathlib.Path:
    """Move units out of a folder, to a new one beside it, which is returned."""
    aside = folder.with_name(f"{folder.name}.unsent-{secrets.token_hex(4)}")
    aside.mkdir()
    for unit in units:
        (folder / layout.parent / unit).rename(aside / unit)
    return aside


@dataclass(frozen=True)
class Found:
    """The units of a folder.

    Attributes:
        complete: on the store.
        incomplete: on the store, without a seal.
        aside: other folders among the units, on the store.
        unsent: complete in the local folder, and not on the store.
        renames: to be renamed on the store, with their new names.
        lost_at: folder with units that were complete in the local one, and which others who have written to the store
            since have overtaken; None: there are none.
    """

    complete: Collection[str]
    incomplete: Collection[str]
    aside: Collection[str]
    unsent: Collection[str] = frozenset()
    renames: Mapping[str, str] = field(default_factory=dict)
    lost_at: pathlib.Path | None = None


def find(listed: Mapping[str, Listed], place: str, layout: Layout) -> Found:
    """Return the units of a listing."""
    inside: dict[str, dict[str, Listed]] = {}
    for path, each in listed.items():
        parent, _, rest = path.partition("/")
        if parent == layout.parent and "/" in rest:
            unit, _, file = rest.partition("/")
            inside.setdefault(unit, {})[file] = each
    units = {unit: files for unit, files in inside.items() if layout.is_unit(unit)}
    complete = {
        unit
        for unit, files in units.items()
        if layout.seal in files or layout.is_whole(objects.join(place, layout.parent, unit), files)
    }
    return Found(complete, units.keys() - complete, inside.keys() - units.keys())


def _unit_of(path: str, layout: Layout) -> str | None:
    """Return the unit in which a file lies, or the name of what else lies among the units; None outside."""
    parts = path.split("/")
    return parts[1] if parts[0] == layout.parent and len(parts) > 1 else None


def _unsent_units(folder: pathlib.Path, layout: Layout, sent: Collection[str], copies: Copies) -> set[str]:
    """Return the units of a folder that have never been on the store; others somebody has deleted there."""
    seals = (folder / layout.parent).glob(f"*/{layout.seal}")
    found = {seal.relative_to(folder / layout.parent).parts[0] for seal in seals}
    found = {unit for unit in found if layout.is_unit(unit) and unit not in sent}
    return {unit for unit in found if not copies.is_unchanged(f"{layout.parent}/{unit}/{layout.seal}")}


def _files(folder: pathlib.Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return [path for path in (each.relative_to(folder).as_posix() for each in paths) if path not in _OWN]


def delete_empty(folder: pathlib.Path, *, keep: Collection[str] = ()) -> None:
    """Delete the folders inside one that hold no file, but those to keep."""
    for path in sorted((each for each in folder.rglob("*") if each.is_dir()), reverse=True):
        if not any(path.iterdir()) and not any(path.is_relative_to(folder / each) for each in keep):
            path.rmdir()


def download(place: str, files: Mapping[str, Listed], folder: pathlib.Path, copies: Copies | None = None) -> None:
    """Load objects into a local folder, several at a time.

    Args:
        place: address of the folder of the store.
        files: to load, as listed.
        folder: the local one.
        copies: notes them.

    Raises:
        OSError: the store does not give one, or the disk takes it not.
        ValueError: a name is none that a file can have.
    """
    for path in files:
        check_name(place, path)
    with ThreadPoolExecutor(_WORKERS) as pool:
        for path in pool.map(lambda path: _load(objects.join(place, path), folder / path, path), files):
            if copies is not None:
                copies.note(path, files[path].version)


def check_name(place: str, path: str) -> None:
    """Refuse the path of an object inside a folder of a store that no file inside a local folder can have.

    Raises:
        ValueError: it is such a path.
    """
    if not path.isprintable() or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{place}: {path!r} is no name that a file can have; remove that object")


def _load(place: str, target: pathlib.Path, path: str) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    opened = objects.ObjectFile(place)
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("wb") as file:
        for offset in range(0, opened.size, _PART_BYTES):
            file.write(opened.read(offset, _PART_BYTES))
    temporary.replace(target)
    return path


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold a file's lock in the `with` block, which other processes of this machine wait for."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def parts_of(folder: pathlib.Path, *, skip: Collection[str] = ()) -> list[str]:
    """Return the paths of all files inside a folder, in order, as far as others do not delete them meanwhile.

    Args:
        folder: to walk through.
        skip: folders in it that are left out.
    """
    found = []
    for root, folders, files in os.walk(folder):
        inside = pathlib.Path(root).relative_to(folder)
        folders[:] = [name for name in folders if (inside / name).as_posix() not in skip]
        found += [(inside / name).as_posix() for name in files]
    return sorted(found)
