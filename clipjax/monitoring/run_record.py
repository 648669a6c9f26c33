"""`WORKDIR/run.json`: a record for each start (machine, devices, versions), and the step of the last whole checkpoint.

The first process writes it.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from clipjax.runtime import process_log, processes
from clipjax.runtime.files import write_atomic

FILE = "run.json"
PACKAGES = ("clipjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages whose version can change numbers or files."""

_lock = threading.Lock()  # a commit is recorded by another thread than facts about a start


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a copy, without its metadata
            found[name] = "unknown"
    return found


def describe_start() -> dict[str, Any]:
    """Describe this process and its machine; open the devices."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": f"{jax.process_index()} of {jax.process_count()}",
        "local_devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.local_devices()],
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions(),
    }


class DamagedRecord(ValueError):
    """A `run.json` that cannot be understood."""


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """Return the record of a run: `starts`, and `committed_step` once a checkpoint is complete; empty without a file.

    Raises:
        DamagedRecord: the file holds something else.
        OSError: it cannot be read.
    """
    path = workdir / FILE
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("starts", []), list):
        raise DamagedRecord(f"{path} is damaged: it is no JSON object with a list `starts`")
    step = found.get("committed_step", 0)
    if type(step) is not int or step < 0:
        raise DamagedRecord(f"{path} is damaged: committed_step={step!r} must be a whole number of at least 0")
    return found


def write(workdir: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Add the record of this start.

    Raises:
        OSError: the file cannot be written.
    """
    with _lock:
        found = _read_or_set_aside(workdir)
        _save(workdir, {**found, "starts": [*found.get("starts", []), dict(record)]})


def add_to_start(workdir: pathlib.Path, **facts: Any) -> None:
    """Add facts to the record of this start, which is the last one; if they cannot be written, the log has them."""
    process_log.info("\n".join(f"{name}: {value}" for name, value in facts.items()))
    try:
        with _lock:
            found = _read_or_set_aside(workdir)
            if starts := found.get("starts", []):
                _save(workdir, {**found, "starts": [*starts[:-1], {**starts[-1], **facts}]})
    except OSError as error:
        process_log.info(f"{workdir / FILE} cannot be written: {error}")


def record_commit(workdir: pathlib.Path, step: int) -> None:
    """Record the step of a checkpoint that is complete: a workdir that has lost it later is not taken for a new one.

    Raises:
        OSError: the file cannot be written.
    """
    with _lock:
        _save(workdir, {"starts": [], **_read_or_set_aside(workdir), "committed_step": step})


def _read_or_set_aside(workdir: pathlib.Path) -> dict[str, Any]:
    """Return the record; rename a damaged file, and tell so, and return an empty one."""
    try:
        return read(workdir)
    except DamagedRecord as error:
        aside = workdir / f"{FILE}.damaged"
        (workdir / FILE).replace(aside)
        processes.announce(f"warning: {error}; it is now {aside.name}, and a new {FILE} begins")
        return {}


def _save(workdir: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Write the file; it is whole at any time, also after a crash of the machine."""
    write_atomic(workdir / FILE, json.dumps(record, indent=2) + "\n", sync=True)
