"""What a start of a process opens and closes."""

from unittest import mock

import pytest

from clipjax.monitoring import events
from clipjax.runtime.device_check import BrokenDevice
from clipjax.training import session


def test_prometheus_sees_the_ledger_and_the_events_of_the_run(tmp_path):
    checked = mock.Mock(workdir=tmp_path)
    log = events.Events(tmp_path, enabled=True)
    with session._ledger(checked, log) as goodput:
        checked.exporter.watch.assert_called_once_with(goodput, log)
    assert [event["event"] for event in events.read(tmp_path)] == ["start", "stop"]


def test_a_start_that_fails_has_taken_the_signals_over_and_closes_what_it_opened(tmp_path, monkeypatch):
    parts = {name: mock.MagicMock() for name in ("Shutdown", "Watchdog", "sharding", "start_signals")}
    for name, part in parts.items():
        monkeypatch.setattr(session, name, part)
    monkeypatch.setattr(session.device_check, "check_devices", mock.Mock(side_effect=BrokenDevice("cpu:3")))
    checked = mock.MagicMock(workdir=tmp_path)
    with pytest.raises(BrokenDevice), session.open_session(checked):
        pass
    signals = parts["Shutdown"].return_value
    parts["start_signals"].hand_over.assert_called_once_with(signals.receive)
    assert signals.close.called and checked.exporter.close.called
    assert events.read(tmp_path)[-1]["reason"] == "BrokenDevice"
