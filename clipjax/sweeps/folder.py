"""The folder of a sweep: on a disk; or on an object store, held by a lease, with a local folder for logs.

On a store the files are where they are on a disk, so that one can be copied to the other. Training keeps those of a
trial there by itself; the sweep adds its own: records, logs of trials that have ended, and the leaderboard.

Reading order: `Folder`, `Folder.held`, `Folder.refuse_trained`.
"""

import contextlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from clipjax.runtime import lease, objects, staging, storage
from clipjax.runtime.lease import Lease
from clipjax.runtime.terminal import printable

_ONE = "sweep"  # in a trial's folder: the lease of a sweep that trains this trial alone
_MAX_BYTES = 2**26


class Folder:
    """The folder of a sweep. Paths of files are those inside it, such as `trial-0000-seed-1/trial.json`.

    Writing to a store needs `held`.

    Args:
        place: path of the folder, or its address.

    Attributes:
        place: path of the folder, or its address.
        local: where logs are written and locked: the folder itself, or one of this machine for that of a store.

    Raises:
        ValueError: there is no place for the local folder.
    """

    def __init__(self, place: Path | str) -> None:
        self.place = place
        self.local = place if isinstance(place, Path) else staging.folder_of(place)
        self._lease: Lease | None = None
        self._is_one = self._has_written = False

    @contextlib.contextmanager
    def held(self, trial: str | None, on_lost: Callable[[str], None]) -> Iterator[None]:
        """Hold a folder on a store in the `with` block, so that no other sweep writes to it; on a disk, do nothing.

        Args:
            trial: folder of the only trial that is held, while others may train other ones; None: all are.
            on_lost: gets the reason, in another thread, if another sweep takes it over.

        Raises:
            ValueError: another sweep holds it, or the store cannot be used.
        """
        if isinstance(self.place, Path):
            yield
            return
        self._is_one = trial is not None
        try:
            self._lease = Lease(objects.join(self.place, *((trial, _ONE) if trial else ())), tell=_tell)
        except OSError as error:
            raise ValueError(f"--workdir={self.place}: {error.strerror or error}") from error
        self._lease.watch(on_lost)
        try:
            yield
        finally:
            self._lease.release(delete=not self._has_written)

    def refuse_trained(self, trials: Sequence[str]) -> None:
        """Refuse trials on a store that are being trained, on any machine; on a disk the locks of their logs tell.

        Args:
            trials: their folders.

        Raises:
            ValueError: one is being trained, or is held by another sweep.
            OSError: the store does not tell.
        """
        if isinstance(self.place, Path):
            return
        trained = [objects.join(self.place, trial) for trial in trials]
        sweeps = [self.place] if self._is_one else [objects.join(place, _ONE) for place in trained]
        lease.refuse_held([*sweeps, *trained], _tell)

    def at(self, path: str) -> Path | str:
        """Return path or address of a file."""
        return self.place / path if isinstance(self.place, Path) else objects.join(self.place, path)

    def names(self) -> list[str]:
        """Return the names of the files and folders directly in it, in order.

        Raises:
            OSError: the store does not tell.
        """
        if isinstance(self.place, Path):
            return sorted(path.name for path in self.place.glob("*"))
        return sorted({path.partition("/")[0] for path in objects.list_folder(self.place)})

    def exists(self, path: str) -> bool:
        """Return True if there is such a file.

        Raises:
            OSError: the store does not tell.
        """
        place = self.at(path)
        return place.is_file() if isinstance(place, Path) else objects.exists(place)

    def read(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
            ValueError: it is larger than any that belongs here.
        """
        return storage.read_small(self.at(path), _MAX_BYTES)

    def stream(self, path: str) -> io.BufferedReader:
        """Open a file that is read from its beginning to its end.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be opened; or, later, read.
        """
        return storage.stream(str(self.at(path)))

    def write(self, path: str, content: str | bytes) -> None:
        """Write a file, which is whole or the old one at any time.

        Raises:
            OSError: it cannot be written, or another sweep has taken the folder over.
        """
        place = self.at(path)
        if isinstance(place, Path):
            storage.write(place, content)
        else:
            objects.write_bytes(place, content.encode() if isinstance(content, str) else content, self._require())

    def delete(self, path: str) -> None:
        """Delete a file, if there is one.

        Raises:
            OSError: it cannot be deleted, or another sweep has taken the folder over.
        """
        place = self.at(path)
        if isinstance(place, Path):
            place.unlink(missing_ok=True)
        else:
            objects.delete(place, self._require())

    def load(self, path: str, file: IO[bytes]) -> None:
        """Let a local file, open for appending, hold what the store has of it; on a disk it is the file itself.

        Raises:
            OSError: the store does not give it, or the disk does not take it.
        """
        if isinstance(self.place, Path):
            return
        file.truncate(0)
        with contextlib.suppress(FileNotFoundError), self.stream(path) as source:
            shutil.copyfileobj(source, file)

    def send(self, path: str) -> None:
        """Write a local file to the store; on a disk it is there.

        Raises:
            OSError: the store does not take it, or another sweep has taken the folder over.
        """
        if isinstance(self.place, str):
            objects.write_file(objects.join(self.place, path), self.local / path, self._require())

    def drop_copy(self, trial: str) -> None:
        """Delete the local copy of a finished trial, all of which the store has: many would fill a disk."""
        if isinstance(self.place, str):
            shutil.rmtree(staging.folder_of(objects.join(self.place, trial)), ignore_errors=True)

    def _require(self) -> float:
        """Return for how many seconds a write may be tried again, if the folder is held."""
        assert self._lease is not None
        self._lease.require()
        self._has_written = True
        return self._lease.retry_seconds


def _tell(line: str) -> None:
    print(f"clipjax: {printable(line)}", file=sys.stderr, flush=True)
