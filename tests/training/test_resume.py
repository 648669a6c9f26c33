"""Which checkpoint a run goes on from after a rollback: copies of its decisions count where they are unchanged."""

import pathlib

import jax.numpy as jnp
import pytest

from clipjax.checkpoints.manager import Checkpoints
from clipjax.config import CheckpointConfig
from clipjax.training.decisions import Decisions, Rollback, to_record
from clipjax.training.recovery import RunStopped
from clipjax.training.resume import _apply

DECISION = Rollback(to_step=10, first_step=24, last_step=34, first_batch=23, last_batch=33, reason="not finite")
OTHER = Rollback(to_step=10, first_step=25, last_step=34, first_batch=24, last_batch=33, reason="not finite")


def save(workdir: pathlib.Path, copies: dict[int, list[Rollback]]) -> Checkpoints:
    """Save a step for each copy of the decisions."""
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep_last=9))
    for step, copy in copies.items():
        record = {"format": 2, "decisions": [to_record(each) for each in copy]}
        checkpoints.save(step, {"params": {"kernel": jnp.full((4,), step)}}, {"data": record})
    checkpoints.wait()
    return checkpoints


def change(workdir: pathlib.Path, step: int, old: bytes, new: bytes) -> None:
    path = workdir / "checkpoints" / str(step) / "data" / "metadata"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_steps_behind_a_rollback_are_set_aside_and_those_after_it_are_not(tmp_path):
    checkpoints = save(tmp_path, {10: [], 20: [], 30: [DECISION]})
    decisions = Decisions(tmp_path)
    _apply(decisions, checkpoints)
    assert decisions.taken == [DECISION] == Decisions(tmp_path).taken, "the file was lost, the copy was not"
    assert checkpoints.steps() == [10, 30] and (tmp_path / "checkpoints" / "20.rejected").is_dir()


@pytest.mark.parametrize(("old", "new"), [(b"24", b"25"), (b"first_step", b"first_stop"), (b"{", b"")])
def test_a_damaged_copy_is_not_believed_and_its_step_is_set_aside_as_damaged(tmp_path, old, new, capsys):
    save(tmp_path, {10: [], 30: [DECISION], 40: [DECISION]})
    Decisions(tmp_path).take(lambda: DECISION)
    for step in (30, 40):
        again = Checkpoints(tmp_path, CheckpointConfig())
        change(tmp_path, step, old, new)
        _apply(Decisions(tmp_path), again)
        assert step in again.steps()
    assert Checkpoints(tmp_path, CheckpointConfig()).newest_verified() == 10
    assert (tmp_path / "checkpoints" / "40.damaged").is_dir() and (tmp_path / "checkpoints" / "30.damaged").is_dir()
    assert "going on from" in capsys.readouterr().err


def test_decisions_of_another_run_are_refused(tmp_path):
    checkpoints = save(tmp_path, {30: [DECISION]})
    Decisions(tmp_path).take(lambda: OTHER)
    with pytest.raises(RunStopped, match="contradict each other; bring back the file of this run"):
        _apply(Decisions(tmp_path), checkpoints)
