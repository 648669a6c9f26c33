"""Metrics for Prometheus: scraped over HTTP as it does, on one address, and never in the way of the run."""

import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from clipjax.config import Config, LogConfig
from clipjax.config.validation import validate
from clipjax.monitoring.events import Events
from clipjax.monitoring.goodput import Goodput
from clipjax.monitoring.prometheus import Exporter

VALUES = {
    "loss": 3.5,
    "learning_rate": 1e-4,
    "examples_per_second": 1234.5,
    "skipped_updates": 2,
    "goodput": 0.5,
    "samples_skipped": {"corrupt_image": 1},
    "a/name": 1.0,
    "text": "x",
    "nothing": float("nan"),
}


@pytest.fixture
def exporter():
    made = Exporter(LogConfig(prometheus_port=0))
    yield made
    made.close()


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Values by name and label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [((one.name, *one.labels.values()), one.value) for family in families for one in family.samples]
    assert len(dict(samples)) == len(samples), "each is served once"
    return dict(samples)


def test_a_scrape_shows_the_last_step_the_times_and_the_events(exporter, tmp_path):
    assert scrape(exporter.port) == {}  # nothing is known yet
    exporter.update(1, VALUES)
    assert scrape(exporter.port)["clipjax_goodput",] == 0.5  # as it was logged: nobody keeps a ledger yet
    assert exporter.url == f"http://127.0.0.1:{exporter.port}/metrics"
    now = 1000.0
    events = Events(tmp_path, enabled=True)
    ledger = Goodput(events, began=now, clock=lambda: now)
    exporter.watch(ledger, events)
    now += 60
    ledger.step(1)
    now += 20
    exporter.update(32, VALUES)
    events.add("rollback", step=7)
    events.add("anything")
    found = scrape(exporter.port)
    assert found["clipjax_step",] == 32
    assert found["clipjax_loss",] == 3.5
    assert found["clipjax_learning_rate",] == 1e-4
    assert found["clipjax_examples_per_second",] == 1234.5
    assert found["clipjax_skipped_updates",] == 2
    assert found["clipjax_goodput",] == 0.25
    assert found["clipjax_wall_seconds", "initialisation"] == 60 and found["clipjax_wall_seconds", "steps"] == 20
    assert found["clipjax_events_total", "rollback"] == found["clipjax_events_total", "anything"] == 1
    assert found["clipjax_events_total", "failed_save"] == found["clipjax_events_total", "worker_restart"] == 0
    assert not any("text" in key[0] or "a/name" in key[0] or "samples_skipped" in key[0] for key in found)
    now += 20  # times are those of the scrape, not of the last logged step
    assert scrape(exporter.port)["clipjax_wall_seconds", "steps"] == 40


def test_a_taken_port_and_a_foreign_host_are_refused(exporter):
    with pytest.raises(ValueError, match=rf"log\.prometheus_port={exporter.port} cannot be used .* choose a free"):
        Exporter(LogConfig(prometheus_port=exporter.port))
    with pytest.raises(ValueError, match=r"log\.prometheus_host='192\.0\.2\.1': .* an address of this machine"):
        Exporter(LogConfig(prometheus_port=0, prometheus_host="192.0.2.1"))
    with pytest.raises(ValueError, match="prometheus_host"):
        Exporter(LogConfig(prometheus_port=0, prometheus_host="x" * 70 + ".test"))


def test_only_the_loopback_is_served_and_nothing_after_the_end():
    made = Exporter(LogConfig(prometheus_port=0))
    assert made._server.server_address[0] == "127.0.0.1"
    made.close()
    with pytest.raises(urllib.error.URLError):
        scrape(made.port)
    Exporter(LogConfig(prometheus_port=made.port)).close()  # the port is free again


def test_clients_that_send_nonsense_or_leave_disturb_nobody(exporter, capsys):
    for request in (b"", b"\x00\xff nonsense\r\n\r\n", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", exporter.port), timeout=60) as client:
            client.sendall(request)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leave with a reset
    exporter.update(1, {"loss": 1.0})
    assert scrape(exporter.port)["clipjax_loss",] == 1.0
    assert capsys.readouterr().err == ""


def test_the_config_bounds_the_port_and_refuses_a_host_without_one():
    def error(**fields) -> str:
        with pytest.raises(ValueError) as refused:
            validate(Config(log=LogConfig(**fields)))
        return str(refused.value)

    for port in (-1, 65536):
        assert f"log.prometheus_port={port} must lie between 0 and 65535" in error(prometheus_port=port)
    assert "log.prometheus_host='0.0.0.0' would be ignored" in error(prometheus_host="0.0.0.0")
    assert "log.price_per_hour=0 must be greater than 0" in error(price_per_hour=0)
