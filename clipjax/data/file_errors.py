"""Errors of the files of a source while it is read, as those of the data."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from clipjax.data.sample import BadSample, ChangedData, UnreadableData
from clipjax.runtime.connections import is_away
from clipjax.runtime.files import reason_of
from clipjax.runtime.objects import FileChanged
from clipjax.runtime.terminal import printable

AWAY_SECONDS = 300.0
"""Time for which a file that its store did not give after all tries, which takes minutes, is not asked for again."""


class FileErrors:
    """The errors of a source's files; it is pickled with the source, and used by several threads.

    Args:
        kind: what a file is called in messages.
    """

    def __init__(self, kind: str):
        self._kind = kind
        self._away: dict[str, tuple[float, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_kind": self._kind, "_away": {}}

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Turn the errors of reading a file in the `with` block into those of the data.

        Raises:
            UnreadableData: its storage does not give it, or did not a moment ago.
            ChangedData: it is not the file that was opened.
        """
        if known := self._away.get(path):
            if time.monotonic() < known[0]:
                raise UnreadableData(known[1])
            self._away.pop(path, None)
        try:
            yield
        except BadSample:
            raise
        except (OSError, ValueError) as error:  # a file that has changed is none of its kind sometimes
            text = (
                f"{self._kind} {printable(path)} cannot be read as it was opened: {reason_of(error)}; let what writes "
                "it finish, or look at its disk, then start the same command again"
            )
            if isinstance(error, FileChanged) or not isinstance(error, OSError):
                raise ChangedData(text) from error
            slow = is_away(error)
            if slow:
                self._away[path] = (time.monotonic() + AWAY_SECONDS, text)
            raise UnreadableData(text, is_away=slow) from error


def to_unreadable(error: OSError, index: int) -> UnreadableData:
    """Return the error of the storage of a sample as one of the data."""
    place = f"{error.filename}: " if error.filename else ""
    text = f"sample {index} of the source cannot be read: {printable(place + reason_of(error))}; see to its storage"
    return ChangedData(text) if isinstance(error, FileChanged) else UnreadableData(text, is_away=is_away(error))
