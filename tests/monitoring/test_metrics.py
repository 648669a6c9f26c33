"""Metric files survive kills and full disks; clock, FLOPs and progress line say what they should."""

import errno
import io
import json
import os
import pathlib
import pty
import struct
import sys

import numpy as np
import pytest

from clipjax.config import ModelConfig, TextTransformerConfig, ViTConfig
from clipjax.monitoring import writers
from clipjax.monitoring.progress import Progress, StepClock, mfu
from clipjax.monitoring.writers import MetricsWriter
from clipjax.runtime import chips
from clipjax.runtime.terminal import format_duration, format_table


def lines_of(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write_all(workdir: pathlib.Path, steps: range, *, start_step: int) -> None:
    with MetricsWriter(workdir, tensorboard=False, start_step=start_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step})


def events_of(workdir: pathlib.Path) -> list:
    """All events of all files in TensorBoard's order; fails on a record that is not whole."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            data = content[12 : 12 + size]
            assert struct.unpack("<I", content[8:12])[0] == masked_crc32c(content[:8])
            assert struct.unpack("<I", content[12 + size : 16 + size])[0] == masked_crc32c(data)
            events.append(event_pb2.Event.FromString(data))
            content = content[16 + size :]
    return events


# MetricsWriter


def test_writes_step_first_and_nested_values(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run", tensorboard=False, start_step=0) as writer:
        writer.write(3, {"loss": np.float32(0.5), "eval": {"scenes": {"top1": 1}}, "note": "é"})
        # Flushed per line: readable before the writer is closed.
        text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 3, ')
    assert json.loads(text) == {"step": 3, "loss": 0.5, "eval": {"scenes": {"top1": 1}}, "note": "é"}


def test_nonfinite_values_are_null_and_named(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False, start_step=0) as writer:
        writer.write(1, {"loss": float("nan"), "norm": {"image": np.float32("inf"), "text": 1.0}})
        writer.write(2, {"loss": 1.0})

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "norm": {"image": None, "text": 1.0},
        "nonfinite": ["loss", "norm/image"],
    }
    assert "nonfinite" not in json.loads(second)


@pytest.mark.parametrize("torn", [b"", b'{"step": 7, "lo', b'{"step": 4, "loss": 0.25}'])
def test_resumed_file_equals_uninterrupted(tmp_path, torn):
    write_all(tmp_path / "whole", range(1, 9), start_step=0)
    write_all(tmp_path / "killed", range(1, 7), start_step=0)
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    write_all(tmp_path / "killed", range(5, 9), start_step=4)
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert killed == whole
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["metrics.jsonl"]


def test_resume_drops_garbage_and_keeps_a_clean_file_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n{"loss": 1}\n{"step": "2"}\n\n{"step": 2}\n')
    MetricsWriter(tmp_path, tensorboard=False, start_step=2).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    inode = path.stat().st_ino
    MetricsWriter(tmp_path, tensorboard=False, start_step=2).close()
    assert path.stat().st_ino == inode


def test_failed_trim_leaves_the_old_file(tmp_path, monkeypatch):
    write_all(tmp_path, range(1, 4), start_step=0)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writers.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        MetricsWriter(tmp_path, tensorboard=False, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


class FullDisk:
    """A raw file that takes half of a record and then fails, as a full disk does."""

    def __init__(self, file) -> None:
        self.file, self.full, self.started = file, True, False

    def write(self, record: bytes) -> int:
        if not self.full:
            return self.file.write(record)
        if self.started:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.started = True
        return self.file.write(record[: len(record) // 2])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_full_disk_warns_once_and_leaves_no_half_line(tmp_path, capsys):
    with MetricsWriter(tmp_path, tensorboard=False, start_step=0) as writer:
        writer.write(1, {"loss": 1.0})
        disk = writer._lines._file = FullDisk(writer._lines._file)
        writer.write(2, {"loss": 2.0})
        disk.started = False
        writer.write(3, {"loss": 3.0})
        disk.full = False
        writer.write(4, {"loss": 4.0})
        assert writer.failures == 2
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 4]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 2" in error and "No space left" in error


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
def test_real_enospc_is_survived(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = writers.MetricsWriter.__new__(writers.MetricsWriter)  # /dev/full reads as endless zeros: skip the trim
    writer.failures, writer._events = 0, None
    writer._lines = writers._AppendOnlyFile(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert writer.failures == 1 and "No space left" in capsys.readouterr().err


def test_unwritable_start_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        MetricsWriter(tmp_path / "file", tensorboard=False, start_step=0)


def test_tensorboard_gets_flat_numbers_and_purges_on_resume(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True, start_step=0) as writer:
        writer.write(1, {"loss": np.float32(0.5), "eval": {"scenes": {"top1": 1, "note": "x"}}, "name": "run"})
        writer.write(2, {"loss": 0.25})
    MetricsWriter(tmp_path, tensorboard=True, start_step=1).close()
    events = events_of(tmp_path)
    assert events[0].file_version == "brain.Event:2"
    values = [
        {value.tag: value.simple_value for value in event.summary.value} for event in events if event.summary.value
    ]
    assert values == [{"loss": 0.5, "eval/scenes/top1": 1.0}, {"loss": 0.25}]
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [1, 2]  # TensorBoard hides what was written before at this step and later
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_reads_what_we_write(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, tensorboard=True, start_step=0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0 * step})
    with MetricsWriter(tmp_path, tensorboard=True, start_step=1) as writer:
        writer.write(2, {"loss": 20.0})
    reader = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


# StepClock


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


# FLOPs


def vit(image_width: int, patch_size: int, *, image_size: int = 224) -> ModelConfig:
    large = image_width == 1024
    return ModelConfig(
        embed_dim=768 if large else 512,
        image=ViTConfig(image_size=image_size, patch_size=patch_size, width=image_width, depth=24 if large else 12),
        text=TextTransformerConfig(width=768 if large else 512),
    )


@pytest.mark.parametrize(
    ("config", "published_gflops", "exact"),
    [
        (vit(768, 32), 14.78, 14_777_163_776),
        (vit(768, 16), 41.09, 41_086_447_616),
        (vit(1024, 14), 175.33, 175_325_220_864),
        (vit(1024, 14, image_size=336), 395.22, 395_219_472_384),
    ],
    ids=["B/32", "B/16", "L/14", "L/14@336"],
)
def test_flops_match_open_clips_table(config, published_gflops, exact):
    assert config.flops() == pytest.approx(published_gflops * 1e9, rel=5e-3)
    assert config.flops() == exact  # frozen: reported MFU must stay comparable


def test_flops_by_hand():
    config = ModelConfig(
        embed_dim=5,
        image=ViTConfig(image_size=8, patch_size=4, width=6, depth=2, num_heads=1, mlp_dim=7),
        text=TextTransformerConfig(context_length=3, vocab_size=11, width=4, depth=1, num_heads=1),
    )
    image = 4 * (2 * 48 * 6) + 2 * (5 * (2 * 4 * 36 + 2 * 2 * 6 * 7) + 2 * (2 * 25 * 6)) + 2 * 6 * 5
    text = 3 * (2 * 4 * 16 + 2 * 2 * 4 * 16) + 2 * (2 * 9 * 4) + 2 * 4 * 5
    assert config.flops() == image + text


def test_mfu_counts_three_forward_passes_over_all_devices():
    # 100% of an H200 on ViT-B/16 is 8,026 pairs/s by the published table.
    peak = chips.CHIPS["h200"].peak_tflops
    assert mfu(8026, vit(768, 16).flops(), 1, peak) == pytest.approx(1.0, rel=1e-3)
    assert mfu(8026, vit(768, 16).flops(), 4, peak) == pytest.approx(0.25, rel=1e-3)


# Progress

VALUES = {
    "loss": np.float32(3.412),
    "logit_scale": 15.2,
    "learning_rate": 9.1e-4,
    "examples_per_second": 312.4,
    "mfu": 0.041,
    "input_wait_fraction": 0.02,
    "seconds_left": 83.0,
}


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3661, "1:01:01"), (100 * 3600, "100:00:00"), (np.inf, "?")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


# format_table


def test_table_aligns_numbers_right():
    assert format_table([["a", "1.5", "2%"], ["long", "10", ""], ["c", "-", "1,000"]], ["name", "x", "share"]) == (
        "name    x  share\n----  ---  -----\na     1.5     2%\nlong   10\nc       -  1,000"
    )


def test_empty_table_and_ragged_rows():
    assert format_table([], ["a", "bb"]) == "a  bb\n-  --"
    with pytest.raises(ValueError, match="zip"):
        format_table([["1"]], ["a", "b"])
