"""Stand-ins in the decisions of a run: on disk before they are used, adopted from copies, bounded, checked."""

import errno
import json

import pytest

from clipjax.config import Config
from clipjax.data.sample import UnreadableData
from clipjax.training import decisions as decisions_module
from clipjax.training.decisions import Decisions, Rollback, StandIns, num_decided, parse, parse_all, to_record
from clipjax.training.stand_ins import keeping
from tests.training.test_recovery import DECISION

pytestmark = pytest.mark.newest


def test_stand_ins_are_kept_beside_rollbacks(tmp_path):
    decisions = Decisions(tmp_path)
    assert decisions.keep({17: 3, 4: 9}) == ""
    decisions.take(lambda: DECISION)
    assert decisions.keep({5: 1}) == ""
    again = Decisions(tmp_path)
    assert (again.taken, again.stand_ins) == ([DECISION], {4: 9, 5: 1, 17: 3})
    assert again.records() == decisions.records() == [to_record(DECISION), again.records()[1]]
    assert parse_all(json.loads(json.dumps(again.records()))) == [
        DECISION,
        StandIns(places=[4, 5, 17], samples=[9, 1, 3]),
    ]
    assert again.left_out == [(23, 33)]
    again.forget_from(0)
    assert not again.taken and again.stand_ins == {4: 9, 5: 1, 17: 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"places": [1], "samples": []}, "do not fit"),
        ({"places": [], "samples": []}, "do not fit"),
        ({"places": [1, 1], "samples": [2, 2]}, "do not fit"),
        ({"places": [-1], "samples": [2]}, r"places=\[-1\] is no list of whole numbers"),
        ({"places": [True], "samples": [2]}, "no list of whole numbers"),
        ({"places": 1, "samples": [2]}, "places=1 is no list"),
        ({"places": [1], "samples": [2.0]}, r"samples=\[2.0\]"),
        ({"places": [1]}, "is no decision"),
        ({"places": [1], "samples": [2], "why": "x"}, "is no decision"),
        ({"places": [1], "samples": [2], "decision": ["stand_ins"]}, "of another version"),
    ],
)
def test_damaged_ones_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        parse({"decision": "stand_ins"} | values)


def test_a_copy_gives_back_what_the_file_has_lost(tmp_path):
    decisions = Decisions(tmp_path)
    decisions.keep({1: 10, 2: 20})
    decisions.adopt([StandIns(places=[2, 3], samples=[20, 30]), DECISION])
    for each in (decisions, Decisions(tmp_path)):
        assert (each.taken, each.stand_ins) == ([DECISION], {1: 10, 2: 20, 3: 30})
    with pytest.raises(ValueError, match="contradict each other; bring back the file of this run .two samples, 20 and"):
        decisions.adopt([DECISION, StandIns(places=[2], samples=[21])])


def test_the_fullest_copy_is_the_one_to_adopt():
    few, many = StandIns(places=[1], samples=[1]), StandIns(places=[1, 2], samples=[1, 2])
    copies: list[list[Rollback | StandIns]] = [[few], [many], [DECISION], [DECISION, few], []]
    assert max(copies, key=num_decided) == [DECISION, few]
    assert max(copies[:2], key=num_decided) == [many]


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    lines = [{"decision": "stand_ins", "places": [1], "samples": [number]} for number in (2, 3)]
    (tmp_path / "decisions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="line 2: two samples, 2 and 3, stand in at place 1; bring back the file"):
        Decisions(tmp_path)


def test_what_cannot_be_written_is_not_used(tmp_path, monkeypatch):
    decisions = Decisions(tmp_path)
    decisions.keep({1: 10})

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(decisions_module, "write_atomic", fail)
        assert "cannot be recorded in" in decisions.keep({2: 20})
        config = Config()
        config.data.on_unreadable = type(config.data.on_unreadable)("skip")
        with keeping(decisions, config, lambda *_: None) as keep:
            assert keep is not None
            with pytest.raises(UnreadableData, match=r"skip: what stands in .* \(No space left on device\); see to"):
                keep({2: 20})
    assert decisions.stand_ins == Decisions(tmp_path).stand_ins == {1: 10}


def test_what_the_store_does_not_take_is_no_decision(tmp_path):
    def send(_):
        raise OSError(errno.EIO, "the server answers 503")

    decisions = Decisions(tmp_path, send)
    assert "the server answers 503" in decisions.keep({2: 20})
    assert not decisions.stand_ins and not Decisions(tmp_path).stand_ins


def test_their_number_is_bounded_and_the_file_is_read_again(tmp_path):
    most = decisions_module.MOST_STAND_INS
    decisions = Decisions(tmp_path)
    assert decisions.keep({10**13 + i: 10**11 + i for i in range(most)}) == ""
    assert "100,000 samples already" in decisions.keep({1: 1})
    assert len(Decisions(tmp_path).stand_ins) == most


def test_nothing_is_kept_where_a_run_stops():
    with keeping(Decisions.__new__(Decisions), Config(), lambda *_: None) as keep:
        assert keep is None


def test_each_decision_is_told(tmp_path):
    config, told = Config(global_batch_size=8), []
    config.data.on_unreadable = type(config.data.on_unreadable)("skip")
    with keeping(Decisions(tmp_path), config, lambda *told_now: told.append(told_now)) as keep:
        assert keep is not None
        keep({17: 3})
        keep({33: 4, 34: 5})
        for place in range(100, 120):
            keep({place: 1})
    text = "storage does not give process 0 {}; others of the same source stand in, there and in every later start ({})"
    assert told == [
        ("global batch 2: " + text.format("1 sample", "1 by now"), 1),
        ("global batch 4: " + text.format("2 samples", "3 by now"), 3),
        ("global batch 12: " + text.format("1 sample", "4 by now"), 4),
        ("global batch 13: " + text.format("1 sample", "8 by now"), 8),
        ("global batch 14: " + text.format("1 sample", "16 by now"), 16),
    ]
