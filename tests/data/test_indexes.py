"""Index files: as good as the shard itself, whatever becomes of them, and built once by many processes."""

import io
import json
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest

from clipjax.cli import data_index
from clipjax.cli.data import main
from clipjax.data import index_file, index_store, indexes, webdataset
from clipjax.data.index_file import pack
from clipjax.data.index_table import IndexTable
from clipjax.data.sample import UnreadableData
from clipjax.data.tar_index import index_shard
from clipjax.runtime.storage import open_file
from tests.data.test_webdataset import entry, good, open_source, outcome, outcomes, pair, set_time, write

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def frozen_shards() -> dict[str, tuple[list[tuple], int, int | None]]:
    """Members, format and length of shards whose digests were taken before there were index files."""
    rng = random.Random(7)
    data = {f"{i:04d}": (rng.randbytes(rng.randrange(1, 3000)), f"caption {i}".encode()) for i in range(40)}
    plain = [
        member
        for key, (image, text) in data.items()
        for member in ((f"{key}.jpg", image), (f"{key}.txt", text), (f"{key}.json", b'{"label": 3}'))
    ]
    folder = "d" * 120
    long = [
        member
        for key, (image, text) in data.items()
        for member in ((f"{folder}/{key}.jpg", image), (f"{folder}/{key}.txt", text))
    ]
    apart = sorted(plain, key=lambda member: not member[0].endswith("jpg"))
    odd = [
        ("README.md", b"x"),
        *plain[:30],
        ("0003.npy", b"n" * 100),
        ("0009.jpg", b"again"),
        ("only.txt", b"t"),
        ("n.cls", b"3"),
        ("n.webp", b"w"),
        *plain[30:60],
    ]
    return {
        "plain": (plain, tarfile.USTAR_FORMAT, None),
        "long-gnu": (long, tarfile.GNU_FORMAT, None),
        "long-pax": (long, tarfile.PAX_FORMAT, None),
        "mtimes": ([(*member, 1.5) for member in plain], tarfile.PAX_FORMAT, None),
        "apart": (apart, tarfile.USTAR_FORMAT, None),
        "odd": (odd, tarfile.GNU_FORMAT, None),
        "cut": (plain, tarfile.USTAR_FORMAT, 20_000),
        "cut-header": (plain, tarfile.USTAR_FORMAT, 4096 + 100),
    }


FROZEN = {
    "plain": ("0d27c2d13f935d26efa3cd40f1979fce", 40),
    "long-gnu": ("42b731f6eb2f77a27df0301888d685ef", 40),
    "long-pax": ("42b731f6eb2f77a27df0301888d685ef", 40),
    "mtimes": ("0d27c2d13f935d26efa3cd40f1979fce", 40),
    "apart": ("0d27c2d13f935d26efa3cd40f1979fce", 40),
    "odd": ("af75fa2662543089e135e52f9f6c0765", 22),
    "cut": ("092b71f9a84fb94e8604920b1c0f72ec", 5),
    "cut-header": ("3a0ebbf151de57fb5649b2e23192ae61", 1),
}
"""Digest and number of samples, by the code of revision 677053c."""


@pytest.mark.parametrize("name", FROZEN)
def test_digests_are_those_of_runs_that_go_on(tmp_path, name):
    members, tar_format, length = frozen_shards()[name]
    path = tmp_path / "s.tar"
    write(path, [entry(name, content, mtime=(*mtime, 0)[0]) for name, content, *mtime in members], tar_format)
    if length is not None:
        os.truncate(path, length)
    for _ in range(2):  # built, and found
        source = open_source(path, max_image_pixels=25_000_000)
        for each in (source, pickle.loads(pickle.dumps(source))):
            (digest,) = each.digests()
            assert (digest.digest, digest.size) == FROZEN[name]


def test_a_digest_counts_contents_up_to_the_limit_of_an_image(tmp_path):
    """As before: a source with another limit has its own digest where a member is above one of them."""
    large = [entry("k.jpg", bytes(2**20 + 5000)), entry("k.txt", b"x")]
    write(tmp_path / "a.tar", [*pair("a"), *large])
    (small,) = open_source(tmp_path / "a.tar", max_image_pixels=1000).digests()
    (wide,) = open_source(tmp_path / "a.tar", max_image_pixels=2000).digests()
    assert small.digest != wide.digest
    write(tmp_path / "b.tar", [*pair("a"), *large])
    (first,) = open_source(tmp_path / "b.tar", max_image_pixels=2000).digests()
    assert first.digest == wide.digest
    assert open_source(tmp_path / "b.tar", max_image_pixels=1000).digests()[0].digest == small.digest
    same = [open_source(tmp_path / "a.tar", max_image_pixels=pixels).digests() for pixels in (10_000, 2000)]
    assert same[0] == same[1]


def random_members(rng: random.Random) -> list:
    """Members of samples, most of them together, and whatever else may lie in a tar."""
    members, keys = [], []
    for i in range(rng.randint(1, 6)):
        stem = rng.choice(("", "./", "d/", "long" * 40 + "/")) + rng.choice((f"k{i}", f"p.{i}", "\u00e9" + str(i)))
        keys.append(stem)
        kinds = rng.sample(("jpg", "txt", "json", "cls", "png", "gif", "npy", "seg.png", "JPG"), rng.randint(1, 5))
        for kind in kinds:
            content = {"txt": b"about", "json": b'{"caption": "c", "label": 3}', "cls": b"7"}.get(kind, b"i")
            large = rng.choice((1, 1, 1, 600, 70_000)) if kind not in ("json", "cls", "txt") else 1
            mtime = rng.choice((0, 1.5))
            members.append(entry(f"{stem}.{kind}", content * large, mtime=mtime))
        if rng.random() < 0.2:
            members.append(entry(f"folder{i}", kind=tarfile.DIRTYPE))
        if rng.random() < 0.1:
            members.append(entry(f"{stem}.txt", kind=tarfile.LNKTYPE, linkname=f"{keys[0]}.txt"))
    for _ in range(rng.choice((0, 0, 0, 1, 3))):  # apart, twice
        members.insert(rng.randrange(len(members) + 1), rng.choice(members))
    return members


def full_table(path: pathlib.Path):
    """The source whose index is a table of all members, read as sources were before."""
    file = open_file(str(path))
    index = index_shard(file, str(path))
    object.__setattr__(index, "is_compact", False)
    content = pack(index, file, name=path.name, limit=10**9)
    source = open_source(path)
    source._places = [content]
    assert not IndexTable(content).header.is_compact
    return source


def check_reads(path: pathlib.Path, lengths) -> int:
    """Compare all ways to read a tar, whole and cut off; return for how many lengths its samples lie together."""
    whole, compact = path.read_bytes(), 0
    for length in (len(whole), *lengths):
        path.write_bytes(whole[:length])
        set_time(path)
        try:
            source = open_source(path)
        except ValueError as error:
            assert "no sample in" in str(error) or length < 512
            continue
        table, count = full_table(path), len(source)
        expected = [(outcome(table, i), table.location(i)) for i in range(count)]
        assert [(outcome(source, i), source.location(i)) for i in range(count)] == expected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(webdataset, "quick_sample", lambda block: None)
            assert [outcome(source, i) for i in range(count)] == [each for each, _ in expected]
            patch.setattr(webdataset.Limits, "sample", 0)
            assert [outcome(source, i) for i in range(count)] == [each for each, _ in expected]
        compact += source._shard(0)._table.header.is_compact
    return compact


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_one_read_gives_what_a_table_of_all_members_gives(tmp_path, first):
    """On random tars, whole and cut off: samples, reasons and keys; by the quick way, the other one, and by headers."""
    compact = 0
    for seed in range(first, first + 15):
        rng, path = random.Random(seed), tmp_path / f"{seed}.tar"
        with tarfile.open(path, "w", format=rng.choice(FORMATS[1:])) as tar:
            for member, content in random_members(rng):
                tar.addfile(member, io.BytesIO(content))
        size = path.stat().st_size
        compact += check_reads(path, [rng.randrange(600, size) for _ in range(4)])
    assert 15 < compact < 75  # of 75, both kinds are there


def test_one_read_gives_the_same_wherever_a_tar_is_cut(tmp_path):
    write(tmp_path / "s.tar", [*pair("a"), *pair("b.1"), entry("long" * 40 + ".jpg", b"x")], tarfile.GNU_FORMAT)
    assert check_reads(tmp_path / "s.tar", [*range(0, 6144, 61), *range(509, 6144, 512)]) > 100


def test_most_shards_take_four_bytes_a_sample(tmp_path):
    path = tmp_path / "s.tar"
    for count, tar_format in ((1000, tarfile.USTAR_FORMAT), (2000, tarfile.PAX_FORMAT)):
        members = [member for i in range(count) for member in pair(f"{i:06d}")]
        write(path, members, tar_format)
        content = pathlib.Path(index_store.index_places(str(path))[0]).read_bytes()
        assert len(content) < 600 + 4 * count


def test_large_members_that_are_not_used_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "s.tar"
    members = [member for i in range(3) for member in (*pair(f"{i}"), entry(f"{i}.npy", bytes(300_000)))]
    source, sizes = write(path, members), []
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: sizes.append(args[1]) or read(*args))
    assert outcomes(source) == {f"{i}": good(f"{i}") for i in range(3)}
    assert sum(sizes) < 20_000


def index_of(path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(index_store.index_places(str(path))[0])


@pytest.mark.parametrize("layout", ["together", "apart"])
def test_an_index_that_is_damaged_anywhere_is_made_anew(tmp_path, layout, caplog):
    path = tmp_path / "s.tar"
    members = [*pair("a"), *pair("b"), entry("c.txt", b"x"), *pair("b")]
    write(path, members if layout == "together" else members[::-1])
    expected = list(outcomes(open_source(path)).items())
    place = index_of(path)
    content = place.read_bytes()
    assert IndexTable(content).header.is_compact is False or layout == "together"
    damages = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(0, len(content), 3)]
    damages += [content[:i] for i in (0, 10, 64, 100, len(content) - 1)] + [content + b"x", b"clipjaxI" * 100]
    for damaged in damages:
        caplog.clear()
        place.write_bytes(damaged)
        source = open_source(path)
        assert list(outcomes(source).items()) == expected
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 1 and str(path) in told[0]
        assert place.read_bytes() == content
    caplog.clear()
    assert list(outcomes(open_source(path)).items()) == expected and not caplog.records
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["index", str(path)]) == 0  # looks at the places, too
    assert IndexTable(place.read_bytes()).header.count == len(expected)


def test_a_shard_that_changed_is_indexed_again_and_told(tmp_path, caplog):
    paths = [tmp_path / f"{name}.tar" for name in "ab"]
    for path in paths:
        write(path, pair(path.stem))
    assert len(open_source(*paths)) == 2 and not caplog.records
    with tarfile.open(paths[1], "w") as tar:
        for member, content in (*pair("b"), *pair("c")):
            tar.addfile(member, io.BytesIO(content))
    source = open_source(*paths)
    assert outcomes(source) == {key: good(key) for key in "abc"}
    (record,) = caplog.records
    assert record.getMessage() == (
        f"1 of 2 shards have changed since they were indexed and are indexed again, the first: {paths[1]}"
    )
    os.utime(paths[0], (1, 1))  # another time alone may mean another content, too
    assert len(open_source(*paths)) == 3 and len(caplog.records) == 2


def test_a_shard_that_was_just_written_is_indexed_again(tmp_path, monkeypatch, caplog):
    """A write within a tick of the clock leaves size and time as they are."""
    monkeypatch.setattr(index_store, "_CLOCK_TICK_NS", 10**12)
    path, now = tmp_path / "s.tar", time.time_ns()
    for key in ("a", "b"):
        with tarfile.open(path, "w") as tar:
            for member, content in pair(key):
                tar.addfile(member, io.BytesIO(content))
        os.utime(path, ns=(now, now))
        source = pickle.loads(pickle.dumps(open_source(path)))
        assert outcomes(source) == {key: good(key)} and not caplog.records
    monkeypatch.setattr(index_store, "_CLOCK_TICK_NS", 0)
    open_source(path)
    index = index_of(path).stat()
    assert outcomes(open_source(path)) == {"b": good("b")} and index_of(path).stat().st_ino == index.st_ino


def test_an_index_of_another_content_is_not_used_by_a_run_that_began_before(tmp_path):
    path = tmp_path / "s.tar"
    source = write(path, [*pair("a"), *pair("b")])
    state = path.stat()
    write(path, [*pair("x"), *pair("y")])  # and its index
    path.write_bytes(path.read_bytes())
    with pytest.raises(UnreadableData, match="another program has written it anew"):
        source[0]
    write(path, [*pair("a"), *pair("b")])
    index = index_of(path).read_bytes()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert index_of(path).read_bytes() == index  # of another time
    assert outcomes(source) == {"a": good("a"), "b": good("b")}


def make_readonly(folder: pathlib.Path, how: str) -> None:
    """Make a folder that takes no index, also for root."""
    if how == "mode":
        folder.chmod(0o555)
    elif how == "file":
        (folder / ".clipjax-index").write_text("no folder")
    else:
        (folder / ".clipjax-index").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("how", ["mode", "file", "link"])
def test_where_nothing_can_be_written_the_index_lies_in_the_cache(tmp_path, monkeypatch, how, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        with tarfile.open(folder / "s.tar", "w") as tar:
            for member, content in pair(folder.name):
                tar.addfile(member, io.BytesIO(content))
        make_readonly(folder, how)
    (tmp_path / "elsewhere").mkdir()
    for _ in range(2):
        sources = [open_source(folder / "s.tar") for folder in folders]
        assert [outcomes(source) for source in sources] == [{"one": good("one")}, {"two": good("two")}]
    cache = tmp_path / "cache" / "clipjax" / "index"
    assert len(list(cache.iterdir())) == 2 and cache.stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "elsewhere").iterdir())
    assert main(["index", f"{tmp_path}/*/s.tar"]) == 0
    assert capsys.readouterr().out.endswith(f"the indexes lie in {cache}\n")
    # Where the cache cannot be written either, a run does without, and its workers too; the command refuses.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = pickle.loads(pickle.dumps(open_source(folders[0] / "s.tar")))
    assert outcomes(source) == {"one": good("one")}
    with pytest.raises(SystemExit) as left:
        main(["index", f"--source={folders[0]}/s.tar"])
    assert left.value.code == 2 and "make one writable, or set XDG_CACHE_HOME" in capsys.readouterr().err
    folders[0].chmod(0o755)
    folders[1].chmod(0o755)


def test_a_full_disk_costs_no_run(tmp_path, monkeypatch):
    def write_atomic(path: pathlib.Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_store, "write_atomic", write_atomic)
    assert outcomes(write(tmp_path / "s.tar", pair("a"))) == {"a": good("a")}


def test_a_source_travels_with_paths_and_counts_alone(tmp_path):
    paths = [tmp_path / f"{i}.tar" for i in range(3)]
    sizes = []
    for count in (1, 400):
        for path in paths:
            write(path, [member for i in range(count) for member in pair(f"{i:03d}")])
        sizes.append(len(pickle.dumps(open_source(*paths))))
    assert sizes[1] <= sizes[0] + 12


@pytest.mark.parametrize("deleted", [False, True])
def test_a_worker_builds_an_index_that_went_away_or_broke(tmp_path, deleted, caplog):
    path = tmp_path / "s.tar"
    source = pickle.loads(pickle.dumps(write(path, [*pair("a"), *pair("b")])))
    place = index_of(path)
    place.unlink() if deleted else place.write_bytes(b"")
    assert outcomes(source) == {"a": good("a"), "b": good("b")}
    assert caplog.text.count("is made anew") == 1 and place.stat().st_size


def test_counts_of_img2dataset_are_compared(tmp_path, caplog):
    for i, successes in enumerate((1, 3, "x", None)):
        (tmp_path / f"{i:05d}_stats.json").write_text(json.dumps({"count": 9, "successes": successes}))
        write(tmp_path / f"{i:05d}.tar", pair("a"))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert f"{tmp_path}/00001.tar holds 1 samples, not 3; their download may" in told[0]


class Remote:
    """An object of a store: no path, and every read is counted."""

    reads: list[int]

    def __init__(self, content: bytes):
        self.content, self.size, self.version, self.reads = content, len(content), "etag", []

    def read(self, offset: int, size: int) -> bytes:
        self.reads.append(size)
        return self.content[offset : offset + size]


def test_remote_shards_are_read_in_large_parts_and_indexed_in_the_cache(tmp_path, monkeypatch):
    write(tmp_path / "s.tar", [member for i in range(200) for member in pair(f"{i:03d}")])
    remote = Remote((tmp_path / "s.tar").read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (index_store, webdataset):
        monkeypatch.setattr(module, "open_file", lambda place, listed=None: remote)
    address = "gs://bucket/folder/s.tar"
    source = webdataset.TarSource([address], max_caption_bytes=1000, max_image_pixels=1000)
    headers = [size for size in remote.reads if size >= 2**20]
    assert len(headers) == 1 and len(remote.reads) == 1 + 2 * 16  # and the contents of the digest
    remote.reads.clear()
    assert source[7] == good("007") and len(remote.reads) == 1
    assert source.location(7) == f"shard {address}, key 007"
    again = webdataset.TarSource([address], max_caption_bytes=1000, max_image_pixels=1000)
    assert again.digests() == source.digests() and len(remote.reads) == 2
    assert [path.suffix for path in (tmp_path / "cache" / "clipjax" / "index").iterdir()] == [".idx"]


PROGRAM = """
import sys
from clipjax.data import index_store, indexes
log = open(sys.argv[1], "a", buffering=1)
index = index_store.index_shard
def counted(file, path):
    log.write(path + chr(10))
    if log.name == "/dev/null":
        print("holds the lock", flush=True)
        sys.stdin.readline()
    return index(file, path)
index_store.index_shard = counted
print("ready", flush=True)
sys.stdin.readline()
for entry in indexes.open_indexes(sys.argv[2:], limit=10**6, num_workers=1):
    print(entry.header.name, entry.header.count)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    program = (sys.executable, "-c", PROGRAM, *arguments)
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.process
def test_processes_that_start_together_share_the_work(tmp_path):
    paths = [str(tmp_path / f"{i:02d}.tar") for i in range(30)]
    members = [member for i in range(100) for member in pair(f"{i}")]
    for path in paths:
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                tar.addfile(member, io.BytesIO(content))
    log = tmp_path / "log"
    processes = [start(str(log), *paths) for _ in range(3)]
    for each in processes:
        go(each)
    for each in processes:
        output, _ = each.communicate(timeout=60)
        assert output.split() == [word for i in range(30) for word in (f"{i:02d}.tar", "100")]
    assert sorted(log.read_text().split()) == paths  # each once
    left = {path.suffix for path in (tmp_path / ".clipjax-index").iterdir()}
    assert left == {".idx"}


@pytest.mark.process
def test_a_builder_that_is_killed_keeps_nobody_waiting(tmp_path):
    """It ends while it holds the lock and has written half of the index."""
    path = tmp_path / "s.tar"
    write(path, pair("a"))
    place = index_of(path)
    place.unlink()
    process = start("/dev/null", str(path))
    go(process)
    assert process.stdout is not None and process.stdout.readline() == "holds the lock\n"
    assert index_store.build(str(path), limit=1, may_wait=False) is None
    found: list = []
    waiting = threading.Thread(target=lambda: found.append(index_store.build(str(path), limit=1)))
    waiting.start()
    pathlib.Path(f"{place}.tmp").write_bytes(b"half")
    assert not found
    process.kill()
    process.communicate()
    waiting.join(60)
    assert found and found[0].header.count == 1
    assert [each.name for each in place.parent.iterdir()] == [place.name]


@pytest.mark.process
def test_several_processes_build_for_one_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(indexes, "_SECONDS_TO_START", 0.0)
    for i in range(6):
        write(tmp_path / f"{i}.tar", pair(f"{i}"))
        index_of(tmp_path / f"{i}.tar").unlink()
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(index_store, "index_shard", lambda *_: pytest.fail("this process leaves it to others"))
    paths = [str(tmp_path / f"{i}.tar") for i in range(6)]
    found = indexes.open_indexes(paths, limit=10**6, num_workers=2, progress=lambda *counts: seen.append(counts))
    assert [entry.header.name for entry in found] == [f"{i}.tar" for i in range(6)]
    assert seen == [(i, 6, i) for i in range(1, 7)]
    monkeypatch.undo()
    (tmp_path / "3.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(SystemExit) as left:
        main(["index", f"{tmp_path}/*.tar", "--num_workers=2"])
    assert left.value.code == 2 and "3.tar is not a tar file" in capsys.readouterr().err


def test_the_command_tells_what_it_did_and_does_nothing_twice(tmp_path, capsys):
    for name in "ab":
        write(tmp_path / f"{name}.tar", [*pair(name), *pair(name * 2)])
    index_of(tmp_path / "a.tar").unlink()
    assert main(["index", f"{tmp_path}/?.tar"]) == 0
    first = capsys.readouterr().out
    assert "2 shards (1 new), 4 samples, " in first and first.count("\n") == 1
    assert first.endswith(f"samples/s; the indexes lie in {tmp_path}/.clipjax-index\n")
    assert main(["index", "--source", f"{tmp_path}/?.tar"]) == 0
    assert "2 shards (none new), 4 samples, " in capsys.readouterr().out


def test_the_command_can_be_interrupted(tmp_path, capsys, monkeypatch):
    for name in "abc":
        write(tmp_path / f"{name}.tar", pair(name))
        index_of(tmp_path / f"{name}.tar").unlink()

    def interrupt(line, built: int, missing: int, samples: int) -> None:
        line.built = built
        if built == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_index.ShardProgress, "update", interrupt)
        assert main(["index", f"{tmp_path}/?.tar"]) == 130
    assert "stopped after 2 shards; the same command goes on from here" in capsys.readouterr().err
    assert main(["index", f"{tmp_path}/?.tar"]) == 0
    assert "3 shards (1 new), 3 samples" in capsys.readouterr().out


def test_the_command_shows_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_index, "_PLAIN_SECONDS", 0.0)
    for name in "ab":
        write(tmp_path / f"{name}.tar", pair(name))
        index_of(tmp_path / f"{name}.tar").unlink()
    assert main(["index", f"{tmp_path}/?.tar"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line[:16] for line in lines] == ["shard 1/2   50% ", "shard 2/2  100% "]
    assert all("pairs/s" in line and "left 0:00" in line for line in lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--source is missing"),
        (["a", "b"], "argument 'b' is not understood"),
        (["a", "--source=b"], "--source is given twice"),
        (["tfds:scenes/train"], "is prepared TFDS data, which has an index"),
        (["none-*.tar"], "match no file"),
        (["a", "--num_workers=0"], "--num_workers=0 must be a whole number of at least 1"),
        (["a", "--tfds_dir=x"], "unknown option --tfds_dir"),
    ],
)
def test_the_command_refuses(argv, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["index", *argv])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_an_index_of_others_is_not_believed(tmp_path):
    """One whose digests are right and whose places are not: it is made anew, and nothing is read outside the shard."""
    path = tmp_path / "s.tar"
    for members in ([*pair("a"), *pair("b")], [*pair("a")[:1], *pair("b"), *pair("a")[1:]]):
        write(path, members)
        expected, content = outcomes(open_source(path)), index_of(path).read_bytes()
        table = IndexTable(content)
        body = content[table._first :]
        for at in range(0, len(body) - 3, 4):
            for value in (0, 1, 2**31, 2**32 - 1):
                forged = body[:at] + np.uint32(value).tobytes() + body[at + 4 :]
                index_of(path).write_bytes(forge(content, forged))
                source = open_source(path)
                try:
                    found = outcomes(source)
                except UnreadableData:
                    continue
                assert table.header.is_compact is False or found.keys() <= {"a", "b"} or found == expected
        index_of(path).write_bytes(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3),
        ("name", "other.tar"),
        ("size", -1),
        ("size", 2**70),
        ("count", 1),
        ("count", "2"),
        ("count", 10**9),
        ("num_faults", 3),
        ("key_bytes", 10**9),
        ("is_compact", 1),
        ("digest", "\x1b[2J"),
        ("digest", None),
        ("unused", []),
        ("unused", {"a": {"count": "x", "lost": 0, "example": ""}}),
        ("unused", {"a": 3}),
        ("damage", ["x"]),
        ("more", 1),
    ],
)
def test_a_header_of_others_is_not_believed(tmp_path, field, value, caplog):
    path = tmp_path / "s.tar"
    write(path, [*pair("a"), *pair("b")])
    content = index_of(path).read_bytes()
    fixed = list(index_file.FIXED.unpack_from(content))
    text = json.loads(content[index_file.FIXED.size :][: fixed[2]]) | {field: value}
    forged = json.dumps(text).encode()
    fixed[2] = len(forged)
    fixed[4] = index_file.digest_of(struct.pack("<IIQ", *fixed[1:4]) + forged)
    body = content[len(content) - fixed[3] :]
    index_of(path).write_bytes(index_file.FIXED.pack(*fixed) + forged + body)
    assert outcomes(open_source(path)) == {"a": good("a"), "b": good("b")}
    assert len(caplog.records) == 1 and index_of(path).read_bytes() == content


def forge(content: bytes, body: bytes) -> bytes:
    """An index file with another body and the digest of that."""
    fixed = list(index_file.FIXED.unpack_from(content))
    fixed[5] = index_file.digest_of(body)
    return index_file.FIXED.pack(*fixed) + content[index_file.FIXED.size : len(content) - len(body)] + body
