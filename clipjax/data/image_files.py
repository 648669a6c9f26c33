"""Image files that tables and folders name, read only where they may be.

Names come from data, so they are no trusted paths: a file is opened only inside of the allowed folders, with links
resolved, and only if it is a regular file of a size that an image may have. A folder may be an address of an object
store or web server; names then lead to nothing outside of it, and to no other server.
"""

import errno
import os
import posixpath
import stat
import urllib.parse
from collections.abc import Sequence

from clipjax.data.sample import BadSample
from clipjax.runtime import objects
from clipjax.runtime.connections import NO_OBJECT, WEB, split
from clipjax.runtime.storage import is_address, read_small

IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
     ".mpo", ".heic", ".heif", ".jxl")
)  # fmt: skip
"""Endings of files that are taken for images; what they are is decided by their content."""

_MAX_PIXEL_BYTES = 8  # four channels of 16 bits
_MAX_OVERHEAD_BYTES = 2**20  # profiles, thumbnails
_MAX_KEY_BYTES = 1024  # of an object, in all stores
_ABSENT = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENXIO,
    errno.EINVAL,
}  # fmt: skip
"""Errors that tell of one file; others, such as of a broken disk, stop the run."""


def max_image_bytes(max_pixels: int) -> int:
    """Return the size above which a file is not even read: no image of so many pixels needs more."""
    return _MAX_PIXEL_BYTES * max_pixels + _MAX_OVERHEAD_BYTES


class ImageFiles:
    """Files in one or several folders.

    Args:
        folders: paths or addresses; relative names start at the first one; files must lie inside any of them.
        max_bytes: limit of a file.
    """

    def __init__(self, folders: Sequence[str], *, max_bytes: int):
        self._folders = [folder if is_address(folder) else os.path.realpath(folder) for folder in folders]
        self._max_bytes = max_bytes
        self._disks = {folder: _disk_of(folder) for folder in self._folders if not is_address(folder)}

    @property
    def folders(self) -> list[str]:
        """The folders, with links resolved."""
        return list(self._folders)

    def find(self, name: str) -> str:
        """Return the path of a file, with links resolved; or its address.

        Raises:
            BadSample: `missing_image` if it lies outside of the folders, or has no possible name.
        """
        base = self._folders[0]
        try:
            if is_address(name) or (is_address(base) and not name.startswith("/")):
                return self._find_object(name if is_address(name) else objects.join(base, _escaped(name, base)))
            path = os.path.realpath(os.path.join(base, name))  # noqa: PTH118
            if any(os.path.commonpath([path, folder]) == folder for folder in self._disks):
                return path
        except ValueError:  # a null character, or a lone surrogate
            pass
        except OSError as error:
            _raise_unless_absent(error)
        raise BadSample("missing_image")

    def _find_object(self, address: str) -> str:
        """Return an address without steps up; raise ValueError if it is in none of the folders."""
        scheme, bucket, key = split(address)
        key = posixpath.normpath(key)
        if len(key.encode()) > _MAX_KEY_BYTES or not key.isprintable() or f"{key}/".startswith("../"):
            raise ValueError
        for folder in filter(is_address, self._folders):
            *server, root = split(folder)
            inside = f"{root.rstrip('/')}/" if root else ""
            if server == [scheme, bucket] and key.startswith(inside):
                place = f"{scheme}://{bucket}"
                return objects.join(place, _escaped(key, place))
        raise ValueError

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read a file.

        Args:
            name: path, relative or absolute.
            max_bytes: limit of this file; that of all images if None.

        Raises:
            BadSample: `missing_image` if there is none that may be read, or `image_too_large`.
            OSError: the disk or the store fails.
        """
        path = self.find(name)
        max_bytes = self._max_bytes if max_bytes is None else max_bytes
        if is_address(path):
            return _read_object(path, max_bytes)
        try:
            return _read_regular(path, max_bytes)
        except OSError as error:
            _raise_unless_absent(error)
            self._raise_if_away()
            raise BadSample("missing_image") from None

    def _raise_if_away(self) -> None:
        """Raise an error if a folder is not where it was: with its disk away, all of its images seem to be missing."""
        for folder, disk in self._disks.items():
            if disk is not None and _disk_of(folder) != disk:
                raise OSError(errno.ESTALE, "the folder is gone, or lies on another disk than at the start", folder)


def _disk_of(folder: str) -> int | None:
    """Return the number of the disk on which a folder lies; None if there is no such folder."""
    try:
        return os.stat(folder).st_dev  # noqa: PTH116
    except OSError:
        return None


def _escaped(name: str, base: str) -> str:
    """Return a name as it stands in an address that begins like `base`."""
    return urllib.parse.quote(name) if split(base)[0] in WEB else name


def _read_object(address: str, max_bytes: int) -> bytes:
    try:
        return read_small(address, max_bytes)
    except FileNotFoundError as error:
        if error.strerror != NO_OBJECT:  # no bucket
            raise
        raise BadSample("missing_image") from None
    except ValueError:
        raise BadSample("image_too_large") from None


def _raise_unless_absent(error: OSError) -> None:
    if error.errno not in _ABSENT:
        raise error


def _read_regular(path: str, max_bytes: int) -> bytes:
    # Not to wait for the other end of a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise BadSample("missing_image")
        if state.st_size > max_bytes:
            raise BadSample("image_too_large")
        return file.read(max_bytes + 1)[:max_bytes]
