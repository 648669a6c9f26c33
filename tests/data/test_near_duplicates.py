"""Perceptual hashes, the search for near ones, and the samples that it names."""

import io
import math
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipjax.data import hash_store
from clipjax.data.duplicates import find_duplicates
from clipjax.data.hash_store import hash_places, hash_source
from clipjax.data.hash_workers import Hasher, SourceSpec
from clipjax.data.near_pairs import find_groups, join_groups, near_pairs
from clipjax.data.picture_hash import hash_picture
from clipjax.data.picture_rows import USABLE, PictureHashes, hash_rows
from clipjax.data.sample import REASONS
from clipjax.data.sources import ArraySource
from tests.data.picture_files import saved

pytestmark = pytest.mark.newest


def picture(seed: int, side: int = 120) -> np.ndarray:
    """Return soft random shapes: noise that was drawn small and scaled up."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return (hash_picture(one) ^ hash_picture(other)).bit_count()


def test_hash_is_the_formula():
    pixels = picture(0)
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0))
    sums = [
        sum(
            grey[y, x] * math.cos(math.pi * (2 * y + 1) * u / 64) * math.cos(math.pi * (2 * x + 1) * v / 64) / 16
            for y in range(32)
            for x in range(32)
        )
        for u in range(1, 9)
        for v in range(1, 9)
    ]
    median = sum(sorted(sums)[31:33]) / 2
    assert f"{hash_picture(pixels):064b}" == "".join("01"[int(value > median + 4)] for value in sums)


@pytest.mark.parametrize("colour", [0, 77, 255])
def test_a_picture_of_one_colour_is_zero(colour):
    assert hash_picture(np.full((40, 50, 3), colour, np.uint8)) == 0


@pytest.mark.parametrize("seed", range(10))
def test_copies_are_near_and_other_pictures_are_far(seed):
    pixels = picture(seed)
    for quality in (50, 90):
        copy = np.asarray(Image.open(io.BytesIO(saved(pixels, "JPEG", quality=quality))))
        assert distance(pixels, copy) <= 6
    for side in (60, 200):
        assert distance(pixels, np.asarray(Image.fromarray(pixels).resize((side, side)))) <= 6
    assert distance(pixels, np.ascontiguousarray(pixels[1:-1, 1:-1])) <= 6  # 0.8 % of each side
    assert distance(pixels, picture(seed + 100)) > 12


def all_near(hashes: np.ndarray, most: int) -> dict[tuple[int, int], int]:
    """Compare all with all."""
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    return {(i, j): int(apart[i, j]) for i, j in zip(*np.nonzero(apart <= most), strict=True) if i < j}


def planted(most: int, rng: np.random.Generator) -> np.ndarray:
    """Return random hashes, others a few bits away, and a crowd that differs in few of the bits only."""
    hashes = rng.integers(0, 2**64, 600, dtype=np.uint64)
    near = hashes[:200].copy()
    for _ in range(most + 1):
        near ^= np.uint64(1) << rng.integers(0, 64, 200, dtype=np.uint64)
    crowd = rng.integers(0, 2**14, 400, dtype=np.uint64) << np.uint64(20)
    unique = np.unique(np.concatenate([hashes, near, crowd]))
    return rng.permutation(unique)


@pytest.mark.parametrize("most", [0, 1, 3, 6, 8, 12])
def test_every_near_pair_is_found_once(most):
    hashes = planted(most, np.random.default_rng(most))
    found = [
        ((i, j), bits)
        for part in near_pairs(hashes, most)
        for i, j, bits in zip(*(a.tolist() for a in part), strict=True)
    ]
    expected = all_near(hashes, most)
    assert len(found) == len(expected) and dict(found) == expected
    assert most == 0 or expected


def test_large_buckets_are_banded_again(monkeypatch):
    monkeypatch.setattr("clipjax.data.near_pairs._FEW", 4)
    monkeypatch.setattr("clipjax.data.near_pairs._SORT_COST", 0.0)
    monkeypatch.setattr("clipjax.data.near_pairs._OFFSET_COST", 0.0)
    hashes = planted(2, np.random.default_rng(5))
    found = [pair for one, other, _ in near_pairs(hashes, 2) for pair in zip(one.tolist(), other.tolist(), strict=True)]
    assert sorted(found) == sorted(all_near(hashes, 2))


@pytest.mark.parametrize("size", [0, 1, 2])
def test_few_hashes(size):
    assert [len(part[0]) for part in near_pairs(np.arange(size, dtype=np.uint64), 1)] == ([1] if size == 2 else [])


def test_groups_are_those_of_a_plain_union_find():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 300, (2, 200))
    labels = np.arange(300)
    for start in range(0, 200, 50):
        join_groups(labels, first[start : start + 50], second[start : start + 50])
    parent = list(range(300))

    def root(i: int) -> int:
        return i if parent[i] == i else root(parent[i])

    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    assert find_groups(labels, np.arange(300)).tolist() == [root(i) for i in range(300)]


def hashes_of(*values: int | None) -> PictureHashes:
    reasons = [USABLE if value is not None else REASONS.index("corrupt_image") for value in values]
    return PictureHashes(np.array([value or 0 for value in values], np.uint64), np.array(reasons, np.int8))


def test_the_first_of_each_group_stays():
    far = 0xFFFF_0000_FFFF_0000
    #                        a    -     a    b         a'   chain of a'  b
    hashes = hashes_of(0b0, None, 0b0, far, 0b11, 0b1111, far, None)
    found = find_duplicates(hashes, [], 2)
    assert found.repeated.tolist() == [2, 4, 5, 6] and found.groups == 2
    assert found.pairs == 1 + 2 + 1 + 1  # a-a, each a with a', a' with the next, b-b
    assert sorted(example[1:] for example in found.examples) == [(0, 0, 2), (0, 3, 6), (2, 0, 4), (2, 4, 5)]


def test_leaks_count_by_evaluation_set():
    hashes = hashes_of(0, 2**40 - 1, None, 0b1, 3 * 2**62)
    found = find_duplicates(hashes, [hashes_of(None, 0), hashes_of(2**40 - 2, 2**20 - 1)], 1)
    assert [leaked.tolist() for leaked in found.leaked] == [[0, 3], [1]]
    assert found.repeated.tolist() == [3] and found.dropped().tolist() == [0, 1, 3]
    assert [each for each in found.examples if each.against == 1] == [(1, 1, 1, 0)]


def test_nothing_usable():
    found = find_duplicates(hashes_of(None, None), [hashes_of(None)], 6)
    assert (found.pairs, found.groups, found.dropped().tolist()) == (0, 0, [])


def test_many_equal_hashes_are_not_compared_with_each_other():
    found = find_duplicates(hashes_of(*[0] * 200_000, 2**64 - 1), [], 6)  # 20 billion pairs
    assert found.pairs == 200_000 * 199_999 // 2
    assert found.repeated.tolist() == list(range(1, 200_000))


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, 5)
    return path


def write_tar(path, count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            image = b"no picture" if number == 2 else saved(picture(number), "JPEG")
            for name, content in ((f"{number}.jpg", image), (f"{number}.txt", b"words")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def hash_all(path) -> PictureHashes:
    spec = SourceSpec(source=str(path))
    return hash_source(spec, spec.open(), num_workers=1, progress=lambda done, total: None)


def test_hashes_are_kept_until_the_shard_changes(shard, monkeypatch):
    first = hash_all(shard)
    assert first.reasons.tolist() == [-1, -1, REASONS.index("corrupt_image"), -1, -1]
    with monkeypatch.context() as patch:
        patch.setattr(hash_store, "hash_rows", pytest.fail)
        again = hash_all(shard)
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.reasons, again.reasons)
    write_tar(shard, 7)
    assert len(hash_all(shard).values) == 7


def test_a_search_that_was_stopped_goes_on_with_the_next_shard(tmp_path, monkeypatch):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", 3)
    spec = SourceSpec(source=f"{tmp_path}/[ab].tar")
    hashed: list[range] = []

    def stopped(source, rows: range) -> PictureHashes:
        hashed.append(rows)
        if len(hashed) == 2:
            raise KeyboardInterrupt
        return hash_rows(source, rows)

    monkeypatch.setattr(hash_store, "hash_rows", stopped)
    told: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        hash_source(spec, spec.open(), num_workers=1, progress=lambda done, total: told.append((done, total)))
    assert len(hash_source(spec, spec.open(), num_workers=1, progress=lambda *counts: told.append(counts)).values) == 6
    assert hashed == [range(3), range(3, 6), range(3, 6)] and told == [(3, 6), (3, 3)]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:-3] + b"???", lambda b: b""])
def test_a_damaged_file_of_hashes_is_made_anew(shard, damage):
    first = hash_all(shard)
    place = hash_places(str(shard))[0]
    place.write_bytes(damage(content := place.read_bytes()))
    np.testing.assert_array_equal(hash_all(shard).values, first.values)
    assert place.read_bytes() == content


@pytest.mark.parametrize("reason", [-2, 100])
def test_a_reason_that_does_not_exist_is_not_believed(shard, reason):
    first = hash_all(shard)
    (part,) = hash_store.shards_of(SourceSpec(source=str(shard)).open())
    hash_store._write(part, PictureHashes(first.values + np.uint64(1), np.full(5, reason, np.int8)))
    np.testing.assert_array_equal(hash_all(shard).values, first.values)


def test_hashes_of_another_formula_are_not_used(shard, monkeypatch):
    hash_all(shard)
    monkeypatch.setattr(hash_store, "HASH_FORMAT", "other")
    monkeypatch.setattr(hash_store, "hash_rows", lambda source, rows: hashes_of(*[7] * len(rows)))
    assert hash_all(shard).values.tolist() == [7] * 5


def test_worker_processes_give_the_same(shard):
    spec = SourceSpec(source=str(shard))
    source = spec.open()
    hasher = Hasher(spec)
    try:
        found = hasher.hash(source, range(1, 5))
        assert hasher._process is not None and hasher._process.poll() is None
    finally:
        hasher.close()
    expected = hash_rows(source, range(1, 5))
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.reasons, expected.reasons)


def test_a_dead_worker_is_replaced_by_this_process(shard):
    spec = SourceSpec(source=str(shard))
    hasher = Hasher(spec)
    hasher.hash(spec.open(), range(1))
    assert hasher._process is not None
    hasher._process.kill()
    hasher._process.wait()
    assert len(hasher.hash(spec.open(), range(5)).values) == 5
    hasher.close()


def test_arrays_are_hashed_each_time():
    source = ArraySource([picture(i) for i in range(3)], ["a"] * 3)
    found = hash_source(SourceSpec(source="unused"), source, num_workers=1, progress=lambda done, total: None)
    assert found.values.tolist() == [hash_picture(picture(i)) for i in range(3)]
