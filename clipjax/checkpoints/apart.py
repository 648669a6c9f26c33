"""Processes that do not see the local folder of process 0's workdir, as on hosts without a shared disk.

Each host has a folder of its own then, with the records of the checkpoints on the store, which a start compares, and
files without content in the place of their arrays: those process 0 reads and sends (`first.py`). Logs alone are sent
from there.
"""

import contextlib
import pathlib
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable

import jax

from clipjax.checkpoints import exchange
from clipjax.checkpoints.mirrored import LAYOUT
from clipjax.checkpoints.records import RECORD_FILE
from clipjax.runtime import objects, process_log, staging
from clipjax.runtime.mirror import Mirror

_LOOK_SECONDS = 2.0
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")
_FILLED = ".filled"


class _Follower:
    """The part of a lease that a process needs which sends its log alone."""

    token, retry_seconds = "", None

    def require(self) -> None:
        """Do nothing: process 0 holds the workdir for all."""

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Do nothing: process 0 is told."""

    def release(self, *, delete: bool = False) -> None:
        """Do nothing."""


def find_folder(
    place: str, folder: pathlib.Path, mirror: Mirror | None, files: tuple[str, ...]
) -> tuple[pathlib.Path, Mirror | None, bool]:
    """Return the local folder of this process, its mirror, and whether any process does not see that of process 0.

    All processes call this once process 0 holds the workdir and has filled its folder.

    Args:
        place: address of the workdir.
        folder: the local one, as process 0 has it.
        mirror: of process 0; None on the others.
        files: beside the checkpoints, that a start reads.

    Raises:
        ValueError: on all processes: the store does not take what process 0 has.
        OSError: the store or the disk fails.
    """
    if jax.process_count() == 1:
        return folder, mirror, False
    name = exchange.publish("apart/probe", lambda: _make_probe(folder))
    sees = _appears(folder / name)
    everybody = exchange.gather("apart/sees", sees)
    apart = not exchange.publish("apart/all", lambda: all(everybody))
    if refusal := exchange.publish("apart/sent", lambda: _send_unsent(folder / name, mirror if apart else None)):
        raise ValueError(f"--workdir={place}: {refusal}")
    if sees:
        return folder, mirror, apart
    own = folder.with_name(f"{folder.name}-on-{_UNSAFE.sub('-', socket.gethostname())}")
    own.mkdir(parents=True, exist_ok=True)
    with staging.locked(own / ".lock"):
        if not (own / _FILLED).exists() or (own / _FILLED).read_text() != name:
            _fill(own, place, files)
            (own / _FILLED).write_text(name)
        _load_log(own, place)
    copies = staging.Copies(own, "")
    for path in staging.parts_of(own):
        copies.note(path, "")
    found = staging.Found((), (), ())
    return own, Mirror(own, place, _Follower(), layout=LAYOUT, copies=copies, found=found), apart


def _load_log(folder: pathlib.Path, place: str) -> None:
    """Load the log of this process that earlier starts have left, which would be overwritten else."""
    log = process_log.path_of(pathlib.Path(), jax.process_index()).as_posix()
    listed = objects.list_folder(objects.join(place, process_log.FOLDER))
    if each := listed.get(pathlib.PurePath(log).name):
        staging.download(place, {log: each}, folder)


def _make_probe(folder: pathlib.Path) -> str:
    name = f".shared-probe-{secrets.token_hex(16)}"
    with contextlib.suppress(OSError):  # then nobody sees it, and a later write tells why
        (folder / name).write_bytes(b"")
    return name


def _send_unsent(probe: pathlib.Path, mirror: Mirror | None) -> str:
    """Send what the others are about to load; return why that fails."""
    try:
        probe.unlink(missing_ok=True)
        if mirror is not None:
            mirror.send_unsent()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _appears(probe: pathlib.Path) -> bool:
    deadline = time.monotonic() + _LOOK_SECONDS
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _fill(folder: pathlib.Path, place: str, files: tuple[str, ...]) -> None:
    """Load what a start reads; files of arrays get their size alone."""
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != ".lock":
            child.unlink()
    listed = objects.list_folder(place)
    found = staging.find(listed, place, LAYOUT)
    inside = tuple(f"{LAYOUT.parent}/{unit}/" for unit in found.complete)
    steps = {path: each for path, each in listed.items() if path.startswith(inside)} if inside else {}
    small = {path: each for path, each in steps.items() if path.count("/") == 2 or path.endswith(f"/{RECORD_FILE}")}
    staging.download(place, small | {path: each for path, each in listed.items() if path in files}, folder)
    for path, each in steps.items():
        if path not in small:
            staging.check_name(place, path)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("wb") as file:
                file.truncate(each.size)
