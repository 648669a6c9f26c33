"""What a start of a process opens and closes."""

from unittest import mock

from clipjax.monitoring import events
from clipjax.training import session


def test_prometheus_sees_the_ledger_and_the_events_of_the_run(tmp_path):
    checked = mock.Mock(workdir=tmp_path)
    log = events.Events(tmp_path, enabled=True)
    with session._ledger(checked, log) as goodput:
        checked.exporter.watch.assert_called_once_with(goodput, log)
    assert [event["event"] for event in events.read(tmp_path)] == ["start", "stop"]
