"""Metric files survive kills and full disks."""

import errno
import json
import pathlib
import struct

import numpy as np
import pytest

from clipjax.monitoring import writers
from clipjax.monitoring.writers import MetricsWriter


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


def test_an_evaluation_that_the_checkpoint_does_not_know_is_written_once(tmp_path):
    """A signal came before the evaluation of step 4, the next start made it, and was killed before its next save."""

    def go_on(*, evaluated: bool) -> list[dict]:
        with MetricsWriter(tmp_path, tensorboard=False, start_step=4, evaluated=evaluated) as writer:
            if not evaluated:
                writer.write(4, {"eval": {"val": {"top1": 0.5}}})
            writer.write(5, {"loss": 0.2})
        return lines_of(tmp_path)

    write_all(tmp_path, range(1, 5), start_step=0)
    first = go_on(evaluated=False)
    assert [(line["step"], "eval" in line) for line in first[-3:]] == [(4, False), (4, True), (5, False)]
    assert go_on(evaluated=False) == first
    assert go_on(evaluated=True) == first, "one that it knows stays"


def test_resume_drops_garbage_and_keeps_a_clean_file_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n{"loss": 1}\n{"step": "2"}\n\n{"step": 2}\n')
    MetricsWriter(tmp_path, tensorboard=False, start_step=2).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    inode = path.stat().st_ino
    MetricsWriter(tmp_path, tensorboard=False, start_step=2).close()
    assert path.stat().st_ino == inode


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_the_start_delays_the_trim_and_adds_nothing_before(tmp_path, monkeypatch, capsys):
    write_all(tmp_path, range(1, 4), start_step=0)
    path = tmp_path / "metrics.jsonl"
    before = b'{"garbage": 0}\n' + path.read_bytes()  # so that cutting off the end is not enough
    path.write_bytes(before)
    with monkeypatch.context() as patch:
        patch.setattr(writers.os, "fsync", full)
        writer = MetricsWriter(tmp_path, tensorboard=False, start_step=1)
        writer.write(2, {"loss": 2.0})
        assert path.read_bytes() == before and writer.failures == 1
    writer.write(3, {"loss": 3.0})  # there is room again
    writer.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot open the metric files of {tmp_path}" in error and "No space" in error


def test_sync_brings_the_files_and_their_folder_to_the_disk(tmp_path, monkeypatch, capsys):
    synced: list[str] = []
    with MetricsWriter(tmp_path, tensorboard=True, start_step=0) as writer:
        writer.write(1, {"loss": 1.0})
        monkeypatch.setattr(
            writers.os, "fsync", lambda file: synced.append(str(pathlib.Path(f"/proc/self/fd/{file}").readlink()))
        )
        writer.sync()
        monkeypatch.setattr(writers.os, "fsync", full)
        writer.sync()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert set(synced) == {str(tmp_path / "metrics.jsonl"), str(events), str(tmp_path)}
    assert writer.failures == 1 and "to the disk: " in capsys.readouterr().err


def test_lines_at_the_end_are_cut_off_without_room_for_a_copy(tmp_path, monkeypatch):
    write_all(tmp_path, range(1, 4), start_step=0)
    monkeypatch.setattr(writers, "write_atomic", full)
    write_all(tmp_path, range(2, 4), start_step=1)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_tensorboard_that_cannot_begin_costs_no_line_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(writers._TensorBoardFile, "_write", full)
        writer = MetricsWriter(tmp_path, tensorboard=True, start_step=0)
        writer.write(1, {"loss": 1.0})
        assert [line["step"] for line in lines_of(tmp_path)] == [1]
        assert list((tmp_path / "tensorboard").iterdir()) == []
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert [event.step for event in events_of(tmp_path)] == [0, 1, 2]
    assert capsys.readouterr().err.count("\n") == 1


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


def test_full_disk_warns_once_and_loses_no_line(tmp_path, capsys):
    with MetricsWriter(tmp_path, tensorboard=False, start_step=0) as writer:
        writer.write(1, {"loss": 1.0})
        disk = writer._lines._file = FullDisk(writer._lines._file)
        writer.write(2, {"loss": 2.0})
        disk.started = False
        writer.write(3, {"loss": 3.0})
        disk.full = False
        writer.write(4, {"loss": 4.0})
        assert writer.failures == 2
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 2" in error and "No space left" in error


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
def test_real_enospc_is_survived(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(writers, "_trim", lambda *_, **__: None)  # /dev/full reads as endless zeros
    with MetricsWriter(tmp_path, tensorboard=False, start_step=0) as writer:
        writer.write(1, {"loss": 1.0})
    error = capsys.readouterr().err
    assert writer.failures == 1 and "No space left" in error
    assert f"1 lines of {tmp_path}/metrics.jsonl could not be written, the last of step 1" in error


def test_half_a_line_that_cannot_be_taken_back_is_cut_off_before_the_next(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False, start_step=0) as writer:
        writer.write(1, {"loss": 1.0})
        raw = writer._lines._file
        disk = writer._lines._file = FullDisk(raw)
        disk.truncate = full
        writer.write(2, {"loss": 2.0})
        assert not (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
        writer._lines._file = raw
        writer.write(3, {"loss": 3.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_lines_that_wait_are_bounded_and_the_lost_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writers, "MAX_WAITING", 3)
    with MetricsWriter(tmp_path, tensorboard=False, start_step=0) as writer:
        disk = writer._lines._file = FullDisk(writer._lines._file)
        for step in range(1, 6):
            disk.started = False
            writer.write(step, {"loss": 1.0})
        disk.full = False
    assert [line["step"] for line in lines_of(tmp_path)] == [3, 4, 5]
    assert "2 lines of" in capsys.readouterr().err


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
