"""A sweep of real runs on an object store: its machine is lost in the middle of a trial, and another one goes on.

Another machine is another staging folder: nothing of the sweep but the store is there.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from clipjax.runtime import objects, staging
from tests.faults.test_bucket import PACED
from tests.faults.tiny_run import TinyRun, ended, losses
from tests.runtime.stores import BUCKET
from tests.sweeps.test_on_store import NAMES, rows_of

KILLS = {
    "gs": rf"PUT .*{NAMES[1]}/checkpoints/40/params/",  # in the middle of a checkpoint of the second trial
    "s3": rf"PUT .*{NAMES[1]}/results.json",  # it is trained, and the sweep does not know
}
STEPS = {"gs": "20", "s3": "40"}
"""The step from which the second trial then goes on."""


class SweepRun(TinyRun):
    """A sweep of two real runs of 40 steps."""

    def command(self, name: str, *options: str) -> list[str]:
        return []

    def start_sweep(
        self, workdir: str, machine: str, environment: dict[str, str], train: tuple[str, ...] = ("-m", "clipjax")
    ) -> subprocess.Popen:
        options = [f"--config={self.folder}/config.py", f"--sweep={self.folder}/sweep.py", f"--workdir={workdir}"]
        options += ["--config.total_examples=320", "--config.eval.every_examples=320"]
        call = f"main({options}, command={[sys.executable, *train, 'train']})"
        code = f"import sys; from clipjax.cli.sweep import main; sys.exit({call})"
        here = {"CLIPJAX_STAGING": str(self.folder / machine), "CLIPJAX_LEASE_SECONDS": "2"}
        return self.start(machine, prefix=("-c", code), environment={**environment, **here})


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """The files of the sweep, and its undisturbed end on a disk."""
    run = SweepRun(pathlib.Path(tmp_path_factory.mktemp("sweep")))
    run.write()
    (run.folder / "sweep.py").write_text(
        "from clipjax.sweeps import *\n"
        "def get_sweep():\n"
        "    search = Grid({'optim.learning_rate': [0.001, 0.002]})\n"
        "    return Sweep(search=search, metric='loss', maximize=False)\n"
    )
    with ended(process := run.start_sweep(str(run.workdir("disk")), "no-machine", {})):
        assert process.wait(300) == 0, run.output("no-machine")
    return run


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLS)
def test_a_machine_lost_in_the_middle_of_real_trials(kind, on_disk, request, tmp_path):
    server = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[kind])
    environment = request.getfixturevalue({"gs": "gcs_session", "s3": "s3_session"}[kind])[1]
    place = f"{kind}://{BUCKET}/sweeps/trained"
    process = on_disk.start_sweep(place, f"{kind}-machine-0", environment, train=("-c", PACED))

    def lose_machine():
        process.kill()
        process.wait()
        trial = json.loads(objects.read_bytes(f"{place}/{NAMES[1]}/.owner", 2**16))["pid"]
        os.killpg(trial, signal.SIGKILL)

    fault = server.plant(KILLS[kind], times=1, **{"before" if kind == "gs" else "after": lose_machine})
    with ended(process):
        assert process.wait(300) == -signal.SIGKILL and fault.hits == 1, on_disk.output(f"{kind}-machine-0")
    server.reset()
    before = objects.list_folder(f"{place}/{NAMES[0]}")
    assert f"{NAMES[1]}/.owner" in objects.list_folder(place)
    with ended(process := on_disk.start_sweep(place, f"{kind}-machine-1", environment)):
        assert process.wait(300) == 0, on_disk.output(f"{kind}-machine-1")
    assert "2 trials in" in (out := on_disk.output(f"{kind}-machine-1")) and "1 to run" in out

    assert not list((on_disk.folder / f"{kind}-machine-1").rglob("checkpoints"))  # they would fill its disk
    assert objects.list_folder(f"{place}/{NAMES[0]}") == before  # no file of the finished trial was touched
    staging.download(place, objects.list_folder(place), tmp_path)
    disk = on_disk.workdir("disk")
    assert rows_of((tmp_path / "leaderboard.csv").read_text()) == rows_of((disk / "leaderboard.csv").read_text())
    for name in NAMES[:2]:
        assert losses(tmp_path / name) == losses(disk / name)
    log = (tmp_path / NAMES[1] / "log.txt").read_text()  # of the last start: the other's was lost with its machine
    assert re.findall(r"^step (\d+) of 40", log, re.MULTILINE) == [STEPS[kind]]
