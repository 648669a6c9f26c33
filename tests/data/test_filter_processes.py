"""Processes and machines that judge one source: each shard once, whoever is killed or fails, and the same bitmap."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest

from clipjax.config import Config, DataConfig, ModelConfig, ViTConfig
from clipjax.data import filter_results, filter_workers, shard_results
from clipjax.data.filters import FilteredSource
from clipjax.data.index_store import FOLDER
from clipjax.data.kept_samples import kept_place
from clipjax.data.key_lists import KeyList
from clipjax.data.sample import UnreadableData
from clipjax.data.shard_results import judge_shard, make_filters
from clipjax.data.sources import build_source, build_training_source
from clipjax.data.training_order import OrderFormat, make_order
from clipjax.data.training_stream import TrainStream
from clipjax.data.webdataset import TarSource
from clipjax.runtime.consistency import run_on_all
from tests.cli.test_data_show import png
from tests.data.test_filters import FILTERS, OLD, add, expected_keys, keys, rows, write_tar
from tests.runtime.test_consistency import run_processes

pytestmark = pytest.mark.process

PROGRAM = """
import os, sys, time
from clipjax.config import DataConfig
from clipjax.data import kept_samples, shard_results
from clipjax.data.sources import build_training_source
log = open(sys.argv[1], "a", buffering=1)
judge, publish = shard_results._judge, kept_samples._publish

def judged(described, path, *rest):
    log.write(f"{path} {os.getpid()}\\n")
    if sys.argv[3] == "hold":
        os.write(1, b"holds a shard\\n")  # of several threads
        sys.stdin.readline()
    if sys.argv[3] == "fail":
        raise OSError(5, "Input/output error")
    time.sleep(0.02)
    return judge(described, path, *rest)

def published(*arguments):
    if sys.argv[3] == "hold the bitmap":
        kept_samples.make_folder(arguments[0].parent)
        with kept_samples.locked(f"{arguments[0]}.lock", may_wait=True):
            open(f"{arguments[0]}.tmp", "wb").write(b"half")
            print("holds the bitmap", flush=True)
            sys.stdin.readline()
    publish(*arguments)

shard_results._judge, kept_samples._publish = judged, published
print("ready", flush=True)
sys.stdin.readline()
source = build_training_source(DataConfig(train=sys.argv[2], filters=tuple(sys.argv[4:])))
print(*[source[i].key for i in range(len(source))])
"""


def start(log: pathlib.Path, spec: str, mode: str = "") -> "subprocess.Popen[str]":
    words = (sys.executable, "-c", PROGRAM, str(log), spec, mode, *FILTERS)
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "clipjax" / "index"


@pytest.fixture
def spec(tmp_path) -> str:
    for number in range(20):
        write_tar(tmp_path / f"{number:02d}.tar", rows(number * 3, 3))
    found = f"{tmp_path}/*.tar"
    build_source(found, data=DataConfig())  # its shards have indexes
    return found


def judged(log: pathlib.Path) -> list[str]:
    return sorted(line.split()[0] for line in log.read_text().splitlines())


def paths(spec: str) -> list[str]:
    return [spec.replace("*", f"{number:02d}") for number in range(20)]


def test_processes_that_start_together_judge_each_shard_once_and_share_one_bitmap(tmp_path, spec, cache):
    log = tmp_path / "log"
    processes = [start(log, spec) for _ in range(3)]
    for each in processes:
        go(each)
    for each in processes:
        output, error = each.communicate(timeout=60)
        assert output.split() == expected_keys() and not error
    assert judged(log) == paths(spec)
    assert len({line.split()[1] for line in log.read_text().splitlines()}) > 1  # they share the work
    assert [each.suffix for each in cache.iterdir()] == [".bitmap"]
    assert {each.suffix for each in (tmp_path / FOLDER).iterdir()} == {".idx", ".kept"}


@pytest.mark.parametrize("holding", ["hold", "hold the bitmap"])
def test_a_process_that_is_killed_keeps_nobody_waiting(tmp_path, spec, cache, holding):
    """It ends while it holds a lock, with a file half written."""
    log = tmp_path / "log"
    process, other = start(log, spec, holding), start(log, spec)
    go(process)
    assert said(process) == ("holds a shard" if holding == "hold" else "holds the bitmap")
    go(other)
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(2)  # it has judged all else
    process.kill()
    process.communicate()
    output, error = other.communicate(timeout=60)
    assert output.split() == expected_keys() and not error
    assert sorted(set(judged(log))) == paths(spec)
    assert [each.suffix for each in cache.iterdir()] == [".bitmap"]


def test_a_run_that_was_killed_midway_judges_only_what_is_missing(tmp_path, spec, monkeypatch):
    data = DataConfig(train=spec, filters=FILTERS)
    source, filters = build_source(spec, data=data), make_filters(data)
    for number, path in enumerate(paths(spec)[:12]):
        judge_shard(source, number, path, 3, filters)  # type: ignore[arg-type]
    done: list[str] = []
    judge = shard_results._judge
    monkeypatch.setattr(shard_results, "_judge", lambda *each: done.append(each[1]) or judge(*each))
    assert keys(build_training_source(data)) == expected_keys() and sorted(done) == paths(spec)[12:]


def test_a_process_that_fails_leaves_its_shards_to_the_others(tmp_path, spec):
    """It tells of the shard; the launcher's barrier (`run_on_all`) tells the others."""
    log = tmp_path / "log"
    failing, other = start(log, spec, "fail"), start(log, spec)
    go(failing)
    output, error = failing.communicate(timeout=60)
    assert failing.returncode == 1 and not output and "UnreadableData: shard " in error and "Input/output" in error
    go(other)
    assert other.communicate(timeout=60)[0].split() == expected_keys()


class Failing(TarSource):
    """The source of a process whose disk gives nothing."""

    failed = threading.Event()

    def metadata(self, shard, columns):
        self.failed.set()
        raise OSError(5, "Input/output error")


class Waiting(TarSource):
    """The source of a process that is slower."""

    def metadata(self, shard, columns):
        assert Failing.failed.wait(30)
        return super().metadata(shard, columns)


def test_a_process_that_fails_ends_the_others_of_its_run(spec, monkeypatch):
    data = DataConfig(train=spec, filters=FILTERS)

    def open_data(kind: type[TarSource]):
        source = kind(paths(spec), max_caption_bytes=1000, max_image_pixels=10**6)
        return filter_results.filter_source(source, data, spec), {"data": {}}

    works = [functools.partial(run_on_all, "it", functools.partial(open_data, kind)) for kind in (Waiting, Failing)]
    outcomes = run_processes(monkeypatch, works)
    assert [type(each) for each in outcomes] == [ValueError] * 2 and str(outcomes[0]) == str(outcomes[1])
    assert str(outcomes[0]).startswith("process 1 (") and "cannot be read for its filters: [Errno 5]" in str(
        outcomes[0]
    )
    assert keys(build_training_source(data)) == expected_keys()


def test_a_list_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "keys"
    path.write_text("a\nb\n")
    listed = KeyList("data.keep_keys", str(path))
    path.write_text("a\nc\n")
    with pytest.raises(ValueError, match="^data.keep_keys=.*keys has changed while it was read; start again"):
        listed.load()


def test_waiting_threads_take_other_shards_first(tmp_path, spec, monkeypatch):
    data = DataConfig(train=spec, filters=FILTERS)
    path = paths(spec)[7]
    [place, _] = shard_results.result_places(path, make_filters(data))
    done: list[str] = []
    judge = shard_results._judge
    all_else = threading.Event()

    def note(*each):
        done.append(each[1])
        if len(done) == 19:
            all_else.set()
        return judge(*each)

    monkeypatch.setattr(shard_results, "_judge", note)
    found: list = []
    with shard_results.locked(f"{place}.lock", may_wait=False):
        thread = threading.Thread(target=lambda: found.append(build_training_source(data)))
        thread.start()
        assert all_else.wait(30) and path not in done
    thread.join(30)
    assert keys(found[0]) == expected_keys() and done[-1] == path and sorted(done) == paths(spec)


def test_a_result_that_is_there_waits_for_no_other_place(spec, monkeypatch):
    """The disk of the shards is full, and another process holds the name in the cache folder."""
    data = DataConfig(train=spec, filters=FILTERS)
    source, filters, path = build_source(spec, data=data), make_filters(data), paths(spec)[3]
    [_, cached] = shard_results.result_places(path, filters)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_results, "write_atomic", refuse)
    cached.parent.mkdir(parents=True)
    with shard_results.locked(f"{cached}.lock", may_wait=False):
        found = judge_shard(source, 3, path, 3, filters, may_wait=False)  # type: ignore[arg-type]
    assert found is not None and found.shard.kept == sum(9 <= int(key) < 12 for key in expected_keys())


def test_judging_processes_answer_where_nothing_can_be_written(tmp_path, spec, cache, monkeypatch, caplog):
    for each in (tmp_path / FOLDER).iterdir():
        each.unlink()
    (tmp_path / FOLDER).rmdir()
    (tmp_path / FOLDER).write_text("no folder")
    cache.parent.parent.rmdir()
    cache.parent.parent.write_text("no folder")
    monkeypatch.setattr(filter_results, "_SECONDS_TO_START", 0.0)
    monkeypatch.setattr(filter_results, "num_cores", lambda: 2)
    monkeypatch.setattr(shard_results, "_judge", None)  # nothing is left for this process
    assert keys(build_training_source(DataConfig(train=spec, filters=FILTERS))) == expected_keys()
    assert "cannot be written to" in caplog.text


@pytest.mark.parametrize("answer", [{}, {"error": "x"}, {"result": ""}, {"result": "AAAA"}], ids=str)
def test_an_answer_that_is_none_leaves_the_shard_to_this_process(spec, monkeypatch, answer):
    monkeypatch.setattr(filter_results, "_SECONDS_TO_START", 0.0)
    monkeypatch.setattr(filter_workers.Judge, "judge", lambda self, path, **_: answer)
    assert keys(build_training_source(DataConfig(train=spec, filters=FILTERS))) == expected_keys()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_give_the_batches_of_a_list_in_memory(tmp_path, cache, num_workers):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row in rows():
            add(tar, f"{row['key']}.png", png(8))
            add(tar, f"{row['key']}.txt", row["key"].encode())
            add(tar, f"{row['key']}.json", json.dumps(row).encode())
    os.utime(tmp_path / "a.tar", (OLD, OLD))
    data = DataConfig(train=str(tmp_path / "a.tar"), filters=FILTERS, num_workers=num_workers, num_threads=1)
    source = build_training_source(data)
    assert isinstance(source, FilteredSource) and len(list(cache.glob("*.bitmap"))) == 1
    config = Config(global_batch_size=4, model=ModelConfig(image=ViTConfig(image_size=8)), data=data)
    stream = TrainStream(source, tokenize=tokenize, config=config)
    try:
        found = [[f"{token:04d}" for token in next(stream)["tokens"][:, 0]] for _ in range(9)]
    finally:
        stream.close()
    order = make_order((len(source),), config, OrderFormat())
    assert found == [[expected_keys()[int(i)] for i in order.placed(number)[:, 0]] for number in range(9)]


def tokenize(text: str) -> np.ndarray:
    return np.array([int(text)], np.int32)


def test_a_shard_that_is_written_anew_meanwhile_is_told_and_nothing_is_kept(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("filepath,caption,width\n" + "a.jpg,text,300\n" * 10)
    os.utime(path, (OLD, OLD))
    (tmp_path / "a.jpg").write_bytes(b"x")
    data = DataConfig(train=str(path), filters=("width>200",))
    source = build_source(data.train, data=data)
    judge = shard_results.judge_shard

    def late(*arguments, **options):
        os.utime(path, (OLD + 5, OLD + 5))
        return judge(*arguments, **options)

    monkeypatch.setattr(filter_results, "judge_shard", late)
    with pytest.raises(UnreadableData, match="a.csv cannot be read for its filters: another program has written it"):
        filter_results.filter_source(source, data, data.train)
    assert not list(cache.glob(kept_place(pathlib.Path(), "*").name))
