"""A workdir on an object store: killed while it uploads, gone on with on another machine, with the undisturbed end.

Another machine is another staging folder: nothing of the run but the store is there.
"""

import os
import pathlib
import signal
import subprocess

import pytest

from clipjax.checkpoints import mirrored
from clipjax.checkpoints.manifest import State, examine
from clipjax.runtime import objects, staging
from tests.faults.crash import UNDISTURBED
from tests.faults.tiny_run import LAST_STEP, TinyRun, differences, ended
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

    def start_on(self, machine: str, name: str) -> subprocess.Popen:
        staging_folder = self.folder / machine
        more = {"CLIPJAX_STAGING": str(staging_folder), "CLIPJAX_LEASE_SECONDS": "1", "CLIPJAX_MIRROR_SECONDS": "0.5"}
        return self.start(name, environment={**self.variables, **more})


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
        process = run.start_on(f"{kind}-machine-{number}", name)

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
