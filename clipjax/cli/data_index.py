"""The work of `clipjax data index`: index files of all tars of a source, by several processes, with progress."""

import pathlib
import signal
import sys
import time
from collections.abc import Sequence

from clipjax.cli.errors import SIGNAL
from clipjax.config import DataConfig
from clipjax.data.index_store import Entry
from clipjax.data.indexes import open_indexes
from clipjax.data.sources import tar_paths
from clipjax.data.unused_members import require_samples, tell_unused
from clipjax.data.webdataset import max_file_bytes
from clipjax.monitoring.progress import Progress
from clipjax.runtime.terminal import printable

ABOUT = """Make the index files of a source's tars: clipjax data index 'cc3m/{00000..00331}.tar'

A run makes those that are missing when it starts. This command does it ahead, with a process per core, goes on where it
was stopped, and shares the work with others of its kind, also on other machines. Indexes lie beside the shards in
.clipjax-index/, or, where nothing can be written, in $XDG_CACHE_HOME/clipjax/index."""
_IN_PLACE_SECONDS = 0.1  # between two updates
_PLAIN_SECONDS = 10.0


def name_source(argv: Sequence[str]) -> list[str]:
    """Return the arguments with `--source=` before the first one that is given without an option's name."""
    is_value = [before.startswith("--") and "=" not in before for before in ("", *argv)]
    stray = (i for i, each in enumerate(argv) if not (each.startswith("-") or is_value[i]))
    first = next(stray, None)
    return [f"--source={each}" if i == first else each for i, each in enumerate(argv)]


def run(source: str, num_workers: int | None) -> int:
    """Make the index files that are missing or damaged; return the exit code.

    Args:
        source: path or pattern of tars.
        num_workers: processes; None: one per core.

    Raises:
        ValueError: a file is no tar, none holds a sample, or an index can be written nowhere.
        OSError: a file cannot be read.
    """
    paths, start = tar_paths(source), time.monotonic()
    line = ShardProgress()
    try:
        entries = open_indexes(
            paths,
            limit=max_file_bytes(DataConfig().max_image_pixels),
            num_workers=num_workers,
            is_thorough=True,
            progress=line.update,
        )
    except KeyboardInterrupt:
        line.close()
        print(f"clipjax data: stopped after {line.built:,} shards; the same command goes on from here", file=sys.stderr)
        return SIGNAL + signal.SIGINT
    finally:
        line.close()
    headers = [entry.header for entry in entries]
    require_samples(paths, headers)
    tell_unused(paths, headers)
    seconds, samples = time.monotonic() - start, sum(header.count for header in headers)
    made = f"{line.built:,} new" if line.built else "none new"
    rate = f", {line.samples / max(seconds, 1e-3):,.0f} samples/s" if line.built else ""
    print(
        f"{printable(source)}: {len(paths):,} shards ({made}), {samples:,} samples, {seconds:.1f} s{rate}; the indexes "
        f"lie in {printable(_folders(entries))}"
    )
    return 0


def _folders(entries: Sequence[Entry]) -> str:
    """Return where the index files lie.

    Raises:
        ValueError: one lies nowhere.
    """
    homeless = [entry.header.name for entry in entries if isinstance(entry.place, bytes)]
    if homeless:
        raise ValueError(
            f"the index of {homeless[0]} and of {len(homeless) - 1} more shards can be written neither beside them nor "
            "into the cache folder; make one writable, or set XDG_CACHE_HOME"
        )
    folders = dict.fromkeys(str(pathlib.Path(str(entry.place)).parent) for entry in entries)
    return ", ".join(list(folders)[:3]) + (f" and {len(folders) - 3} more folders" if len(folders) > 3 else "")


class ShardProgress:
    """The progress on the standard error: a line in place on a terminal, else one from time to time.

    Attributes:
        built: shards that are done.
        samples: in those.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._start = self._shown = time.monotonic()
        self.built = self.samples = 0

    def update(self, built: int, missing: int, samples: int) -> None:
        """Take how many shards are done, of how many, and their samples."""
        self.built, self.samples = built, samples
        now = time.monotonic()
        if self._progress is None:
            self._progress = Progress(missing, unit="shard")
        if now - self._shown >= (_IN_PLACE_SECONDS if sys.stderr.isatty() else _PLAIN_SECONDS):
            self._shown, rate = now, built / max(now - self._start, 1e-3)
            values = {"examples_per_second": samples * rate / built}
            if missing:
                values["seconds_left"] = (missing - built) / rate
            self._progress.update(built, values)

    def close(self) -> None:
        """Leave the line."""
        if self._progress is not None:
            self._progress.close()
