"""Stand-ins in the decisions of a run: on disk before they are used, adopted from copies, bounded, checked."""

import errno
import json
import threading
import time

import pytest

from clipjax.config import Config, OnUnreadable
from clipjax.data.sample import UnreadableData
from clipjax.data.training_order import OrderFormat, require_places
from clipjax.runtime import processes
from clipjax.training import decisions as decisions_module
from clipjax.training.decisions import Decisions, Rollback, StandIns, num_decided, parse, parse_all
from clipjax.training.stand_ins import Keeper, open_keeper
from tests.training.test_recovery import DECISION

pytestmark = pytest.mark.newest


def test_stand_ins_are_kept_beside_rollbacks(tmp_path):
    decisions = Decisions(tmp_path)
    assert decisions.keep({17: 3, 4: 9}) == ""
    decisions.take(lambda: DECISION)
    assert decisions.keep({5: 1}) == ""
    again = Decisions(tmp_path)
    assert (again.taken, again.stand_ins) == ([DECISION], {4: 9, 5: 1, 17: 3})
    assert again.records() == decisions.records()
    assert parse_all(json.loads(json.dumps(again.records()))) == [
        StandIns(places=[4, 17], samples=[9, 3]),
        DECISION,
        StandIns(places=[5], samples=[1]),
    ]
    assert again.left_out == [(23, 33)]
    again.forget_from(0)  # the batch of place 5 was read well before that rollback
    assert not again.taken and again.stand_ins == {4: 9, 17: 3}


def test_a_rollback_and_stand_ins_at_the_same_time_are_both_on_disk(tmp_path):
    """The thread that answers other processes writes while the main thread waits for the store."""
    kept = []

    def send(_):
        if not kept:
            kept.append(threading.Thread(target=lambda: kept.append(decisions.keep({1: 2}))))
            kept[0].start()
            time.sleep(0.2)

    decisions = Decisions(tmp_path, send)
    assert decisions.take(lambda: DECISION) == DECISION
    kept[0].join()
    again = Decisions(tmp_path)
    assert (again.taken, again.stand_ins, kept[1]) == ([DECISION], {1: 2}, "")


def test_stand_ins_that_were_never_saved_are_forgotten(tmp_path):
    decisions = Decisions(tmp_path)
    decisions.keep({1: 2})
    decisions.forget_stand_ins()
    assert not decisions.stand_ins and not Decisions(tmp_path).stand_ins
    assert decisions.keep({1: 3}) == "" and Decisions(tmp_path).stand_ins == {1: 3}


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
        config = skipping()
        with open_keeper(decisions, config) as keeper:
            assert keeper is not None
            with pytest.raises(UnreadableData, match=r"and what stands in .* \(No space left on device\)$"):
                keeper.keep({2: 20})
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


def skipping() -> Config:
    config = Config(global_batch_size=8)
    config.data.on_unreadable = OnUnreadable.SKIP
    return config


def test_nothing_is_kept_where_a_run_stops(tmp_path):
    with open_keeper(Decisions(tmp_path), Config()) as keeper:
        assert keeper is None
    require_places(OrderFormat())
    with pytest.raises(ValueError, match="data.on_unreadable=skip: the run began with the order of an older version"):
        require_places(None)


TEXT = "storage does not give {}; others of the same source stand in, there and in every later start ({} by now)"


def test_decisions_are_told_at_first_and_whenever_they_double(tmp_path):
    told = []
    keeper = Keeper(Decisions(tmp_path), skipping())
    with keeper.telling(lambda *each: told.append(each)):
        keeper.keep({17: 3})
        keeper.keep({33: 4, 34: 5})
        for place in range(100, 120):
            keeper.keep({place: 1})
    keeper.keep({200: 1})  # announced, as it is between two parts of a run
    assert told == [
        ("global batch 2: " + TEXT.format("process 0 1 sample", 1), 1),
        ("global batch 4: " + TEXT.format("process 0 2 samples", 3), 3),
        ("global batch 12: " + TEXT.format("process 0 1 sample", 4), 4),
        ("global batch 13: " + TEXT.format("process 0 1 sample", 8), 8),
        ("global batch 14: " + TEXT.format("process 0 1 sample", 16), 16),
    ]


class Exchange:
    """The key-value store of a run, without processes."""

    def __init__(self, monkeypatch):
        self.values: dict[str, str] = {}
        monkeypatch.setattr(processes, "kv_list", self.list)
        monkeypatch.setattr(processes, "kv_delete", lambda key: self.values.pop(key))
        monkeypatch.setattr(processes, "kv_set", self.set)

    def list(self, folder: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: text for key, text in self.values.items() if key.startswith(f"{folder}/")}

    def set(self, key: str, value: str, *, overwrite: bool = False) -> None:
        assert overwrite or key not in self.values
        self.values[key] = value


def test_all_processes_that_ask_are_answered_by_one_write(tmp_path, monkeypatch):
    written, told = [], []
    keeper = Keeper(Decisions(tmp_path, lambda path: written.append(path.read_bytes())), skipping())
    store = Exchange(monkeypatch)
    assert not keeper.answer()
    for rank in range(1, 4):
        store.set(f"stand_ins/asked/{rank}-0", json.dumps([[16 + rank, 24 + rank], [rank, 10 + rank]]))
    with keeper.telling(lambda *each: told.append(each)):
        assert keeper.answer() and len(written) == 1
    assert store.values == {f"stand_ins/answered/{rank}-0": '""' for rank in range(1, 4)}
    assert Decisions(tmp_path).stand_ins == {17: 1, 18: 2, 19: 3, 25: 11, 26: 12, 27: 13}
    assert told == [("global batch 2: " + TEXT.format("3 processes 6 samples", 6), 6)]


def test_who_asks_is_answered_whatever_goes_wrong(tmp_path, monkeypatch):
    keeper, store = Keeper(Decisions(tmp_path), skipping()), Exchange(monkeypatch)

    def fail(*_):
        raise RuntimeError("a closed stream")

    store.set("stand_ins/asked/1-0", json.dumps([[16], [1]]))
    with keeper.telling(fail):
        assert keeper.answer() and "a closed stream" in store.values["stand_ins/answered/1-0"]
