"""One owner for a workdir: process 0 of a run holds an exclusive flock on `WORKDIR/.owner` until it ends.

The kernel drops the lock when the process ends, in any way, so the file that a killed run leaves blocks nobody. The
folder itself is locked too, where its file system can: somebody may delete the file. A lock on the folder alone, as
that of a `flock` around the command, keeps nobody out of a workdir that was used before.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from clipjax.runtime.files import read_bounded

FILE = ".owner"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_MAX_BYTES = 65_536
_MAX_SHOWN = 300  # letters of the holder's command
_LOST = (
    "another process holds this folder, and there is no .owner in it that says which: a run whose file somebody has "
    "deleted, or a `flock` on the folder; wait for it, stop it, or use another workdir"
)
_ASKING_SECONDS = 0.2  # a start that only asks (`refuse_held`) has the lock for a moment
_WRITING_SECONDS = 0.5  # between a holder's lock and its content in the file
_held: dict[pathlib.Path, tuple[int, ...]] = {}


def take(workdir: pathlib.Path, option: str = "--workdir", place: str = "") -> str:
    """Make a workdir, and hold it for this process; a process may take what it holds.

    Args:
        workdir: to hold.
        option: that names it, for messages.
        place: that it is a local folder of, for messages; empty: of none.

    Returns:
        A warning for the user if the file system has no locks, else an empty text.

    Raises:
        ValueError: another process holds it, or it cannot be written to.
    """
    place = f"{place} (here {workdir})" if place else str(workdir)
    path = workdir.resolve() / FILE
    if path in _held:
        return ""
    opened: list[int] = []
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        warning = _open_locked(path, workdir, opened)
    except BlockingIOError:
        _close_all(opened)
        holder = _holder(path) if path.exists() else _LOST
        raise ValueError(f"{option}={place}: {holder}") from None
    except OSError as error:
        _close_all(opened)
        raise ValueError(f"{option}={place}: cannot be written to ({error.strerror}); choose another") from error
    descriptor, descriptors = opened[-1], tuple(opened)
    _held[path] = descriptors
    # Workers are started by exec, which closes the descriptor; one that is forked would keep the lock after us.
    os.register_at_fork(after_in_child=lambda: _close(path, descriptors))
    content = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
    }
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its content
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(content).encode() + b"\n", 0)
    return warning


def refuse_held(workdir: pathlib.Path, option: str = "--workdir") -> None:
    """Refuse a workdir that another process holds, without taking it; write nothing.

    Raises:
        ValueError: another process holds it.
    """
    path = workdir.resolve() / FILE
    if path in _held:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path if path.exists() else path.parent, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{option}={workdir}: {_holder(path) if path.exists() else _LOST}") from None
        finally:
            os.close(descriptor)


def release(workdir: pathlib.Path, *, delete: bool = False) -> None:
    """Give a workdir up, if this process holds it; also delete the file, if it was not there before."""
    path = workdir.resolve() / FILE
    if path in _held:
        if delete:
            path.unlink(missing_ok=True)
        _close(path, _held[path])


def _close(path: pathlib.Path, descriptors: tuple[int, ...]) -> None:
    if _held.get(path) == descriptors:
        del _held[path]
        _close_all(descriptors)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _open_locked(path: pathlib.Path, workdir: pathlib.Path, opened: list[int]) -> str:
    """Open and lock the folder, then the file in it, which is made if nobody holds the folder.

    Args:
        path: of the file.
        workdir: for messages.
        opened: gets the descriptors, that of the file as the last one.

    Returns:
        A warning for the user if the file system has no locks, else an empty text.

    Raises:
        BlockingIOError: another process holds the file, or the folder without one.
    """
    while True:
        free = _lock_folder(path.parent, opened)
        if not free and not path.exists():
            raise BlockingIOError
        opened.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644))
        warning = _lock(opened[-1], workdir)
        if _is_file_at(opened[-1], path):
            return warning
        _close_all(opened)  # its holder gave the workdir up, and deleted the file
        opened.clear()


def _lock_folder(folder: pathlib.Path, opened: list[int]) -> bool:
    """Lock a folder, where that is possible; return False if another process holds it.

    Args:
        folder: to lock.
        opened: gets the descriptor.
    """
    try:
        opened.append(os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
        _lock(opened[-1], folder)
    except BlockingIOError:
        return False
    except OSError:  # it cannot be listed, or its file system locks files only
        return True
    return True


def _lock(descriptor: int, workdir: pathlib.Path) -> str:
    """Lock a file, or return a warning that its file system cannot.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    deadline = time.monotonic() + _ASKING_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return (
                f"the file system of {workdir} has no locks ({error.strerror}): a second run on this workdir would not "
                "be noticed, so start only one"
            )


def _is_file_at(descriptor: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: pathlib.Path) -> str:
    """Return who holds a workdir, in words, and what to do about it."""
    deadline = time.monotonic() + _WRITING_SECONDS
    while True:
        try:
            return describe(json.loads(read_bounded(path, _MAX_BYTES)))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            if time.monotonic() > deadline:
                return (
                    f"another process holds it, and {path} does not say which; wait for it, stop it, or use another "
                    "workdir"
                )
            time.sleep(0.05)


def describe(holder: Any) -> str:
    """Return who holds a workdir, by the content of its file, in words, and what to do about it.

    Raises:
        LookupError, TypeError: the content is another one.
    """
    host, pid, since, command = (
        "".join(filter(str.isprintable, str(holder[name])))[:_MAX_SHOWN] for name in ("host", "pid", "since", "command")
    )
    return (
        f"another run holds it: process {pid} on host {host}, since {since}, command `{command}`; wait for it, stop it "
        f"(`kill {pid}` on {host} lets it save), or use another workdir"
    )
