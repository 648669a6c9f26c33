"""Consistency of the processes of a run: before the first step they compare their fingerprints and refuse together.

Reading order: `run_on_all` (does a process's own preparation, and compares), `find_differences` (the comparison). A
fingerprint has sections of named values, which must be equal on all processes. One process compares nothing, but its
fingerprint is recorded too.
"""

import contextlib
import json
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from clipjax.runtime import processes

Fingerprint = dict[str, dict[str, Any]]
Result = TypeVar("Result")

REMEDIES = {
    "config": "give every process the same config file and command line",
    "code": "install the same version of clipjax and of its requirements on every machine",
    "checkpoint": "the workdir, and what init_from and distill_from name, must be one place that every machine sees",
    "data": "every machine must see the same data and tokenizer, whole and unchanged",
    "class list": "every machine must see the same files of class names, templates, paraphrases and overlaps",
}
"""Advice for each section of a fingerprint."""

WAIT_SECONDS = 3600.0
"""Time for the slowest process to open its data; one that dies meanwhile ends the others long before."""

_SHOWN = 8  # differences of a section in a message
_SHARED_SECONDS = 15.0  # file systems of several machines may show a new file late


def run_on_all(
    name: str, work: Callable[[], tuple[Result, Fingerprint]], *, kinds: Sequence[type[ValueError]] = ()
) -> tuple[Result, Fingerprint]:
    """Do this process's part of a preparation, and go on only if all processes can and agree.

    Args:
        name: name of this preparation, used once per program.
        work: the preparation; returns its result, and the fingerprint that must be the same everywhere. It may not wait
            for other processes: one that fails would leave them waiting.
        kinds: errors that keep their class on the way between processes.

    Returns:
        Result and fingerprint of this process.

    Raises:
        ValueError: on every process: one of them failed, or its fingerprint differs from that of process 0. It is one
            of `kinds` if the errors of all processes that failed are.
    """
    if jax.process_count() == 1:
        return work()
    report: dict[str, Any] = {"host": socket.gethostname()}
    done: tuple[Result, Fingerprint] | None = None
    failure: Exception | None = None
    try:
        done = work()
        report["facts"] = done[1]
    except (ValueError, OSError) as error:
        report["error"] = str(error) or repr(error)
        report["kind"] = next((kind.__name__ for kind in kinds if isinstance(error, kind)), "")
    except Exception as error:  # a defect: it is shown in full here, and the others end too
        failure, report["error"] = error, repr(error)
    processes.kv_set(f"{name}/report/{jax.process_index()}", json.dumps(report))
    verdict, found_kind = _verdict(name)
    if failure is not None:
        raise failure
    if verdict:
        raise next((kind for kind in kinds if kind.__name__ == found_kind), ValueError)(verdict)
    assert done is not None
    return done


def _verdict(name: str) -> tuple[str, str]:
    """Return the verdict of process 0 on all reports, and the kind of all errors; empty if all is well."""
    try:
        if processes.is_first():
            reports = [
                json.loads(processes.kv_get(f"{name}/report/{rank}", timeout_seconds=WAIT_SECONDS))
                for rank in range(jax.process_count())
            ]
            found = {report.get("kind", "") for report in reports if "error" in report}
            verdict = ["\n".join(find_differences(reports)), found.pop() if len(found) == 1 else ""]
            processes.kv_set(f"{name}/verdict", json.dumps(verdict))
        text, kind = json.loads(processes.kv_get(f"{name}/verdict", timeout_seconds=2 * WAIT_SECONDS))
        return text, kind
    except TimeoutError as error:
        raise ValueError(f"{error}; its log is logs/rank-*.log in its workdir") from error


def find_differences(reports: list[dict[str, Any]]) -> list[str]:
    """Return a line for everything that keeps these processes from working together.

    Args:
        reports: one for each process: its `host`, and either its `facts` (the fingerprint) or its `error`.
    """
    hosts = [report["host"] for report in reports]
    errors = [report.get("error") for report in reports]
    if any(error is not None for error in errors):
        groups = _groups(errors)
        return [
            error if len(groups) == 1 else f"{_who(ranks, hosts)}: {error}"
            for error, ranks in groups.items()
            if error is not None
        ]
    lines = []
    for section, ours in reports[0]["facts"].items():
        others = [json.dumps(report["facts"].get(section), sort_keys=True) for report in reports]
        for text, ranks in _groups(others).items():
            if 0 not in ranks:
                shown = _differing(ours, json.loads(text) or {})
                lines.append(
                    f"{_who(ranks, hosts)} {'has' if len(ranks) == 1 else 'have'} another {section} than process 0 "
                    f"({hosts[0]}): {shown}; {REMEDIES.get(section, 'make them equal')}"
                )
    return lines


def _groups(values: list[Any]) -> dict[Any, list[int]]:
    """Group the ranks by their value, in order."""
    found: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return found


def _who(ranks: list[int], hosts: list[str]) -> str:
    """Name processes: `process 1 (node-1)`, `processes 1, 2, 3 and 12 more (node-1, ...)`."""
    numbers = ", ".join(map(str, ranks[:_SHOWN])) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    places = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"process{'es' if len(ranks) > 1 else ''} {numbers} ({places})"


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name, "absent") != theirs.get(name, "absent")]
    shown = [f"{name}={theirs.get(name, 'absent')!r} (process 0: {ours.get(name, 'absent')!r})" for name in names]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def check_shared(workdir: pathlib.Path) -> None:
    """Check that all processes have the same workdir, and not each its own of this name.

    Raises:
        ValueError: on every process: a file that process 0 makes there does not appear for all.
    """
    if jax.process_count() == 1:
        return
    probe = workdir / f".shared-probe-{secrets.token_hex(8)}"
    if processes.is_first():
        processes.kv_set("shared/probe", probe.name)
        with contextlib.suppress(OSError):  # then the others do not see it
            probe.write_bytes(b"")
    probe = workdir / processes.kv_get("shared/probe", timeout_seconds=WAIT_SECONDS)
    try:
        run_on_all("shared", lambda: (None, {"checkpoint": {"workdir of process 0": _appears(probe)}}))
    finally:
        if processes.is_first():
            probe.unlink(missing_ok=True)


def _appears(probe: pathlib.Path) -> str:
    deadline = time.monotonic() + _SHARED_SECONDS
    while not probe.exists():
        if processes.is_first() or time.monotonic() > deadline:
            return "seen" if processes.is_first() else "not seen"
        time.sleep(0.2)
        list(probe.parent.iterdir())  # makes NFS look again
    return "seen"
