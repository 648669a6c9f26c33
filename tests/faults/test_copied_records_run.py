"""A run that moves between ArrayRecord files on a disk and in a bucket, killed in its steps and while it copies."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from clipjax.config import DataConfig
from clipjax.data.array_records import write_array_records
from clipjax.data.sources import build_source
from clipjax.runtime import objects
from tests.faults.crash import UNDISTURBED
from tests.faults.tiny_run import ROOT, TinyRun, complete_steps, differences, ended, wait_until
from tests.runtime.stores import BUCKET

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.newest]

NUM_FILES = 4


class RecordsRun(TinyRun):
    """The tiny run on ArrayRecord files."""

    @property
    def place(self) -> str:
        return f"gs://{BUCKET}/{self.folder.name}"

    def write(self) -> None:
        super().write()
        pairs = build_source(str(self.shard), data=DataConfig())
        per_file = len(pairs) // NUM_FILES
        for number in range(NUM_FILES):
            path = self.folder / "data" / f"{number}.array_record"
            write_array_records(path, (pairs[i] for i in range(number * per_file, (number + 1) * per_file)))
            objects.write_bytes(f"{self.place}/{path.name}", path.read_bytes())
        config = self.folder / "config.py"
        config.write_text(config.read_text().replace(str(self.shard), f"{self.folder}/data/*.array_record"))

    def moved(self) -> tuple[str, ...]:
        """Return the options of the run in the bucket."""
        source = f"{self.place}/*.array_record"
        return (
            f"--config.data.train={source}",
            f"--config.eval.tasks['pairs'].source={source}",
            f"--config.data.cache_dir={self.folder}/copies",
        )


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_run_goes_on_exactly_with_its_records_in_a_bucket_and_back(tmp_path, gcs, monkeypatch):
    run = RecordsRun(tmp_path)
    run.write()
    run.finish(UNDISTURBED)

    def kill_at(step: int, *options: str) -> None:
        process = run.start("killed", *options)
        with ended(process):
            assert wait_until(lambda: run.logged_step("killed") >= step, seconds=120, process=process), run.output(
                "killed"
            )
            kill(process)

    kill_at(30)
    stuck = gcs.plant(r"GET .*/2\.array_record", delay=30, times=1)
    process = run.start("killed", *run.moved())
    with ended(process):
        assert wait_until(lambda: stuck.hits, seconds=60, process=process), run.output("killed")
        kill(process)
    gcs.reset()
    kill_at(95, *run.moved(), "--config.data.num_workers=2")
    assert gcs.count(r"GET .*/2\.array_record") == 1
    kill_at(150)
    gcs.reset()
    run.finish("killed", *run.moved())
    assert not gcs.count(r"GET .*array_record")
    assert not differences(run, "killed", UNDISTURBED)
    told = run.output("killed")
    assert f"data.cache_dir: copying {NUM_FILES} files of {run.place}/*.array_record" in told and "warning" not in told

    evaluated = clipjax(run, "eval", f"--checkpoint={run.workdir('killed')}", "--output=there.json")
    assert evaluated.returncode == 0, evaluated.stderr  # the config of the last start names the bucket and the cache
    here = f"--config.eval.tasks['pairs'].source={tmp_path}/data/*.array_record"
    assert clipjax(run, "eval", f"--checkpoint={run.workdir('killed')}", here, "--output=here.json").returncode == 0
    assert (tmp_path / "there.json").read_text() == (tmp_path / "here.json").read_text()


def clipjax(run: RecordsRun, *argv: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [sys.executable, "-m", "clipjax", *argv],
        cwd=run.folder,
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("data.cache_dir=None",), "lies in a store, and its library reads files on a disk alone"),
        (("data.cache_gib=0.000001",), "data.cache_gib=0.000001 is too small"),
    ],
)
def test_a_start_without_room_is_refused_and_leaves_nothing(tmp_path, gcs, options, message):
    run = RecordsRun(tmp_path)
    run.write()
    gcs.reset()
    given = {option.partition("=")[0]: option for option in run.moved()} | {
        f"--config.{option.partition('=')[0]}": f"--config.{option}" for option in options
    }
    refused = clipjax(run, *run.command("refused", *given.values()))
    assert refused.returncode == 2 and message in refused.stderr, refused.stderr
    assert not run.workdir("refused").exists() and not gcs.count(r"GET .*/\d\.array_record")


def test_two_processes_of_a_machine_copy_once(tmp_path, gcs):
    run = RecordsRun(tmp_path)
    run.write()
    gcs.reset()
    gcs.plant(r"GET .*/\d\.array_record", delay=0.5)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    many = (*run.moved(), "--config.total_examples=160", f"--coordinator={address}", "--num_processes=2")
    with contextlib.ExitStack() as stack:
        both = [run.start("two", *many, f"--process_id={rank}") for rank in range(2)]
        for process in both:
            stack.enter_context(ended(process))
        assert [process.wait(300) for process in both] == [0, 0], run.output("two")
    assert gcs.count(r"GET .*/\d\.array_record") == NUM_FILES


def test_records_that_have_changed_in_the_bucket_are_another_run(tmp_path, gcs):
    run = RecordsRun(tmp_path)
    run.write()
    process = run.start("changed", *run.moved())
    with ended(process):
        saved = wait_until(lambda: complete_steps(run.workdir("changed")), seconds=120, process=process)
        assert saved, run.output("changed")
        kill(process)
    objects.write_bytes(f"{run.place}/1.array_record", (tmp_path / "data" / "0.array_record").read_bytes())
    refused = clipjax(run, *run.command("changed", *run.moved()))
    assert refused.returncode == 2 and "(changed: " in refused.stderr and "/1.array_record (16 sam" in refused.stderr
    assert f"{run.place}/1.array_record has changed since it was copied" in refused.stderr
