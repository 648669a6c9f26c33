"""The check of devices: a healthy machine passes in silence, and each kind of fault is named with its host."""

import json
import socket
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import MeshConfig
from clipjax.runtime import device_check, processes
from clipjax.runtime.device_check import BrokenDevice, _Findings, check_devices
from clipjax.runtime.sharding import make_mesh

HOST = socket.gethostname()


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(slice=2, data=2, tensor=2))


def test_healthy_devices_pass_and_their_times_are_told(mesh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        times = check_devices(mesh)
    assert list(times) == ["matmul", "slice", "data", "tensor"]  # axes of one device have no links
    for part in times.values():
        assert 0 < part["median_seconds"] <= part["max_seconds"] < 60
        assert part["slowest"].startswith("cpu:") and part["host"] == HOST
    json.dumps(times)


def test_the_product_is_that_of_the_tiles_and_one_wrong_number_is_seen(monkeypatch, mesh):
    known = device_check._known_matrices
    a, b, product = known(mesh.devices.flat[0])
    np.testing.assert_array_equal(np.tile(a, (2, 2)) @ np.tile(b, (2, 2)), np.tile(2 * product, (2, 2)))

    def flipped(device):
        a, b, product = known(device)
        if device.id == 3:
            a[17, 5] += 1
        return a, b, product

    monkeypatch.setattr(device_check, "_known_matrices", flipped)
    with pytest.raises(BrokenDevice) as broken:
        check_devices(mesh)
    _, *lines = str(broken.value).splitlines()
    assert lines == [f"cpu:3 (process 0) multiplies wrongly, on host {HOST}"]


def test_a_link_that_changes_a_bit_is_named_by_its_two_ends(monkeypatch, mesh):
    send = jax.lax.ppermute

    def faulty(x, axis, pairs):
        # On the axis `data`, the device with coordinates (slice 1, data 0, tensor 1) receives one bit flipped.
        hit = (jax.lax.axis_index("slice") == 1) & (jax.lax.axis_index("data") == 0) & (axis == "data")
        hit &= jax.lax.axis_index("tensor") == 1
        return send(x, axis, pairs) ^ (hit & (jnp.arange(x.size) == 7)).astype(jnp.uint32)

    monkeypatch.setattr(jax.lax, "ppermute", faulty)
    with pytest.raises(BrokenDevice) as broken:
        check_devices(mesh)
    _, *lines = str(broken.value).splitlines()
    assert lines == [
        f"cpu:5 (process 0) receives wrong bytes from cpu:7 (process 0) on the mesh axis 'data', on host {HOST}"
    ]


@pytest.mark.parametrize("collective", ["psum", "all_gather"])
def test_a_wrong_collective_is_named_by_its_axis(monkeypatch, mesh, collective):
    right = getattr(jax.lax, collective)

    def faulty(x, axis):
        hit = (jax.lax.axis_index("slice") == 0) & (jax.lax.axis_index("data") == 1) & (axis == "tensor")
        return right(x, axis) + hit.astype(jnp.uint32)

    monkeypatch.setattr(jax.lax, collective, faulty)
    with pytest.raises(BrokenDevice) as broken:
        check_devices(mesh)
    _, *lines = str(broken.value).splitlines()
    group = "receives wrong bytes from its group on the mesh axis 'tensor'"
    assert sorted(lines) == [f"cpu:{i} (process 0) {group}, on host {HOST}" for i in (2, 3)]


def test_a_device_that_never_answers_is_named(monkeypatch):
    monkeypatch.setattr(device_check, "SILENT_SECONDS", 0.02)
    monkeypatch.setattr(device_check, "_COMPILE_SECONDS", 0.02)
    device = jax.devices()[2]
    silent = types.SimpleNamespace(device=device, data=types.SimpleNamespace(is_ready=lambda: False))
    result: Any = types.SimpleNamespace(addressable_shards=[silent])
    findings = _Findings()
    device_check._measure(findings, "data", lambda: result, lambda *_: "unused")
    assert findings.broken == ["cpu:2 (process 0) gives no result in the part 'data'"]


def findings(rank: int, *seconds: float, broken: tuple[str, ...] = ()) -> _Findings:
    names = [f"gpu:{rank}{i} (process {rank})" for i in range(len(seconds))]
    return _Findings(
        f"host-{rank}", list(broken), {"matmul": dict(zip(names, seconds, strict=True))}, dict.fromkeys(names, "H")
    )


def test_a_device_far_above_the_median_of_its_kind_is_a_warning(monkeypatch):
    found = [findings(0, 0.010, 0.011), findings(1, 0.012, 0.031)]
    assert device_check._summary(found)["matmul"]["slowest"] == "gpu:11 (process 1)"  # CPUs: never a warning
    monkeypatch.setitem(device_check.SLOW_SECONDS, "cpu", 0.005)
    with pytest.warns(
        UserWarning, match=r"^gpu:11 \(process 1\) on host host-1 is slow .* matmul takes 0\.0310 s"
    ) as told:
        device_check._summary(found)
    assert len(told) == 1
    found[1].kinds["gpu:11 (process 1)"] = "another kind"  # which has its own median
    device_check._summary(found)


class Store:
    """The key-value store of two processes, without processes."""

    def __init__(self, monkeypatch, rank: int) -> None:
        self.texts: dict[str, str] = {}
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: rank)
        monkeypatch.setattr(processes, "kv_set", self.texts.__setitem__)
        monkeypatch.setattr(device_check, "_READ_SECONDS", 0.0)
        monkeypatch.setattr(processes, "kv_get", self.get)
        monkeypatch.setattr(processes, "kv_list", lambda folder: {"0": "host-0", "1": "host-1"})

    def get(self, key: str, *, timeout_seconds: float) -> str:
        if key not in self.texts:
            raise TimeoutError(key)
        return self.texts[key]


def test_a_process_that_sends_nothing_is_named_with_its_host(monkeypatch):
    store = Store(monkeypatch, 0)
    with pytest.raises(BrokenDevice, match="process 1 sends no result of the part 'products', on host host-1"):
        device_check._settle("check", "products", findings(0, 0.01))
    assert "host-1" in store.texts["check/products/verdict"]  # the others raise it too


def test_a_fault_of_one_process_reaches_all(monkeypatch):
    store = Store(monkeypatch, 1)
    lines = ["gpu:3 (process 0) multiplies wrongly, on host host-0"]
    store.texts["check/products/verdict"] = json.dumps(lines)
    with pytest.raises(BrokenDevice, match="multiplies wrongly, on host host-0"):
        device_check._settle("check", "products", findings(1, 0.01))
    store.texts["check/links/verdict"] = "[]"
    assert device_check._settle("check", "links", findings(1, 0.01))["matmul"]["host"] == "host-1"
    sent = json.loads(store.texts["check/links/1"])
    Store(monkeypatch, 0).texts["check/links/1"] = json.dumps(sent)
    assert device_check._settle("check", "links", findings(0, 0.02))["matmul"]["slowest"] == "gpu:00 (process 0)"
