"""Signals before training can save: every process of a start leaves soon, with one line."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from clipjax.cli import main as console
from clipjax.runtime import start_signals
from tests.runtime.test_shutdown import handlers  # noqa: F401
from tests.waiting import wait_for

pytestmark = pytest.mark.newest
ROOT = pathlib.Path(__file__).parents[2]
LINE = (
    "clipjax: stopped by signal {} before the first step of this start; there is nothing to save, and the same command "
)


@pytest.fixture
def ended(handlers, monkeypatch) -> list[int]:  # noqa: F811
    """The codes that processes would have ended with; their threads do end."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # pytest would tell of SystemExit
    monkeypatch.setattr(start_signals, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(start_signals, "_LAST_SECONDS", 0.1)
    return codes


class Texts:
    """Texts between processes, as the coordinator keeps them."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._lock = threading.Lock()

    def kv_set(self, key: str, text: str) -> None:
        with self._lock:
            if key in self.texts:
                raise RuntimeError("ALREADY_EXISTS")
            self.texts[key] = text

    def kv_list(self, folder: str) -> dict[str, str]:
        with self._lock:
            return {key.rpartition("/")[2]: text for key, text in self.texts.items() if key.startswith(f"{folder}/")}


def connect(texts: Texts, count: int) -> list[start_signals._Start]:
    """As many processes of one start as parts of this one; signals reach the last."""
    starts = [start_signals._Start() for _ in range(count)]
    for rank, start in enumerate(starts):
        start.connect(texts.kv_set, texts.kv_list)
        start.is_first = rank == 0
    return starts


@pytest.mark.parametrize("number", start_signals.STOP_SIGNALS)
def test_a_lone_process_leaves_at_once_with_one_line(ended, capsys, number):
    with start_signals.session():
        signal.raise_signal(number)
        wait_for(lambda: ended)
    assert ended == [128 + number] and capsys.readouterr().err.startswith(LINE.format(int(number)))


def test_the_handlers_from_before_come_back(handlers, capfd):  # noqa: F811
    with start_signals.session():
        assert signal.getsignal(signal.SIGTERM) is not handlers[signal.SIGTERM]
        signal.raise_signal(signal.SIGUSR1)
        wait_for(lambda: "test_the_handlers_from_before_come_back" in capfd.readouterr().err)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_signal_to_one_process_ends_all_and_one_speaks(ended, capsys):
    starts = connect(Texts(), 4)
    signal.raise_signal(signal.SIGTERM)
    wait_for(lambda: len(ended) == 4)
    assert ended == [143] * 4
    assert capsys.readouterr().err.count("\n") == 1
    for start in reversed(starts):
        start.close()


def test_once_training_has_begun_anywhere_a_signal_belongs_to_it(ended):
    starts = connect(Texts(), 2)
    passed: list[int] = []
    starts[0].hand_over(passed.append)
    signal.raise_signal(signal.SIGINT)  # to the other one, which is a moment behind
    wait_for(lambda: starts[1]._late == [signal.SIGINT])
    starts[1].hand_over(passed.append)
    signal.raise_signal(signal.SIGTERM)
    wait_for(lambda: passed == [signal.SIGINT, signal.SIGTERM])
    assert not ended
    for start in reversed(starts):
        start.close()


def test_training_does_not_begin_once_a_signal_has_come(ended):
    texts = Texts()
    texts.kv_set("start/outcome", "15")
    (start,) = connect(texts, 1)
    with pytest.raises(SystemExit):  # os._exit
        start.hand_over(pytest.fail)
    wait_for(lambda: ended == [143, 143])  # the thread that follows the others has found so too
    start.close()


def test_a_third_signal_does_not_wait_for_the_coordinator(ended, monkeypatch):
    (start,) = connect(Texts(), 1)
    held = threading.Event()
    monkeypatch.setattr(start, "_stop", lambda number: held.wait())
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
    wait_for(lambda: ended == [143])
    held.set()
    start._thread.join()


def test_the_console_answers_signals_before_it_imports_training(ended, monkeypatch):
    def importing(rest: list[str]) -> None:
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: ended)
        raise SystemExit

    monkeypatch.setattr(console, "_refuse_held_workdir", importing)
    with pytest.raises(SystemExit):
        console.main(["train"])
    assert ended == [143]


SLOW = """
import sys, time
from clipjax.cli import main

def slow_train(argv):
    from clipjax.training import preflight
    def opening(*_):
        print("opening", flush=True)
        time.sleep(100)
    preflight.open_inputs = opening
    from clipjax.cli import train
    return train.main(argv)

if __name__ == "__main__":
    from clipjax.runtime import start_signals
    with start_signals.session():
        sys.exit(slow_train(sys.argv[1:]))
"""
CONFIG = """
from clipjax.config import *
def get_config():
    return Config(total_examples=8, global_batch_size=8, data=DataConfig(train="pairs.tar"))
"""


@pytest.mark.process
@pytest.mark.parametrize(("count", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_during_preflight_ends_every_process_without_a_traceback(tmp_path, count, number):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "config.py").write_text(CONFIG)
    arguments = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        options = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={rank}"]
        started.append(
            subprocess.Popen(
                [sys.executable, str(tmp_path / "slow.py"), *arguments, *(options if count > 1 else [])],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "opening\n"
        started[-1].send_signal(number)
        errors = [process.communicate(timeout=30)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [128 + number] * count, errors
    assert LINE.format(int(number)) in errors[0] and not any("Traceback" in error for error in errors)
