"""The folder of packed shards, on a disk or of an object store, with a manifest of those that are finished.

A shard is written under another name, and gets its own when it is whole. For a store it is written into a temporary
folder, and sent by a thread while the next one is written; once the store has all of it, the manifest there is written
anew, on condition that nobody else has. So a kill at any moment leaves no shard in the manifest that is not whole.

Reading order: `Output`, `check_store` (before the source is read), `open_output`, `FolderOutput`, `StoreOutput`.
"""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent import futures
from typing import Any, Protocol

from clipjax.data.index_store import locked
from clipjax.data.pack_manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PackedShard,
    manifest_line,
    manifest_text,
    parse_manifest,
)
from clipjax.runtime import objects, staging
from clipjax.runtime.connections import split
from clipjax.runtime.files import read_bounded, require_writable, sync_folder, write_atomic

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""

_OURS = re.compile(r"(\.partial-)?[0-9]{5,}\.(tar|array_record)|\.clipjax-index|manifest\.jsonl(\.tmp)?")
_PROBE = re.compile(r"\.write-probe-[0-9a-f]{16}")


class Output(Protocol):
    """A folder of shards.

    Attributes:
        shards: that are written.
        folder: on a disk, in which they are written.
    """

    shards: list[PackedShard]
    folder: pathlib.Path

    @property
    def finished(self) -> list[PackedShard]:
        """Shards that lie where they belong, and are in the manifest."""
        ...

    def add(self, shard: PackedShard, partial: pathlib.Path) -> None:
        """Take a shard that is whole.

        Args:
            shard: its line of the manifest.
            partial: path in `folder` at which it was written; nothing lies there any more.

        Raises:
            OSError: the disk does not take it.
            ValueError: the store does not take it, or the one before.
        """
        ...

    def finish(self) -> None:
        """Wait until all shards are finished.

        Raises:
            ValueError: the store does not take one.
        """
        ...

    def full_disk(self, error: OSError) -> ValueError:
        """Return an error of `FULL` in words for a person."""
        ...


def check_store(place: str) -> None:
    """Refuse a folder of a store that holds something else or takes nothing, before any work.

    Raises:
        ValueError: it does.
    """
    try:
        if split(place)[2] and objects.exists(place):
            raise ValueError(f"--output={place} is an object; name a folder")
        probes = [name for name in _list(place) if _PROBE.fullmatch(name)]
        probes.append(f".write-probe-{secrets.token_hex(8)}")
        objects.write_bytes(objects.join(place, probes[-1]), b"")
        for name in probes:
            objects.delete(objects.join(place, name))
    except OSError as error:
        raise _unusable(place, error) from error


@contextlib.contextmanager
def open_output(place: pathlib.Path | str, about: Mapping[str, Any]) -> Iterator[Output]:
    """Open a folder of shards, which is new or holds some of the same source.

    Args:
        place: path, or address of a folder of a store.
        about: the source and the choices, for the first line of the manifest.

    Raises:
        ValueError: it holds something else, cannot be written to, or another process writes there.
    """
    if isinstance(place, pathlib.Path):
        yield FolderOutput(place, about)
        return
    with _temporary_folder(place) as folder:
        output = StoreOutput(place, about, folder)
        try:
            yield output
        finally:
            output.close()


def _refuse_others(place: pathlib.Path | str, names: Collection[str]) -> None:
    """Refuse a folder by the names of the files and folders in it.

    Raises:
        ValueError: one is of something else.
    """
    others = sorted(name for name in names if not _OURS.fullmatch(name))
    if not others and MANIFEST not in names:
        others = sorted(name for name in names if name[0].isdigit())
    if others:
        raise ValueError(f"--output={place} holds {others[0]!r}, which is of something else; name an empty folder")


class FolderOutput:
    """A folder of shards on a disk; see `Output`.

    Raises:
        ValueError: it holds something else, or cannot be written to.
    """

    def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]) -> None:
        self.folder, self._path = folder, folder / MANIFEST
        require_writable(folder, "--output")
        _refuse_others(folder, [entry.name for entry in folder.iterdir()])
        for left in folder.glob(".partial-*"):
            left.unlink()
        content = read_bounded(self._path, MAX_MANIFEST_BYTES) if self._path.exists() else None
        self.shards = parse_manifest(folder, content, about, self._size_of)
        write_atomic(self._path, manifest_text(about, self.shards), sync=True)

    def _size_of(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except OSError:
            return None

    @property
    def finished(self) -> list[PackedShard]:
        """All shards: each is finished when it is added."""
        return self.shards

    def add(self, shard: PackedShard, partial: pathlib.Path) -> None:
        """Give a shard its name, and note it.

        Raises:
            OSError: the disk does not take it.
        """
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(self.folder / shard.shard)
        sync_folder(self.folder)
        self.shards.append(shard)
        with self._path.open("a") as file:
            file.write(manifest_line(shard))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Do nothing: each shard is finished when it is added."""

    def full_disk(self, error: OSError) -> ValueError:
        """Return the error in words, with the remedy."""
        return ValueError(
            f"--output={self.folder}: nothing more can be written there ({error.strerror}); {len(self.shards)} shards "
            "are finished and stay: free some space, and the same command goes on from there"
        )


class StoreOutput:
    """A folder of shards of a store; see `Output`. At most two lie on the disk: one is written, one is sent.

    Args:
        place: address of the folder.
        about: first line of the manifest.
        folder: an empty one on a disk.

    Raises:
        ValueError: the folder of the store holds something else, or cannot be written to.
    """

    def __init__(self, place: str, about: Mapping[str, Any], folder: pathlib.Path) -> None:
        self.folder, self._place, self._manifest = folder, place, objects.join(place, MANIFEST)
        content, self._version = None, None
        try:
            sizes = _list(place)
            with contextlib.suppress(FileNotFoundError):
                content, self._version = objects.read_versioned(self._manifest, MAX_MANIFEST_BYTES)
            self.shards = parse_manifest(place, content, about, sizes.get)
            self._content = manifest_text(about, self.shards).encode()
            self._write_manifest(self._content)
        except OSError as error:
            raise _unusable(place, error) from error
        self._num_finished = len(self.shards)
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._sending: futures.Future[None] | None = None

    @property
    def finished(self) -> list[PackedShard]:
        """Shards that are whole on the store, and in its manifest."""
        return self.shards[: self._num_finished]

    def add(self, shard: PackedShard, partial: pathlib.Path) -> None:
        """Begin to send a shard, once the one before is finished.

        Raises:
            OSError: the disk fails.
            ValueError: the store does not take the one before.
        """
        self.finish()
        path = partial.replace(self.folder / shard.shard)
        self.shards.append(shard)
        self._sending = self._pool.submit(self._send, shard, path)

    def _send(self, shard: PackedShard, path: pathlib.Path) -> None:
        """Send a shard, and note it in the manifest once the store has all of it; delete the file in any case."""
        address = objects.join(self._place, shard.shard)
        try:
            objects.write_file(address, path)
            if (size := objects.ObjectFile(address).size) != shard.bytes:
                raise OSError(errno.EIO, f"the store has {size} of the {shard.bytes} bytes of {shard.shard}", address)
            self._write_manifest(self._content + manifest_line(shard).encode())
            self._num_finished += 1
        finally:
            path.unlink(missing_ok=True)

    def _write_manifest(self, content: bytes) -> None:
        """Write the manifest if it is still the one that this process has read or written.

        Raises:
            ValueError: it is not.
            OSError: the store does not take it.
        """
        if self._version is None:
            version = objects.create(self._manifest, content)
        else:
            version = objects.replace(self._manifest, content, self._version)
        if version is None:
            found, version = objects.read_versioned(self._manifest, MAX_MANIFEST_BYTES)
            if found != content:  # else only an answer was lost
                raise ValueError(
                    f"--output={self._place}: another process has written its {MANIFEST} meanwhile; let only one "
                    "command write there: what is finished stays, and the same command goes on from there"
                )
        self._version, self._content = version, content

    def finish(self) -> None:
        """Wait until the shard that is being sent is finished.

        Raises:
            ValueError: the store does not take it.
        """
        sending, self._sending = self._sending, None
        try:
            if sending is not None:
                sending.result()
        except OSError as error:
            raise ValueError(
                f"--output={self._place}: {error.strerror or error}; {self._num_finished} shards are finished and "
                "stay: the same command goes on from there"
            ) from error

    def full_disk(self, error: OSError) -> ValueError:
        """Return the error in words, with the remedy."""
        return ValueError(
            f"--output={self._place}: a shard is written in {self.folder.parent} before it is sent, and nothing more "
            f"can be written there ({error.strerror}); {self._num_finished} shards are finished and stay: free some "
            f"space, or set {staging.VARIABLE} to another folder, and the same command goes on from there"
        )

    def close(self) -> None:
        """Wait for the shard that is being sent, whatever comes of it."""
        self._pool.shutdown()


def _list(place: str) -> dict[str, int]:
    """Return the bytes of the objects in a folder of a store by name, those in the folder of indexes left out.

    Raises:
        ValueError: one is of something else.
        OSError: the store does not tell.
    """
    listed = objects.list_folder(place)
    _refuse_others(place, {path.partition("/")[0] for path in listed if not _PROBE.fullmatch(path)})
    return {path: each.size for path, each in listed.items() if "/" not in path}


def _unusable(place: str, error: OSError) -> ValueError:
    return ValueError(f"--output={place}: {error.strerror or error}; choose another place")


@contextlib.contextmanager
def _temporary_folder(place: str) -> Iterator[pathlib.Path]:
    """Give an empty folder on a disk, which is deleted again: after a kill, by the next start of the same command.

    Raises:
        ValueError: it cannot be made, or another process has it.
    """
    folder = staging.folder_of(objects.join(place, MANIFEST))  # never that of a workdir of this address
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(f"{folder}.lock", may_wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"--output={place}: another process on this machine writes there; wait for it, or stop it"
            ) from error
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
