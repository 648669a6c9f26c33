"""Metrics for Prometheus: a run seen from outside, at `http://HOST:PORT/metrics`, from `log.prometheus_port` on.

The server is bound in the preflight, so that a port that is taken is refused; its threads are daemons, and only read
what the loop leaves here: nothing that they meet reaches the run.
"""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from clipjax.config import LogConfig
from clipjax.monitoring.events import Events
from clipjax.monitoring.goodput import Goodput

COUNTED = ("start", "skipped_update", "rollback", "failed_save", "worker_restart")
"""Events that are shown with a count of 0 before the first one."""

_CLIENT_SECONDS = 10.0  # then a client that sends nothing loses its connection, and its thread ends


class Exporter(Collector):
    """The metrics of one process's run, served from now until `close`.

    Attributes:
        port: where it listens.
        url: address of the metrics.

    Args:
        config: with a port.

    Raises:
        ValueError: the port or the host cannot be used.
    """

    def __init__(self, config: LogConfig) -> None:
        assert config.prometheus_port is not None
        self._values: dict[str, float] = {}
        self._goodput: Goodput | None = None
        self._events: Events | None = None
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        port, host = config.prometheus_port, config.prometheus_host
        try:
            server, self._thread = start_http_server(port, host, registry)
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have such a name
            raise ValueError(
                f"log.prometheus_port={port} cannot be used on log.prometheus_host={host!r}: {error}; choose a free "
                "port (0 takes any) and an address of this machine, or None to serve nothing"
            ) from error
        self._server: Any = server
        server_handler: Any = server.RequestHandlerClass
        self._server.RequestHandlerClass = type("Handler", (server_handler,), {"timeout": _CLIENT_SECONDS})
        self._server.handle_error = lambda request, client_address: None  # a client that leaves is no news
        self.port = self._server.server_port  # where the config says 0, the one that was free
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def watch(self, goodput: Goodput, events: Events) -> None:
        """Serve these from now on."""
        self._goodput, self._events = goodput, events

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Serve the numbers of a logged step; texts, nested values and names that Prometheus refuses are left out."""
        numbers = {name: one for name, one in values.items() if isinstance(one, int | float) and name.isidentifier()}
        self._values = {**numbers, "step": step, "last_log_timestamp_seconds": time.time()}

    def collect(self) -> Iterable[Metric]:
        """Return everything that is known now; a thread of the server calls it."""
        found: list[Metric] = []
        logged = dict(self._values)
        if self._goodput is not None:
            logged.pop("goodput", None)  # that of this moment comes from the ledger
        for name, value in logged.items():
            found.append(GaugeMetricFamily(f"clipjax_{name}", f"{name} at the last logged step", value=float(value)))
        if self._goodput is not None:
            seconds = self._goodput.seconds()
            times = GaugeMetricFamily("clipjax_wall_seconds", "time of all starts of the run", labels=["cause"])
            for cause, value in seconds.items():
                times.add_metric([cause], value)
            share = seconds["steps"] / max(math.fsum(seconds.values()), 1e-9)
            found += [times, GaugeMetricFamily("clipjax_goodput", "share of productive steps, 0 to 1", value=share)]
        if self._events is not None:
            counts = CounterMetricFamily("clipjax_events", "events of this start", labels=["event"])
            for event, count in ({**dict.fromkeys(COUNTED, 0), **self._events.counts}).items():
                counts.add_metric([event], count)
            found.append(counts)
        return found

    def close(self) -> None:
        """Close the port and end the server; requests that are being answered end by themselves."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
