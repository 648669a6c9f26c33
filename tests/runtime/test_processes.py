"""The start of processes, and the texts between them."""

import contextlib
import os
import pathlib
import socket
import time
import types

import jax
import pytest

from clipjax.runtime import processes

pytestmark = pytest.mark.newest


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """What `jax.distributed.initialize` was called with; as many processes join as were named."""
    calls = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(jax, "process_count", lambda: calls[-1].get("num_processes", 1))
    monkeypatch.setattr(processes, "check_coordinator", lambda *_: None)
    return calls


TIMES = {"initialization_timeout": 300, "heartbeat_timeout_seconds": processes.HEARTBEAT_SECONDS}


def test_a_lone_process_starts_nothing(calls):
    processes.start({}, {"SLURM_NTASKS": "4"})
    assert calls == []


def test_start_says_what_is_known_and_keeps_jax_from_asking_again(calls, capsys):
    processes.start({"coordinator": "host:1", "num_processes": "4", "process_id": "0"}, {})
    known = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 0, "local_device_ids": None}
    assert calls == [known | TIMES | {"cluster_detection_method": "deactivate"}]
    assert capsys.readouterr().err == "clipjax: process 0: waiting for 4 processes at host:1 (flags)\n"


def test_start_leaves_tpu_pods_to_jax(calls):
    processes.start({}, {"TPU_WORKER_HOSTNAMES": "worker-0,worker-1"})
    assert calls == [{"coordinator_address": None} | TIMES]


def test_one_process_per_gpu_takes_its_own(calls):
    environment = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    processes.start({}, environment | {"OMPI_COMM_WORLD_LOCAL_RANK": "1"})
    assert calls[0]["local_device_ids"] == (1,)


def test_a_meeting_point_that_cannot_be_used_is_refused(calls, monkeypatch):
    def fail(**_: object) -> None:
        raise RuntimeError("address already in use")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match="cannot meet at host:1: address already in use; is the port free"):
        processes.start({"coordinator": "host:1", "num_processes": "2", "process_id": "0"}, {})


def test_processes_whose_devices_do_not_know_each_other_are_refused(calls, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(ValueError, match=r"2 processes were started \(flags\), but the devices know of 1"):
        processes.start({"coordinator": "host:1", "num_processes": "2", "process_id": "1"}, {})


def test_whoever_waits_long_says_so(calls, monkeypatch, capsys):
    monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments) or time.sleep(0.2))
    processes.start({"coordinator": "host:1", "num_processes": "2", "process_id": "1"}, {})
    assert "process 1: still waiting for 2 processes at host:1; all of them must be started" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_ends_one_of_several_processes_at_once(monkeypatch, count, capsys):
    ended = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(os, "_exit", ended.append)
    with contextlib.suppress(KeyError), processes.abort_on_error():
        raise KeyError("defect")
    assert processes.abort(3) == 3
    assert ended == [1, 3] * (count - 1)  # alone, the error goes on as any other
    assert ("KeyError: 'defect'" in capsys.readouterr().err) == (count > 1)


def test_devices_that_one_process_lacks_end_all_of_them(monkeypatch, capsys):
    texts: dict[str, str] = {}
    ended: list[int] = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "kv_set", texts.__setitem__)
    monkeypatch.setattr(processes, "kv_list", lambda _: texts)
    monkeypatch.setattr(processes, "_LAST_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", ended.append)
    with processes._failure_shared("process 1"):
        assert not ended
    with contextlib.suppress(ValueError), processes._failure_shared("process 1"):
        raise ValueError("no chip")
    assert ended == [2] and "clipjax: error: process 1: no chip" in capsys.readouterr().err


def test_a_lone_process_is_the_first():
    assert processes.is_first()


@pytest.fixture
def coordinator():
    """A coordinator of this process alone, beside devices that are open already, started past JAX's public door."""
    from jax._src import distributed

    jax.devices()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    distributed.global_state.initialize(coordinator_address=address, num_processes=1, process_id=0)
    yield distributed
    distributed.global_state.shutdown()


def test_texts_go_through_the_coordinator(coordinator):
    """Fails where a newer JAX has moved the private attributes that `processes._store` rests on."""
    processes.kv_set("folder/a", "x")
    processes.kv_set("folder/b", "b")
    assert processes.kv_get("folder/a", timeout_seconds=1) == "x"
    with pytest.raises(jax.errors.JaxRuntimeError, match="ALREADY_EXISTS"):
        processes.kv_set("folder/a", "z")
    processes.kv_set("folder/b", "y\n", overwrite=True)
    assert processes.kv_list("folder") == {"a": "x", "b": "y\n"}
    processes.kv_delete("folder")
    assert processes.kv_list("folder") == {}
    with pytest.raises(TimeoutError, match="no process has sent folder/a within 0 seconds"):
        processes.kv_get("folder/a", timeout_seconds=0.01)


def test_a_store_that_jax_has_moved_is_named(monkeypatch):
    from jax._src import distributed

    with pytest.raises(RuntimeError, match="jax.distributed is not initialized"):
        processes.kv_list("folder")
    monkeypatch.setattr(distributed.global_state, "client", object())
    with pytest.raises(RuntimeError, match="its client lacks key_value_set, blocking_key_value_get, key_value_dir_get"):
        processes.kv_list("folder")
    monkeypatch.delattr(distributed, "global_state")
    with pytest.raises(RuntimeError, match=r"JAX .* has moved jax\._src\.distributed\.global_state.*no attribute"):
        processes.kv_list("folder")


def test_one_function_alone_enters_the_private_modules_of_jax():
    package = pathlib.Path(processes.__file__).parents[1]
    users = {
        path.name: path.read_text().count("from jax._src") + path.read_text().count("import jax._src")
        for path in package.rglob("*.py")
    }
    assert {name: count for name, count in users.items() if count} == {"processes.py": 1}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "::"])
def test_a_port_that_another_program_uses_is_refused_before_jax_tries(host):
    """On whatever address it listens; JAX would bind to all of them, and may crash."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as another run would
        holder.bind((host, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot meet at localhost:{port}: another program uses this port"):
            processes.start({"coordinator": f"localhost:{port}", "num_processes": "2", "process_id": "0"}, {})
    processes.check_coordinator(f"localhost:{port}", {})


def test_a_meeting_point_on_another_machine_is_refused_unless_it_is_forwarded():
    with pytest.raises(ValueError, match=r"process 0 runs here, and 192\.0\.2\.1 is another machine"):
        processes.check_coordinator("192.0.2.1:0", {})
    processes.check_coordinator("192.0.2.1:0", {"JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.1:0"})
    with pytest.raises(ValueError, match="this machine has no such address"):
        processes.check_coordinator("localhost:0", {"JAX_COORDINATOR_BIND_ADDRESS": "192.0.2.1:0"})


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RuntimeError("Unable to initialize backend 'tpu': no chip (set JAX_PLATFORMS='' to ...)"), "'tpu': no chip;"),
        (AssertionError(), "there is no such device, or JAX has no plugin"),
    ],
)
def test_a_platform_that_is_not_there_is_refused(monkeypatch, failure, reason):
    def devices() -> list:
        raise failure

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError) as refused:
        processes.start({}, {"JAX_PLATFORMS": "tpu"})
    assert str(refused.value).startswith("JAX_PLATFORMS=tpu: ") and reason in str(refused.value)


def test_a_run_says_on_what_it_runs(monkeypatch):
    monkeypatch.setattr(processes, "_accelerator_files", lambda: "/dev/nvidia0")
    assert processes.describe_devices({"JAX_PLATFORMS": "cpu"}) == f"devices: {jax.device_count()} cpu"
    told = processes.describe_devices({})
    assert "this machine has an accelerator (/dev/nvidia0) that JAX does not use" in told
    monkeypatch.setattr(processes, "_accelerator_files", lambda: "")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert processes.describe_devices({}) == f"devices: {jax.device_count()} cpu of 4 processes"
    chip = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "devices", lambda: [chip] * 16)
    assert processes.describe_devices({}) == "devices: 16 tpu (TPU v5 lite) of 4 processes"
