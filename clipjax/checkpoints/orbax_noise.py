"""Noise of Orbax, asyncio and TensorStore about arrays that cannot be written or read, kept from the terminal."""

import asyncio
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

from clipjax.checkpoints.folder import TEMPORARY


def silence_orbax() -> None:
    """Keep the tracebacks of arrays that cannot be written or read off the terminal; one error tells what they mean.

    After the first array that fails Orbax waits for none of the others, so asyncio complains of each of those, and
    TensorStore of each that ends when the loop that started it is gone.
    """
    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(_is_news)
    if isinstance(sys.unraisablehook, _WithoutClosedLoops):
        return
    sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


class _WithoutClosedLoops:
    """A hook for errors in threads of C++ that shows all but those of an asyncio loop that has gone."""

    def __init__(self, show: Callable[[Any], Any]) -> None:
        self._show = show

    def __call__(self, found: Any) -> None:
        files = {frame.filename for frame in traceback.extract_tb(found.exc_traceback)}
        if not isinstance(found.exc_value, RuntimeError) or files != {asyncio.base_events.__file__}:
            self._show(found)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what Orbax logs about a write that failed, and asyncio about a future of Orbax."""
    trace = record.exc_info[2] if record.exc_info and record.name == "asyncio" else None
    if any("orbax/checkpoint/_src/" in frame.filename for frame in traceback.extract_tb(trace)):
        return False
    return "orbax/checkpoint/_src/futures" not in record.pathname and TEMPORARY not in record.getMessage()
