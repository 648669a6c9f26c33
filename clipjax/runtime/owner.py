"""One owner for a workdir: process 0 of a run holds an exclusive flock on `WORKDIR/.owner` until it ends.

The kernel drops the lock when the process ends, in any way, so the file that a killed run leaves blocks nobody. The
folder itself is locked too, where its file system can: somebody may delete the file.
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

from clipjax.runtime.files import read_bounded

FILE = ".owner"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_MAX_BYTES = 65_536
_MAX_SHOWN = 300  # letters of the holder's command
_ASKING_SECONDS = 0.2  # a start that only asks (`refuse_held`) has the lock for a moment
_WRITING_SECONDS = 0.5  # between a holder's lock and its content in the file
_held: dict[pathlib.Path, tuple[int, ...]] = {}


def take(workdir: pathlib.Path, option: str = "--workdir") -> str:
    """Make a workdir, and hold it for this process; a process may take what it holds.

    Args:
        workdir: to hold.
        option: that names it, for messages.

    Returns:
        A warning for the user if the file system has no locks, else an empty text.

    Raises:
        ValueError: another process holds it, or it cannot be written to.
    """
    path = workdir.resolve() / FILE
    if path in _held:
        return ""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                warning = _lock(descriptor, workdir)
                _lock_folder(folder, workdir)
            except BlockingIOError:
                _close_all(descriptor, folder)
                raise ValueError(f"{option}={workdir}: {_holder(path)}") from None
            if _is_file_at(descriptor, path):
                break
            _close_all(descriptor, folder)  # its holder gave the workdir up, and deleted the file
    except OSError as error:
        raise ValueError(f"{option}={workdir}: cannot be written to ({error.strerror}); choose another") from error
    _held[path] = (descriptor, folder)
    # Workers are started by exec, which closes the descriptor; one that is forked would keep the lock after us.
    os.register_at_fork(after_in_child=lambda: _close(path, (descriptor, folder)))
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
    for place in (path, path.parent):
        with contextlib.suppress(OSError):
            descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{option}={workdir}: {_holder(path)}") from None
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
        _close_all(*descriptors)


def _close_all(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _lock_folder(descriptor: int, workdir: pathlib.Path) -> None:
    """Lock a folder, where its file system can lock one (NFS cannot).

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        _lock(descriptor, workdir)
    except BlockingIOError:
        raise
    except OSError:
        return


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
            found = json.loads(read_bounded(path, _MAX_BYTES))
            host, pid, since, command = (
                "".join(filter(str.isprintable, str(found[name])))[:_MAX_SHOWN]
                for name in ("host", "pid", "since", "command")
            )
            break
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            if time.monotonic() > deadline:
                return (
                    f"another process holds it, and {path} does not say which; wait for it, stop it, or use another "
                    "workdir"
                )
            time.sleep(0.05)
    return (
        f"another run holds it: process {pid} on host {host}, since {since}, command `{command}`; wait for it, stop it "
        f"(`kill {pid}` on {host} lets it save), or use another workdir"
    )
