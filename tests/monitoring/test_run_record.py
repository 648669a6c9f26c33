"""`run.json`: a record for each start."""

import json
import sys
import threading
import time

import jax
import pytest

from clipjax.monitoring import run_record


def test_starts_and_the_committed_step_are_kept(tmp_path):
    assert run_record.read(tmp_path) == {}
    run_record.write(tmp_path, {"number": 1})
    run_record.record_commit(tmp_path, 7)
    run_record.write(tmp_path, {"number": 2})
    run_record.record_commit(tmp_path, 9)
    assert run_record.read(tmp_path) == {"starts": [{"number": 1}, {"number": 2}], "committed_step": 9}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("damaged", ["{", "[]", '{"starts": 3}', '{"committed_step": "7"}', '{"committed_step": -1}'])
def test_a_damaged_file_is_told_and_set_aside(tmp_path, capsys, damaged):
    (tmp_path / "run.json").write_text(damaged)
    with pytest.raises(run_record.DamagedRecord, match="run.json is damaged"):
        run_record.read(tmp_path)
    run_record.record_commit(tmp_path, 3)
    assert "run.json is damaged" in capsys.readouterr().err
    assert (tmp_path / "run.json.damaged").read_text() == damaged
    run_record.write(tmp_path, {"number": 3})
    assert run_record.read(tmp_path) == {"starts": [{"number": 3}], "committed_step": 3}


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


def test_a_commit_and_facts_that_are_recorded_at_once_are_both_kept(tmp_path, monkeypatch):
    run_record.write(tmp_path, {})
    save = run_record._save
    monkeypatch.setattr(run_record, "_save", lambda *words: (time.sleep(0.1), save(*words)))
    thread = threading.Thread(target=run_record.record_commit, args=(tmp_path, 7))
    thread.start()
    time.sleep(0.05)
    run_record.add_to_start(tmp_path, fact=1)
    thread.join()
    assert run_record.read(tmp_path) == {"starts": [{"fact": 1}], "committed_step": 7}
