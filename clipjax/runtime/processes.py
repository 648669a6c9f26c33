"""Processes: their start, the first one, and texts between them.

A run with several processes is started by a launcher (Slurm, Kubernetes, TPU pods, Open MPI, or by hand);
`clipjax.runtime.launchers` finds out which one this process is, and `start` joins the others.
"""

import contextlib
import errno
import importlib.util
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import jax

from clipjax.runtime import process_log, start_signals
from clipjax.runtime.launchers import Launch, find_launch
from clipjax.runtime.terminal import printable
from clipjax.runtime.work import kill_workers

HEARTBEAT_SECONDS = 52
"""Silence after which a process counts as dead, and the others end. JAX's default is 100 seconds.

JAX sends a sign of life every half of it: a machine that is paused for 20 seconds right before one survives, and a
process that dies is mostly named before by the watchdog (`watchdog.SILENT_SECONDS`), which looks every two seconds.
"""

START_SECONDS = 300
"""Time that the processes wait for each other at the start; machines of one job can come up minutes apart."""

_PATIENCE_SECONDS = 15.0  # then every process that still waits says so
_PARTING_SECONDS = 10.0
_LEAVING_SECONDS = 60.0
_LAST_SECONDS = 3.0  # for the others to read a message: the end of process 0 takes it away
_KEY = "clipjax/"
_STORE_METHODS = ("key_value_set", "blocking_key_value_get", "key_value_dir_get", "key_value_delete")
_MOVED = f"JAX {jax.__version__} has moved jax._src.distributed.global_state, the way between clipjax's processes"


def start(options: Mapping[str, str | None] | None = None, environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if a launcher started any, and open the devices.

    Args:
        options: values of `launchers.OPTIONS` from the command line; they beat the environment.
        environment: variables that a launcher set.

    Raises:
        ValueError: the values are incomplete or impossible, or the meeting point cannot be used. If the others
            never come, JAX ends the process after `START_SECONDS`; nothing can catch that, so it is announced before.
    """
    if jax.distributed.is_initialized():
        return
    launch = find_launch(options, environment, on_tpu=_on_tpu(environment))
    if launch is None:
        open_devices(environment)
        return
    known: dict[str, Any] = {"coordinator_address": launch.coordinator}
    if launch.process_id is not None:
        # Without "deactivate", JAX would ask the cluster again, and give the only process of a machine one GPU.
        known |= {"num_processes": launch.num_processes, "process_id": launch.process_id}
        known |= {"local_device_ids": launch.gpus, "cluster_detection_method": "deactivate"}
    if launch.process_id == 0 and launch.coordinator is not None:
        check_coordinator(launch.coordinator, environment)
    # JAX's notifier would take SIGTERM for itself; `clipjax.runtime.shutdown` agrees on the step to stop at.
    jax.config.update("jax_enable_preemption_service", False)
    with _announced(launch):
        try:
            jax.distributed.initialize(
                **known, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(
                f"the processes ({launch.launcher}) cannot meet at {launch.coordinator or 'the address JAX found'}: "
                f"{error}; is the port free, the address that of process 0, and every process started? "
                "--coordinator=HOST:PORT --num_processes=N --process_id=I say all of it outright"
            ) from error
        start_signals.connected(kv_set, kv_list)
        # Opening the devices waits for all processes: now, while all of them are sure to come.
        with _failure_shared(f"process {launch.process_id}" if launch.process_id is not None else socket.gethostname()):
            open_devices(environment)
        joined = jax.process_count()
    start_signals.joined(first=is_first())
    if launch.num_processes not in (None, joined):
        raise ValueError(
            f"{launch.num_processes} processes were started ({launch.launcher}), but the devices know of {joined}; "
            "does JAX_PLATFORMS name a platform that all of them have?"
        )


def check_coordinator(address: str, environment: Mapping[str, str] = os.environ) -> None:
    """Check on process 0 that it can be reached at the meeting point, before JAX tries and may crash.

    Another program that takes the port between this check and JAX's own use of it is not noticed.

    Raises:
        ValueError: the port is taken or may not be used, or the host is another machine.
    """
    host, _, port = address.rpartition(":")
    default_bind = f"[::]:{port}"
    bind = environment.get("JAX_COORDINATOR_BIND_ADDRESS", default_bind)
    bind_host, _, bind_port = bind.rpartition(":")
    if failure := _bind_failure(bind_host.strip("[]"), int(bind_port), socket.SOCK_STREAM):
        reason = {
            errno.EADDRINUSE: "another program uses this port",
            errno.EACCES: "this port is for the administrator (below 1024)",
            errno.EADDRNOTAVAIL: "this machine has no such address",
        }.get(failure.errno or 0, failure.strerror)
        raise ValueError(
            f"the processes cannot meet at {address}: {reason} (bind to {bind}); give all of them another port, "
            "as in --coordinator=HOST:PORT"
        )
    if bind != default_bind:
        return  # somebody forwards the address to this one
    with contextlib.suppress(socket.gaierror):  # names of containers can appear later
        found = [info[4][0] for info in socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_DGRAM)]
        failures = [_bind_failure(str(each), 0, socket.SOCK_DGRAM) for each in found]
        if failures and all(each is not None and each.errno == errno.EADDRNOTAVAIL for each in failures):
            raise ValueError(
                f"the processes cannot meet at {address}: process 0 runs here, and {host} is another machine; name "
                f"this one, or set JAX_COORDINATOR_BIND_ADDRESS={default_bind} if that address is forwarded here"
            )


def _bind_failure(host: str, port: int, kind: socket.SocketKind) -> OSError | None:
    """Return the error of binding a socket as gRPC does: to IPv6 and IPv4 alike, if the host is `::`.

    gRPC also allows others to share the port (SO_REUSEPORT); then two runs would get each other's processes.
    """
    family = socket.AF_INET6 if ":" in host and socket.has_ipv6 else socket.AF_INET
    try:
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind((host, port))
    except socket.gaierror:
        return None
    except OSError as error:
        if family == socket.AF_INET6 and host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return _bind_failure("0.0.0.0", port, kind)  # a machine without IPv6
        return error
    return None


def open_devices(environment: Mapping[str, str] = os.environ) -> None:
    """Open the devices.

    Raises:
        ValueError: JAX_PLATFORMS names a platform that this machine, or this JAX, does not have.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the plugins of some platforms assert
        wanted = environment.get("JAX_PLATFORMS") or jax.config.jax_platforms  # pyright: ignore
        if not wanted:
            raise
        reason = (
            str(error).partition(" (set JAX_PLATFORMS=")[0].rstrip(".")
            or "there is no such device, or JAX has no plugin"
        )
        raise ValueError(
            f"JAX_PLATFORMS={wanted}: {reason}; unset it to take the devices that are there, or name another platform"
        ) from error


def describe_devices(environment: Mapping[str, str] = os.environ) -> str:
    """Return the devices of all processes in words, and whether this machine has others that JAX does not use."""
    devices = jax.devices()
    platform, kind = devices[0].platform, devices[0].device_kind
    text = f"devices: {len(devices)} {platform}" + ("" if kind.lower() == platform else f" ({kind})")
    if jax.process_count() > 1:
        text += f" of {jax.process_count()} processes"
    others = _accelerator_files() if platform == "cpu" and not environment.get("JAX_PLATFORMS") else ""
    if others:
        text += (
            f"\nthis machine has an accelerator ({others}) that JAX does not use: is its plugin installed "
            "(pip install 'clipjax[gpu]' or 'clipjax[tpu]')? JAX_PLATFORMS=cpu says that the CPU is meant"
        )
    return text


def _accelerator_files() -> str:
    """Return the first file by which Linux shows a GPU or TPU; empty if there is none."""
    found = (path for pattern in ("nvidia[0-9]*", "kfd", "accel[0-9]*") for path in pathlib.Path("/dev").glob(pattern))
    return str(next(found, ""))


def _on_tpu(environment: Mapping[str, str]) -> bool:
    """Return True if JAX has found TPU chips: where there are none, importing it sets this variable."""
    return importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in environment


@contextmanager
def _announced(launch: Launch) -> Iterator[None]:
    """Print a line on the processes that this one waits for: process 0 at once, the others if it takes long."""
    number = "" if launch.process_id is None else f"process {launch.process_id}: "
    others = f"{launch.num_processes or 'the other'} processes at {launch.coordinator or 'the address JAX finds'}"

    def say(text: str) -> None:
        show(f"{number}{text}")

    def remind() -> None:
        say(
            f"still waiting for {others}; all of them must be started, and that address reachable. Without them this "
            f"process is ended after {START_SECONDS} seconds"
        )

    if launch.process_id == 0:
        say(f"waiting for {others} ({launch.launcher})")
    reminder = threading.Timer(_PATIENCE_SECONDS, remind)
    reminder.daemon = True
    reminder.start()
    try:
        yield
    finally:
        reminder.cancel()


@contextmanager
def _failure_shared(name: str) -> Iterator[None]:
    """End all processes with exit code 2 if the `with` block is refused on one: the others would wait in it."""
    done = threading.Event()

    def watch() -> None:
        while not (failures := kv_list("start_failed").values()):
            if done.wait(1.0):
                return
        for text in failures:
            show(f"error: {text}")
        done.wait(_LAST_SECONDS)
        os._exit(2)

    thread = threading.Thread(target=watch, daemon=True, name="start-failures")
    if jax.distributed.is_initialized():
        thread.start()
    try:
        yield
    except ValueError as error:
        if not thread.is_alive():
            raise
        kv_set(f"start_failed/{name}", f"{name}: {error}")
        thread.join()
    finally:
        done.set()


def is_first() -> bool:
    """Return True on the process that writes the files of which there is one."""
    return jax.process_index() == 0


def announce(text: str) -> None:
    """Write a line to the log of this process; the first one also shows it on standard error."""
    process_log.info(text)
    if is_first():
        show(text)


def show(text: str) -> None:
    """Show a line on standard error, if anybody reads it."""
    with contextlib.suppress(OSError, ValueError):  # a broken pipe, a closed stream
        print(f"clipjax: {printable(text)}", file=sys.stderr, flush=True)


def kv_set(key: str, value: str, *, overwrite: bool = False) -> None:
    """Leave a text for the other processes with the coordinator, under a new key or instead of the text there.

    No device takes part.

    Raises:
        JaxRuntimeError: the key is used already, and `overwrite` is False.
    """
    _store().key_value_set(_KEY + key, value, allow_overwrite=overwrite)


def kv_get(key: str, *, timeout_seconds: float) -> str:
    """Return the text that some process leaves under a key; wait for it.

    Raises:
        TimeoutError: no text came in time.
    """
    try:
        return _store().blocking_key_value_get(_KEY + key, int(1000 * timeout_seconds))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(f"no process has sent {key} within {timeout_seconds:.0f} seconds") from error


def kv_list(folder: str) -> dict[str, str]:
    """Return the texts in a folder of keys by now, by the last part of the key; never wait."""
    return {key.rpartition("/")[2]: value for key, value in _store().key_value_dir_get(f"{_KEY}{folder}/")}


def kv_delete(folder: str) -> None:
    """Delete a folder of keys."""
    _store().key_value_delete(f"{_KEY}{folder}/")


def _store() -> Any:
    """Return the key-value store of the coordinator, the one thing that is taken from JAX's private modules.

    JAX (0.10 to 0.12) has no public way to it; Orbax takes the same one.

    Raises:
        RuntimeError: this JAX keeps it elsewhere, or `jax.distributed` is not initialized.
    """
    try:
        from jax._src import distributed

        client = distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{_MOVED}: {error}") from error
    if client is None:
        raise RuntimeError("a lone process has no key-value store: jax.distributed is not initialized")
    if missing := [name for name in _STORE_METHODS if not hasattr(client, name)]:
        raise RuntimeError(f"{_MOVED}: its client lacks {', '.join(missing)}")
    return client


def leave(exit_code: int) -> NoReturn:
    """End this process, whatever its threads wait for; with several, when all of them leave, or after some seconds."""
    end_within(_LEAVING_SECONDS)
    _flush()
    kill_workers()
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        parting = threading.Thread(target=_part, daemon=True, name="parting")
        parting.start()
        parting.join(_PARTING_SECONDS * (1 + is_first()))  # the others need process 0
    os._exit(exit_code)


def _part() -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


def end_within(seconds: float) -> None:
    """Let the kernel end this process (SIGALRM, exit code 142) if it has not left in time, whatever holds it up."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a broken pipe, a closed stream
            stream.flush()


def abort(exit_code: int = 1) -> int:
    """End one of several processes here and now after an error, and so the others soon; alone, return the exit code.

    At an ordinary exit JAX waits for the others, which wait for this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        _flush()
        if exit_code != 1 and is_first():
            # The others may be about to leave with the same code, and the end of process 0 would give them another.
            time.sleep(_LAST_SECONDS)
        os._exit(exit_code)
    return exit_code


@contextmanager
def abort_on_error() -> Iterator[None]:
    """End the process at once after an error that leaves the block, if it is one of several."""
    try:
        yield
    except Exception:
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exc()
            abort()
        raise
