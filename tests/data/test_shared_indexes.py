"""Indexes of shards in object stores: built once by some machine, fetched by all others, never believed blindly."""

import itertools

import pytest

from clipjax.data import index_store, indexes
from clipjax.data.index_store import FOLDER, Entry, Missing
from clipjax.data.webdataset import TarSource
from clipjax.runtime import objects
from tests.data.test_exact_resume import SAMPLES, shards
from tests.runtime.stores import BUCKET

_numbers = itertools.count()


@pytest.fixture
def place(gcs) -> str:
    return f"gs://{BUCKET}/indexes-{next(_numbers)}"


@pytest.fixture
def paths(place) -> list[str]:
    for name, content in shards():
        objects.write_bytes(f"{place}/{name}", content)
    return [f"{place}/{name}" for name, _ in shards()]


def open_tars(paths: list[str]) -> TarSource:
    return TarSource(paths, max_caption_bytes=1000, max_image_pixels=10**6)


def reads_of_shards(gcs) -> int:
    return sum(1 for request in gcs.requests if request.startswith("GET") and request.split("?")[0].endswith(".tar"))


def test_the_next_machine_fetches_what_the_first_has_built(paths, place, on_machine, gcs):
    on_machine("first")
    first = open_tars(paths)
    kept = objects.list_folder(place)
    assert {f"{FOLDER}/{name}.idx" for name, _ in shards()} <= set(kept)
    folder = on_machine("second")
    gcs.requests.clear()
    second = open_tars(paths)
    assert reads_of_shards(gcs) == 0 and len(list(folder.glob("*.idx"))) == len(paths)
    assert len(second) == SAMPLES and second.digests() == first.digests()
    assert [second[i].captions for i in range(SAMPLES)] == [first[i].captions for i in range(SAMPLES)]
    gcs.requests.clear()
    open_tars(paths)  # and a third start asks for no index at all
    assert not any(FOLDER in request for request in gcs.requests)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "text"])
def test_a_damaged_or_foreign_index_in_the_store_is_built_anew(paths, place, on_machine, gcs, damage):
    on_machine("first")
    expected = open_tars(paths).digests()
    shared = f"{place}/{FOLDER}/00001.tar.idx"
    content = objects.read_bytes(shared, 2**20)
    match damage:
        case "cut":
            content = content[:-5]
        case "flipped":
            content = content[:60] + bytes([content[60] ^ 1]) + content[61:]
        case "empty":
            content = b""
        case "other":
            content = objects.read_bytes(f"{place}/{FOLDER}/00000.tar.idx", 2**20)
        case "text":
            content = b"<html>not here</html>"
    objects.write_bytes(shared, content)
    on_machine("second")
    gcs.requests.clear()
    assert open_tars(paths).digests() == expected and reads_of_shards(gcs) > 0
    on_machine("third")
    gcs.requests.clear()
    assert open_tars(paths).digests() == expected and reads_of_shards(gcs) == 0  # the second has mended it


def test_a_shard_that_has_changed_has_no_index(paths, on_machine):
    on_machine("first")
    open_tars(paths)
    objects.write_bytes(paths[0], list(shards())[1][1])
    on_machine("second")
    assert isinstance(index_store.find(paths[0]), Missing) and isinstance(index_store.find(paths[1]), Entry)
    assert open_tars(paths)[0].captions == ("pair 00030",)


def test_a_store_that_takes_nothing_and_a_disk_that_takes_nothing(paths, place, on_machine, gcs, monkeypatch):
    folder = on_machine("first")
    folder.parent.mkdir(parents=True)
    folder.write_text("a file")

    def refuse(place: str, content: bytes) -> None:
        raise PermissionError(13, "read-only", place)

    monkeypatch.setattr(objects, "write_bytes", refuse)
    source = open_tars(paths)
    assert len(source) == SAMPLES and source[100].captions == ("pair 00100",)
    assert not any(FOLDER in path for path in objects.list_folder(place))


def test_many_shards_cost_one_listing(place, on_machine, gcs):
    content = next(shards())[1]
    paths = [f"{place}/{number:05d}.tar" for number in range(30)]
    for path in paths:
        objects.write_bytes(path, content)
    on_machine("first")
    indexes.open_indexes(paths, limit=10**6)
    gcs.requests.clear()
    found = indexes.open_indexes(paths, limit=10**6)
    assert [entry.header.count for entry in found] == [30] * 30
    assert len(gcs.requests) == 1
