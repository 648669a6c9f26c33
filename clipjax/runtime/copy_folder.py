"""The folder of `data.cache_dir`: copies of objects, their digests, and the room that they may take.

For each object, by a hash of its address, version and size, there is `HASH.copy`, `HASH.json` (what it is a copy of,
with the digest; while it is being made, of how much), `HASH.lock`, and `HASH.part` while it is being made. A source
whose copies must stay has a tree of links to them in `KEY.files` (`kept_files.py`).

Reading order: `Copy` (one object), `make_room` (all of them), `locked`.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from clipjax.runtime.files import read_bounded, write_atomic

PART_BYTES = 16 * 2**20
"""Bytes of a request; half a copy is known up to the last whole one."""

TREE = ".files"
"""Ending of the folders of links."""

_MAX_RECORD_BYTES = 2**16
_TREE_NAME = re.compile(rf"[0-9a-f]{{32}}{re.escape(TREE)}")
_ROOM_LOCK = "room.lock"


@dataclass(frozen=True)
class Copy:
    """The place of the copy of an object, which may be there or not.

    Attributes:
        folder: of all copies.
        place: address of the object.
        version: of the object.
        size: bytes of the object.
    """

    folder: pathlib.Path
    place: str
    version: str
    size: int

    @property
    def name(self) -> str:
        """Beginning of the names of its files."""
        return xxhash.xxh3_128_hexdigest(f"{self.place} {self.version} {self.size}".encode())

    def path(self, kind: str) -> pathlib.Path:
        """Return the path of its file of a kind: `copy`, `json`, `lock` or `part`."""
        return self.folder / f"{self.name}.{kind}"

    def recorded_digest(self) -> str | None:
        """Return the digest of the copy; None if none has been finished."""
        record = self._record()
        return None if record is None or "done" in record else record["digest"]

    def is_there(self) -> bool:
        """Return True if there is a finished copy; its bytes are not looked at."""
        with contextlib.suppress(OSError):
            return self.recorded_digest() is not None and self.path("copy").stat().st_size == self.size
        return False

    def is_whole(self, on_part: Callable[[int], None] = lambda size: None) -> bool:
        """Return True if there is a copy with its digest, which costs reading it; `on_part` gets sizes of its parts."""
        digest = self.recorded_digest()
        if digest is None:
            return False
        try:
            return digest_of(self.path("copy"), on_part) == digest
        except FileNotFoundError:
            return False

    def reserve(self) -> None:
        """Let the others see the room that the copy is going to take.

        Raises:
            OSError: the disk does not let it.
        """
        with self.path("part").open("ab") as part:
            part.truncate(self.size)

    def make(self, read: Callable[[int, int], bytes], on_part: Callable[[int], None] = lambda size: None) -> None:
        """Make the copy; half of one that is left of a killed process is gone on with, if it has its digest.

        Where it fails, that half stays, for a later call or `discard`.

        Args:
            read: gives the bytes of the object from an offset on.
            on_part: gets sizes of parts that lie on the disk; what it raises ends the copy.

        Raises:
            OSError: the object cannot be read, or the disk does not take or keep it.
        """
        total, start = self._find_half(on_part)
        record = {"address": self.place, "version": self.version, "size": self.size}
        with self.path("part").open("r+b" if start else "wb") as part:
            part.truncate(self.size)  # others see what it is going to take
            part.seek(start)
            for offset in range(start, self.size, PART_BYTES):
                content = read(offset, PART_BYTES)
                if len(content) != min(PART_BYTES, self.size - offset):
                    raise OSError(errno.EIO, "the store gave a part of an object")
                total.update(content)
                part.write(content)
                part.flush()
                done = record | {"done": offset + len(content), "digest": total.hexdigest()}
                write_atomic(self.path("json"), json.dumps(done))
                on_part(len(content))
        if digest_of(self.path("part")) != total.hexdigest():
            self.discard()
            raise OSError(errno.EIO, "the disk gives other bytes than it was given")
        self.path("part").replace(self.path("copy"))
        write_atomic(self.path("json"), json.dumps(record | {"digest": total.hexdigest()}))

    def discard(self) -> None:
        """Delete what there is of a copy that is not finished."""
        self.path("json").unlink(missing_ok=True)
        self.path("part").unlink(missing_ok=True)

    def _find_half(self, on_part: Callable[[int], None]) -> tuple[Any, int]:
        """Return digest and size of the part that lies on the disk already; 0 if it is not what was written."""
        record, total = self._record() or {}, xxhash.xxh3_128()
        done = record.get("done")
        if type(done) is int and 0 < done <= self.size and (done % PART_BYTES == 0 or done == self.size):
            sizes: list[int] = []
            with contextlib.suppress(FileNotFoundError), self.path("part").open("rb") as part:
                while sum(sizes) < done and (content := part.read(min(PART_BYTES, done - sum(sizes)))):
                    total.update(content)
                    sizes.append(len(content))
            if sum(sizes) == done and total.hexdigest() == record["digest"]:
                for size in sizes:
                    on_part(size)
                return total, done
        return xxhash.xxh3_128(), 0

    def _record(self) -> dict[str, Any] | None:
        try:
            record = json.loads(read_bounded(self.path("json"), _MAX_RECORD_BYTES))
            known = (record["address"], record["version"], record["size"])
            is_ours = known == (self.place, self.version, self.size) and isinstance(record["digest"], str)
            return record if is_ours else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def digest_of(path: pathlib.Path, on_part: Callable[[int], None] = lambda size: None) -> str:
    """Return the digest of what lies in a file; `on_part` gets sizes of parts that have been read."""
    total = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while part := file.read(PART_BYTES):
            total.update(part)
            on_part(len(part))
    return total.hexdigest()


def recorded_places(folder: pathlib.Path) -> dict[str, str]:
    """Return the version of a copy by the address of its object, for all objects that there are finished copies of."""
    found: dict[str, str] = {}
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(read_bounded(path, _MAX_RECORD_BYTES))
            if "done" not in record:
                found[str(record["address"])] = str(record["version"])
    return found


@contextlib.contextmanager
def room_lock(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of all processes of the machine on the room in a folder: wait for it, and keep it a short time."""
    descriptor = os.open(folder / _ROOM_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_room(
    folder: pathlib.Path, size: int, max_bytes: int, *, own: Collection[str], before: float = float("inf")
) -> int:
    """Delete copies that are not in use until others of a size fit.

    Args:
        folder: of the copies.
        size: bytes of the copies that are wanted.
        max_bytes: of all copies together.
        own: names of the copies that are wanted: they stay, and are counted in `size`.
        before: seconds of the clock; copies that have been used later stay.

    Returns:
        Bytes for which there is no room; 0 or less: they fit.
    """
    found: dict[pathlib.Path, tuple[float, int]] = {}
    for path in folder.iterdir():
        if path.suffix in (".copy", ".part") and path.stem not in own:
            with contextlib.suppress(FileNotFoundError):
                found[path] = (path.with_suffix(".lock").stat().st_mtime, path.stat().st_size)
    over = sum(each for _, each in found.values()) + size - max_bytes
    if over <= 0:
        return over
    held = _held_names(folder)
    for path, (used, each) in sorted(found.items(), key=lambda item: item[1]):
        if over <= 0 or used >= before:
            break
        if path.stem in held:
            continue
        with locked(path.with_suffix(".lock")) as is_ours:
            if is_ours:
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)  # who reads it keeps what is open
                over -= each
    _drop_broken_trees(folder)
    return over


def _trees(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in folder.glob(f"*{TREE}") if _TREE_NAME.fullmatch(path.name) and path.is_dir())


def links_of(tree: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the links in a tree."""
    for inside, _, names in os.walk(tree):
        for name in names:
            path = pathlib.Path(inside, name)
            if path.is_symlink():
                yield path


def _held_names(folder: pathlib.Path) -> set[str]:
    """Return the names of the copies that trees in use link to."""
    held: set[str] = set()
    for tree in _trees(folder):
        if not _is_free(tree):
            held.update(link.readlink().stem for link in links_of(tree))
    return held


def _is_free(tree: pathlib.Path) -> bool:
    """Return True for a tree that nobody makes or uses; who holds its first lock may look at the second one."""
    with locked(tree.with_suffix(".lock")) as is_made_by_nobody:
        if not is_made_by_nobody:
            return False
        with locked(tree.with_suffix(".use")) as is_used_by_nobody:
            return is_used_by_nobody


def _drop_broken_trees(folder: pathlib.Path) -> None:
    """Delete trees in use by nobody that have lost a copy."""
    for tree in _trees(folder):
        with locked(tree.with_suffix(".lock")) as is_ours:
            if is_ours and not all(link.exists() for link in links_of(tree)):
                with locked(tree.with_suffix(".use")) as is_free:
                    if is_free:
                        shutil.rmtree(tree, ignore_errors=True)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[bool]:
    """Hold a lock for all processes of the machine; the value tells whether it is free. A killed holder holds none."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
