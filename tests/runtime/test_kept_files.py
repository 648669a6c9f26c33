"""Copies that a library opens: made once a machine, resumed, verified, and there as long as they are used."""

import errno
import logging
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from clipjax.runtime import connections, copy_folder, kept_files, objects
from clipjax.runtime.copy_folder import Copy
from clipjax.runtime.file_cache import CachedFile, FileCache
from clipjax.runtime.kept_files import KeptFiles, Wanted, keep_files
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import open_file
from tests.runtime.stores import BUCKET
from tests.waiting import wait_for

PART = 4096
CONTENTS = {f"{i}.bin": bytes([i + 1]) * (5 * PART + 100 + i) for i in range(3)}
SIZE = sum(map(len, CONTENTS.values()))
SCRIPT = f"""
import sys
from clipjax.runtime import copy_folder, kept_files
copy_folder.PART_BYTES, kept_files._THREADS = {PART}, 1
from tests.runtime.test_kept_files import wanted_at
kept = kept_files.keep_files(kept_files.FileCache(sys.argv[1], {10 * SIZE}), wanted_at(sys.argv[2]), "SPEC")
print("kept", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["gs", "s3"])
def store(request, monkeypatch):
    """A server with the objects, and their folder."""
    server = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    place = f"{request.param}://{BUCKET}/kept"
    write(place)
    server.requests.clear()
    monkeypatch.setattr(copy_folder, "PART_BYTES", PART)
    return server, place


def write(place: str, **contents: bytes) -> None:
    for name, content in (CONTENTS | {f"{name}.bin": content for name, content in contents.items()}).items():
        objects.write_bytes(f"{place}/{name}", content)


def wanted_at(place: str, names=tuple(CONTENTS)) -> dict[str, Wanted]:
    files = {name: open_file(f"{place}/{name}") for name in names}
    return {f"a/{name}": Wanted(f"{place}/{name}", Listed(file.size, file.version)) for name, file in files.items()}


def keep(folder: pathlib.Path, place: str, size: int = 10 * SIZE, names=tuple(CONTENTS)) -> KeptFiles:
    return keep_files(FileCache(str(folder), size), wanted_at(place, names), "SPEC")


def contents(kept: KeptFiles) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (kept.folder / "a").iterdir()}


def endings(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    return sorted(folder.glob(f"*.{kind}"))


def reads(server) -> int:
    return sum(request.startswith("GET") for request in server.requests)


@pytest.fixture
def start():
    """A function that starts a process which copies; it ends with the test."""
    processes: list[subprocess.Popen] = []

    def start_one(folder: pathlib.Path, place: str) -> subprocess.Popen:
        root = str(pathlib.Path(__file__).resolve().parents[2])
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root},
        )
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


def be_patient(server, monkeypatch) -> None:
    """End an outage, and the time limits of the fixture `impatient`."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 60.0)
    connections._open_store.cache_clear()
    server.reset()


def test_all_files_are_there_and_the_next_start_asks_for_versions_only(tmp_path, store):
    server, place = store
    kept = keep(tmp_path / "new" / "cache", place)
    assert contents(kept) == CONTENTS and kept.path("a/1.bin") == f"{kept.folder}/a/1.bin"
    assert reads(server) == 3 * 6
    assert not endings(kept.folder.parent, "part") and len(endings(kept.folder.parent, "copy")) == 3
    del kept
    server.requests.clear()
    assert contents(keep(tmp_path / "new" / "cache", place)) == CONTENTS
    assert reads(server) == 0 and len(server.requests) == 3


def test_a_copy_that_has_changed_on_the_disk_is_made_anew(tmp_path, store):
    server, place = store
    damaged = pathlib.Path(keep(tmp_path, place).path("a/2.bin")).resolve()
    damaged.write_bytes(b"X" + damaged.read_bytes()[1:])
    server.requests.clear()
    assert contents(keep(tmp_path, place)) == CONTENTS
    assert reads(server) == 6


def test_a_link_that_leads_elsewhere_is_made_anew(tmp_path, store):
    kept = keep(tmp_path / "cache", store[1])
    for number, name in enumerate(CONTENTS):
        link = pathlib.Path(kept.path(f"a/{name}"))
        link.unlink()
        (link.write_bytes, link.symlink_to)[number % 2]((b"other", "/etc/passwd")[number % 2])
    (kept.folder / "a" / "index").mkdir()
    del kept
    kept = keep(tmp_path / "cache", store[1])
    assert {name: pathlib.Path(kept.path(f"a/{name}")).read_bytes() for name in CONTENTS} == CONTENTS
    assert (kept.folder / "a" / "index").is_dir()


def test_who_comes_while_copies_are_in_use_reads_none_of_them(tmp_path, store, monkeypatch):
    kept = keep(tmp_path, store[1])

    def fail(*_):
        raise AssertionError("it is verified once more")

    monkeypatch.setattr(copy_folder, "digest_of", fail)
    assert contents(keep(tmp_path, store[1])) == CONTENTS
    pathlib.Path(kept.path("a/0.bin")).resolve().unlink()
    with pytest.raises(ValueError, match="copies of source 'SPEC' have been deleted while another process"):
        keep(tmp_path, store[1])


def test_an_outage_that_passes_costs_nothing(tmp_path, store):
    server, place = store
    server.plant("GET .*/kept/", status=503, times=3)
    assert contents(keep(tmp_path, place)) == CONTENTS


def test_after_an_outage_the_next_start_goes_on(tmp_path, store, impatient, monkeypatch):
    server, place = store
    monkeypatch.setattr(kept_files, "_THREADS", 1)
    wanted = wanted_at(place)
    fault = server.plant("GET .*/kept/1", times=2)
    server.plant("GET .*/kept/1", status=503)
    with pytest.raises(ValueError, match=r"1\.bin cannot be copied to data\.cache_dir=.* 503 .*the same command goes"):
        keep_files(FileCache(str(tmp_path), 10 * SIZE), wanted, "SPEC")
    assert fault.hits == 2 and endings(tmp_path, "part") and endings(tmp_path, "copy")
    be_patient(server, monkeypatch)
    assert contents(keep(tmp_path, place)) == CONTENTS
    assert server.count("GET .*/kept/0") == 0 and server.count("GET .*/kept/1") == 4
    assert reads(server) <= 4 + 6 and not endings(tmp_path, "part")


def test_half_a_copy_that_is_not_what_was_written_is_made_anew(tmp_path, store, impatient, monkeypatch):
    server, place = store
    monkeypatch.setattr(kept_files, "_THREADS", 1)
    server.plant("GET .*/kept/0", times=3)
    server.plant("GET .*/kept/0", status=503)
    with pytest.raises(ValueError, match="cannot be copied"):
        keep(tmp_path, place)
    listed = wanted_at(place)["a/0.bin"].listed
    part = Copy(tmp_path, f"{place}/0.bin", listed.version, listed.size).path("part")
    with part.open("r+b") as file:
        file.write(b"other")
    be_patient(server, monkeypatch)
    assert contents(keep(tmp_path, place)) == CONTENTS
    assert server.count("GET .*/kept/0") == 6


def test_a_process_that_is_killed_midway_loses_what_was_on_its_way_only(tmp_path, store, start):
    server, place = store
    server.plant("GET .*/kept/0", times=6)
    server.plant("GET .*/kept/1", times=2)
    stuck = server.plant("GET .*/kept/1", delay=3.0, times=1)
    process = start(tmp_path, place)
    wait_for(lambda: stuck.hits)
    process.kill()
    process.wait()
    assert len(endings(tmp_path, "copy")) == 1 and len(endings(tmp_path, "part")) == 2
    server.reset()
    assert contents(keep(tmp_path, place)) == CONTENTS
    assert reads(server) == 4 + 6 and not endings(tmp_path, "part")


def test_a_person_who_stops_it_leaves_what_was_copied(tmp_path, store, start):
    server, place = store
    stuck = server.plant("GET .*/kept/1", delay=0.5)
    process = start(tmp_path, place)
    wait_for(lambda: stuck.hits > 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    assert len(endings(tmp_path, "copy")) == 1 and len(endings(tmp_path, "part")) == 1  # 2.bin had not been begun


def test_one_process_of_a_machine_copies_and_the_others_wait(tmp_path, store, start):
    server, place = store
    server.plant("GET .*/kept/", delay=0.05)
    processes = [start(tmp_path, place) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["kept\n"] * 3
    assert reads(server) == 3 * 6


def test_who_waits_takes_over_from_a_process_that_is_killed(tmp_path, store, start):
    server, place = store
    stuck = server.plant("GET .*/kept/1", delay=2.0, times=1)
    first = start(tmp_path, place)
    wait_for(lambda: stuck.hits)
    second = start(tmp_path, place)
    wait_for(lambda: server.count("HEAD .*/kept/2") == 2)
    first.kill()
    first.wait()
    assert second.stdout.readline() == "kept\n"
    assert reads(server) == 3 * 6 + 1  # the part that was on its way


def test_an_object_that_changes_while_it_is_copied_is_told(tmp_path, store):
    _, place = store
    wanted = wanted_at(place)
    objects.write_bytes(f"{place}/1.bin", b"another")
    with pytest.raises(ValueError, match=r"1\.bin cannot .*: another program has written the object anew since this"):
        keep_files(FileCache(str(tmp_path), 10 * SIZE), wanted, "SPEC")
    names = {path.stem for kind in ("part", "copy") for path in endings(tmp_path, kind)}
    listed = wanted["a/1.bin"].listed
    assert Copy(tmp_path, f"{place}/1.bin", listed.version, listed.size).name not in names
    assert contents(keep(tmp_path, place)) == CONTENTS | {"1.bin": b"another"}


def test_an_object_that_has_changed_since_the_last_start_is_told_and_copied(tmp_path, store, caplog):
    server, place = store
    keep(tmp_path, place)
    write(place, **{"1": b"another"})
    server.requests.clear()
    with caplog.at_level(logging.WARNING):
        kept = keep(tmp_path, place)
    assert f"{place}/1.bin has changed since it was copied" in caplog.text
    assert store[1].startswith("gs") or "copying 1 files of SPEC" in caplog.text  # versions are times in this gs
    assert contents(kept) == CONTENTS | {"1.bin": b"another"}


def test_a_cache_that_is_too_small_is_refused_before_anything_is_copied(tmp_path, store):
    server, place = store
    with pytest.raises(ValueError, match=r"data\.cache_gib=\S+ is too small: all files of source 'SPEC', .* GiB, have"):
        keep(tmp_path, place, SIZE - 1)
    assert reads(server) == 0 and not endings(tmp_path, "part")
    assert contents(keep(tmp_path, place, SIZE)) == CONTENTS


def test_copies_in_use_make_no_room_and_others_do(tmp_path, store):
    _, place = store
    first = keep(tmp_path, place, names=["0.bin", "1.bin"])
    with pytest.raises(ValueError, match=r"besides \S+ GiB that other sources and runs use; set at least"):
        keep(tmp_path, place, SIZE - 1, ["2.bin"])
    assert contents(first) == {name: CONTENTS[name] for name in ("0.bin", "1.bin")}
    tree = first.folder
    del first
    second = keep(tmp_path, place, SIZE - 1, ["2.bin"])
    assert contents(second) == {"2.bin": CONTENTS["2.bin"]} and len(endings(tmp_path, "copy")) == 2
    assert not tree.exists() and second.folder.exists()  # one of its copies has made room


def test_a_shard_that_is_copied_as_it_is_read_takes_nothing_from_copies_in_use(tmp_path, store):
    _, place = store
    kept = keep(tmp_path, place, names=["0.bin", "1.bin"])
    for path in endings(tmp_path, "lock"):
        os.utime(path, (1, 1))
    file = FileCache(str(tmp_path), SIZE - 1).open(f"{place}/2.bin")
    assert isinstance(file, CachedFile) and file.read(0, 5) == CONTENTS["2.bin"][:5]
    wait_for(lambda: file.gives_up)
    assert len(contents(kept)) == 2


def test_copies_of_shards_make_room_for_those_that_are_needed(tmp_path, store):
    _, place = store
    file = FileCache(str(tmp_path), 10 * SIZE).open(f"{place}/2.bin")
    assert isinstance(file, CachedFile) and file.read(0, 5)
    wait_for(lambda: file._copy is not None)
    names = ["0.bin", "1.bin"]
    kept = keep(tmp_path, place, SIZE - 1, names)
    assert sorted(contents(kept)) == names and len(endings(tmp_path, "copy")) == 2
    assert file.read(0, 9999) == CONTENTS["2.bin"][:9999]


def test_an_object_of_two_sources_is_copied_once(tmp_path, store):
    server, place = store
    both = [keep(tmp_path, place, names=names) for names in (["0.bin", "1.bin"], ["1.bin", "2.bin"])]
    assert [sorted(contents(each)) for each in both] == [["0.bin", "1.bin"], ["1.bin", "2.bin"]]
    assert reads(server) == 3 * 6


def test_a_disk_without_room_is_refused(tmp_path, store, monkeypatch):
    server, place = store
    usage = type("Usage", (), {"free": SIZE - 1})
    monkeypatch.setattr(kept_files.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"its disk has \S+ GiB free, and the copies of source 'SPEC' take"):
        keep(tmp_path, place)
    assert reads(server) == 0 and not endings(tmp_path, "part")


def test_a_disk_that_fills_up_is_told(tmp_path, store, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(copy_folder, "write_atomic", fail)
    with pytest.raises(ValueError, match="No space left on device; make room on the disk"):
        keep(tmp_path, store[1])
    assert not endings(tmp_path, "part")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, store):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*cache: cannot be written to"):
        keep(tmp_path / "cache", store[1])
