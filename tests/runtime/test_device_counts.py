"""Devices that are missing are named with their host."""

import socket

import jax
import pytest

from clipjax.runtime import device_counts, processes
from clipjax.runtime.device_counts import by_host, find_changes, find_odd, share


def test_a_lone_process_counts_its_own():
    share()
    assert by_host() == {socket.gethostname(): jax.local_device_count()}


def test_processes_of_a_host_add_up(monkeypatch):
    texts: dict[str, str] = {}
    monkeypatch.setattr(jax, "process_count", lambda: 12)
    monkeypatch.setattr(processes, "kv_set", texts.__setitem__)
    monkeypatch.setattr(
        processes, "kv_list", lambda folder: {key.removeprefix(f"{folder}/"): texts[key] for key in texts}
    )
    for rank in range(12):
        monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
        monkeypatch.setattr(socket, "gethostname", lambda rank=rank: f"host-{rank // 4}")
        monkeypatch.setattr(jax, "local_device_count", lambda rank=rank: 1 if rank == 11 else 2)
        device_counts.share()
    assert list(by_host().items()) == [("host-0", 8), ("host-1", 8), ("host-2", 7)]


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ({"a": 8}, ""),
        ({"a": 8, "b": 8}, ""),
        ({"a": 8, "b": 7}, "hosts differ in their devices: host b has 7, the other hosts have 8 each"),
        (
            {"a": 7, "b": 8, "c": 8, "d": 6},
            "hosts differ in their devices: host a has 7, host d has 6, the other hosts ",
        ),
    ],
)
def test_hosts_that_differ_are_named(now, found):
    assert find_odd(now).startswith(found) and bool(find_odd(now)) == bool(found)


@pytest.mark.parametrize(
    ("now", "last", "found"),
    [
        ({"a": 8}, {"devices_by_host": {"a": 8}, "num_devices": 8}, ""),
        ({"b": 8}, {"devices_by_host": {"a": 8}, "num_devices": 8}, ""),  # another machine
        (
            {"a": 7},
            {"devices_by_host": {"a": 8}},
            "7 devices, 8 at the last start of this run: host a has 7 (8 then); ",
        ),
        (
            {"a": 7, "b": 9},
            {"devices_by_host": {"a": 8, "b": 8}},
            "16 devices, 16 at the last start of this run: host a ",
        ),
        (
            {"a": 8, "c": 8},
            {"devices_by_host": {"a": 8, "b": 8, "c": 8}},
            "16 devices, 24 at the last start of this run: host b has 0 (8 then); the run may go on with any number",
        ),
        ({"a": 7}, {"num_devices": 8}, "7 devices, 8 at the last start of this run; the run may go on"),
        ({"a": 7}, {}, ""),
        ({"a": 7}, {"devices_by_host": ["a"], "num_devices": "8"}, ""),  # nonsense in the file
    ],
)
def test_changes_since_the_last_start_are_named_with_both_counts(now, last, found):
    assert find_changes(now, last).startswith(found) and bool(find_changes(now, last)) == bool(found)
