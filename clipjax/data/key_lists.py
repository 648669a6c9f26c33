"""Lists of keys, which choose the samples of training: `data.keep_keys` and `data.drop_keys`."""

import array
import threading
from collections.abc import Sequence

import numpy as np
import xxhash

from clipjax.runtime.storage import open_file, stream

KEEP_KEYS, DROP_KEYS = "data.keep_keys", "data.drop_keys"
_MAX_LIST_BYTES = 2**32
_MAX_KEY_BYTES = 4096
_READ_BYTES = 2**22


class KeyList:
    """Keys of a text file, a line each: `KEY`, or `SHARD/KEY` with the shard's name, with or without its ending.

    Its digest is read at once, its keys when the first shard is judged.

    Args:
        field: that names it in the config.
        path: of the file.

    Raises:
        ValueError: the file cannot be read.

    Attributes:
        digest: of the content.
    """

    def __init__(self, field: str, path: str):
        self._field, self._path, self._lock = field, path, threading.Lock()
        self._hashes: np.ndarray | None = None
        hasher = xxhash.xxh3_128()
        try:
            with stream(path) as file:
                if open_file(path).size > _MAX_LIST_BYTES:
                    raise ValueError(f"{field}={path} is larger than {_MAX_LIST_BYTES} bytes; split it")
                while part := file.read(_READ_BYTES):
                    hasher.update(part)
        except OSError as error:
            raise self._unreadable(error) from error
        self.digest = hasher.hexdigest()

    def _unreadable(self, error: OSError) -> ValueError:
        return ValueError(f"{self._field}={self._path} cannot be read: {error.strerror or error}; give a text file")

    def load(self) -> np.ndarray:
        """Return the sorted hashes of the keys: uint64 [n].

        Raises:
            ValueError: the file cannot be read any more, has changed, or has no key.
        """
        with self._lock:
            if self._hashes is None:
                self._hashes = self._read()
            return self._hashes

    def _read(self) -> np.ndarray:
        hasher, hashes = xxhash.xxh3_128(), array.array("Q")
        try:
            with stream(self._path) as file:
                while line := file.readline(_MAX_KEY_BYTES + 1):
                    if len(line) > _MAX_KEY_BYTES:
                        raise ValueError(f"{self._field}={self._path}: line {len(hashes) + 1} is too long for a key")
                    hasher.update(line)
                    if key := line.removeprefix(b"\xef\xbb\xbf").strip():
                        hashes.append(xxhash.xxh3_64_intdigest(key))
        except OSError as error:
            raise self._unreadable(error) from error
        if not hashes:
            raise ValueError(f"{self._field}={self._path} holds no key; write one a line, or leave the field out")
        if hasher.hexdigest() != self.digest:
            raise ValueError(f"{self._field}={self._path} has changed while it was read; start again")
        return np.unique(np.frombuffer(hashes, np.uint64))

    def contains(self, shard: str, keys: Sequence[str]) -> np.ndarray:
        """Return for each key of a shard whether it is listed: bool [n].

        Raises:
            ValueError: see `load`.
        """
        listed, name = self.load(), shard.rpartition("/")[2]
        found = np.zeros(len(keys), np.bool_)
        for prefix in dict.fromkeys(("", f"{name}/", f"{name.rpartition('.')[0]}/")):
            hashes = np.fromiter(
                (xxhash.xxh3_64_intdigest((prefix + key).encode("utf-8", "replace")) for key in keys), np.uint64
            )
            places = np.minimum(np.searchsorted(listed, hashes), len(listed) - 1)
            found |= listed[places] == hashes
        return found & np.array([bool(key) for key in keys], np.bool_)
