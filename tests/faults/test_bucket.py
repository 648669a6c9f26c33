"""A workdir on an object store: killed while it uploads, gone on with on another machine, with the undisturbed end.

Another machine is another staging folder: nothing of the run but the store is there.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess

import pytest

from clipjax.checkpoints import mirrored
from clipjax.checkpoints.manifest import State, examine
from clipjax.runtime import objects, staging
from tests.faults.crash import UNDISTURBED
from tests.faults.tiny_run import LAST_STEP, TinyRun, differences, ended, losses
from tests.launch.conftest import free_ports
from tests.runtime.stores import BUCKET, StoreServer

pytestmark = pytest.mark.process

KILLS = {
    "gs": (
        ("PUT .*checkpoints/40/params/", "before"),  # in the middle of a checkpoint
        ("PUT .*checkpoints/120/manifest.json", "after"),  # it is complete, and the run does not know
        ("DELETE .*checkpoints/120/", "after"),  # in the middle of deleting an old one
    ),
    "s3": (("PUT .*checkpoints/80/manifest.json", "before"),),  # all of it is there but its manifest
}


PACED = """
import sys
from clipjax.cli.main import console
from clipjax.training.run import Run

save = Run.save

def save_and_send(run, *args, **options):
    save(run, *args, **options)
    run.wait_for_saves()
    if run.session.checked.mirror is not None:
        run.session.checked.mirror.send_unsent()

Run.save = save_and_send
sys.argv[0] = "clipjax"
console()
"""
"""A run that waits at each save until the store has it: a fast machine would leave out the save whose upload kills."""


class BucketRun(TinyRun):
    """The tiny run with a workdir on a store."""

    def on(self, kind: str, server: StoreServer, environment: dict[str, str]) -> "BucketRun":
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "server", server)
        object.__setattr__(self, "variables", environment)
        return self

    def address(self, name: str) -> str:
        return f"{self.kind}://{BUCKET}/runs/{name}"

    def command(self, name: str, *options: str) -> list[str]:
        words = super().command(name, *options)
        return [f"--workdir={self.address(name)}" if word.startswith("--workdir=") else word for word in words]

    def start_on(
        self, machine: str, name: str, *options: str, prefix: tuple[str, ...] = ("-m", "clipjax")
    ) -> subprocess.Popen:
        staging_folder = self.folder / machine
        more = {"CLIPJAX_STAGING": str(staging_folder), "CLIPJAX_LEASE_SECONDS": "1", "CLIPJAX_MIRROR_SECONDS": "0.5"}
        return self.start(name, *options, prefix=prefix, environment={**self.variables, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the run, and its undisturbed end on a disk."""
    run = TinyRun(pathlib.Path(tmp_path_factory.mktemp("bucket")))
    run.write()
    run.finish(UNDISTURBED)
    return run.folder


@pytest.mark.parametrize("kind", KILLS)
def test_kills_during_uploads(kind, folder, request):
    server = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[kind])
    environment = request.getfixturevalue({"gs": "gcs_session", "s3": "s3_session"}[kind])[1]
    run, name = BucketRun(folder).on(kind, server, environment), f"on-{kind}"
    for number, (pattern, moment) in enumerate(KILLS[kind]):
        process = run.start_on(f"{kind}-machine-{number}", name, prefix=("-c", PACED))

        def kill(process=process):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        fault = server.plant(pattern, times=1, **{moment: kill})
        with ended(process):
            assert process.wait(120) == -signal.SIGKILL and fault.hits == 1, run.output(name)
        server.reset()
        assert_restorable(run.address(name), folder / f"{kind}-look-{number}")
    process = run.start_on(f"{kind}-last-machine", name)
    with ended(process):
        assert process.wait(120) == 0, run.output(name)
    workdir = run.workdir(name)
    staging.download(run.address(name), objects.list_folder(run.address(name)), workdir)
    assert not differences(run, name, UNDISTURBED)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["180", "200"]
    assert all(examine(workdir / "checkpoints" / step).state is State.VERIFIED for step in ("180", "200"))
    starts = run.first_steps(name)
    assert starts[0] == 0 and starts == sorted(starts) and len(starts) == len(KILLS[kind]) + 1
    assert starts[1] < LAST_STEP and starts[-1] >= 40
    assert not (folder / f"{kind}:").exists()


def assert_restorable(address: str, folder: pathlib.Path) -> None:
    """Check that what the store lists as complete is complete."""
    listed = objects.list_folder(address)
    found = staging.find(listed, address, mirrored.LAYOUT)
    wanted = {path: each for path, each in listed.items() if path.split("/")[:2][-1] in found.complete}
    staging.download(address, wanted, folder)
    for step in found.complete:
        assert examine(folder / "checkpoints" / step, step=int(step)).state is State.VERIFIED


SHORT_CLOSE = """
import sys
from clipjax.cli.main import console
from clipjax.runtime import connections, mirror
mirror.CLOSE_SECONDS, connections.MAX_RETRIES = 1.0, 1
sys.argv[0] = "clipjax"
console()
"""


@pytest.mark.slow
def test_what_the_store_did_not_take_is_sent_by_the_next_start_on_the_same_machine(folder, gcs, gcs_session):
    run, name, options = BucketRun(folder).on("gs", gcs, gcs_session[1]), "away", "--config.total_examples=480"
    gcs.plant("PUT .*checkpoints/(40|60)/", status=503)
    process = run.start_on("one-machine", name, options, prefix=("-c", SHORT_CLOSE))
    with ended(process):
        assert process.wait(120) == 3, run.output(name)
    output = run.output(name)
    assert "does not take the run's files: the server answers 503" in output and "Traceback" not in output
    assert "what is missing lies in" in output and "done:" not in output
    assert not objects.exists(f"{run.address(name)}/results.json")  # the sign of a finished run
    gcs.reset()
    process = run.start_on("one-machine", name, options)
    with ended(process):
        assert process.wait(120) == 0, run.output(name)
    assert re.findall(r"^step (\d+) of 60", run.output(name), re.MULTILINE) == ["0", "60"]
    assert objects.exists(f"{run.address(name)}/checkpoints/60/manifest.json")


def start_two(start, *options):
    """Start two processes with their number and options that lead them to each other."""
    launch = ("--num_processes=2", f"--coordinator=localhost:{free_ports(1)[0]}")
    return [start(i, *options, *launch, f"--process_id={i}") for i in range(2)]


def finish_two(both):
    try:
        assert [process.wait(200) for process in both] == [0, 0]
    finally:
        for process in both:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_rollback_of_two_hosts_without_a_shared_disk(folder, gcs, gcs_session):
    run, shared = BucketRun(folder).on("gs", gcs, gcs_session[1]), TinyRun(folder)
    poison = ("-m", "tests.faults.poison", "nan", "30,31,32")
    options = ("--config.total_examples=480", "--config.mesh.fsdp=2", "--config.recovery.max_skipped_in_a_row=3")
    finish_two(start_two(lambda _, *words: shared.start("poison-disk", *words, prefix=poison), *options))
    finish_two(start_two(lambda i, *words: run.start_on(f"p-{i}", "poison", *words, prefix=poison), *options))
    workdir = run.workdir("poison")
    staging.download(run.address("poison"), objects.list_folder(run.address("poison")), workdir)
    assert losses(workdir) == losses(run.workdir("poison-disk"))
    decisions = [(each / "decisions.jsonl").read_bytes() for each in (workdir, run.workdir("poison-disk"))]
    assert decisions[0] == decisions[1] and b'"to_step": 20' in decisions[0]


@pytest.mark.slow
def test_two_hosts_without_a_shared_disk(folder, gcs, gcs_session):
    """Both are killed while a checkpoint is uploaded; two other hosts go on, as one process with a disk would."""
    run, shared = BucketRun(folder).on("gs", gcs, gcs_session[1]), TinyRun(folder)
    options = ("--config.total_examples=480", "--config.mesh.fsdp=2", "--config.eval.every_examples=480")

    finish_two(start_two(lambda _, *words: shared.start("on-a-disk", *words), *options))
    paced = ("-c", PACED)
    first = start_two(lambda i, *words: run.start_on(f"host-{i}", "two-hosts", *words, prefix=paced), *options)

    def kill():
        for process in first:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    fault = gcs.plant("PUT .*checkpoints/40/train/", times=1, before=kill)
    assert [process.wait(200) for process in first] == [-signal.SIGKILL] * 2 and fault.hits == 1
    gcs.reset()
    assert_restorable(run.address("two-hosts"), folder / "look-two-hosts")
    finish_two(start_two(lambda i, *words: run.start_on(f"host-{i + 2}", "two-hosts", *words), *options))
    workdir = run.workdir("two-hosts")
    staging.download(run.address("two-hosts"), objects.list_folder(run.address("two-hosts")), workdir)
    assert losses(workdir) == losses(run.workdir("on-a-disk")) and len(losses(workdir)) > 60
    results = [json.loads((each / "results.json").read_text())["tasks"] for each in (workdir, run.workdir("on-a-disk"))]
    assert results[0] == results[1]
    assert {path.name for path in (workdir / "logs").iterdir()} == {"rank-00000.log", "rank-00001.log"}
    assert re.findall(r"^step (\d+) of 60", run.output("two-hosts"), re.MULTILINE) == ["0", "20"]
