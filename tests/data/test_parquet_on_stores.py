"""Parquet in a store: read by ranges or from copies on a disk, as on a disk itself; a file that changes is noticed."""

import pathlib
import pickle

import pytest

from clipjax.config import DataConfig
from clipjax.data.sample import UnreadableData
from clipjax.data.sources import build_source
from clipjax.runtime import objects
from tests.data.test_exact_resume import SAMPLES, STEPS, caption, check_exact, make_config, read, write_parquet
from tests.runtime.stores import BUCKET
from tests.waiting import wait_for


@pytest.fixture(params=["gs", "s3"])
def stored(request, tmp_path):
    """Path of a file, address of the same in a store, and its server."""
    server = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    (tmp_path / "disk").mkdir()
    path = pathlib.Path(write_parquet(tmp_path / "disk"))
    place = f"{request.param}://{BUCKET}/{tmp_path.name}/pairs.parquet"
    objects.write_bytes(place, path.read_bytes())
    server.requests.clear()
    return path, place, server


def cached(tmp_path, **fields) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), **fields)


def copies(tmp_path) -> list[pathlib.Path]:
    return list((tmp_path / "cache").glob("*.copy"))


def reads(server) -> int:
    return sum(request.startswith("GET") for request in server.requests)


def test_copies_change_nothing_and_spare_the_store(stored, tmp_path):
    path, place, server = stored
    config = make_config(cached(tmp_path, train=place, order_block=4))
    check_exact(config)
    wait_for(lambda: copies(tmp_path))
    assert copies(tmp_path)[0].read_bytes() == path.read_bytes()
    server.requests.clear()
    found = read(config, 0, STEPS)
    spared = reads(server)
    config.data.cache_dir = None
    server.requests.clear()
    assert read(config, 0, STEPS) == found
    assert spared < reads(server)
    config.data.train = str(path)
    assert read(config, 0, STEPS) == found


@pytest.mark.process
def test_workers_read_copies(stored, tmp_path):
    check_exact(make_config(cached(tmp_path, train=stored[1], num_threads=1)), (0, 2), interruptions=1)
    wait_for(lambda: copies(tmp_path))


def test_a_copy_is_asked_for_by_reading_and_not_by_the_start(stored, tmp_path):
    _, place, _ = stored
    source = build_source(place, data=cached(tmp_path))
    source.digests()
    assert not (tmp_path / "cache").exists()
    assert source[1].captions == (caption(1),)
    wait_for(lambda: copies(tmp_path))


def test_a_full_cache_stops_nothing(stored, tmp_path):
    _, place, server = stored
    source = build_source(place, data=cached(tmp_path, cache_gib=2**-30))
    assert [source[i].captions for i in range(SAMPLES)] == [(caption(i),) for i in range(SAMPLES)]
    wait_for(lambda: (tmp_path / "cache").exists())
    source._groups.clear()
    server.requests.clear()
    assert source[3].captions == (caption(3),) and reads(server) and not copies(tmp_path)


def test_a_folder_that_cannot_be_written_to_stops_nothing(stored, tmp_path):
    (tmp_path / "cache").write_text("a file")
    source = build_source(stored[1], data=cached(tmp_path))
    assert [source[i].captions for i in range(SAMPLES)] == [(caption(i),) for i in range(SAMPLES)]


@pytest.mark.parametrize("has_read", [True, False])
@pytest.mark.parametrize("has_cache", [True, False])
def test_a_file_that_changes_stops_the_run(stored, tmp_path, has_read, has_cache):
    path, place, _ = stored
    source = build_source(place, data=cached(tmp_path, cache_gib=2**-30) if has_cache else DataConfig())
    source = pickle.loads(pickle.dumps(source))
    if has_read:
        source[0]
        source._groups.clear()
    objects.write_bytes(place, path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:])
    with pytest.raises(UnreadableData, match=rf"file {place} cannot be read as it was opened: another program has wri"):
        source[0]


def test_a_file_that_has_changed_is_copied_anew_by_the_next_start(stored, tmp_path):
    path, place, _ = stored
    build_source(place, data=cached(tmp_path))[0]
    wait_for(lambda: copies(tmp_path))
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    pq.write_table(table.slice(5), path, row_group_size=16)
    objects.write_bytes(place, path.read_bytes())
    source = build_source(place, data=cached(tmp_path))
    assert source[0].captions == (caption(5),)
    wait_for(lambda: len(copies(tmp_path)) == 2)
    assert source[7].captions == (caption(12),)


def test_a_file_on_a_disk_that_is_replaced_stops_the_run(stored):
    path = stored[0]
    source = pickle.loads(pickle.dumps(build_source(str(path), data=DataConfig())))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(UnreadableData, match="another program has written it anew"):
        source[0]
    path.unlink()
    with pytest.raises(UnreadableData, match=r"pairs\.parquet cannot be read as it was opened: No such file"):
        source[0]
