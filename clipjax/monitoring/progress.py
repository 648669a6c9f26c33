"""The step clock, MFU and the progress line. Nothing here knows JAX.

The progress line is ours and not rich's. On a broken pipe rich's console raises SystemExit, on a closed stream
ValueError; into a file it writes one line at the end instead of one for each update; a killed run leaves the cursor
hidden.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from clipjax.runtime.terminal import format_duration, printable


class StepClock:
    """The clock of rates between two logged steps. Time spent inside `pause` (evaluation, checkpoints) does not count.

    Args:
        total_steps: steps of the whole run, for the time left.
        step: completed updates when the clock starts, which is now.
        examples_seen: examples seen by then.
        now: clock in monotonic seconds.
    """

    def __init__(
        self, total_steps: int, *, step: int = 0, examples_seen: int = 0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps, self._now = total_steps, now
        self._step, self._examples_seen, self._wait_seconds = step, examples_seen, 0.0
        self._start, self._paused_seconds = now(), 0.0

    def lap(self, *, step: int, examples_seen: int, wait_seconds: float) -> dict[str, float]:
        """Return the rates since the last lap, or since the start.

        Args:
            step: completed updates; more than at the last lap.
            examples_seen: examples seen by the whole run, over all processes.
            wait_seconds: seconds that this process has waited for input since it started.

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
        """Stop the clock for the length of the `with` block. Not to be nested, no lap inside."""
        start = self._now()
        try:
            yield
        finally:
            self._paused_seconds += self._now() - start


def mfu(examples_per_second: float, flops_per_pair: float, num_devices: int, peak_tflops: float) -> float:
    """Return the model FLOPs utilisation, 0 to 1: three forward passes per pair; recomputation does not count."""
    return 3 * flops_per_pair * examples_per_second / (num_devices * peak_tflops * 1e12)


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
        total_steps: steps of the whole run.
        stream: output stream; None is stderr.
        enabled: False shows nothing (all processes but the first).
        unit: word for a step.
    """

    def __init__(
        self, total_steps: int, *, stream: TextIO | None = None, enabled: bool = True, unit: str = "step"
    ) -> None:
        self._unit = unit
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._line = ""  # what stands on the terminal's last line
        try:
            self._in_place = self._enabled and self._stream.isatty()
        except (AttributeError, ValueError):  # no stream (sys.stderr may be None), or a closed one
            self._enabled = self._in_place = False

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show a logged step; `values` are the metrics of `_COLUMNS`, and others are ignored."""
        if not self._enabled:
            return
        share = min(step / max(self._total_steps, 1), 1.0)
        columns = [f"{self._unit} {step:>{len(str(self._total_steps))}}/{self._total_steps}  {int(100 * share):>3}%"]
        columns += [show(float(values[name])) for name, show in _COLUMNS if values.get(name) is not None]
        text = "  ".join(columns)
        if self._in_place:
            self._line = self._with_bar(text, share)
            self._emit(f"\r{self._line}\x1b[K")
        else:
            self._emit(f"{text}\n")

    def message(self, text: str) -> None:
        """Print lines of their own, without control characters of others; on a terminal above the progress line."""
        text = "\n".join(map(printable, text.split("\n")))
        self._emit(f"\r\x1b[K{text}\n{self._line}" if self._in_place else f"{text}\n")

    def close(self) -> None:
        """Leave the last progress line in place and the cursor below it."""
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
