"""Which environments mean several processes, and how a signal is remembered."""

import os
import signal

import jax
import pytest

from clipjax import distributed


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, True),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "16"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "worker-0,worker-1"}, True),
        ({"SLURM_JOB_ID": "7", "PATH": "/bin"}, False),
    ],
)
def test_is_launched(environment, launched):
    assert distributed.is_launched(environment) is launched


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_NTASKS": "1"}, []),
        ({"SLURM_NTASKS": "4"}, [()]),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            [("host:1", 4, 3)],
        ),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "SLURM_NTASKS": "4"}, [("host:1", None, None)]),
    ],
)
def test_start_says_what_is_known_and_leaves_the_rest_to_jax(monkeypatch, environment, expected):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    distributed.start(environment)
    assert calls == expected


def test_a_lone_process_is_the_first():
    assert distributed.is_first()


@pytest.fixture
def handlers():
    """The handlers before a test; whatever it installs is taken out again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_remembered_and_the_second_ends_the_process(handlers, monkeypatch, number, code):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    shutdown = distributed.ShutdownSignal()
    assert shutdown.number is None
    assert not shutdown.due(1)
    assert shutdown.exit_code == 0
    signal.raise_signal(number)
    assert shutdown.number == number
    assert shutdown.due(2)
    assert shutdown.due(3)  # it stays due
    assert shutdown.exit_code == code
    assert not ended
    signal.raise_signal(signal.SIGINT)
    assert ended == [130]


def test_restore_gives_the_handlers_back(handlers):
    def mine(*_: object) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    shutdown = distributed.ShutdownSignal()
    assert signal.getsignal(signal.SIGTERM) is not mine
    shutdown.restore()
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]
    assert shutdown.exit_code == 0


def test_with_several_processes_jax_keeps_sigterm_and_gets_sigint_as_one(handlers, monkeypatch):
    """JAX's notifier lives in the handler of SIGTERM: another one in its place, and no process would ever stop."""
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    shutdown = distributed.ShutdownSignal()
    assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]
    signal.raise_signal(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGTERM)]
    shutdown.restore()
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]


def test_with_several_processes_the_step_to_stop_at_is_jaxs(handlers, monkeypatch):
    from jax.experimental import multihost_utils

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 5)
    shutdown = distributed.ShutdownSignal()
    assert [shutdown.due(step) for step in (3, 4, 5)] == [False, False, True]
    assert shutdown.exit_code == 143
    shutdown.restore()
