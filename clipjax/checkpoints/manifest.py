"""The manifest of a checkpoint: size and checksum of each of its files, so that no changed byte goes unnoticed.

`manifest.json` is the last file that a save writes into a step directory. It covers every other file but the marker
`good`, and itself by a digest. A directory without one is incomplete, unless its `data` record has no `format`: then it
is of an older version of clipjax, complete but unverified.
"""

import enum
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import xxhash

from clipjax.checkpoints.records import FORMAT, read_record
from clipjax.runtime.files import read_bounded, write_atomic

FILE = "manifest.json"
_MAX_BYTES = 256 * 2**20
_CHUNK_BYTES = 4 * 2**20
_WORKERS = 8  # one for each file; reading and hashing leave Python's lock

Files = Mapping[str, tuple[int, str]]
"""Bytes and xxh3_128 by path inside the step directory."""


class DamagedCheckpoint(ValueError):
    """A checkpoint is incomplete, changed since it was written, or cannot be restored."""


class State(enum.StrEnum):
    """State of a step directory, as far as its files tell."""

    VERIFIED = "complete and verified"
    UNVERIFIED = "unverified: older format"
    DAMAGED = "damaged"
    INCOMPLETE = "incomplete"


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`.

    Attributes:
        step: completed updates.
        best: the metric that chooses the best step and its value; None if it was not measured.
        files: all other files.
    """

    step: int
    best: tuple[str, float] | None
    files: Files


@dataclass(frozen=True)
class Verdict:
    """Result of an examination.

    Attributes:
        state: of the step directory.
        fault: the first file that is wrong and how; empty where none is.
    """

    state: State
    fault: str = ""

    @property
    def usable(self) -> bool:
        """True if the checkpoint may be restored."""
        return self.state in (State.VERIFIED, State.UNVERIFIED)


def hash_files(directory: pathlib.Path, paths: Iterable[str], *, sync: bool = False) -> dict[str, tuple[int, str]]:
    """Return size and checksum of files, a thread for each; with `sync`, once they are on the disk."""
    paths = list(paths)
    with ThreadPoolExecutor(_WORKERS) as pool:
        found = pool.map(lambda path: _hash_file(directory / path, sync=sync), paths)
        return dict(zip(paths, found, strict=True))


def _hash_file(path: pathlib.Path, *, sync: bool) -> tuple[int, str]:
    total, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(min(os.fstat(file.fileno()).st_size + 1, _CHUNK_BYTES))
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            total.update(view[:count])
            size += count
        if sync:
            os.fsync(file.fileno())
    return size, total.hexdigest()


def list_files(directory: pathlib.Path) -> list[str]:
    """Return the paths of all files inside a directory, in order."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def write(directory: pathlib.Path, manifest: Manifest) -> None:
    """Write `manifest.json`, whole or not at all, and wait until it is on the disk."""
    write_atomic(directory / FILE, _encode(manifest), sync=True)


def _encode(manifest: Manifest) -> bytes:
    record = {
        "format": FORMAT,
        "step": manifest.step,
        "best": None if manifest.best is None else list(manifest.best),
        "files": {path: list(manifest.files[path]) for path in sorted(manifest.files)},
    }
    digest = xxhash.xxh3_128_hexdigest(_compact(record))
    return _compact(record | {"digest": digest}) + b"\n"


def _compact(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def read(directory: pathlib.Path) -> Manifest:
    """Return the manifest of a step directory.

    Raises:
        FileNotFoundError: it has none.
        DamagedCheckpoint: the manifest itself is damaged.
    """
    try:
        content = read_bounded(directory / FILE, _MAX_BYTES)
        record = json.loads(content)
        best = record["best"]
        manifest = Manifest(
            int(record["step"]),
            None if best is None else (str(best[0]), float(best[1])),
            {_inside(path): (int(size), str(checksum)) for path, (size, checksum) in record["files"].items()},
        )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: {FILE}: cannot be read ({error!r})") from error
    if record.get("format") != FORMAT or content != _encode(manifest):
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: {FILE}: another content")
    return manifest


def _inside(path: str) -> str:
    """Return a path if it stays inside the step directory."""
    if pathlib.PurePosixPath(path).is_absolute() or ".." in pathlib.PurePosixPath(path).parts:
        raise ValueError(f"{path!r} leads out of the checkpoint")
    return path


def examine(
    directory: pathlib.Path, *, step: int | None = None, contents: bool = True, part: tuple[int, int] = (0, 1)
) -> Verdict:
    """Compare a step directory with its manifest.

    Args:
        directory: of the step.
        step: that it must be of; None: any.
        contents: False compares the sizes of all files and the contents of the records, but reads no array.
        part: of the contents, (i, n): every n-th file from i; processes share the work so.
    """
    try:
        manifest = read(directory)
    except DamagedCheckpoint as error:
        return Verdict(State.DAMAGED, str(error).partition("damaged: ")[2])
    except FileNotFoundError:
        return _without_manifest(directory)
    if step not in (None, manifest.step):
        return Verdict(State.DAMAGED, f"{FILE}: it is that of step {manifest.step}")
    for path, (size, _) in manifest.files.items():
        try:
            found = (directory / path).stat().st_size
        except OSError as error:
            return Verdict(State.DAMAGED, f"{path}: {_reason(error)}")
        if found != size:
            return Verdict(State.DAMAGED, f"{path}: {found} bytes instead of {size}")
    chosen = [path for path in manifest.files if contents or path.endswith("/metadata")]
    if contents:
        chosen = sorted(chosen, key=lambda path: manifest.files[path], reverse=True)[part[0] :: part[1]]
    return _compare(directory, {path: manifest.files[path] for path in chosen})


def _compare(directory: pathlib.Path, files: Files) -> Verdict:
    try:
        found = hash_files(directory, files)
    except OSError as error:
        path = pathlib.Path(error.filename).relative_to(directory) if error.filename else directory.name
        return Verdict(State.DAMAGED, f"{path}: {_reason(error)}")
    changed = sorted(path for path in files if found[path] != files[path])
    return Verdict(State.DAMAGED, f"{changed[0]}: another content") if changed else Verdict(State.VERIFIED)


def _without_manifest(directory: pathlib.Path) -> Verdict:
    try:
        data = read_record(directory, "data")
    except (OSError, ValueError) as error:
        return Verdict(State.INCOMPLETE, f"{FILE}: missing; data: {_reason(error)}")
    if isinstance(data, dict) and "format" not in data:
        return Verdict(State.UNVERIFIED)
    return Verdict(State.INCOMPLETE, f"{FILE}: missing")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or repr(error)


def best_of(directory: pathlib.Path) -> tuple[str, float] | None:
    """Return the metric that chooses the best step and its value at this one; None if it was not measured."""
    try:
        return read(directory).best
    except FileNotFoundError:  # an older format, in which Orbax kept it
        old = directory / "metrics" / "metrics"
        try:
            metrics: Any = json.loads(read_bounded(old, _CHUNK_BYTES))
            return next(((str(name), float(value)) for name, value in metrics.items()), None)
        except (OSError, ValueError, AttributeError, TypeError):
            return None
    except DamagedCheckpoint:
        return None
