"""Metric files: `metrics.jsonl` and TensorBoard events.

Nothing here knows JAX: values are numbers or anything scalar with `.item()`.
"""

import contextlib
import json
import math
import os
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

from clipjax.runtime.files import write_atomic


class _AppendOnlyFile:
    """A file of whole records: one that could not be written is taken back, so that no reader meets half of it."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = path.open("ab", buffering=0)

    def append(self, record: bytes) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            while record:
                record = record[self._file.write(record) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise

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
        self._file = _AppendOnlyFile(folder / name)
        self._write(file_version="brain.Event:2")
        # purge_step: TensorBoard hides what an earlier, killed run wrote at this step and later.
        self._write(step=start_step + 1, session_log=self._session_log(status=self._session_log.START))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(values, "")]
        self._write(step=step, summary=self._summary(value=scalars))

    def _write(self, **content: Any) -> None:
        data = self._event(wall_time=time.time(), **content).SerializeToString()
        header = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (header, data)]
        self._file.append(header + checksums[0] + data + checksums[1])

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """The metric files of a run: `workdir/metrics.jsonl` and, if wanted, `workdir/tensorboard`. For one process only.

    A run that resumes at `start_step` first drops the lines after that step and any half-written one, so that its file
    has the lines of an uninterrupted run; if it is yet to be evaluated there (not `evaluated`), an evaluation of that
    step too, which an earlier start has lost. A write that fails later on (full disk) never stops training: it is
    counted in `failures` and reported once on stderr.

    Raises:
        OSError: the files cannot be created or trimmed at the start.
    """

    def __init__(self, workdir: pathlib.Path, *, tensorboard: bool, start_step: int, evaluated: bool = True) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        if path.exists():
            _trim(path, start_step, evaluated=evaluated)
        self.failures = 0
        self._lines = _AppendOnlyFile(path)
        self._events = _TensorBoardFile(workdir / "tensorboard", start_step) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one line: `step`, then `values` (numbers, strings, scalar arrays or dicts of them).

        JSON has no NaN or infinity: such a value becomes null, and its name is listed under `nonfinite`.
        TensorBoard gets the numbers only, with nested names joined by "/".
        """
        nonfinite: list[str] = []
        line = {"step": int(step), **_json_ready(values, "", nonfinite)}
        if nonfinite:
            line["nonfinite"] = nonfinite
        try:
            self._lines.append(json.dumps(line, allow_nan=False).encode() + b"\n")
            if self._events is not None:
                self._events.write(int(step), values)
        except OSError as error:
            self.failures += 1
            if self.failures == 1:
                message = f"clipjax: cannot write metrics of step {step}: {error}; training goes on without them"
                with contextlib.suppress(OSError, ValueError):
                    print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the files; every line is already written."""
        self._lines.close()
        if self._events is not None:
            self._events.close()


def _trim(path: pathlib.Path, start_step: int, *, evaluated: bool) -> None:
    """Keep only the whole lines up to `start_step`, none of an evaluation there if it is not `evaluated`.

    Atomic, and no write where there is nothing to drop.
    """
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    kept = b"".join(line for line in lines if _is_kept(line, start_step, evaluated=evaluated))
    if kept == content:
        return
    write_atomic(path, kept, sync=True)


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
