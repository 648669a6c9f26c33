"""launch/slurm for real: start, a killed rank, a time limit, refused arguments, a sweep as an array."""

import json
import os
import pathlib
import re
import signal
import subprocess

import pytest

from tests.launch.conftest import Cluster, until

SLURM = pathlib.Path(__file__).parents[2] / "launch" / "slurm"
LAST_STEP = 12

pytestmark = pytest.mark.process


def submit(slurm: Cluster, folder: pathlib.Path, *options: str, arguments: tuple[str, ...]) -> str:
    command = ("sbatch", "--parsable", "--ntasks-per-node=2", *options, str(SLURM / "train.sbatch"), *arguments)
    return slurm.call(*command, cwd=folder).strip()


def story(slurm: Cluster, folder: pathlib.Path) -> str:
    files = [*sorted(folder.glob("clipjax-*")), slurm.folder / "slurmctld.log"]
    return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)


def ended(slurm: Cluster, job: str, folder: pathlib.Path, state: str) -> None:
    def is_over() -> bool:
        return slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    until(is_over, 200, lambda: story(slurm, folder))
    assert slurm.state(job) == state, story(slurm, folder)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def children(slurm: Cluster, job: str) -> list[int]:
    """The processes of clipjax train in the step of a job of this cluster, not of another one on this machine."""
    ours = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={slurm.env['SLURM_CONF']}".encode()}
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        inside = ours <= set(variables) and any(v.startswith(b"SLURM_PROCID=") for v in variables)
        if inside and b"train" in words and b"srun" not in words[0]:
            found.append(int(entry.name))
    return found


def saved(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is complete; until then its folder has a longer name."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def undisturbed(slurm, tiny_config, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("slurm-run")
    job = submit(slurm, folder, arguments=(f"--config={tiny_config}", "--workdir=run"))
    ended(slurm, job, folder, "COMPLETED")
    log = (folder / f"clipjax-{job}.log").read_text()
    assert "+ srun --kill-on-bad-exit=1" in log and "left with exit code 0" in log
    assert f"step {LAST_STEP}/{LAST_STEP}" in (folder / f"clipjax-{job}-0.log").read_text()
    assert (folder / f"clipjax-{job}-1.log").exists()
    return folder / "run"


def test_a_killed_rank_is_requeued_and_goes_on_bit_for_bit(slurm, tiny_config, undisturbed, tmp_path):
    job = submit(slurm, tmp_path, arguments=(f"--config={tiny_config}", "--workdir=run"))
    until(lambda: saved(tmp_path / "run"), 120, lambda: story(slurm, tmp_path))
    os.kill(max(children(slurm, job)), signal.SIGKILL)
    ended(slurm, job, tmp_path, "COMPLETED")
    log = (tmp_path / f"clipjax-{job}.log").read_text()
    assert f"+ scontrol requeue {job}" in log and "attempt 2 left with exit code 0" in log
    starts = re.findall(rf"^step (\d+) of {LAST_STEP}", (tmp_path / f"clipjax-{job}-0.log").read_text(), re.MULTILINE)
    assert len(starts) == 2 and starts[0] == "0" and 0 < int(starts[1]) < LAST_STEP, starts
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert not list(tmp_path.glob("*.failures"))


@pytest.mark.slow
def test_a_time_limit_saves_and_requeues_and_scancel_does_not(slurm, tiny_config, tmp_path):
    # SLURM looks at limits every 30 seconds: this warning comes 30 to 60 seconds after the start.
    long = (f"--config={tiny_config}", "--workdir=run", "--config.total_examples=3200000")
    job = submit(slurm, tmp_path, "--time=2", "--signal=TERM@60", arguments=long)

    def goes_on() -> list[str]:
        log = tmp_path / f"clipjax-{job}-0.log"
        return re.findall(r"step ([1-9]\d*) of 100000", log.read_text() if log.exists() else "")

    until(goes_on, 150, lambda: story(slurm, tmp_path))
    log = (tmp_path / f"clipjax-{job}.log").read_text()
    assert "left with exit code 143" in log and f"+ scontrol requeue {job}" in log
    slurm.call("scancel", job)
    until(lambda: slurm.state(job) == "CANCELLED", 60, lambda: story(slurm, tmp_path))
    after = (tmp_path / f"clipjax-{job}.log").read_text()
    assert after.count("scontrol requeue") == log.count("scontrol requeue")


def test_refused_arguments_are_not_requeued(slurm, tiny_config, tmp_path):
    job = submit(slurm, tmp_path, arguments=(f"--config={tiny_config}", "--workdir=run", "--config.mesh.data=3"))
    ended(slurm, job, tmp_path, "FAILED")
    assert "not requeued" in (tmp_path / f"clipjax-{job}.log").read_text()


def test_dry_run_shows_the_command_and_mistakes_are_refused():
    script = str(SLURM / "train.sbatch")
    shown = subprocess.run(["bash", script, "--dry-run", "--config=a b.py"], capture_output=True, text=True)
    assert shown.returncode == 0 and "clipjax train --config=a\\ b.py" in shown.stdout
    refused = subprocess.run(["bash", script], capture_output=True, text=True)
    assert refused.returncode == 2 and "arguments of clipjax train are missing" in refused.stderr


CRASH = 'if [ "$SLURM_PROCID" = 1 ]; then kill -SEGV $$; fi\nexec sleep 60\n'
SAVE = 'echo "stopped by signal 15 after step 3; the same command goes on from here"\nexit 143\n'
FAIL = "exit 1\n"
UNUSABLE_DATA = "exit 3\n"


@pytest.mark.parametrize(
    ("does", "code", "says"),
    [
        (CRASH, 143, "not requeued: failed 1 times"),
        (SAVE, 143, "+ scontrol requeue"),
        (FAIL, 1, "not requeued: failed 1 times"),
        (UNUSABLE_DATA, 3, "not requeued: see"),
    ],
    ids=["crashed", "saved", "failed", "data"],
)
def test_only_a_saved_run_is_requeued_without_end(slurm, tmp_path, does, code, says):
    """Where one process crashes and SIGTERM ends the other before it can save, srun reports 143 too."""
    (tmp_path / "fake.sh").write_text(does)
    before = slurm.env["CLIPJAX"]
    slurm.env.update(CLIPJAX=f"bash {tmp_path}/fake.sh", CLIPJAX_MAX_FAILURES="0")
    try:
        job = submit(slurm, tmp_path, arguments=("--config=c", "--workdir=run"))
    finally:
        slurm.env["CLIPJAX"] = before
        del slurm.env["CLIPJAX_MAX_FAILURES"]
    log = tmp_path / f"clipjax-{job}.log"

    def decided() -> bool:
        return log.exists() and any(text in log.read_text() for text in ("not requeued", "scontrol requeue"))

    until(decided, 60, lambda: story(slurm, tmp_path))
    slurm.call("scancel", job)
    assert f"left with exit code {code}" in log.read_text() and says in log.read_text()
