"""Which checkpoint a run goes on from after a rollback: copies of its decisions count where they are unchanged."""

import dataclasses
import errno
import json
import os
import pathlib

import jax.numpy as jnp
import pytest

from clipjax.checkpoints import folder, manager
from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.manifest import DamagedCheckpoint, UndecidedCheckpoint, UnusableCheckpoint, Verdict
from clipjax.config import CheckpointConfig
from clipjax.training.decisions import Decisions, Rollback, to_record
from clipjax.training.recovery import RunStopped
from clipjax.training.resume import Position, _apply, _choose, _position

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


def give_nothing(monkeypatch, step: int, *, times: int) -> None:
    """Let the storage give no record of a step, so many times."""
    examine, left = manager.examine, [times]

    def fail_first(directory: pathlib.Path, **options) -> Verdict:
        if directory.name == str(step) and not options.get("contents", True) and left[0]:
            left[0] -= 1
            return Verdict(manager.State.UNREADABLE, "data/metadata: Input/output error")
        return examine(directory, **options)

    monkeypatch.setattr(manager, "examine", fail_first)


def test_a_rejected_step_whose_records_could_not_be_read_at_first_does_not_come_back(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, {10: [], 20: []})
    Decisions(tmp_path).take(lambda: DECISION)
    give_nothing(monkeypatch, 20, times=1)
    assert _choose(Decisions(tmp_path), checkpoints) == 10
    assert (tmp_path / "checkpoints" / "20.rejected").is_dir()


def test_a_step_whose_records_cannot_be_read_again_is_not_restored(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, {10: [], 20: []})
    give_nothing(monkeypatch, 20, times=2)
    with pytest.raises(UndecidedCheckpoint, match="checkpoints/20: its records cannot be read any more"):
        _choose(Decisions(tmp_path), checkpoints)
    assert checkpoints.steps() == [10, 20]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_step_that_cannot_be_renamed_is_refused_with_path_and_remedy(tmp_path, monkeypatch, number, damaged):
    """One behind a rollback, and one that is damaged."""
    checkpoints = save(tmp_path, {10: [], 20: []})
    if damaged:
        change(tmp_path, 20, b"{", b"[")
    else:
        Decisions(tmp_path).take(lambda: DECISION)

    def refuse(place: pathlib.Path, step: int, reason: str) -> pathlib.Path:
        raise OSError(number, os.strerror(number), str(place / str(step)))

    monkeypatch.setattr(folder, "set_aside", refuse)
    with pytest.raises(
        UnusableCheckpoint, match=rf"checkpoints/20 must not be .* cannot be renamed: {os.strerror(number)}.*writable"
    ):
        _choose(Decisions(tmp_path), checkpoints)
    assert checkpoints.steps() == [10, 20], "it is not forgotten while it is there"


GOOD = json.loads(json.dumps(dataclasses.asdict(Position(step=7, num_samples=3))))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ([], r"data=\[\]"),
        (None, "data=None"),
        (GOOD | {"more": 1}, "data.more is unknown"),
        ({"step": 7}, "data.num_samples is missing"),
        ({"num_samples": 7}, "data.step is missing"),
        (GOOD | {"step": 8}, "data.step=8 must be 7"),
        *((GOOD | {"step": value}, "data.step=") for value in (None, "7", 7.0, True, float("nan"), [7])),
        (GOOD | {"num_samples": float("inf")}, "data.num_samples=inf"),
        (GOOD | {"evaluated": 1}, "data.evaluated=1 must be of type bool"),
        (GOOD | {"teacher_step": "1"}, "data.teacher_step='1' must be of type int or NoneType"),
        (GOOD | {"shards": {}}, "data.shards="),
        (GOOD | {"decisions": "none"}, "data.decisions="),
        (GOOD | {"order": [64, 4, 1]}, "data.order="),
        (GOOD | {"index": 2}, "data.index="),
        (GOOD | {"order": {"block": 64, "window": 4}}, "data.order="),
        (GOOD | {"order": {"block": 64, "window": 4, "lanes": 0}}, "data.order.lanes=0"),
        *((GOOD | {"format": value}, "data.format=") for value in (0, "2", None, 2.5, 99)),
    ],
)
def test_a_data_record_that_holds_no_position_is_refused_by_field(record, field):
    with pytest.raises(DamagedCheckpoint, match=rf"run/7 is damaged: .*{field}"):
        _position(pathlib.Path("run/7"), record, 7)


def test_a_position_comes_back_from_its_record_and_from_one_of_an_older_format():
    position = Position(7, True, 3, 4, [["a", "b", 1]], [to_record(DECISION)], {"block": 64, "window": 4, "lanes": 1})
    record = json.loads(json.dumps(dataclasses.asdict(position) | {"format": 2}))
    assert _position(pathlib.Path("run/7"), record, 7) == position
    assert _position(pathlib.Path("run/7"), {"step": 7, "evaluated": True, "num_samples": 3}, 7).decisions == ()


@pytest.mark.parametrize("copy", [5, {"a": 1}, [5], [["a"]], [{"decision": []}], "text", None])
def test_a_copy_of_the_decisions_that_is_none_is_refused(tmp_path, copy):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(10, {"params": {"kernel": jnp.zeros(4)}}, {"data": {"format": 2, "decisions": copy}})
    checkpoints.wait()
    with pytest.raises(DamagedCheckpoint, match="checkpoints/10 is damaged: data.decisions: .*decision"):
        _apply(Decisions(tmp_path), checkpoints)
