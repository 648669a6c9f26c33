"""Metric files: `metrics.jsonl` and TensorBoard events.

Nothing here knows JAX: values are numbers or anything scalar with `.item()`.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

from clipjax.runtime import processes
from clipjax.runtime.files import sync_folder, write_atomic

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

MAX_WAITING = 10_000
"""Lines that are kept in memory while they cannot be written."""


class _AppendOnlyFile:
    """A file of whole records: one that could not be written is taken back, so that no reader meets half of it."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._torn_at: int | None = None

    def append(self, record: bytes) -> None:
        if self._torn_at is not None:
            self._file.truncate(self._torn_at)
            self._torn_at = None
        start = self._file.seek(0, os.SEEK_END)
        try:
            while record:
                record = record[self._file.write(record) :]
        except OSError:
            self._torn_at = start
            with contextlib.suppress(OSError):
                self._file.truncate(start)
                self._torn_at = None
            raise

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _TensorBoardFile:
    """One TensorBoard event file.

    tensorboardX's own `SummaryWriter` writes from a thread that a full disk kills, after which its bounded queue blocks
    the caller for ever; this class uses its event messages alone.
    """

    def __init__(self, folder: pathlib.Path, start_step: int) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        # The attributes of generated protobuf modules exist at run time only, hence Any.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._session_log, self._summary = events.Event, events.SessionLog, summaries.Summary
        self._checksum = masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        # The name's time orders the files of resumed runs; nanoseconds keep two starts within a second apart.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{time.time_ns()}"
        path = folder / name
        self._file = _AppendOnlyFile(path)
        try:
            self._write(file_version="brain.Event:2")
            # purge_step: TensorBoard hides what an earlier, killed run wrote at this step and later.
            self._write(step=start_step + 1, session_log=self._session_log(status=self._session_log.START))
        except OSError:
            self.close()
            path.unlink(missing_ok=True)
            raise

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(values, "")]
        self._write(step=step, summary=self._summary(value=scalars))

    def _write(self, **content: Any) -> None:
        data = self._event(wall_time=time.time(), **content).SerializeToString()
        header = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (header, data)]
        self._file.append(header + checksums[0] + data + checksums[1])

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """The metric files of a run: `workdir/metrics.jsonl` and, if wanted, `workdir/tensorboard`. For one process only.

    A run that resumes at `start_step` first drops the lines after that step and any half-written one, so that its file
    has the lines of an uninterrupted run; if it is yet to be evaluated there (not `evaluated`), an evaluation of that
    step too, which an earlier start has lost. A disk that is full never stops training, at the start or later: lines
    wait in memory, up to `MAX_WAITING` of them, and every later line tries again; files that could not be
    opened or trimmed get none before. The first failure is reported on stderr, each is counted in `failures`, and at
    the end the lines that are lost are. TensorBoard's values do not wait.
    """

    def __init__(self, workdir: pathlib.Path, *, tensorboard: bool, start_step: int, evaluated: bool = True) -> None:
        self._workdir, self._start_step, self._evaluated = workdir, start_step, evaluated
        self._tensorboard = tensorboard
        self._lines: _AppendOnlyFile | None = None
        self._events: _TensorBoardFile | None = None
        self._waiting: collections.deque[tuple[int, bytes]] = collections.deque()
        self._num_lost = 0
        self.failures = 0
        self._told = False
        try:
            self._open_lines()
            self._open_events()
        except OSError as error:
            self._tell(f"cannot open the metric files of {workdir}: {error}; training goes on, and tries again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_lines(self) -> _AppendOnlyFile:
        if self._lines is None:
            self._workdir.mkdir(parents=True, exist_ok=True)
            path = self._workdir / METRICS_FILE
            if path.exists():
                _trim(path, self._start_step, evaluated=self._evaluated)
            self._lines = _AppendOnlyFile(path)
        return self._lines

    def _open_events(self) -> _TensorBoardFile | None:
        if self._events is None and self._tensorboard:
            self._events = _TensorBoardFile(self._workdir / TENSORBOARD_FOLDER, self._start_step)
        return self._events

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one line: `step`, then `values` (numbers, strings, scalar arrays or dicts of them).

        JSON has no NaN or infinity: such a value becomes null, and its name is listed under `nonfinite`.
        TensorBoard gets the numbers only, with nested names joined by "/".
        """
        nonfinite: list[str] = []
        line = {"step": int(step), **_json_ready(values, "", nonfinite)}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._waiting.append((int(step), json.dumps(line, allow_nan=False).encode() + b"\n"))
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._num_lost += 1
        try:
            self._write_waiting()
            events = self._open_events()
            if events is not None:
                events.write(int(step), values)
        except OSError as error:
            self.failures += 1
            self._tell(f"cannot write metrics of step {step}: {error}; training goes on, and tries again")

    def _write_waiting(self) -> None:
        lines = self._open_lines()
        while self._waiting:
            lines.append(self._waiting[0][1])
            self._waiting.popleft()

    def sync(self) -> None:
        """Wait until all lines that are written are on the disk, so that a crash of the machine leaves them.

        Any thread may call it. A line that the disk took and loses now is lost; training goes on, and this is told.
        """
        try:
            for file in (self._lines, self._events):
                if file is not None:
                    file.sync()
            sync_folder(self._workdir)
        except (OSError, ValueError) as error:  # it is closed
            self.failures += 1
            self._tell(f"cannot bring the metric files of {self._workdir} to the disk: {error}; training goes on")

    def _tell(self, text: str) -> None:
        """Report the first failure."""
        if not self._told:
            self._told = True
            processes.show(text)

    def close(self) -> None:
        """Close the files; tell which lines are lost."""
        with contextlib.suppress(OSError):
            self._write_waiting()
        lost = self._num_lost + len(self._waiting)
        if lost:
            last = f", the last of step {self._waiting[-1][0]}" if self._waiting else ""
            processes.show(f"{lost} lines of {self._workdir / METRICS_FILE} could not be written{last}")
        for file in (self._lines, self._events):
            if file is not None:
                file.close()


def _trim(path: pathlib.Path, start_step: int, *, evaluated: bool) -> None:
    """Keep only the whole lines up to `start_step`, none of an evaluation there if it is not `evaluated`.

    The file is the old or the new one at any time, and there is no write where there is nothing to drop. Lines at the
    end are cut off in place, which a full disk allows.

    Raises:
        OSError: nothing may be added to the file yet.
    """
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    kept = b"".join(line for line in lines if _is_kept(line, start_step, evaluated=evaluated))
    if kept == content:
        return
    if not content.startswith(kept):
        write_atomic(path, kept, sync=True)
        return
    with path.open("r+b") as file:
        file.truncate(len(kept))
        os.fsync(file.fileno())


def _is_kept(line: bytes, start_step: int, *, evaluated: bool) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        values = json.loads(line)
        step = values["step"]
        lost = not evaluated and step == start_step and "eval" in values
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return isinstance(step, int) and step <= start_step and not lost


def _json_ready(values: Mapping[str, Any], prefix: str, nonfinite: list[str]) -> dict[str, Any]:
    ready: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = _json_ready(value, f"{prefix}{name}/", nonfinite)
        elif hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite.append(prefix + name)
            value = None
        ready[name] = value
    return ready


def _scalars(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
            continue
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, int | float):
            yield prefix + name, float(value)
