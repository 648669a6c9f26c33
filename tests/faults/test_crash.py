"""A part of `make chaos`: kills, signals and dead workers at random moments; the end is that of the undisturbed run."""

import pathlib

import pytest

from tests.faults.crash import UNDISTURBED, crash_run, draw_kills
from tests.faults.kill_points import POINTS
from tests.faults.signals import kill_workers_run, stop_run
from tests.faults.storage import BrokenStorage, storage_run
from tests.faults.tiny_run import TinyRun, differences, ended

pytestmark = pytest.mark.process
WORKERS = ("--config.data.num_workers=2",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The files of the run, and its undisturbed end."""
    run = TinyRun(pathlib.Path(tmp_path_factory.mktemp("chaos")))
    run.write()
    run.finish(UNDISTURBED)
    return run


def test_kills(run):
    outcome = crash_run(run, "killed", seed=1, count=10, every_other=WORKERS)
    assert not outcome.wrong
    # A run whose steps take a millisecond is beyond the step of a kill when that comes, and may end before the last.
    assert len(outcome.kills) >= 6


@pytest.mark.slow  # e2e stops runs, too
def test_signals(run):
    outcome = stop_run(run, "stopped", seed=1, count=2, options=WORKERS)
    assert not outcome.wrong
    assert outcome.kills and not any(outcome.lost_steps)


@pytest.mark.slow  # tests/data kills workers, too
def test_workers_that_are_killed(run):
    outcome = kill_workers_run(run, "workers-killed", seed=1, count=2, options=WORKERS)
    assert not outcome.wrong
    assert outcome.kills


@pytest.mark.skipif(not BrokenStorage.is_possible(), reason="no C compiler is here, which faults of storage need")
@pytest.mark.parametrize(
    "hang", ["fsync hangs", *(pytest.param(each, marks=pytest.mark.slow) for each in ("writes hang", "a rename hangs"))]
)
def test_storage_that_never_answers_a_save_does_not_keep_the_process(run, hang):
    name = hang.replace(" ", "-")
    storage = BrokenStorage(run.workdir(name) / "checkpoints", run.folder)
    storage.start(hang)  # each save after the first waits two seconds for that one, and after ten of silence it failed
    process = run.start(name, "--config.recovery.max_failed_saves=1", environment=storage.environment())
    with ended(process):
        try:
            assert process.wait(120) == 3, run.output(name)
        finally:
            storage.end()
    assert "1 saves in a row have failed" in run.output(name) and "Traceback" not in run.output(name)
    run.finish(name)
    assert not differences(run, name, UNDISTURBED)


@pytest.mark.skipif(not BrokenStorage.is_possible(), reason="no C compiler is here, which faults of storage need")
def test_a_disk_that_is_full_for_a_while(run):
    outcome = storage_run(run, "full", seed=3, faults=("disk full",))
    assert not outcome.wrong
    assert outcome.kills and "not saved: No space left on device" in run.output("full")


def test_moments_are_drawn_inside_and_outside_of_saves():
    import random

    kills = draw_kills(random.Random(0), 300)
    assert {point for point, _ in kills} == {*POINTS, "step", "start"}
    assert sum(point in POINTS for point, _ in kills) >= 100
