"""`run.json`: a record for each start."""

import json
import sys

import jax

from clipjax.monitoring import run_record


def test_each_start_adds_a_record_and_a_damaged_file_is_replaced(tmp_path):
    def starts() -> list:
        return json.loads((tmp_path / "run.json").read_text())["starts"]

    run_record.write(tmp_path, {"number": 1})
    run_record.write(tmp_path, {"number": 2})
    assert starts() == [{"number": 1}, {"number": 2}]
    for damaged in ("{", "[]", '{"starts": 3}', "{}"):
        (tmp_path / "run.json").write_text(damaged)
        run_record.write(tmp_path, {"number": 3})
        assert starts() == [{"number": 3}]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_start_is_described_by_machine_devices_and_versions(monkeypatch):
    jax.devices()  # they read the flags once
    monkeypatch.setenv("XLA_FLAGS", "--xla_some=1")
    monkeypatch.setattr(sys, "argv", ["clipjax", "train", "--config=a b.py"])
    start = run_record.describe_start()
    assert start["command"] == "clipjax train '--config=a b.py'"
    assert (start["process"], start["num_processes"], start["num_devices"]) == ("0 of 1", 1, 8)
    assert start["local_devices"][7] == "cpu:7 cpu"
    assert start["xla_flags"] == "--xla_some=1"
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= start["versions"].keys()
    json.dumps(start)
