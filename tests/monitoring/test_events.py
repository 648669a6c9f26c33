"""Events of a run: lines that survive a kill in the middle of one, and a disk that cannot be written."""

import json
import os
import pathlib

from clipjax.monitoring import events
from clipjax.monitoring.events import Events


def test_events_are_lines_in_order_and_counted(tmp_path):
    log = Events(tmp_path, enabled=True, clock=lambda: 12.3456)
    log.add("start", devices=8)
    log.add("rollback", step=7)
    log.add("rollback", step=9)
    assert [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()] == [
        {"time": 12.346, "event": "start", "devices": 8},
        {"time": 12.346, "event": "rollback", "step": 7},
        {"time": 12.346, "event": "rollback", "step": 9},
    ]
    assert [event["event"] for event in events.read(tmp_path)] == ["start", "rollback", "rollback"]
    assert log.counts == {"start": 1, "rollback": 2}


def test_a_line_cut_off_by_a_kill_costs_itself_alone(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"time": 1, "event": "start"}\n[1]\n{"event": []}\n{"time": 2, "ev')
    Events(tmp_path, enabled=True).add("start")
    assert [event["event"] for event in events.read(tmp_path)] == ["start", "start"]
    assert b'{"time": 2, "ev\n{' in path.read_bytes()


def test_sync_brings_the_lines_to_the_disk_and_never_fails(tmp_path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(str(pathlib.Path(f"/proc/self/fd/{file}").readlink())))
    found = Events(tmp_path, enabled=True)
    found.add("start")
    found.sync()
    Events(tmp_path, enabled=False).sync()
    Events(tmp_path / "gone", enabled=True).sync()
    assert synced == [str(tmp_path / "events.jsonl")]


def test_other_processes_and_full_disks_write_nothing_and_go_on(tmp_path):
    Events(tmp_path, enabled=False).add("start")
    assert not list(tmp_path.iterdir()) and events.read(tmp_path) == []
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    Events(tmp_path, enabled=True).add("start")
