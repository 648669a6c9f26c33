"""A file of a disk or a store, as libraries want one: with a position."""

import os

from clipjax.runtime.storage import OpenFile


class PositionedFile:
    """A file as pyarrow wants it, with a position; it remembers the error of a read."""

    closed = False

    def __init__(self, file: OpenFile):
        self._file = file
        self._position = 0
        self._failure: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; fewer at the end, and all without a size."""
        try:
            data = self._file.read(self._position, self._file.size - self._position if size < 0 else size)
        except OSError as error:
            self._failure = error
            raise
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, and return it."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return False."""
        return False

    def close(self) -> None:
        """Note that nothing more is read."""
        self.closed = True

    def flush(self) -> None:
        """Do nothing."""

    def raise_failure(self) -> None:
        """Raise the error of the disk or the store, if it was one that kept the file from being read."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
