"""Who is named as the one that keeps the others waiting, and how the times of all processes come together."""

import jax
import numpy as np
import pytest

from clipjax.monitoring.run_logger import sample_digest
from clipjax.monitoring.stragglers import RankTimes, StepTimes, slow_ranks
from clipjax.runtime import processes


def spent(input_wait: float, blocked: float, *, step: float = 1.0) -> StepTimes:
    return StepTimes(host="node", step_seconds=step, input_wait_seconds=input_wait, blocked_seconds=blocked)


@pytest.mark.parametrize(
    ("times", "slow"),
    [
        ([spent(0.0, 0.9), spent(0.0, 0.9)], []),
        ([spent(0.0, 0.9), spent(0.9, 0.0)], [1]),  # waits for data while the other is blocked
        ([spent(0.0, 0.9), spent(0.0, 0.0)], [1]),  # works on its host all the time
        ([spent(0.9, 0.0), spent(0.9, 0.0)], []),  # all wait for data alike: nobody waits for anybody
        ([spent(0.3, 0.5), spent(0.0, 0.9)], []),  # has time to spare itself
        ([spent(0.05, 0.0, step=0.1), *[spent(0.0, 0.09, step=0.1)] * 3], [0]),
        ([spent(0.02, 0.95), spent(0.07, 0.91)], []),  # less than a tenth of a step
        ([spent(0.0, 0.9), spent(0.9, 0.0), spent(0.8, 0.05), spent(0.0, 0.9)], [1, 2]),
    ],
)
def test_slow_is_who_is_busy_while_the_others_are_blocked(times, slow):
    assert slow_ranks(times) == slow


class Store:
    """The coordinator's texts, for processes that are threads of this test's mind."""

    def __init__(self, monkeypatch) -> None:
        self.texts, self.rank = {}, 0
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: self.rank)
        monkeypatch.setattr(processes, "kv_set", self.keep)
        monkeypatch.setattr(processes, "kv_get", lambda key, timeout_seconds: self.texts[key])
        monkeypatch.setattr(processes, "kv_list", self.published)
        monkeypatch.setattr(processes, "kv_delete", self.forget)

    def keep(self, key: str, value: str, *, overwrite: bool = False) -> None:
        assert overwrite or key not in self.texts
        self.texts[key] = value

    def published(self, folder: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: text for key, text in self.texts.items() if key.startswith(f"{folder}/")}

    def forget(self, folder: str) -> None:
        for key in [key for key in self.texts if key.startswith(f"{folder}/")]:
            del self.texts[key]


def test_times_come_together_one_interval_later_and_name_the_slow(monkeypatch):
    store = Store(monkeypatch)
    first, second = RankTimes(), RankTimes()
    named = []
    for step in (10, 20, 30, 40):
        first.send(step, 10, spent(0.0, 0.9))
        fields, lines = first.receive(before=step)
        if step == 10:
            assert (fields, lines) == ({}, [])  # the second has not sent its own, and nobody waits for it
        else:
            assert fields["ranks"]["step"] == step - 10
            assert fields["ranks"]["input_wait_seconds"] == [0.0, 0.9]
            assert fields["ranks"]["host_seconds"] == pytest.approx([0.1, 0.1])
        named += lines
        store.rank = 1
        second.send(step, 10, spent(0.9, 0.0))
        store.rank = 0
    # Steps 11 to 20 and 21 to 30: two in a row, not counting the first interval, which compiles; told once.
    (line,) = named
    assert line.startswith("straggler: process 1 (node) keeps the others waiting up to step 30: of each step's 1.000 s")
    store.rank = 1
    assert second.table() == ""
    store.rank = 0
    rows = first.table().splitlines()
    assert rows[0].split("  ")[-1] == "kept others waiting"
    assert rows[2].endswith("0 of 3") and rows[3].endswith("3 of 3")
    assert set(store.texts) == {"times/all/0", "times/all/1"}  # the others are cleared away


def test_a_process_that_has_not_sent_yet_is_not_waited_for(monkeypatch):
    Store(monkeypatch)
    times = RankTimes()
    for step in (1, 2, 3):
        times.send(step, 1, spent(0.0, 0.9))
        assert times.receive(before=step) == ({}, [])


def test_digests_of_parts_add_up_to_that_of_the_whole():
    whole = np.random.default_rng(0).permutation(1000)
    parts = sum(sample_digest(part) for part in np.array_split(whole, 7)) % 2**64
    assert parts == sample_digest(np.arange(1000))
    twice = np.append(whole[1:], whole[1])
    assert sample_digest(twice) != sample_digest(whole)
