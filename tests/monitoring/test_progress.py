"""The step clock, MFU, and the progress line on terminals, in files and where nothing can be written."""

import io
import os
import pty
import sys

import numpy as np
import pytest

from clipjax.monitoring.progress import Progress, StepClock, mfu
from clipjax.runtime import chips

VIT_B16_FLOPS = 41_086_447_616  # of a pair

VALUES = {
    "loss": np.float32(3.412),
    "logit_scale": 15.2,
    "learning_rate": 9.1e-4,
    "examples_per_second": 312.4,
    "mfu": 0.041,
    "input_wait_fraction": 0.02,
    "seconds_left": 83.0,
}


def test_clock_excludes_pauses_and_counts_waits():
    now = [100.0]
    clock = StepClock(10, step=2, examples_seen=200, now=lambda: now[0])
    now[0] += 4
    with pytest.raises(KeyError), clock.pause():  # time in a failing block is excluded, too
        now[0] += 50
        raise KeyError
    assert clock.lap(step=4, examples_seen=400, wait_seconds=1.0) == {
        "examples_per_second": 50.0,
        "input_wait_fraction": 0.25,
        "seconds_left": 12.0,
    }
    now[0] += 1
    rates = clock.lap(step=10, examples_seen=1000, wait_seconds=1.5)
    assert rates == {"examples_per_second": 600.0, "input_wait_fraction": 0.5, "seconds_left": 0.0}


def test_clock_survives_a_coarse_timer_and_refuses_a_lap_without_steps():
    clock = StepClock(10, now=lambda: 5.0)
    rates = clock.lap(step=1, examples_seen=8, wait_seconds=2.0)
    assert rates["input_wait_fraction"] == 1.0 and np.isfinite(list(rates.values())).all()
    with pytest.raises(AssertionError):
        clock.lap(step=1, examples_seen=8, wait_seconds=2.0)


def test_mfu_counts_three_forward_passes_over_all_devices():
    # 100% of an H200 on ViT-B/16 is 8,026 pairs/s by the published table.
    peak = chips.CHIPS["h200"].peak_tflops
    assert mfu(8026, VIT_B16_FLOPS, 1, peak) == pytest.approx(1.0, rel=1e-3)
    assert mfu(8026, VIT_B16_FLOPS, 4, peak) == pytest.approx(0.25, rel=1e-3)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_plain_lines_are_aligned():
    stream = io.StringIO()
    progress = Progress(400, stream=stream)
    progress.update(120, VALUES)
    progress.update(400, {**VALUES, "loss": 10.0, "examples_per_second": 12345.0, "mfu": 0.4, "input_wait_fraction": 1})
    progress.message("saved step 400")
    progress.update(7, {"loss": 1.0, "mfu": None, "other": "x"})
    progress.close()
    assert stream.getvalue() == (
        "step 120/400   30%  loss  3.412  scale  15.2  lr 9.1e-04      312 pairs/s  mfu  4.1%  wait   2%  left 1:23\n"
        "step 400/400  100%  loss 10.000  scale  15.2  lr 9.1e-04   12,345 pairs/s  mfu 40.0%  wait 100%  left 1:23\n"
        "saved step 400\n"
        "step   7/400    1%  loss  1.000\n"
    )


def test_hundred_percent_only_at_the_end():
    stream = io.StringIO()
    Progress(1000, stream=stream).update(999, {})
    assert stream.getvalue() == "step  999/1000   99%\n"


def test_terminal_redraws_one_line():
    stream = Terminal()
    progress = Progress(10, stream=stream)
    progress.update(5, {"loss": 1.0})
    progress.message("saved")
    progress.close()
    line = "━" * 12 + "╌" * 12 + "  step  5/10   50%  loss  1.000"
    assert stream.getvalue() == f"\r{line}\x1b[K\r\x1b[Ksaved\n{line}\n"


def test_terminal_line_never_wraps():
    stream = Terminal()
    Progress(400, stream=stream).update(120, VALUES)
    line = stream.getvalue().removeprefix("\r").removesuffix("\x1b[K")
    assert line.startswith("step 120/400") and len(line) == 79


def test_real_pseudo_terminal():
    main, terminal = pty.openpty()
    with open(terminal, "w", encoding="ascii") as stream:  # noqa: PTH123
        progress = Progress(10, stream=stream)
        progress.update(5, {})
        progress.close()
        shown = b""
        while not shown.endswith(b"\n"):
            shown += os.read(main, 4096)
    os.close(main)
    assert b"#" in shown and b"50%" in shown


def test_broken_pipe_closed_stream_and_no_stream_are_silent(monkeypatch):
    class Broken(Terminal):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    broken, closed = Broken(), io.StringIO()
    for stream in (broken, closed):
        progress = Progress(10, stream=stream)
        if stream is closed:
            closed.close()
        progress.update(1, VALUES)
        progress.update(2, VALUES)
        progress.message("x")
        progress.close()
    assert broken.writes == 1
    Progress(10, stream=closed).update(1, VALUES)
    monkeypatch.setattr(sys, "stderr", None)
    Progress(10).update(1, VALUES)


def test_other_processes_show_nothing(capsys):
    progress = Progress(10, enabled=False)
    progress.update(1, VALUES)
    progress.message("x")
    progress.close()
    assert capsys.readouterr() == ("", "")
