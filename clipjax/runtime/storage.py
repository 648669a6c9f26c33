"""Files wherever they lie: on a disk, or behind an address of an object store; read by range.

`objects.py` speaks with the object stores.

Reading order: `is_address`, `open_file`, `OpenFile`, `stream`, `read_small`, `require_writable`, `write`.
"""

import io
import os
import pathlib
import re
import secrets
from typing import Any, Protocol

from clipjax.runtime import files, objects
from clipjax.runtime.objects import FileChanged

__all__ = ["FileChanged", "OpenFile", "is_address", "open_file", "read_small", "require_writable", "stream", "write"]

_STREAM_BYTES = 2**22  # of a request
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # C:/ is a drive


def is_address(place: str) -> bool:
    """Return True for an address such as `gs://bucket/folder`, and False for a path on a disk."""
    return _SCHEME.match(place) is not None


class OpenFile(Protocol):
    """A file that is open for reading, by several threads at once.

    Attributes:
        size: bytes of the file when it was opened.
        version: another text whenever another program has written the file anew, as far as its storage tells.
    """

    size: int
    version: str

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes from an offset on, fewer only where the file ends.

        Raises:
            FileChanged: the file is not the one that was opened any more.
            OSError: the storage does not give them, after retries.
        """
        ...


def open_file(place: str, listed: objects.Listed | None = None) -> OpenFile:
    """Open a file for reading.

    Args:
        place: path, or address of an object.
        listed: size and version of an object, where they are known: a read finds out whether it still has them.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be opened.
        ValueError: the place is an address that nothing here opens.
    """
    return objects.ObjectFile(place, listed) if is_address(place) else _LocalFile(place)


def stream(place: str) -> io.BufferedReader:
    """Open a file that is read from its beginning to its end.

    Raises:
        OSError: it cannot be opened; or, later, read.
        ValueError: the place is an address that nothing here opens.
    """
    return io.BufferedReader(_Stream(open_file(place)), _STREAM_BYTES) if is_address(place) else open(place, "rb")  # noqa: PTH123


class _Stream(io.RawIOBase):
    def __init__(self, file: OpenFile):
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def read_small(place: pathlib.Path | str, max_bytes: int) -> bytes:
    """Return the content of a file or an object that should be small.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is larger than `max_bytes`, and not read then; or it is an address that nothing here opens.
    """
    if is_address(str(place)):
        return objects.read_bytes(str(place), max_bytes)
    return files.read_bounded(pathlib.Path(place), max_bytes)


def require_writable(place: pathlib.Path | str, option: str, *, makes_folder: bool = False) -> None:
    """Check that a file can be written, before the work whose result it is to hold.

    Args:
        place: path of the file, or address of the object.
        option: that names it, for the message.
        makes_folder: the folder of a path is made.

    Raises:
        ValueError: it cannot be written.
    """
    if isinstance(place, pathlib.Path):
        if makes_folder:
            files.require_writable(place.parent, option)
        files.require_file_writable(place, option)
        return
    probe = f"{place}.write-probe-{secrets.token_hex(8)}"
    try:
        objects.write_bytes(probe, b"")
        objects.delete(probe)
    except OSError as error:
        raise ValueError(f"{option}={place}: {error.strerror}; choose another place") from error


def write(place: pathlib.Path | str, content: str | bytes, *, sync: bool = False) -> None:
    """Write a file that is whole or absent at any time, or the one that was there before.

    Args:
        place: path or address.
        content: of the file.
        sync: return only when the disk has it; a store always has.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(place, str):
        objects.write_bytes(place, content.encode() if isinstance(content, str) else content)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(place, content, sync=sync)


class _LocalFile:
    """A file on a disk. It closes when its last reader lets go, so that a cache may drop it during a read."""

    def __init__(self, path: str):
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        state = os.fstat(self._descriptor)
        self._written = state.st_mtime_ns
        self.size = state.st_size
        self.version = f"{state.st_size}-{state.st_mtime_ns}"

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes from an offset on, without a file position, so that threads can share the descriptor."""
        data = os.pread(self._descriptor, size, offset)
        state = os.fstat(self._descriptor)
        if state.st_mtime_ns != self._written or state.st_size != self.size:
            raise FileChanged(None, "another program has written the file anew", self._path)
        return data
