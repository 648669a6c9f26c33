"""The bitmap of kept samples: the numbers are those of a plain list, and its file is damaged, gone, or cannot be."""

import logging
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import xxhash

from clipjax.config import DataConfig
from clipjax.data import kept_samples, shard_results
from clipjax.data.digests import Hasher, ShardDigest
from clipjax.data.filters import FilteredSource
from clipjax.data.kept_format import FIXED, DamagedKept, ShardBits, pack_kept
from clipjax.data.kept_samples import KeptSamples, find_kept, kept_place, make_kept
from clipjax.data.sample import ChangedData, Sample
from clipjax.data.sources import build_training_source
from tests.data.test_filters import FILTERS, OLD, expected_keys, keys, rows, write_tar

pytestmark = pytest.mark.newest


class ListedSamples:
    """The bitmap as each process held it in memory before there was a file: slow, and plain."""

    def __init__(self, shards: list[ShardBits]):
        blocks = [-(-shard.count // 512) for shard in shards]
        self._bits = np.zeros((sum(blocks), 64), np.uint8)
        self._first = np.zeros(sum(blocks), np.int64)
        place = start = 0
        for shard, number in zip(shards, blocks, strict=True):
            part = self._bits[place : place + number].reshape(-1)
            part[: len(shard.bits)] = np.frombuffer(shard.bits, np.uint8)
            self._first[place : place + number] = start + 512 * np.arange(number)
            place, start = place + number, start + shard.count
        self._rank = np.zeros(sum(blocks) + 1, np.int64)
        np.cumsum(np.bitwise_count(self._bits).sum(axis=1, dtype=np.int64), out=self._rank[1:])

    def __len__(self) -> int:
        return int(self._rank[-1])

    def select(self, first: int, count: int = 1) -> np.ndarray:
        begin = int(np.searchsorted(self._rank, first, side="right")) - 1
        end = int(np.searchsorted(self._rank, first + count, side="left"))
        blocks, places = np.nonzero(np.unpackbits(self._bits[begin:end], axis=1))
        skipped = first - int(self._rank[begin])
        return (self._first[begin:end][blocks] + places)[skipped : skipped + count]


class Numbers:
    """A source whose samples are their numbers, in shards."""

    def __init__(self, counts: list[int]):
        self.shard_sizes = counts

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def __getitem__(self, index: int) -> Sample:
        return Sample(b"", (), key=str(index))

    def digests(self) -> list[ShardDigest]:
        return [ShardDigest(f"{i}", f"{i:032x}", count) for i, count in enumerate(self.shard_sizes)]


def draw(counts: list[int], share: float, seed: int = 0) -> list[ShardBits]:
    rng = np.random.default_rng(seed)
    return [ShardBits.of_flags(rng.random(count) < share) for count in counts]


def pack(shards: list[ShardBits], key: str = "key") -> bytes:
    return pack_kept(shards, key=key, dropped=[sum(shard.count - shard.kept for shard in shards)])


SIZES = [[1], [7, 1, 1, 512], [512], [513, 3, 1024, 511], [5] * 40, [3000, 1, 4096], [0, 9, 0, 1000]]


@pytest.mark.parametrize("counts", SIZES, ids=str)
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("way", ["memory", "file", "worker"])
def test_numbers_are_those_of_before(tmp_path, counts, share, way):
    shards = draw(counts, share)
    slow = ListedSamples(shards)
    place = None if way == "memory" else tmp_path / "kept.bitmap"
    kept = make_kept(place, "key", lambda: pack(shards))
    if way == "worker":
        kept = pickle.loads(pickle.dumps(kept))
    assert len(kept) == len(slow)
    stored = kept.select(0, len(slow))
    assert stored.dtype == np.int64
    np.testing.assert_array_equal(stored, slow.select(0, len(slow)))
    for number in range(len(slow)):
        assert kept.select(number)[0] == stored[number] and kept.rank(int(stored[number])) == number
    for first in range(0, len(slow), 7):
        count = min(9, len(slow) - first)
        np.testing.assert_array_equal(kept.select(first, count), slow.select(first, count))
    ranks = np.searchsorted(stored, np.arange(sum(counts) + 1))
    assert [kept.rank(number) for number in range(sum(counts) + 1)] == ranks.tolist()
    first = 0
    for shard in shards:
        assert kept.shard(first, shard.count) == shard
        first += shard.count
    for outside in ((-1, 1), (len(slow), 1), (0, len(slow) + 1)):
        with pytest.raises(IndexError):
            kept.select(*outside)
    with pytest.raises(IndexError):
        kept.rank(sum(counts) + 1)


def test_digests_and_another_order_are_those_of_before(tmp_path):
    counts = [100, 3, 777, 512]
    shards = draw(counts, 0.4)
    kept = make_kept(tmp_path / "a.bitmap", "key", lambda: pack(shards))
    source = FilteredSource(Numbers(counts), kept, counts, ["x>1"])
    expected = []
    for digest, shard in zip(source.source.digests(), shards, strict=True):
        hasher = Hasher()
        hasher.add(digest.digest.encode(), shard.bits)
        expected.append(ShardDigest(digest.name, hasher.hexdigest(), shard.kept))
    assert source.digests() == expected
    order = [2, 0, 3, 1]
    source.source.reordered = lambda order: Numbers([counts[shard] for shard in order])  # type: ignore[attr-defined]
    other = source.reordered(order)
    slow = ListedSamples([shards[shard] for shard in order])
    assert keys(other) == [str(number) for number in slow.select(0, len(slow))] and other.counts() == source.counts()
    assert len(list(tmp_path.glob("*.bitmap"))) == 2  # this order has a file of its own, also the next time
    assert keys(source.reordered(order)) == keys(other) and len(list(tmp_path.iterdir())) == 2
    assert keys(source) == [str(number) for number in ListedSamples(shards).select(0, len(source))]


def test_a_worker_gets_a_path_and_maps_the_file(tmp_path):
    shards = draw([3_000_000, 1_000_001], 0.3)
    place = tmp_path / "kept.bitmap"
    kept = make_kept(place, "key", lambda: pack(shards))
    assert 4e6 / 8 < place.stat().st_size < 4e6 / 8 * 1.13
    pickled = pickle.dumps(kept)
    assert len(pickled) < 1000
    (tmp_path / "pickled").write_bytes(pickled)
    program = (
        "import pathlib, pickle, sys\n"
        "kept = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "before = sys.argv[2] in pathlib.Path('/proc/self/maps').read_text()\n"
        "found = int(kept.select(777_777)[0])\n"
        "print(before, found, sys.argv[2] in pathlib.Path('/proc/self/maps').read_text())"
    )
    words = (sys.executable, "-c", program, str(tmp_path / "pickled"), str(place))
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", str(kept.select(777_777)[0]), "True"]


def tars(folder: pathlib.Path) -> DataConfig:
    for number in range(3):
        write_tar(folder / f"{number}.tar", rows(number * 20, 20))
    return DataConfig(train=f"{folder}/{{0,1,2}}.tar", filters=FILTERS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "clipjax" / "index"


def bitmaps(cache: pathlib.Path) -> list[pathlib.Path]:
    return sorted(cache.glob("*.bitmap"))


def forbid_judging(monkeypatch) -> None:
    monkeypatch.setattr(shard_results, "_judge", lambda *_: pytest.fail("all shards have been judged"))


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "cut": lambda content: content[:-1],
    "head": lambda content: content[:20],
    "longer": lambda content: content + b"\0",
    "empty": lambda _: b"",
    "magic": lambda content: flip(content, 0),
    "format": lambda content: flip(content, 8),
    "header": lambda content: flip(content, FIXED.size + 2),
    "rank": lambda content: flip(content, len(content) - 70),
    "bit": lambda content: flip(content, len(content) - 64),
    "padding": lambda content: flip(content, len(content) - 1),
    "zeros": lambda content: bytes(len(content)),
    "other": lambda _: pack(draw([60], 0.5), key="other"),
    "folder": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew_without_judging(tmp_path, cache, monkeypatch, caplog, damage):
    data = tars(tmp_path)
    assert keys(build_training_source(data)) == expected_keys()
    [place] = bitmaps(cache)
    content, make = place.read_bytes(), DAMAGES[damage]
    place.unlink()
    if make is None:
        place.mkdir()
    else:
        place.write_bytes(make(content))
    forbid_judging(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert keys(build_training_source(data)) == expected_keys()
    assert f"the kept samples in {place} are made anew" in caplog.text
    if make is not None:
        assert place.read_bytes() == content and len(list(cache.iterdir())) == 1
        caplog.clear()
        build_training_source(data)
        assert not caplog.records


@pytest.mark.parametrize("part", ["ranks", "bits", "kept", "samples"])
def test_a_file_that_contradicts_itself_is_refused_whatever_its_digests(part):
    shards = draw([1000], 0.5)
    content = bytearray(pack(shards))
    _, version, length, size, *_ = FIXED.unpack_from(content)
    text, body = bytearray(content[FIXED.size : FIXED.size + length]), bytearray(content[FIXED.size + length :])
    if part == "ranks":
        body[8:16] = struct.pack("<q", 2**40)
    elif part == "bits":
        body[-1] |= 1  # behind the last sample
    else:
        [dropped] = KeptSamples(bytes(content)).header.dropped
        old, new = {
            "kept": (f'"dropped": [{dropped}]', f'"dropped": [{dropped - 1}]'),
            "samples": ('"samples": 1000', '"samples": -999'),
        }[part]
        assert old.encode() in text
        text = bytearray(text.replace(old.encode(), new.encode()).ljust(length)[:length])
    lengths = struct.pack("<IIQ", version, length, size)
    digests = xxhash.xxh3_128_digest(lengths + bytes(text)), xxhash.xxh3_128_digest(bytes(body))
    forged = FIXED.pack(b"clipjaxK", version, length, size, *digests) + bytes(text) + bytes(body)
    with pytest.raises(DamagedKept):
        KeptSamples(forged)


def test_another_filter_list_order_or_content_has_another_file(tmp_path, cache):
    data = tars(tmp_path)
    build_training_source(data)
    (tmp_path / "drop").write_text("0001")
    others = [
        DataConfig(train=data.train, filters=FILTERS[:2]),
        DataConfig(train=data.train, filters=FILTERS, drop_keys=f"{tmp_path}/drop"),
        DataConfig(train=f"{tmp_path}/{{2,1,0}}.tar", filters=FILTERS),
        DataConfig(train=f"{tmp_path}/{{0,1}}.tar", filters=FILTERS),
        DataConfig(train=data.train, filters=FILTERS, image_field="jpg"),
    ]
    for number, other in enumerate(others):
        build_training_source(other)
        assert len(bitmaps(cache)) == number + 2
    (tmp_path / "drop").write_text("0002")
    build_training_source(others[1])
    assert len(bitmaps(cache)) == 7
    write_tar(tmp_path / "1.tar", rows(100, 20))
    os.utime(tmp_path / "1.tar", (OLD + 9, OLD + 9))
    changed = keys(build_training_source(data))
    assert len(bitmaps(cache)) == 8 and "0101" in changed and "0022" not in changed
    for each in (data, *others):
        build_training_source(each)
    names = {place.name for place in bitmaps(cache)}
    for each in (data, *others):
        build_training_source(each)
    assert {place.name for place in bitmaps(cache)} == names


def test_a_later_start_looks_at_no_result_of_a_shard_and_no_key(tmp_path, cache, monkeypatch):
    data = tars(tmp_path)
    (tmp_path / "drop").write_text("0002\n")
    data.drop_keys = f"{tmp_path}/drop"
    first = build_training_source(data)
    assert isinstance(first, FilteredSource)
    monkeypatch.setattr(shard_results, "_read", lambda *_: pytest.fail("the bitmap is there"))
    monkeypatch.setattr(shard_results.KeyList, "load", lambda *_: pytest.fail("the bitmap is there"))
    again = build_training_source(data)
    assert isinstance(again, FilteredSource)
    assert keys(again) == keys(first) and again.counts() == first.counts() and again.digests() == first.digests()


def test_where_nothing_can_be_written_memory_holds_the_bitmap(tmp_path, cache, monkeypatch, caplog):
    data = tars(tmp_path)
    expected = keys(build_training_source(data))
    shutil.rmtree(cache.parent.parent)
    cache.parent.parent.write_text("a file")
    forbid_judging(monkeypatch)  # the results beside the shards are there
    with caplog.at_level(logging.WARNING):
        source = build_training_source(data)
    assert f"cannot be written to {cache}: " in caplog.text and "name another by XDG_CACHE_HOME" in caplog.text
    assert keys(source) == expected
    assert keys(pickle.loads(pickle.dumps(source))) == expected


def test_a_file_is_used_where_no_lock_can_be_made(tmp_path, cache, monkeypatch, caplog):
    data = tars(tmp_path)
    expected = keys(build_training_source(data))

    def refuse(*_, **__):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(kept_samples, "locked", refuse)
    monkeypatch.setattr(shard_results, "locked", refuse)
    assert keys(build_training_source(data)) == expected and not caplog.records
    other = DataConfig(train=data.train, filters=FILTERS[:1])
    source = build_training_source(other)  # nothing of it can be kept
    assert len(bitmaps(cache)) == 1 and "cannot be written to" in caplog.text
    assert keys(pickle.loads(pickle.dumps(source))) == [row["key"] for row in rows() if row["width"] >= 200]


def test_what_may_change_without_another_time_is_kept_for_no_later_start(tmp_path, cache, monkeypatch, caplog):
    data = tars(tmp_path)
    (tmp_path / "1.tar").touch()
    monkeypatch.setattr(shard_results, "_CLOCK_TICK_NS", 3600 * 10**9)
    source = build_training_source(data)
    assert keys(pickle.loads(pickle.dumps(source))) == expected_keys()
    assert sorted(each.name[:5] for each in (tmp_path / ".clipjax-index").glob("*.kept")) == ["0.tar", "2.tar"]
    assert not bitmaps(cache) and not caplog.records


def test_a_folder_is_no_file_and_is_judged_at_each_start(tmp_path, cache):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
        (tmp_path / f"{number}.txt").write_text("text")
    (tmp_path / "drop").write_text("2.jpg\n")
    kept = build_training_source(DataConfig(train=f"folder:{tmp_path}", drop_keys=f"{tmp_path}/drop"))
    assert len(kept) == 3
    assert [kept.location(i) for i in range(3)] == [kept.source.location(i) for i in (0, 1, 3)]  # type: ignore
    assert len(pickle.loads(pickle.dumps(kept))) == 3 and not bitmaps(cache)


def test_a_file_that_is_deleted_is_written_again_for_the_next_worker(tmp_path, monkeypatch):
    place = kept_place(tmp_path / "folder", "key")
    shards = draw([5000], 0.5)
    kept = make_kept(place, "key", lambda: pack(shards))
    content, pickled = place.read_bytes(), pickle.dumps(kept)
    shutil.rmtree(place.parent)
    expected = kept.select(100, 50)  # the mapping outlives the name
    worker = pickle.loads(pickled)
    with pytest.raises(ChangedData, match="cannot be read: .*No such file.*start the same command again"):
        worker.select(0)
    worker = pickle.loads(pickle.dumps(kept))
    np.testing.assert_array_equal(worker.select(100, 50), expected)
    assert place.read_bytes() == content
    place.write_bytes(pack(draw([5000], 0.1), "key"))
    with pytest.raises(ChangedData, match="it has changed"):
        pickle.loads(pickled).select(0)
    shutil.rmtree(place.parent)
    place.parent.write_text("a file")
    worker = pickle.loads(pickle.dumps(kept))
    np.testing.assert_array_equal(worker.select(100, 50), expected)


def test_a_file_that_another_machine_writes_without_a_lock_stays(tmp_path, monkeypatch):
    """A network file system takes a file that is replaced away from whoever has mapped it."""
    place, shards = kept_place(tmp_path, "key"), draw([5000], 0.5)
    opened, written = kept_samples._open, []

    def look(place: pathlib.Path, key: str) -> KeptSamples:
        monkeypatch.setattr(kept_samples, "_open", look_again)
        return opened(place, key)

    def look_again(place: pathlib.Path, key: str) -> KeptSamples:
        """This process holds the lock, which keeps nobody out."""
        monkeypatch.setattr(kept_samples, "_open", opened)
        assert not place.exists()
        place.write_bytes(pack(shards))
        written.append(place.stat().st_ino)
        raise FileNotFoundError(2, "as it was a moment before")

    monkeypatch.setattr(kept_samples, "_open", look)
    kept = make_kept(place, "key", lambda: pack(shards))
    np.testing.assert_array_equal(kept.select(0, 10), ListedSamples(shards).select(0, 10))
    assert written == [place.stat().st_ino] and [each.name for each in tmp_path.iterdir()] == [place.name]


def test_what_a_killed_process_left_half_written_goes_away(tmp_path):
    place, shards = kept_place(tmp_path, "key"), draw([5000], 0.5)
    pathlib.Path(f"{place}.tmp").write_bytes(b"half")
    pathlib.Path(f"{place}.lock").touch()
    make_kept(place, "key", lambda: pack(shards))
    assert [each.name for each in tmp_path.iterdir()] == [place.name]
    found = find_kept(place, "key")
    assert found is not None and len(found) == shards[0].kept
