"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable

LIMIT_SECONDS = 120.0
"""No wait that is to end well takes that long, on a machine with much else to do; one that does is a failure."""


def wait_for(condition: Callable[[], object], seconds: float = LIMIT_SECONDS) -> None:
    """Poll until something is true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happens"
        time.sleep(0.01)
