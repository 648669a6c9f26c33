"""`WORKDIR/run.json`: machine, devices and versions, one record for each start. The first process writes it."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from clipjax.runtime.files import write_atomic

PACKAGES = ("clipjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages whose version can change numbers or files."""


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


def write(workdir: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Add the record of this start; the file is whole at any time.

    Raises:
        OSError: the file cannot be written.
    """
    path = workdir / "run.json"
    try:
        starts = list(json.loads(path.read_bytes())["starts"])
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or damaged: it is a record, not a state
        starts = []
    write_atomic(path, json.dumps({"starts": [*starts, dict(record)]}, indent=2) + "\n")
