"""Index files by the place of their shards: found, or built by one of several processes.

An index lies beside its shard in `.clipjax-index/`, or in a cache folder if nothing can be written there. That of a
shard in an object store lies there too, and each machine has a copy of it in its cache folder. Whoever builds one holds
a lock on its name, which ends with the process, so that many processes and machines that start together each take a
shard that nobody holds. What cannot be written anywhere is held in memory.

Reading order: `find`, `build`, `index_places`, `locked`.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import pathlib
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

from clipjax.data.index_file import DamagedIndex, IndexHeader, pack, read_header
from clipjax.data.index_table import IndexTable, open_table
from clipjax.data.tar_index import index_shard
from clipjax.runtime import objects
from clipjax.runtime.files import write_atomic
from clipjax.runtime.storage import OpenFile, is_address, open_file

FOLDER = ".clipjax-index"
"""Folder of index files, beside the shards."""

_SUFFIX = ".idx"
_CLOCK_TICK_NS = 20_000_000  # Linux's times of files are up to 10 ms late
_LONGEST_NAME = 200  # bytes; file systems take 255
_MAX_SHARED_BYTES = 2**30  # of an index in a store
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that have none
_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """An index that is there.

    Attributes:
        header: what it tells.
        place: path of the index file, or its content if it can be written nowhere.
    """

    header: IndexHeader
    place: str | bytes

    def table(self) -> IndexTable:
        """Open the whole of it.

        Raises:
            DamagedIndex: it cannot be used.
            OSError: it cannot be read.
        """
        return IndexTable(self.place) if isinstance(self.place, bytes) else open_table(self.place)


class Missing(NamedTuple):
    """A shard without an index: its path, its size, and what became of the index, `changed`, `damaged` or ``."""

    path: str
    size: int
    reason: str


def find(path: str, *, is_thorough: bool = False, listed: objects.Listed | None = None) -> Entry | Missing:
    """Return the index of a shard if it has one.

    Args:
        path: of the shard.
        is_thorough: also look at its places.
        listed: size and version of the shard, where they are known.

    Raises:
        OSError: the shard cannot be read.
    """
    if listed is not None:
        with contextlib.suppress(DamagedIndex, OSError):
            return _read_entry(index_places(path)[0], path, listed, is_thorough=is_thorough)
    file, reason = open_file(path), ""  # some stores list other versions than they give
    for place in index_places(path):
        try:
            return _read_entry(place, path, file, is_thorough=is_thorough)
        except DamagedIndex as error:
            reason = "changed" if isinstance(error, _OtherShard) else "damaged"
        except OSError:
            continue
    found = _fetch(path, file)
    return Missing(path, file.size, reason) if found is None else found


def _fetch(path: str, file: OpenFile | objects.Listed) -> Entry | None:
    """Return the index that lies beside a shard in its store, if it is that of the shard as it is now."""
    if not is_address(path):
        return None
    try:
        content = objects.read_bytes(shared_place(path), _MAX_SHARED_BYTES)
        header = IndexTable(content).header
    except (DamagedIndex, OSError, ValueError):
        return None
    if (header.name, header.size, header.version) != (_base(path), file.size, file.version):
        return None
    (place,) = index_places(path)
    try:
        make_folder(pathlib.Path(place).parent)
        write_atomic(pathlib.Path(place), content)
        return Entry(header, place)
    except OSError:  # nothing can be written on this machine
        return Entry(header, content)


def _share(path: str, content: bytes) -> None:
    """Write the index of a shard beside it in its store, for the other machines; some stores take nothing."""
    with contextlib.suppress(OSError):
        objects.write_bytes(shared_place(path), content)


def shared_place(path: str) -> str:
    """Return the address of the index of a shard beside it in its store."""
    folder, _, base = path.partition("?")[0].rpartition("/")
    return objects.join(folder, FOLDER, base + _SUFFIX)


class _OtherShard(DamagedIndex):
    """An index of another content of the shard."""


def _read_entry(place: str, path: str, file: OpenFile | objects.Listed, *, is_thorough: bool) -> Entry:
    if is_thorough:
        open_table(place)
    header = read_header(place)
    if header.name != _base(path):
        raise DamagedIndex("it is of another shard")
    if (header.size, header.version) != (file.size, file.version):
        raise _OtherShard("the shard has changed")
    if header.is_fresh:
        raise FileNotFoundError(errno.ENOENT, "the shard may have changed within a tick of the clock", place)
    return Entry(header, place)


def build(path: str, *, limit: int, may_wait: bool = True) -> Entry | None:
    """Build the index of a shard, unless another process does or has just done so.

    Args:
        path: of the shard.
        limit: largest image file that the source reads, in bytes.
        may_wait: wait for another process that builds it.

    Returns:
        The index; None if another process builds it and `may_wait` is False.

    Raises:
        ValueError: the shard is no tar.
        OSError: it cannot be read.
    """
    file, content = open_file(path), b""
    for place in index_places(path):
        with contextlib.ExitStack() as stack:
            try:
                make_folder(pathlib.Path(place).parent)
                stack.enter_context(locked(f"{place}.lock", may_wait=may_wait))
            except BlockingIOError:
                return None
            except OSError:
                continue
            with contextlib.suppress(DamagedIndex, OSError):
                return _read_entry(place, path, file, is_thorough=True)
            if (found := _fetch(path, file)) is not None:  # another machine has built it meanwhile
                return found
            content = content or _index(file, path, limit)
            if is_address(path):
                _share(path, content)
            try:
                write_atomic(pathlib.Path(place), content)
            except OSError:  # the disk may be full
                continue
            return Entry(read_header(place), place)
    content = content or _index(file, path, limit)
    return Entry(IndexTable(content).header, content)


def _index(file: OpenFile, path: str, limit: int) -> bytes:
    # Like git's racy files: a second write within a tick of the clock would leave size and time as they are.
    is_fresh = not is_address(path) and abs(time.time_ns() - os.stat(path).st_mtime_ns) < _CLOCK_TICK_NS  # noqa: PTH116
    try:
        return pack(index_shard(file, path), file, name=_base(path), limit=limit, is_fresh=is_fresh)
    except OSError as error:  # some name no file
        raise OSError(f"{path} cannot be indexed: {error.strerror or error}") from error


def index_places(path: str) -> list[str]:
    """Return the paths where the index of a shard may lie, the best first."""
    whole = path if is_address(path) else os.path.abspath(path)  # noqa: PTH100
    cached = cache_folder() / (hashlib.sha256(os.fsencode(whole)).hexdigest()[:40] + _SUFFIX)
    if is_address(path):
        return [str(cached)]
    folder, base = os.path.split(whole)
    if len(os.fsencode(base)) > _LONGEST_NAME:
        base = hashlib.sha256(os.fsencode(base)).hexdigest()[:40]
    return [os.path.join(folder, FOLDER, base + _SUFFIX), str(cached)]  # noqa: PTH118


def cache_folder() -> pathlib.Path:
    """Return the folder of indexes of shards that lie where nothing can be written."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path(os.environ.get("HOME") or "~").expanduser() / ".cache"
    return pathlib.Path(home) / "clipjax" / "index"


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def make_folder(folder: pathlib.Path) -> None:
    """Make a folder of index files.

    Raises:
        OSError: nothing can be written there.
    """
    if folder.name == FOLDER:
        # Root could write where nobody may, and a link would lead anywhere.
        if not folder.parent.stat().st_mode & 0o222:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(path: str, *, may_wait: bool) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends; its file goes away.

    Raises:
        BlockingIOError: another process holds it, and `may_wait` is False.
        OSError: the file cannot be made.
    """
    descriptor = _take_lock(path, may_wait=may_wait)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108
        os.close(descriptor)


def _take_lock(path: str, *, may_wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            _lock(descriptor, may_wait=may_wait)
            # Whoever held it before has removed the file: the lock of a file that has no name keeps nobody out.
            is_current = os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor))  # noqa: PTH110, PTH116
        except FileNotFoundError:
            is_current = False
        except BaseException:
            os.close(descriptor)
            raise
        if is_current:
            return descriptor
        os.close(descriptor)


def _lock(descriptor: int, *, may_wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if may_wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # without locks, some work is done twice
            raise
