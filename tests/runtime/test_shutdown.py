"""Signals that ask to stop, the step that several processes agree on, and SIGUSR1."""

import os
import random
import signal
import sys
import threading
import time

import jax
import pytest

from clipjax.runtime import processes, shutdown
from clipjax.runtime.shutdown import PROFILE_SIGNAL, STOP_SIGNALS, Shutdown
from tests.waiting import wait_for

pytestmark = pytest.mark.newest


@pytest.fixture
def handlers():
    """The handlers before a test; whatever it installs is taken out again."""
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, PROFILE_SIGNAL)}
    yield before
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """The codes that the process would have ended with."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_counts_the_second_changes_nothing_and_the_third_ends_the_process(handlers, ended, number):
    asked = Shutdown()
    assert asked.number is None and not asked.due()
    signal.raise_signal(number)
    wait_for(asked.due)
    signal.raise_signal(signal.SIGINT)
    wait_for(lambda: asked._count == 2)
    assert asked.due() and asked.number == number and not ended
    asked.close()
    signal.raise_signal(signal.SIGINT)  # while the process leaves
    wait_for(lambda: ended)
    assert ended == [130]


class Gone:
    """A terminal that is gone."""

    def write(self, text: str) -> None:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_terminal_that_is_gone_and_a_log_that_blocks_lose_no_signal(handlers, ended, monkeypatch):
    blocked = threading.Event()
    monkeypatch.setattr(shutdown.process_log, "info", lambda text: blocked.wait(20))
    monkeypatch.setattr(sys, "stderr", Gone())
    asked = Shutdown()
    signal.raise_signal(signal.SIGTERM)
    wait_for(asked.due)
    for count in (2, 3):
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda count=count: asked._count == count)
    wait_for(lambda: ended)
    assert ended == [143]
    blocked.set()


def test_the_first_signal_tells_its_effect(handlers, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(shutdown.processes, "show", said.append)
    Shutdown(effect="nothing is saved")
    signal.raise_signal(signal.SIGTERM)
    wait_for(lambda: said)
    assert said == ["signal 15: nothing is saved; a third within 5 s ends it at once"]


def test_a_third_signal_that_comes_late_changes_nothing(handlers, ended, monkeypatch):
    monkeypatch.setattr(shutdown, "INSIST_SECONDS", 0.0)
    asked = Shutdown()
    for count in (1, 2, 3):
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda count=count: asked._count == count)
    assert not ended


def test_close_gives_the_handlers_back(handlers):
    def mine(*_: object) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    asked = Shutdown()
    assert signal.getsignal(signal.SIGTERM) is not mine
    asked.request("no space left")
    assert asked.due() and asked.error == "no space left" and asked.number is None
    asked.close()
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]
    assert not asked._thread.is_alive()


def test_sigusr1_writes_the_stacks_and_asks_for_a_profile_once(handlers, tmp_path):
    with (tmp_path / "log").open("a") as log:
        asked = Shutdown(log)
        assert not asked.take_profile_request()
        signal.raise_signal(PROFILE_SIGNAL)
        wait_for(lambda: asked.profile_requested)
        assert asked.take_profile_request() and not asked.take_profile_request()
        assert not asked.due()
        asked.close()
    assert "test_sigusr1_writes_the_stacks" in (tmp_path / "log").read_text()


def agreements(monkeypatch, count: int) -> list[Shutdown]:
    """As many processes as threads of this one, with a store of texts between them."""
    texts: dict[str, str] = {}
    lock = threading.Lock()

    def kv_set(key: str, value: str) -> None:
        with lock:
            if key in texts:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            texts[key] = value

    def kv_list(folder: str) -> dict[str, str]:
        with lock:
            return {key.rpartition("/")[2]: text for key, text in texts.items() if key.startswith(f"{folder}/")}

    monkeypatch.setattr(processes, "kv_set", kv_set)
    monkeypatch.setattr(processes, "kv_list", kv_list)
    monkeypatch.setattr(shutdown, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    found = []
    for rank in range(count):
        monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
        asked = Shutdown.__new__(Shutdown)  # signals belong to the main thread; here the requests are made by hand
        asked.number = asked.error = None
        asked._agreement = shutdown._Agreement(asked)
        found.append(asked)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_all_processes_stop_at_the_same_step_whenever_and_wherever_the_request_comes(monkeypatch, seed):
    """Steps wait for the slowest process, which may be two ahead; some also evaluate or compile at any time."""
    rng, count, last = random.Random(seed), 4, 25
    ranks = agreements(monkeypatch, count)
    stopped: dict[int, int] = {}
    started = [0] * count
    delays = [[rng.random() * 0.01 for _ in range(last + 1)] for _ in range(count)]

    def train(rank: int) -> None:
        for step in range(1, last + 1):
            time.sleep(delays[rank][step])
            started[rank] = step
            if step < last and ranks[rank].due():
                stopped[rank] = step
                return
            while min(started) < step - 1:  # devices wait for each other; the host is ahead
                time.sleep(0.001)
        stopped[rank] = 0

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(count)]
    when, who = rng.random() * 0.25, rng.sample(range(count), 2)
    for thread in threads:
        thread.start()
    time.sleep(when)
    ranks[who[0]]._request(15, None)
    ranks[who[1]]._request(2, None)
    for thread in threads:
        thread.join(timeout=30)
    assert len(stopped) == count and len(set(stopped.values())) == 1, (seed, stopped)
    if stopped[0]:
        assert len({rank.number for rank in ranks}) == 1 and ranks[0].number in (15, 2)
    for rank in ranks:
        rank._agreement.close()


def test_a_coordinator_that_is_gone_leaves_nobody_waiting(monkeypatch):
    asked, _ = agreements(monkeypatch, 2)

    def gone(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    monkeypatch.setattr(processes, "kv_list", gone)
    wait_for(lambda: not asked._agreement._thread.is_alive())
    with pytest.raises(RuntimeError, match="cannot agree on a step to stop at"):
        asked.due()
