"""Results of filters for shards in object stores: judged by one machine, fetched by others, never believed blindly."""

import itertools
import pathlib

import pytest

from clipjax.config import DataConfig
from clipjax.data import filter_results, shard_results
from clipjax.data.index_store import FOLDER
from clipjax.data.shard_results import judge_shard, make_filters
from clipjax.data.sources import build_source, build_training_source
from clipjax.runtime import objects
from tests.data.test_filters import FILTERS, expected_keys, keys, rows, write_tar
from tests.runtime.stores import BUCKET

_numbers = itertools.count()


@pytest.fixture
def place(gcs, tmp_path) -> str:
    folder = f"gs://{BUCKET}/filters-{next(_numbers)}"
    (tmp_path / "made").mkdir()
    for number in range(3):
        path = write_tar(tmp_path / "made" / f"{number}.tar", rows(number * 20, 20))
        objects.write_bytes(f"{folder}/{number}.tar", pathlib.Path(path).read_bytes())
    return folder


def count_judged(monkeypatch) -> list[str]:
    done: list[str] = []
    judge = shard_results._judge
    monkeypatch.setattr(shard_results, "_judge", lambda *each: done.append(each[1]) or judge(*each))
    return done


def test_the_next_machine_fetches_what_the_first_has_judged(place, on_machine, monkeypatch, gcs):
    data = DataConfig(train=f"{place}/{{0,1,2}}.tar", filters=FILTERS)
    done = count_judged(monkeypatch)
    on_machine("first")
    first = build_training_source(data)
    assert keys(first) == expected_keys() and len(done) == 3
    assert sum(name.endswith(".kept") for name in objects.list_folder(place)) == 3
    folder = on_machine("second")
    second = build_training_source(data)
    assert len(done) == 3 and keys(second) == expected_keys() and second.digests() == first.digests()
    assert len(list(folder.glob("*.kept"))) == 3 and len(list(folder.glob("*.bitmap"))) == 1
    gcs.requests.clear()
    build_training_source(data)
    assert len(done) == 3 and not any(FOLDER in request for request in gcs.requests)
    build_training_source(DataConfig(train=data.train, filters=FILTERS[:1]))
    assert len(done) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "text"])
def test_a_damaged_or_foreign_result_in_the_store_is_made_anew(place, on_machine, monkeypatch, damage):
    data = DataConfig(train=f"{place}/{{0,1,2}}.tar", filters=FILTERS)
    on_machine("first")
    digests = build_training_source(data).digests()
    shared = {name: f"{place}/{name}" for name in objects.list_folder(place) if name.endswith(".kept")}
    names = sorted(shared)
    content = objects.read_bytes(shared[names[1]], 2**20)
    damaged = {
        "cut": content[:-1],
        "flipped": content[:-1] + bytes([content[-1] ^ 16]),
        "empty": b"",
        "other": objects.read_bytes(shared[names[0]], 2**20),
        "text": b"<html>not here</html>",
    }
    objects.write_bytes(shared[names[1]], damaged[damage])
    on_machine("second")
    done = count_judged(monkeypatch)
    assert build_training_source(data).digests() == digests and done == [f"{place}/1.tar"]
    on_machine("third")
    assert build_training_source(data).digests() == digests and len(done) == 1  # the second has mended it


def test_a_shard_that_has_changed_in_the_store_is_judged_again(place, on_machine, monkeypatch, tmp_path):
    data = DataConfig(train=f"{place}/{{0,1,2}}.tar", filters=FILTERS)
    on_machine("first")
    build_training_source(data)
    path = write_tar(tmp_path / "made" / "1.tar", rows(100, 20))
    objects.write_bytes(f"{place}/1.tar", pathlib.Path(path).read_bytes())
    on_machine("second")
    done = count_judged(monkeypatch)
    assert "0101" in keys(build_training_source(data)) and done == [f"{place}/1.tar"]


def test_a_store_that_takes_nothing_is_judged_by_each_machine(place, on_machine, monkeypatch):
    data = DataConfig(train=f"{place}/{{0,1,2}}.tar", filters=FILTERS)

    def refuse(place: str, content: bytes) -> None:
        raise PermissionError(13, "read-only", place)

    monkeypatch.setattr(objects, "write_bytes", refuse)
    done = count_judged(monkeypatch)
    for number, name in enumerate(("first", "second")):
        on_machine(name)
        for _ in range(2):
            assert keys(build_training_source(data)) == expected_keys() and len(done) == 3 * (number + 1)


def test_a_machine_judges_what_another_has_not_finished(place, on_machine, monkeypatch):
    data = DataConfig(train=f"{place}/{{0,1,2}}.tar", filters=FILTERS)
    on_machine("first")
    source, filters = build_source(data.train, data=data), make_filters(data)
    judge_shard(source, 1, f"{place}/1.tar", 20, filters)  # type: ignore[arg-type]
    on_machine("second")
    done = count_judged(monkeypatch)
    assert keys(build_training_source(data)) == expected_keys() and sorted(done) == [f"{place}/{i}.tar" for i in (0, 2)]


@pytest.mark.process
def test_a_name_that_is_a_pattern_of_another_shard_gets_its_own_result(gcs, monkeypatch, tmp_path):
    """A judging process is told of the shard by its name."""
    place = f"gs://{BUCKET}/filters-{next(_numbers)}"
    for name, start in (("a[1].tar", 0), ("a1.tar", 20)):
        objects.write_bytes(f"{place}/{name}", pathlib.Path(write_tar(tmp_path / name, rows(start, 20))).read_bytes())
    monkeypatch.setattr(filter_results, "_SECONDS_TO_START", 0.0)
    data = DataConfig(train=f"{place}/*.tar", filters=FILTERS)
    kept = [key for key in expected_keys() if key < "0040"]
    assert keys(build_training_source(data)) == [key for key in kept if key >= "0020"] + kept[: kept.index("0022")]
