"""What a run reports: metric files, the step clock, model FLOPs and MFU, the progress line, text tables.

Reading order: `MetricsWriter` (files), `StepClock` (rates), `mfu` (arithmetic), `Progress` and
`format_table` (terminal). Nothing here knows JAX: values are numbers or anything scalar with `.item()`.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TextIO


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
    """One TensorBoard event file. tensorboardX's own `SummaryWriter` writes from a thread that a full disk kills, after
    which its bounded queue blocks the caller for ever; its event messages are all that is used here."""

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
    """Appends metrics to `workdir/metrics.jsonl` and, if wanted, to `workdir/tensorboard`. For one process only.

    A run that resumes at `start_step` first drops the lines after that step and any half-written one, so that its file
    has the lines of an uninterrupted run. A write that fails later on (full disk) never stops training: it is counted
    in `failures` and reported once on stderr.

    Raises:
        OSError: The files cannot be created or trimmed at the start.
    """

    def __init__(self, workdir: pathlib.Path, *, tensorboard: bool, start_step: int) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        if path.exists():
            _trim(path, start_step)
        self.failures = 0
        self._lines = _AppendOnlyFile(path)
        self._events = _TensorBoardFile(workdir / "tensorboard", start_step) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds one line: `step`, then `values` (numbers, strings, scalar arrays or dicts of them).

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
        """Closes the files; every line is already written."""
        self._lines.close()
        if self._events is not None:
            self._events.close()


def _trim(path: pathlib.Path, start_step: int) -> None:
    """Drops all but the whole lines up to `start_step`; atomic, and no write where there is nothing to drop."""
    content = path.read_bytes()
    kept = b"".join(line for line in content.splitlines(keepends=True) if _is_kept(line, start_step))
    if kept == content:
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_kept(line: bytes, start_step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return isinstance(step, int) and step <= start_step


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


class StepClock:
    """Rates between two logged steps. Time spent inside `pause` (evaluation, checkpoints) does not count.

    Args:
        total_steps: Steps of the whole run, for the time left.
        step: Completed updates when the clock starts, which is now.
        examples_seen: Examples seen by then.
        now: Monotonic seconds.
    """

    def __init__(
        self, total_steps: int, *, step: int = 0, examples_seen: int = 0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps, self._now = total_steps, now
        self._step, self._examples_seen, self._wait_seconds = step, examples_seen, 0.0
        self._start, self._paused_seconds = now(), 0.0

    def lap(self, *, step: int, examples_seen: int, wait_seconds: float) -> dict[str, float]:
        """Rates since the last lap, or since the start.

        Args:
            step: Completed updates; more than at the last lap.
            examples_seen: Examples seen by the whole run, over all processes.
            wait_seconds: Seconds that this process has waited for input since it started.

        Returns:
            `examples_per_second`, `input_wait_fraction` (0 to 1) and `seconds_left` at this pace.
        """
        assert step > self._step, (step, self._step)
        now = self._now()
        seconds = max(now - self._start - self._paused_seconds, 1e-9)
        rates = {
            "examples_per_second": (examples_seen - self._examples_seen) / seconds,
            "input_wait_fraction": min(max((wait_seconds - self._wait_seconds) / seconds, 0.0), 1.0),
            "seconds_left": (self._total_steps - step) * seconds / (step - self._step),
        }
        self._step, self._examples_seen, self._wait_seconds = step, examples_seen, wait_seconds
        self._start, self._paused_seconds = now, 0.0
        return rates

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock for the length of the `with` block. Not to be nested, no lap inside."""
        start = self._now()
        try:
            yield
        finally:
            self._paused_seconds += self._now() - start


def mfu(examples_per_second: float, flops_per_pair: int, num_devices: int, peak_tflops: float) -> float:
    """Model FLOPs utilisation, 0 to 1: three forward passes per pair; recomputation is not credited."""
    return 3 * flops_per_pair * examples_per_second / (num_devices * peak_tflops * 1e12)


def format_duration(seconds: float) -> str:
    """`m:ss` or `h:mm:ss`; "?" if it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


_COLUMNS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", "loss {:>6.3f}".format),
    ("logit_scale", "scale {:>5.1f}".format),
    ("learning_rate", "lr {:.1e}".format),
    ("examples_per_second", "{:>7,.0f} pairs/s".format),
    ("mfu", "mfu {:>5.1%}".format),
    ("input_wait_fraction", "wait {:>4.0%}".format),
    ("seconds_left", lambda seconds: f"left {format_duration(seconds)}"),
)
"""Metrics on the progress line, in order; one that is absent is left out."""


class Progress:
    """The progress of a run for a person: one line redrawn in place on a terminal, else a plain line per update.

    A stream that is closed or broken silences it; it never raises.

    Args:
        total_steps: Steps of the whole run.
        stream: Where to; None is stderr.
        enabled: False shows nothing (all processes but the first).
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None = None, enabled: bool = True) -> None:
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._line = ""  # what stands on the terminal's last line
        try:
            self._in_place = self._enabled and self._stream.isatty()
        except (AttributeError, ValueError):  # no stream (sys.stderr may be None), or a closed one
            self._enabled = self._in_place = False

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows a logged step; `values` are the metrics of `_COLUMNS`, others are passed over."""
        if not self._enabled:
            return
        share = min(step / max(self._total_steps, 1), 1.0)
        columns = [f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {int(100 * share):>3}%"]
        columns += [show(float(values[name])) for name, show in _COLUMNS if values.get(name) is not None]
        text = "  ".join(columns)
        if self._in_place:
            self._line = self._with_bar(text, share)
            self._emit(f"\r{self._line}\x1b[K")
        else:
            self._emit(f"{text}\n")

    def message(self, text: str) -> None:
        """Prints a line of its own; on a terminal above the progress line."""
        self._emit(f"\r\x1b[K{text}\n{self._line}" if self._in_place else f"{text}\n")

    def close(self) -> None:
        """Leaves the last progress line in place and the cursor below it."""
        if self._line:
            self._emit("\n")
        self._line, self._enabled = "", False

    def _with_bar(self, text: str, share: float) -> str:
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        width = (columns or 80) - 1  # some terminals report 0; a full last column would wrap
        cells = min(24, width - len(text) - 2)
        if cells < 8:
            return text[:width]
        full, empty = "━╌" if "utf" in (self._stream.encoding or "").lower() else "#."
        done = int(cells * share)
        return f"{full * done}{empty * (cells - done)}  {text}"

    def _emit(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a broken pipe, a closed stream
            self._enabled = False


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A table in plain text, without a final newline; columns that hold only numbers are right-aligned."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [bool(rows) and all(map(_is_number, column[1:])) for column in columns]
    lines = [header, ["-" * width for width in widths], *rows]
    cells = [
        [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _is_number(cell: str) -> bool:
    if cell in ("", "-"):
        return True
    try:
        float(cell.replace(",", "").removesuffix("%"))
    except ValueError:
        return False
    return True
