"""A run whose store loses a shard: it stops, or skips what is lost, and each later start decides the same."""

import json
import os
import shutil
import signal

import pytest

from clipjax.runtime import objects
from tests.faults.test_bucket import finish_two, start_two
from tests.faults.tiny_run import TinyRun, differences, ended, losses, read_lines, wait_until, write_pairs
from tests.runtime.stores import BUCKET

pytestmark = [pytest.mark.process, pytest.mark.slow]

LOST = "GET .*unreadable(/|%2F)pairs-2.tar"
SKIP = (
    "--config.data.on_unreadable=skip",
    "--config.data.max_bad_fraction=0.5",
    "--config.checkpoint.keep_last=20",
)


@pytest.fixture
def run(tmp_path, gcs, monkeypatch):
    """The tiny run on four shards in a store, which has their index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = TinyRun(tmp_path)
    run.write()
    for number in range(4):
        path = tmp_path / "data" / f"{number}.tar"
        write_pairs(path, first=100 * number)
        objects.write_bytes(f"gs://{BUCKET}/unreadable/pairs-{number}.tar", path.read_bytes())
    pairs, config = f"gs://{BUCKET}/unreadable/pairs-*.tar", tmp_path / "config.py"
    config.write_text(config.read_text().replace(f"train={str(run.shard)!r}", f"train={pairs!r}"))
    run.finish("well", "--config.total_examples=80")
    return run


def unreadable(run: TinyRun, name: str) -> int:
    """Return how many samples the metrics count as unreadable."""
    lines = [line for line in losses(run.workdir(name)) if "samples_skipped" in line]
    return lines[-1]["samples_skipped"]["unreadable"]


def stand_ins(run: TinyRun, name: str) -> list[dict]:
    return read_lines(run.workdir(name) / "decisions.jsonl")


def restart_from(run: TinyRun, name: str, new: str, step: int) -> None:
    """Make a workdir that has the decisions of a run, and of its checkpoints an early one."""
    shutil.copytree(run.workdir(name), run.workdir(new), ignore=shutil.ignore_patterns(".owner"))
    for path in (run.workdir(new) / "checkpoints").iterdir():
        if path.name != str(step):
            shutil.rmtree(path)


def test_a_run_stops_unless_it_is_told_to_skip(run, gcs):
    fault = gcs.plant(LOST, status=404, times=10**6)
    process = run.start("stops")
    with ended(process):
        assert process.wait(120) == 3, run.output("stops")
    output = run.output("stops")
    assert "pairs-2.tar cannot be read as it was opened: there is no object" in output and "Traceback" not in output
    assert fault.hits and not stand_ins(run, "stops")


def test_more_than_the_configured_share_stops(run, gcs):
    gcs.plant(LOST, status=404, times=10**6)
    process = run.start("too-many", SKIP[0])
    with ended(process):
        assert process.wait(120) == 3, run.output("too-many")
    output = run.output("too-many")
    assert "data.max_bad_fraction=0.05" in output and "unreadable in shard gs://bucket/unreadable/pairs-2.tar" in output
    assert "closed file" not in output


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_and_one_on_a_well_store_with_its_decisions_are_the_same(run, gcs, num_workers):
    workers = f"--config.data.num_workers={num_workers}"
    gcs.plant(LOST, status=404, times=10**6)
    process = run.start("killed", *SKIP, workers)
    with ended(process):
        assert wait_until(lambda: run.logged_step("killed") >= 90, seconds=120, process=process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = stand_ins(run, "killed")
    assert len(kept) == 1 and len(kept[0]["places"]) > 50 and "Traceback" not in run.output("killed")
    assert not any(128 <= sample < 192 for sample in kept[0]["samples"])
    gcs.reset()
    run.finish("killed", workers, *SKIP[1:])  # the store is well again, and the field back at `stop`
    assert "gs://bucket/unreadable/pairs-2.tar cannot be read" in run.output("killed").replace("\n", " ")
    assert stand_ins(run, "killed") == kept

    restart_from(run, "killed", "again", 20)
    run.finish("again", SKIP[1])
    assert not differences(run, "killed", "again") and run.first_steps("again") == [20]
    last = 200 * 8
    assert unreadable(run, "again") == sum(place < last for place in kept[0]["places"]) > 50
    told = [line for line in read_lines(run.workdir("killed") / "events.jsonl") if line["event"] == "stand_ins"]
    assert told[0]["total"] < told[-1]["total"] <= len(kept[0]["places"]) < 2 * told[-1]["total"]
    assert kept[0]["places"][0] < 20 * 8 - 1  # some of them in the steps before, which were not computed again
    copies = run.workdir("again") / "checkpoints" / "200" / "data" / "metadata"
    assert json.loads(copies.read_text())["decisions"] == kept


def test_two_processes_decide_for_each_other(run, gcs):
    options = ("--config.total_examples=480", "--config.mesh.fsdp=2", "--config.eval.every_examples=480")
    gcs.plant(LOST, status=404, times=10**6)
    finish_two(start_two(lambda _, *words: run.start("both", *words), *options, *SKIP))
    kept = stand_ins(run, "both")
    halves = {place % 8 // 4 for place in kept[0]["places"]}
    assert halves == {0, 1}, run.output("both")
    output = run.output("both")
    assert all(f"storage does not give process {rank}" in output for rank in (0, 1)) and "Traceback" not in output
    gcs.reset()
    restart_from(run, "both", "both-again", 20)
    finish_two(start_two(lambda _, *words: run.start("both-again", *words), *options, SKIP[1]))
    assert losses(run.workdir("both")) == losses(run.workdir("both-again"))
    assert unreadable(run, "both") > 20


def test_a_rollback_leaves_no_process_without_an_answer(run, gcs):
    """One process goes back while the other may still be asking; what stood in before stands in again."""
    poison = ("-m", "tests.faults.poison", "nan", "30,31,32")
    options = ("--config.total_examples=480", "--config.mesh.fsdp=2", "--config.recovery.max_skipped_in_a_row=3")
    gcs.plant(LOST, status=404, times=10**6)
    finish_two(start_two(lambda _, *words: run.start("back", *words, prefix=poison), *options, *SKIP))
    kinds = [line["decision"] for line in stand_ins(run, "back")]
    assert kinds == ["stand_ins", "rollback", "stand_ins"], run.output("back")
    places = [place for line in stand_ins(run, "back") for place in line.get("places", ())]
    assert len(places) == len(set(places)) and "Traceback" not in run.output("back")


def test_stand_ins_of_a_start_that_saved_nothing_are_forgotten(run, gcs):
    gcs.plant(LOST, status=404, times=10**6)
    process = run.start("young", *SKIP)
    with ended(process):
        assert wait_until(lambda: run.logged_step("young") >= 3, seconds=120, process=process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if (run.workdir("young") / "checkpoints" / "20").exists():
        pytest.skip("the machine is so fast that a checkpoint was saved before the kill")
    assert stand_ins(run, "young")
    gcs.reset()
    run.finish("young", "--config.total_examples=160", "--config.global_batch_size=16")
    assert "stand-ins are forgotten: the start that took them saved nothing" in run.output("young")
    assert not stand_ins(run, "young") and unreadable(run, "young") == 0
