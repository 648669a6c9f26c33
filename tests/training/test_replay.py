"""A replay that is stopped, the log that it compares with, and what it lists."""

import contextlib
import types

import jax
import numpy as np
import pytest

from clipjax.cli import train as command
from clipjax.config import Config
from clipjax.models.clip import Clip
from clipjax.monitoring.writers import METRICS_FILE
from clipjax.runtime import sharding
from clipjax.training import replay
from clipjax.training.program import build_program
from tests.training.faults import NUM_SAMPLES, small_config

pytestmark = pytest.mark.newest


class Signal:
    """A signal that comes during some step; None: none comes."""

    def __init__(self, step: int | None) -> None:
        self.number, self._left = None, step

    def due(self) -> bool:
        if self._left is not None:
            self._left -= 1
            self.number = 15 if self._left <= 0 else None
        return self.number is not None


class Stream:
    """Batches without end."""

    closed = False

    def __next__(self) -> dict:
        return {"index": np.arange(2)}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def workdir(monkeypatch, tmp_path):
    """A workdir of step 0, whose run computes nothing; `run(step, signal)` replays, and returns code and lines."""
    beats: list[int] = []
    stream = Stream()

    def run(step: int, signal: int | None = None, norm: float = 1):
        watchdog = types.SimpleNamespace(
            beat=beats.append, reading=contextlib.nullcontext, paused=lambda name: contextlib.nullcontext()
        )
        session = types.SimpleNamespace(
            program=None,
            mesh=None,
            teacher=None,
            decisions=types.SimpleNamespace(taken=[]),
            signal=Signal(signal),
            watchdog=watchdog,
            step=lambda state, batch, teacher: (
                state,
                {"loss": np.float32(2), "skipped_in_a_row": 0, "param_norm": np.float32(norm)},
            ),
        )
        monkeypatch.setattr(replay, "open_session", lambda *_, **__: contextlib.nullcontext(session))
        monkeypatch.setattr(replay, "start_state", lambda *_, **__: (None, types.SimpleNamespace(step=0)))
        monkeypatch.setattr(replay, "open_stream", lambda *_: stream)
        monkeypatch.setattr(replay, "device_batch", lambda *_: None)
        monkeypatch.setattr(replay, "_search", lambda *_: iter(["found"]))
        checked = types.SimpleNamespace(config=Config(), workdir=tmp_path, inputs=None, apart=False)
        lines: list[str] = []
        code = replay.replay(checked, step, show=lines.append)
        assert stream.closed
        return code, lines, beats

    return types.SimpleNamespace(run=run, path=tmp_path)


def test_a_signal_ends_a_replay_after_the_step_that_it_computes(workdir):
    code, lines, beats = workdir.run(step=9, signal=3)
    assert code == 15 and beats == [1, 2, 3]
    assert lines[-1] == "stopped by signal 15 after step 3; nothing of it is kept"


def test_damaged_lines_of_the_log_hide_no_step_and_no_finding(workdir):
    path = workdir.path / METRICS_FILE
    path.write_bytes(b'{"step": 4, "lo\n[1]\n7\nnull\n\xff\n' + b"[" * 20_000 + b"\n")
    code, lines, beats = workdir.run(step=4)
    assert code is None and beats == [1, 2, 3, 4]
    assert lines[-2] == "found" and lines[-1].endswith("it was not logged, so there is nothing to compare")
    path.write_bytes(path.read_bytes() + b'{"step": 4, "loss": 2.0}\n{"step": 4, "lo')
    assert workdir.run(step=4)[1][-1].endswith("every number is bit for bit that of the log")
    path.write_bytes(b'{"step": 4, "loss": 2.5}\n')
    assert "the log has others for loss (loss 2.5)" in workdir.run(step=4)[1][-1]


def test_an_update_that_spoils_the_parameters_is_told(workdir):
    assert "step 4: loss 2.0, the norm of the parameters after it is not finite" in workdir.run(4, norm=np.inf)[1][-1]
    assert "not finite" not in workdir.run(4)[1][-1]


@pytest.mark.parametrize(("number", "code"), [(None, 0), (15, 143), (2, 130)])
def test_the_exit_code_is_that_of_the_signal(monkeypatch, number, code):
    monkeypatch.setattr(command.processes, "start", lambda _: None)
    monkeypatch.setattr(command.preflight, "check", lambda _, **options: types.SimpleNamespace(mirror=None))
    monkeypatch.setattr(command.replay, "replay", lambda *_, **__: number)
    assert command.main(["--config=c.py", "--workdir=run", "--replay=3"]) == code


def test_samples_beyond_those_shown_are_counted(monkeypatch):
    finite = np.arange(16) >= 12
    monkeypatch.setattr(replay, "_make_search", lambda _: lambda *_: ({"image": finite, "text": ~finite}, [], []))
    source = types.SimpleNamespace(location=lambda index: f"sample {index}")
    inputs = types.SimpleNamespace(source=source)
    session = types.SimpleNamespace(teacher=None, checked=types.SimpleNamespace(inputs=inputs))
    state = types.SimpleNamespace(params={})
    image, text = list(replay._search(session, state, None, np.arange(16)))[1:3]
    assert image.startswith("image embeddings: 12 of 16 not finite: sample 0; ")
    assert image.endswith("sample 7 and 4 more")
    assert text.endswith("4 of 16 not finite: sample 12; sample 13; sample 14; sample 15")


def test_samples_of_every_process_are_named_by_the_first(monkeypatch):
    """A bad sample of process 1 was counted, and named nowhere."""
    sent: dict[str, dict[int, list]] = {}

    def gather(key: str, value: list) -> list:
        parts = sent.setdefault(key, {})
        parts[jax.process_index()] = value
        return [parts[rank] for rank in sorted(parts)] if jax.process_index() == 0 else []

    finite = np.ones(16, bool)
    finite[[3, 9, 15]] = False
    monkeypatch.setattr(
        replay, "_make_search", lambda _: lambda *_: ({"image": finite, "text": np.arange(16) < 3}, [], [])
    )
    monkeypatch.setattr(replay.exchange, "gather", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    inputs = types.SimpleNamespace(source=types.SimpleNamespace(location=lambda index: f"sample {index}"))
    session = types.SimpleNamespace(teacher=None, checked=types.SimpleNamespace(inputs=inputs))
    for rank in (1, 0):  # the first one has all parts when it asks
        monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
        own = np.arange(8) + 100 * (rank + 1)
        lines = list(replay._search(session, types.SimpleNamespace(params={}), None, own))
    assert lines[1] == "image embeddings: 3 of 16 not finite: sample 103; sample 201; sample 207"
    shown = "; ".join(f"sample {index}" for index in (*range(103, 108), *range(200, 203)))
    assert lines[2] == f"text embeddings: 13 of 16 not finite: {shown} and 5 more"


def test_the_search_encodes_a_microbatch_at_a_time_as_the_step_does(monkeypatch):
    config = small_config("cached")
    mesh = sharding.make_mesh(config.mesh)
    encoded_at_once: set[int] = set()
    encode = Clip.encode_batch

    def record(self, params, batch_stats, batch, key):
        encoded_at_once.add(len(batch["tokens"]))
        return encode(self, params, batch_stats, batch, key)

    monkeypatch.setattr(Clip, "encode_batch", record)
    with jax.set_mesh(mesh):
        program = build_program(config, mesh, num_samples=NUM_SAMPLES)
        search = replay._make_search(types.SimpleNamespace(program=program, mesh=mesh))
        rows, _, _ = jax.eval_shape(search, program.abstract_state, program.abstract_batch(), None)
    assert rows["image"].shape == (config.global_batch_size,)
    assert encoded_at_once == {config.microbatch_size}
