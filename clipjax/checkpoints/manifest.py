"""The manifest of a checkpoint: size and checksum of each of its files, so that no changed byte goes unnoticed.

`manifest.json` is the last file that a save writes into a step directory. It covers every other file but the marker
`good`, and itself by a digest, in later formats too. A directory without one is incomplete, unless its `data` record
has no `format`: then it is of an older version of clipjax, complete but unverified.

A file that the storage does not give is no damage: it is asked for again, and then the checkpoint is unreadable.
"""

import enum
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import xxhash

from clipjax.checkpoints.records import FORMAT, read_record
from clipjax.runtime.files import read_bounded, reason_of, write_atomic

FILE = "manifest.json"
FIRST_FORMAT = 2
"""The first format with a manifest."""

RETRY_SECONDS = (0.1, 0.5, 1.5)
"""Waits between tries to read a file that the storage does not give."""

_MAX_BYTES = 256 * 2**20
_CHUNK_BYTES = 4 * 2**20
_WORKERS = 8  # one for each file; reading and hashing leave Python's lock
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

T = TypeVar("T")
Files = Mapping[str, tuple[int, str]]
"""Bytes and xxh3_128 by path inside the step directory."""


class UnusableCheckpoint(ValueError):
    """A checkpoint that cannot be used, for whatever reason: a person has to look."""


class DamagedCheckpoint(UnusableCheckpoint):
    """A checkpoint is incomplete, changed since it was written, or cannot be restored."""


class UndecidedCheckpoint(UnusableCheckpoint):
    """A checkpoint that may be good: its storage gives an error, or it needs a newer version of clipjax."""


class State(enum.StrEnum):
    """State of a step directory, as far as its files tell."""

    VERIFIED = "complete and verified"
    UNVERIFIED = "unverified: older format"
    DAMAGED = "damaged"
    INCOMPLETE = "incomplete"
    UNREADABLE = "unreadable"
    NEWER = "of a newer format"


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

    @property
    def undecided(self) -> bool:
        """True if it may be good all the same."""
        return self.state in (State.UNREADABLE, State.NEWER)


def hash_files(directory: pathlib.Path, paths: Iterable[str], *, sync: bool = False) -> dict[str, tuple[int, str]]:
    """Return size and checksum of files, a thread for each; with `sync`, once they are on the disk.

    Raises:
        OSError: a file cannot be read; without `sync`, after several tries.
    """

    def read(path: str) -> tuple[int, str]:
        def attempt() -> tuple[int, str]:
            return _hash_file(directory / path, sync=sync)

        try:
            return attempt() if sync else _patiently(attempt)
        except OSError as error:
            error.filename = error.filename or str(directory / path)  # a read names none
            raise

    paths = list(paths)
    with ThreadPoolExecutor(_WORKERS) as pool:
        return dict(zip(paths, pool.map(read, paths), strict=True))


def _patiently(read: Callable[[], T]) -> T:
    """Return what `read` returns; after an error of the storage, try again: many pass."""
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except _GONE:
            raise
        except OSError:
            time.sleep(seconds)
    return read()


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
    record = {
        "format": FORMAT,
        "step": manifest.step,
        "best": None if manifest.best is None else list(manifest.best),
        "files": {path: list(manifest.files[path]) for path in sorted(manifest.files)},
    }
    write_atomic(directory / FILE, _encode(record), sync=True)


def _encode(record: Mapping[str, Any]) -> bytes:
    """Return a record of any format as the bytes of its file, with its digest last."""
    record = {name: value for name, value in record.items() if name != "digest"}
    digest = xxhash.xxh3_128_hexdigest(_compact(record))
    return _compact(record | {"digest": digest}) + b"\n"


def _compact(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def read(directory: pathlib.Path) -> Manifest:
    """Return the manifest of a step directory.

    Raises:
        FileNotFoundError: it has none.
        OSError: it cannot be read.
        DamagedCheckpoint: the manifest itself is damaged.
        UndecidedCheckpoint: it is of a newer format.
    """
    try:
        content = _patiently(lambda: read_bounded(directory / FILE, _MAX_BYTES))
        record = json.loads(content)
        is_whole, format_ = content == _encode(record), record.get("format")
        if is_whole and _is_newer(format_):
            raise UndecidedCheckpoint(_needs(FILE, format_))
        best = record["best"]
        manifest = Manifest(
            int(record["step"]),
            None if best is None else (str(best[0]), float(best[1])),
            {_inside(path): (int(size), str(checksum)) for path, (size, checksum) in record["files"].items()},
        )
    except (UndecidedCheckpoint, OSError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: {FILE}: cannot be read ({error!r})") from error
    if not is_whole or type(format_) is not int or format_ < FIRST_FORMAT:
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: {FILE}: another content")
    if not manifest.files:  # nothing of the checkpoint would be looked at
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: {FILE}: names no file")
    return manifest


def _is_newer(format_: Any) -> bool:
    return type(format_) is int and format_ > FORMAT


def _needs(name: str, format_: int) -> str:
    return f"{name}: format {format_}, and this version of clipjax knows up to {FORMAT}"


def _inside(path: str) -> str:
    """Return a path if it is one, and stays inside the step directory."""
    if pathlib.PurePosixPath(path).is_absolute() or ".." in pathlib.PurePosixPath(path).parts:
        raise ValueError(f"{path!r} leads out of the checkpoint")
    if b"\0" in os.fsencode(path):  # which refuses what is no text, too
        raise ValueError(f"{path!r} is no path")
    return path


def examine(
    directory: pathlib.Path,
    *,
    step: int | None = None,
    contents: bool = True,
    groups: Collection[str] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Verdict:
    """Compare a step directory with its manifest.

    Args:
        directory: of the step.
        step: that it must be of; None: any.
        contents: False compares the sizes of all files and the contents of the records, but reads no array.
        groups: of arrays whose contents are compared, besides the records; None: all.
        part: of the contents, (i, n): every n-th file from i; processes share the work so.
    """
    try:
        manifest = read(directory)
    except DamagedCheckpoint as error:
        return Verdict(State.DAMAGED, str(error).partition("damaged: ")[2])
    except UndecidedCheckpoint as error:
        return Verdict(State.NEWER, str(error))
    except FileNotFoundError:
        return _without_manifest(directory)
    except OSError as error:
        return _not_given(FILE, error)
    if step not in (None, manifest.step):
        return Verdict(State.DAMAGED, f"{FILE}: it is that of step {manifest.step}")
    for path, (size, _) in manifest.files.items():
        try:
            found = _patiently((directory / path).stat).st_size
        except OSError as error:
            return _not_given(path, error)
        if found != size:
            return Verdict(State.DAMAGED, f"{path}: {found} bytes instead of {size}")
    chosen = [
        path
        for path in manifest.files
        if path.endswith("/metadata") or (contents and (groups is None or path.partition("/")[0] in groups))
    ]
    if contents:
        chosen = sorted(chosen, key=lambda path: manifest.files[path], reverse=True)[part[0] :: part[1]]
    return _compare(directory, {path: manifest.files[path] for path in chosen})


def _compare(directory: pathlib.Path, files: Files) -> Verdict:
    try:
        found = hash_files(directory, files)
    except OSError as error:
        return _not_given(str(pathlib.Path(error.filename).relative_to(directory)), error)
    changed = sorted(path for path in files if found[path] != files[path])
    return Verdict(State.DAMAGED, f"{changed[0]}: another content") if changed else Verdict(State.VERIFIED)


def _without_manifest(directory: pathlib.Path) -> Verdict:
    try:
        data = _patiently(lambda: read_record(directory, "data"))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not isinstance(error, _GONE):
            return _not_given("data", error)
        return Verdict(State.INCOMPLETE, f"{FILE}: missing; data: {_reason(error)}")
    if isinstance(data, dict) and "format" not in data:
        return Verdict(State.UNVERIFIED)
    if isinstance(data, dict) and _is_newer(data["format"]):
        return Verdict(State.NEWER, _needs("data", data["format"]))
    return Verdict(State.INCOMPLETE, f"{FILE}: missing")


def _not_given(path: str, error: OSError) -> Verdict:
    """Return the verdict on a file that cannot be read: it is gone, or the storage does not give it."""
    return Verdict(State.DAMAGED if isinstance(error, _GONE) else State.UNREADABLE, f"{path}: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return reason_of(error)


def best_of(directory: pathlib.Path) -> tuple[str, float] | None:
    """Return the metric that chooses the best step and its value at this one; None if it was not measured."""
    try:
        return read(directory).best
    except FileNotFoundError:  # an older format, in which Orbax kept it
        old = directory / "metrics" / "metrics"
        try:
            metrics: Any = json.loads(read_bounded(old, _CHUNK_BYTES))
            return next(((str(name), float(value)) for name, value in metrics.items()), None)
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, OverflowError):
            return None
    except (UnusableCheckpoint, OSError):
        return None


def best_step(found: Mapping[int, tuple[str, float] | None], metric: str | None) -> int | None:
    """Return the best of some steps by a metric; one that was judged by another metric is none.

    Args:
        found: the metric and its value of each step.
        metric: that chooses; None: none does.
    """
    values = [(best[1], step) for step, best in found.items() if best is not None and best[0] == metric]
    return max((each for each in values if not math.isnan(each[0])), default=(0.0, None))[1]
