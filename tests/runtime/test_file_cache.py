"""Copies of objects on a disk: made once for all processes, verified, within their room, and never in the way."""

import json
import os
import pathlib
import pickle

import pytest

from clipjax.runtime import file_cache, objects
from clipjax.runtime.file_cache import CachedFile, FileCache
from clipjax.runtime.storage import FileChanged
from tests.runtime.stores import BUCKET
from tests.waiting import wait_for

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def place(gcs) -> str:
    address = f"gs://{BUCKET}/a.tar"
    objects.write_bytes(address, CONTENT)
    gcs.requests.clear()
    return address


def opened(cache: FileCache, place: str) -> CachedFile:
    file = cache.open(place)
    assert isinstance(file, CachedFile)
    return file


def copied(cache: FileCache, place: str) -> CachedFile:
    """A file that is read from its copy."""
    file = opened(cache, place)
    assert file.read(10, 20) == CONTENT[10:30]
    wait_for(lambda: file._copy is not None)
    return file


def names(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    return sorted(folder.glob(f"*.{kind}"))


def test_an_object_is_read_from_its_store_until_there_is_a_copy(tmp_path, place, gcs):
    file = copied(FileCache(str(tmp_path / "new" / "cache"), 10**6), place)
    gcs.requests.clear()
    for offset, size in ((0, 10), (5000, 20_000), (len(CONTENT) - 3, 10), (len(CONTENT), 5), (0, len(CONTENT))):
        assert file.read(offset, size) == CONTENT[offset : offset + size]
    assert gcs.requests == []
    (copy,) = names(tmp_path / "new" / "cache", "copy")
    assert copy.read_bytes() == CONTENT and (file.size, names(copy.parent, "part")) == (len(CONTENT), [])


def test_the_next_run_takes_the_copy_and_asks_the_store_for_the_version_only(tmp_path, place, gcs):
    copied(FileCache(str(tmp_path), 10**6), place)
    gcs.requests.clear()
    copied(pickle.loads(pickle.dumps(FileCache(str(tmp_path), 10**6))), place)
    assert gcs.count("GET .*alt=media|GET /bucket/a.tar") <= 1  # the first bytes, while the copy is verified


def test_a_copy_that_has_changed_is_made_anew(tmp_path, place):
    copied(FileCache(str(tmp_path), 10**6), place)
    (copy,) = names(tmp_path, "copy")
    copy.write_bytes(CONTENT[:-1] + b"X")
    file = copied(FileCache(str(tmp_path), 10**6), place)
    assert file.read(0, len(CONTENT)) == CONTENT == copy.read_bytes()


@pytest.mark.parametrize("record", ["", "[]", "{", '{"address": 3}', json.dumps({"digest": "0" * 32})])
def test_a_damaged_record_is_none(tmp_path, place, record):
    copied(FileCache(str(tmp_path), 10**6), place)
    (path,) = names(tmp_path, "json")
    path.write_text(record)
    assert copied(FileCache(str(tmp_path), 10**6), place).read(0, 5) == CONTENT[:5]
    assert json.loads(path.read_text())["address"] == place


def test_a_new_version_of_an_object_is_another_object(tmp_path, place):
    cache = FileCache(str(tmp_path), 10**6)
    copied(cache, place)
    objects.write_bytes(place, b"another content, as long as anything")
    file = opened(cache, place)
    assert file.read(0, 15) == b"another content"
    wait_for(lambda: file._copy is not None)
    assert file.read(0, 100) == b"another content, as long as anything" and len(names(tmp_path, "copy")) == 2


def test_an_object_that_changes_before_it_is_copied_is_told_to_whoever_reads_it(tmp_path, place):
    file = opened(FileCache(str(tmp_path), 10**6), place)
    objects.write_bytes(place, b"another")
    with pytest.raises(FileChanged):
        file.read(0, 5)
    wait_for(lambda: file.gives_up)
    assert names(tmp_path, "copy") == []


def test_a_copy_that_is_lost_while_it_is_read_costs_nothing(tmp_path, place):
    file = copied(FileCache(str(tmp_path), 10**6), place)
    os.truncate(names(tmp_path, "copy")[0], 100)
    assert file.read(50, 300) == CONTENT[50:350]
    assert file.read(0, len(CONTENT)) == CONTENT


def test_what_does_not_fit_is_read_from_its_store(tmp_path, place, gcs):
    cache = FileCache(str(tmp_path), len(CONTENT) + 10)
    other = f"gs://{BUCKET}/b.tar"
    objects.write_bytes(other, CONTENT)
    copied(cache, place)
    file = opened(cache, other)
    assert file.read(0, 5) == CONTENT[:5]
    wait_for(lambda: file.gives_up)
    assert file.read(5, 5) == CONTENT[5:10] and len(names(tmp_path, "copy")) == 1


def test_copies_of_earlier_runs_make_room(tmp_path, place):
    other = f"gs://{BUCKET}/b.tar"
    objects.write_bytes(other, CONTENT)
    copied(FileCache(str(tmp_path), len(CONTENT)), place)
    (old,) = names(tmp_path, "copy")
    os.utime(old.with_suffix(".lock"), (1, 1))
    copied(FileCache(str(tmp_path), len(CONTENT)), other)
    assert len(names(tmp_path, "copy")) == 1 and not old.exists() and len(names(tmp_path, "json")) == 1


def test_one_process_makes_a_copy_and_the_others_find_it(tmp_path, place, gcs, monkeypatch):
    monkeypatch.setattr(file_cache, "_LOOK_AGAIN_SECONDS", 0.0)
    caches = [FileCache(str(tmp_path), 10**6) for _ in range(4)]
    files = [opened(cache, place) for cache in caches]

    def all_copied() -> bool:
        assert all(file.read(7, 9) == CONTENT[7:16] for file in files)
        return all(file._copy is not None for file in files)

    wait_for(all_copied)
    assert len(names(tmp_path, "copy")) == 1
    gcs.requests.clear()
    assert all(file.read(0, len(CONTENT)) == CONTENT for file in files) and gcs.requests == []


def test_a_folder_that_cannot_be_written_to_stops_nothing(tmp_path, place, capsys):
    (tmp_path / "cache").write_text("a file")
    file = opened(FileCache(str(tmp_path / "cache"), 10**6), place)
    assert file.read(0, 5) == CONTENT[:5]
    wait_for(lambda: file.gives_up)
    assert file.read(0, 5) == CONTENT[:5]


def test_half_a_copy_of_a_killed_process_is_written_over(tmp_path, place):
    copied(FileCache(str(tmp_path), 10**6), place)
    (copy,) = names(tmp_path, "copy")
    copy.rename(copy.with_suffix(".part"))
    os.truncate(copy.with_suffix(".part"), 77)
    assert copied(FileCache(str(tmp_path), 10**6), place).read(0, len(CONTENT)) == CONTENT
    assert not copy.with_suffix(".part").exists()
