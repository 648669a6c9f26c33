"""Stacks of all threads, the main one among them."""

import contextlib
import signal
import threading

import pytest

from clipjax.runtime import stacks
from clipjax.runtime.shutdown import PROFILE_SIGNAL, Shutdown
from tests.waiting import wait_for

pytestmark = pytest.mark.newest


@contextlib.contextmanager
def waiting_threads(count: int):
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("count", [1, 120])
def test_the_main_thread_is_there_however_many_others_are(tmp_path, count):
    with waiting_threads(count), (tmp_path / "log").open("a") as log:
        stacks.write(log)
    text = (tmp_path / "log").read_text()
    assert "in test_the_main_thread_is_there" in text
    assert ("\nMain thread (most recent call last):\n" in text) == (threading.active_count() + count > 100)


def test_a_signal_writes_it_too(tmp_path):
    before = signal.getsignal(PROFILE_SIGNAL)
    with waiting_threads(120), (tmp_path / "log").open("a") as log:
        asked = Shutdown(log)
        signal.raise_signal(PROFILE_SIGNAL)
        wait_for(asked.take_profile_request)
        asked.close()
    assert "in test_a_signal_writes_it_too" in (tmp_path / "log").read_text()
    assert signal.getsignal(PROFILE_SIGNAL) == before
