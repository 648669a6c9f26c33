"""Packing to object stores: the shards and the manifest of a disk, whole or not listed, whatever happens meanwhile."""

import errno
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable

import numpy as np
import pytest

from clipjax.cli.main import main
from clipjax.config import DataConfig
from clipjax.data import packing
from clipjax.data.digests import digest_files
from clipjax.data.pack_manifest import MANIFEST, PackedShard
from clipjax.data.packing import pack
from clipjax.data.sources import build_source
from clipjax.runtime import objects
from tests.commands import exit_code
from tests.data.test_filters import add, rows, write_tar
from tests.data.test_packing import contents, write_archive
from tests.runtime.stores import BUCKET, StoreServer
from tests.runtime.test_file_cache import wait_for

KINDS = {"gs": "gcs", "s3": "s3"}
PER_SHARD = 13
OPTIONS = {"data": DataConfig(), "samples_per_shard": PER_SHARD}
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def staging(tmp_path, monkeypatch):
    """The folder of temporary files, which is empty again after each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CLIPJAX_STAGING", str(tmp_path / "staging"))
    yield tmp_path / "staging"
    assert not (tmp_path / "staging").exists() or not list((tmp_path / "staging").iterdir())
    assert not list(tmp_path.glob("[gs][s3]:*"))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def server(kind, request) -> StoreServer:
    return request.getfixturevalue(KINDS[kind])


@pytest.fixture
def place(kind, server) -> str:
    return f"{kind}://{BUCKET}/packed-{next(_numbers)}"


@pytest.fixture
def spec(tmp_path) -> str:
    return write_tar(tmp_path / "a.tar", rows())


def on_store(place: str) -> dict[str, bytes]:
    return {path: objects.read_bytes(objects.join(place, path), 2**26) for path in objects.list_folder(place)}


def assert_listed_are_whole(place: str) -> list[PackedShard]:
    """Check what the manifest lists, by all its bytes; return it."""
    try:
        lines = objects.read_bytes(objects.join(place, MANIFEST), 2**20).splitlines()
    except FileNotFoundError:
        return []
    shards = [PackedShard(**json.loads(line)) for line in lines[1:]]
    found = digest_files([objects.join(place, shard.shard) for shard in shards])
    assert [(each.digest, each.size) for each in found] == [(shard.digest, shard.bytes) for shard in shards]
    return shards


@pytest.mark.parametrize("form", ["tar", "array_record"])
def test_a_store_gets_what_a_disk_gets(tmp_path, place, spec, form):
    shards, old = pack(spec, place, form=form, **OPTIONS)
    here, _ = pack(spec, tmp_path / "here", form=form, **OPTIONS)
    assert shards == here and old == 0 and on_store(place) == contents(tmp_path / "here")
    again, old = pack(spec, place, form=form, **OPTIONS)
    assert again == shards and old == len(shards) == 5
    if form == "array_record":  # their library reads them from a disk alone
        found = build_source(f"{tmp_path}/here/*.array_record", data=DataConfig())
    else:
        found = build_source(f"{place}/*.tar", data=DataConfig())
    expected = build_source(spec, data=DataConfig())
    assert [found[i] for i in range(len(found))] == [expected[i] for i in range(len(expected))]
    # The indexes that reading has left beside the shards are no obstacle.
    assert pack(spec, place, form=form, **OPTIONS)[1] == 5


def test_compressed_tars_of_a_store_are_packed_on_another(tmp_path, gcs, s3):
    archive = write_archive(tmp_path / "a.tar.gz", pathlib.Path(write_tar(tmp_path / "a.tar", rows())))
    source, place = f"s3://{BUCKET}/archive-{next(_numbers)}.tar.gz", f"gs://{BUCKET}/packed-{next(_numbers)}"
    objects.write_file(source, pathlib.Path(archive))
    assert main(["data", "pack", source, f"--output={place}/", f"--samples_per_shard={PER_SHARD}"]) == 0
    pack(str(archive), tmp_path / "here", **OPTIONS)
    found = on_store(place)
    assert {name: content for name, content in found.items() if name != MANIFEST} == {
        name: content for name, content in contents(tmp_path / "here").items() if name != MANIFEST
    }


def large_tar(path: pathlib.Path) -> str:
    """Write a tar whose shards of `PER_SHARD` samples are sent in parts."""
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(30):
            add(tar, f"{number:04d}.jpg", b"\xff\xd8" + draw.bytes(900_000))
            add(tar, f"{number:04d}.txt", b"text")
    return str(path)


SMALL = [
    ("PUT .*/manifest.jsonl", 0, "before"),
    ("PUT .*/manifest.jsonl", 0, "after"),
    ("PUT .*/00000", 0, "before"),
    ("PUT .*/00000", 0, "after"),
    ("PUT .*/manifest.jsonl", 2, "before"),
    ("PUT .*/manifest.jsonl", 2, "after"),
    ("PUT .*/00004", 0, "after"),
]
"""Requests of a start at which the process is killed: pattern, how many of them pass, and the moment."""

LARGE = [
    ("POST .*/00000.tar.*uploads", 0, "after"),
    ("PUT .*/00000.tar.*partNumber=2", 0, "before"),
    ("POST .*/00001.tar.*uploadId", 0, "before"),
    ("POST .*/00001.tar.*uploadId", 0, "after"),
]


@pytest.mark.process
@pytest.mark.parametrize(("form", "kills"), [("tar", SMALL), ("array_record", SMALL[3:5]), ("large", LARGE)])
def test_killed_at_any_request_the_same_command_goes_on(tmp_path, server, place, form, kills):
    kills = kills[::2] if place.startswith("s3") and kills is SMALL else kills  # each takes seconds
    spec = large_tar(tmp_path / "a.tar") if form == "large" else write_tar(tmp_path / "a.tar", rows())
    form = "tar" if form == "large" else form
    arguments = ["data", "pack", spec, f"--output={place}", f"--samples_per_shard={PER_SHARD}", f"--format={form}"]
    listed = 0
    for pattern, passing, moment in kills:
        process = start(arguments)

        def kill(process=process, moment=moment):
            process.send_signal(signal.SIGKILL)
            process.wait()
            if moment == "before":
                raise ConnectionError  # else the request would arrive, and at any time

        if passing:
            server.plant(pattern, times=passing)
        fault = server.plant(pattern, times=1, **{moment: kill})
        output = process.communicate(timeout=120)[0]
        assert process.returncode == -signal.SIGKILL and fault.hits == 1, output
        server.reset()
        now = len(assert_listed_are_whole(place))
        assert now >= listed
        listed = now
    process = start(arguments)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and f"({listed:,} were there)" in output, output
    pack(spec, tmp_path / "here", form=form, **OPTIONS)
    assert 0 < listed < len(assert_listed_are_whole(place)) and on_store(place) == contents(tmp_path / "here")


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "clipjax", *arguments],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_store_that_is_busy_for_a_while_is_not_noticed(tmp_path, server, place, spec):
    planted = [
        server.plant(f"PUT .*/{name}", times=2, status=503) for name in ("00001.tar", "00003.tar", "manifest.jsonl")
    ]
    pack(spec, place, **OPTIONS)
    pack(spec, tmp_path / "here", **OPTIONS)
    assert [fault.hits for fault in planted] == [2] * 3 and on_store(place) == contents(tmp_path / "here")


def test_a_lost_answer_is_no_other_process(tmp_path, server, place, spec):
    def lose():
        raise ConnectionError

    server.plant("PUT .*/manifest.jsonl", times=2)
    fault = server.plant("PUT .*/manifest.jsonl", times=1, after=lose)
    shards, _ = pack(spec, place, **OPTIONS)
    assert fault.hits == 1 and len(shards) == len(assert_listed_are_whole(place)) == 5


@pytest.mark.parametrize("at", ["00002.tar", "manifest.jsonl"])
def test_a_store_that_stays_away_ends_with_a_sentence(tmp_path, server, place, spec, at, impatient, capsys):
    arguments = ["data", "pack", spec, f"--output={place}", f"--samples_per_shard={PER_SHARD}"]
    if at == MANIFEST:
        server.plant(f"PUT .*/{at}", times=3)
    server.plant(f"PUT .*/{at}", status=503)
    assert exit_code(main, arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipjax data: error: --output={place}: the server answers 503 Service Unavailable, after")
    assert line.endswith("2 shards are finished and stay: the same command goes on from there")
    assert len(assert_listed_are_whole(place)) == 2
    server.reset()
    assert exit_code(main, arguments) == 0 and "5 shards (2 were there), 60 samples" in capsys.readouterr().out
    pack(spec, tmp_path / "here", **OPTIONS)
    assert on_store(place) == contents(tmp_path / "here")


def test_a_store_that_takes_nothing_is_refused_before_the_source_is_opened(tmp_path, server, place, capsys):
    server.plant("^PUT", status=403)
    for spec in (str(tmp_path / "none.tar"), f"{place}-none/*.tar"):
        assert exit_code(main, ["data", "pack", spec, f"--output={place}"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"--output={place}: the store refuses access (403 Forbidden) with the credentials it got;" in line
    assert not server.count("packed-[0-9]*-none") and not on_store(place)


def test_no_store_and_no_bucket(monkeypatch, spec, kind, server, impatient, capsys):
    assert exit_code(main, ["data", "pack", spec, f"--output={kind}://none-such/x"]) == 2
    assert "there is no bucket none-such" in capsys.readouterr().err
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert exit_code(main, ["data", "pack", spec, f"--output={kind}://{BUCKET}/x"]) == 2
    assert "the store cannot be reached, after retries" in capsys.readouterr().err


def test_other_places_and_sources_are_refused(tmp_path, place, spec):
    for name, shown in (("thesis.txt", "thesis.txt"), ("00000.tar", "00000.tar"), ("checkpoints/20/x", "checkpoints")):
        folder = f"{place}/{shown}-is-here"
        objects.write_bytes(f"{folder}/{name}", b"x")
        with pytest.raises(ValueError, match=rf"--output={folder} holds '{shown}', which is of something else; name"):
            pack(spec, folder, **OPTIONS)
        assert on_store(folder) == {name: b"x"}
    objects.write_bytes(f"{place}/a.tar", pathlib.Path(spec).read_bytes())
    with pytest.raises(ValueError, match=r"a\.tar is an object; name a folder"):
        pack(spec, f"{place}/a.tar", **OPTIONS)
    pack(f"{place}/a.tar", f"{place}/out", **OPTIONS)
    before = on_store(f"{place}/out")
    for changed in ({"samples_per_shard": 7}, {"form": "array_record"}):
        with pytest.raises(ValueError, match="holds shards of another source, another --format or --samples_per_shard"):
            pack(spec, f"{place}/out", **(OPTIONS | changed))
    with pytest.raises(ValueError, match=r"holds .*out/0000\d\.tar of the source .*; write into another folder"):
        pack(f"{place}/out/*.tar", f"{place}/out", **OPTIONS)
    found = on_store(f"{place}/out")
    assert {name: content for name, content in found.items() if "clipjax-index" not in name} == before


def test_a_shard_that_is_gone_or_cut_is_packed_again(tmp_path, place, spec):
    pack(spec, place, **OPTIONS)
    whole = on_store(place)
    manifest = whole[MANIFEST]
    for name, change, left in (
        ("00003.tar", None, 3),
        ("00001.tar", b"cut", 1),
        (MANIFEST, manifest[:-9] + b"}]\n\xff", 4),
        (MANIFEST, manifest.replace(b'"read": 13', b'"read": "13"'), 0),
        (MANIFEST, manifest.replace(b'"00002.tar"', b'"00002.tar/../../x"'), 2),
    ):
        if change is None:
            objects.delete(f"{place}/{name}")
        else:
            objects.write_bytes(f"{place}/{name}", change)
        objects.write_bytes(f"{place}/.write-probe-{'0' * 16}", b"")  # as a kill leaves it
        _, old = pack(spec, place, **OPTIONS)
        assert old == left and on_store(place) == whole


def test_at_most_two_shards_lie_on_the_disk(tmp_path, place, server, spec, staging):
    seen = []

    def look():
        time.sleep(0.2)  # the next shard is being written meanwhile
        seen.append({path.name.removeprefix(".partial-") for path in staging.rglob("*.tar")})

    server.plant("PUT .*/0000", before=look)
    shards, _ = pack(spec, place, data=DataConfig(), samples_per_shard=6)
    assert len(shards) == len(seen) == 10 and max(map(len, seen)) == 2 and all(map(len, seen))


def test_a_full_disk_for_temporary_files(tmp_path, place, spec, staging, monkeypatch):
    write, left = packing.write_tar, [3]

    def stop(path: pathlib.Path, found) -> None:
        if not left[0]:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        write(path, found)

    monkeypatch.setattr(packing, "write_tar", stop)
    with pytest.raises(
        ValueError, match=rf"--output={place}: a shard is written in {staging} before it is sent"
    ) as told:
        pack(spec, place, **OPTIONS)
    assert "free some space, or set CLIPJAX_STAGING to another folder" in str(told.value)
    assert not list(staging.iterdir()) and len(assert_listed_are_whole(place)) == 3  # the one on its way has arrived
    monkeypatch.setattr(packing, "write_tar", write)
    assert pack(spec, place, **OPTIONS)[1] == 3


def test_another_machine_that_packs_there_is_noticed(tmp_path, place, server, spec, monkeypatch):
    def meanwhile():
        monkeypatch.setenv("CLIPJAX_STAGING", str(tmp_path / "other-machine"))
        pack(spec, place, **OPTIONS)

    server.plant("PUT .*/manifest.jsonl", times=2)
    fault = server.plant("PUT .*/00002.tar", times=1, before=meanwhile)
    with pytest.raises(
        ValueError, match=rf"--output={place}: another process has written its manifest.jsonl meanwhile"
    ):
        pack(spec, place, **OPTIONS)
    assert fault.hits == 1 and len(assert_listed_are_whole(place)) == 5
    assert pack(spec, place, **OPTIONS)[1] == 5


@pytest.mark.process
def test_an_interrupt_lets_the_shard_on_its_way_arrive(tmp_path, place, server, spec):
    def interrupt():
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)

    server.plant("PUT .*/00002.tar", times=1, before=interrupt)
    process = start(["data", "pack", spec, f"--output={place}", f"--samples_per_shard={PER_SHARD}"])
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, told
    assert told == "clipjax data: stopped; finished shards stay, the same command goes on from here\n"
    assert len(assert_listed_are_whole(place)) == 3
    assert pack(spec, place, **OPTIONS)[1] == 3


@pytest.mark.process
def test_a_second_process_of_this_machine_is_refused(tmp_path, place, server, spec):
    arguments = ["data", "pack", spec, f"--output={place}", f"--samples_per_shard={PER_SHARD}"]
    begun: list[Callable] = []
    fault = server.plant("PUT .*/00002.tar", times=1, before=lambda: wait_for(lambda: begun, 60))
    process = start(arguments)
    wait_for(lambda: fault.hits, 60)
    with pytest.raises(ValueError, match=rf"--output={place}: another process on this machine writes there; wait"):
        pack(spec, place, **OPTIONS)
    begun.append(print)
    assert process.communicate(timeout=60)[0].startswith(f"{place}: 5 shards, 60 samples") and process.returncode == 0
