"""Files: written whole or not at all, read up to a limit, and places that can be written to."""

import contextlib
import os
import pathlib


def write_atomic(path: pathlib.Path, content: str | bytes, *, sync: bool = False) -> None:
    """Write a file that is whole or absent at any time, or the one that was there before; text is UTF-8.

    Args:
        path: of the file; its folder exists.
        content: all of it.
        sync: also wait until it is on the disk, so that a crash of the machine cannot empty it.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # what is left would only take space on a full disk
            temporary.unlink()
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Wait until the names in a folder are on the disk.

    Raises:
        OSError: the folder cannot be read, or the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: pathlib.Path, max_bytes: int) -> bytes:
    """Return the content of a file that should be small.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `max_bytes`; of such a file no more than that is read.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{str(path)!r} is larger than {max_bytes} bytes")
    return content


def require_writable(folder: pathlib.Path, option: str = "--workdir") -> None:
    """Make a folder that files can be written to.

    Args:
        folder: to make, with all above it.
        option: that names it, for the message.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.write_bytes(b"")
    except OSError as error:
        raise ValueError(f"{option}={folder}: cannot be written to ({error.strerror}); choose another") from error
    with contextlib.suppress(OSError):
        probe.unlink()


def require_file_writable(path: pathlib.Path, option: str) -> None:
    """Check that a file can be written, before the work whose result it is to hold.

    Raises:
        ValueError: there is no such folder, the path is one, or it cannot be written.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{option}={path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ValueError(f"{option}={path} is a folder; name a file in it")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{option}={path}: cannot be written to ({error.strerror}); choose another") from error
    if not existed:
        path.unlink(missing_ok=True)  # another process may look at the same time


def reason_of(error: Exception) -> str:
    """Return an error in words; of one of the operating system what that says, without the file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or repr(error)
