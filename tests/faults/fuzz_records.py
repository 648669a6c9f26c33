"""Readers of broken records: those of a checkpoint and those of a workdir."""

import json
import math
import pathlib
import random
from typing import Any

from clipjax.checkpoints import manifest
from clipjax.config import Config
from clipjax.config.serialization import from_dict, to_dict
from clipjax.data.digests import from_record
from clipjax.monitoring import events, run_record
from clipjax.monitoring.goodput import History
from clipjax.runtime import device_counts
from clipjax.training.decisions import Decisions, parse_all
from clipjax.training.resume import Position
from tests.faults.break_values import break_bytes, break_value

DATA: dict[str, Any] = {
    "step": 9,
    "evaluated": False,
    "num_samples": 64,
    "teacher_step": None,
    "shards": [["train.tar", "b9e20cec1f940653ab37bc31ec3cadff", 64], ["b.tar", "0" * 32, 3]],
    "decisions": [
        {
            "decision": "rollback",
            "to_step": 20,
            "first_step": 25,
            "last_step": 30,
            "first_batch": 24,
            "last_batch": 29,
            "reason": "not finite",
        },
    ],
    "format": 2,
}
MANIFEST: dict[str, Any] = {
    "format": 2,
    "step": 9,
    "best": ["scenes/val top1", 0.5],
    "files": {"config/metadata": [3, "9" * 32], "params/d/x": [0, "0" * 32]},
}
RUN: dict[str, Any] = {
    "format": 1,
    "starts": [{"time": "2026-11-30", "devices_by_host": {"a": 8}, "num_devices": 8}],
    "committed_step": 9,
}
EVENTS: list[dict[str, Any]] = [
    {"time": 1.5, "event": "start", "step": 0},
    {"time": 2.5, "event": "ledger", "step": 3, "seconds": {"steps": 1.0, "saving": 0.5}},
]


def read_config(rng: random.Random, folder: pathlib.Path) -> str:
    """Read a broken `config` record."""
    record = break_value(json.loads(json.dumps(to_dict(Config()))), rng)
    assert isinstance(from_dict(record), Config)
    return "read"


def read_data(rng: random.Random, folder: pathlib.Path) -> str:
    """Read a broken `data` record, with the shards and decisions in it."""
    position = Position.from_record(break_value(DATA, rng), 9)
    from_record(position.shards)
    parse_all(position.decisions)
    return "read"


def read_manifest(rng: random.Random, folder: pathlib.Path) -> str:
    """Read a broken manifest, also one whose digest fits, and examine its checkpoint: the examination never raises."""
    content = manifest._encode(MANIFEST)
    if rng.random() < 0.5:
        content = break_bytes(content, rng)
    else:
        broken = break_value(MANIFEST, rng)
        content = manifest._encode(broken) if isinstance(broken, dict) else json.dumps(broken).encode()
    (folder / manifest.FILE).write_bytes(content)
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "metadata").write_bytes(b"{} ")
    assert not manifest.examine(folder).usable
    manifest.best_of(folder)
    manifest.read(folder)
    return "read"


def read_workdir(rng: random.Random, folder: pathlib.Path) -> str:
    """Read broken `run.json`, `events.jsonl` and `decisions.jsonl`."""
    (folder / "run.json").write_text(json.dumps(break_value(RUN, rng)))
    lines = [EVENTS[0], *(break_value(each, rng) for each in EVENTS)]
    written = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
    (folder / "events.jsonl").write_bytes(break_bytes(written, rng) if rng.random() < 0.5 else written)
    decisions = b"".join(json.dumps(break_value(each, rng)).encode() + b"\n" for each in DATA["decisions"])
    (folder / "decisions.jsonl").write_bytes(break_bytes(decisions, rng) if rng.random() < 0.5 else decisions)
    history = History.from_events(events.read(folder))
    assert all(math.isfinite(value) for value in [*history.seconds.values(), history.device_seconds])
    last = next(iter(reversed(run_record.read(folder).get("starts", []))), {})
    device_counts.find_changes({"a": 8}, last if isinstance(last, dict) else {})
    Decisions(folder)
    return "read"
