"""Devices by host: what this start has, hosts that differ from the others, and what is missing since the last start.

JAX lists only the devices that it finds: a GPU that has fallen off its bus is no error, but a smaller mesh. Any number
is allowed, so these are warnings.
"""

import collections
import json
import socket
from collections.abc import Mapping
from typing import Any

import jax

from clipjax.runtime import processes

_FOLDER = "devices"


def share() -> None:
    """Tell the other processes how many devices this one has; each calls it once, before any calls `by_host`."""
    if jax.process_count() > 1:
        text = json.dumps([socket.gethostname(), jax.local_device_count()])
        processes.kv_set(f"{_FOLDER}/{jax.process_index()}", text)


def by_host() -> dict[str, int]:
    """Return the number of devices of each host, over all of its processes."""
    if jax.process_count() == 1:
        return {socket.gethostname(): jax.local_device_count()}
    found: collections.Counter[str] = collections.Counter()
    for _, text in sorted(processes.kv_list(_FOLDER).items(), key=lambda item: int(item[0])):
        host, count = json.loads(text)
        found[host] += count
    return dict(found)


def find_odd(now: Mapping[str, int]) -> str:
    """Return a warning that names the hosts with another number of devices than most; empty if there are none."""
    sizes = collections.Counter(now.values())
    usual = max(sizes, key=lambda size: (sizes[size], size))
    odd = [f"host {host} has {count}" for host, count in now.items() if count != usual]
    return f"hosts differ in their devices: {_list(odd)}, the other hosts have {usual} each" if odd else ""


def find_changes(now: Mapping[str, int], last: Mapping[str, Any]) -> str:
    """Return a warning if a host has lost or won devices since the last start, or there are others in all.

    Args:
        now: devices by host.
        last: the record of that start in `run.json`; one of an older version knows their sum alone.
    """
    before = last.get("devices_by_host")
    if not isinstance(before, dict) or not all(type(count) is int for count in before.values()):
        before = {}
    then, total = sum(before.values()) or last.get("num_devices"), sum(now.values())
    changed = [
        f"host {host} has {now.get(host, 0)} ({before.get(host, 0)} then)"
        for host in dict.fromkeys([*before, *now])
        if now.get(host, 0) != before.get(host, 0)
    ]
    moved = then == total and not any(now[host] != before[host] for host in now.keys() & before.keys())
    if moved or type(then) is not int:  # the same number on other machines is no news
        return ""
    where = f": {_list(changed)}" if before else ""
    return (
        f"{total} devices, {then} at the last start of this run{where}; the run may go on with any number, but look at "
        "the machine if this is not meant"
    )


def _list(texts: list[str], shown: int = 8) -> str:
    return ", ".join(texts[:shown]) + (f" and {len(texts) - shown} more" if len(texts) > shown else "")
