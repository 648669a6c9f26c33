"""A SLURM cluster of one node on this machine: real munged, slurmctld and slurmd in a temporary folder."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.e2e.conftest import cache, environment, tiny_config  # noqa: F401

CONF = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0
KillWait=5
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def until(what: Callable[[], object], seconds: float, story: Callable[[], str]) -> object:
    """Poll until something is true; its value."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, story()
        time.sleep(0.1)
    return value


@dataclass
class Cluster:
    """Where it lives, and the environment that its commands need."""

    folder: pathlib.Path
    env: dict[str, str]

    def call(self, *command: str, expect: int = 0, cwd: pathlib.Path | None = None) -> str:
        done = subprocess.run(
            command, env=self.env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
        )
        assert done.returncode == expect, done.stdout
        return done.stdout

    def state(self, job: str) -> str:
        return self.call("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip()

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("*.log")))


def kill_jobs(variable: str) -> None:
    """Kill what is left of this cluster's jobs: all processes that have its configuration in their environment."""
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture(scope="session")
def slurm(cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:  # noqa: F811
    """The running cluster."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs slurm-wlm and root: missing {', '.join(missing) or 'root'}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    # The port where a job's processes meet follows from its number: two clusters on one machine must not share any.
    first_job = random.SystemRandom().randrange(1, 60_000_000)
    host = socket.gethostname().split(".")[0]
    conf.write_text(CONF.format(host=host, folder=folder, ports=free_ports(2), first_job=first_job))
    scripts = pathlib.Path(sys.executable).parent
    repository = pathlib.Path(__file__).parents[2]
    env = environment(SLURM_CONF=str(conf), PATH=f"{scripts}:{os.environ['PATH']}", PYTHONPATH=str(repository), **cache)
    env["CLIPJAX"] = f"{sys.executable} -m clipjax"
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    commands = [munge, ["slurmctld", "-D"], ["slurmd", "-D"]]
    cluster, daemons = Cluster(folder, env), []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out.log").open("wb") as log:
                daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
            if command is munge:
                until((folder / "munge.socket").exists, 20, cluster.logs)

        def idle() -> bool:
            done = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=env, capture_output=True, text=True)
            return done.stdout.strip() == "idle"

        until(idle, 40, cluster.logs)
        yield cluster
        subprocess.run(["scancel", "--full", "--user=root"], env=env, capture_output=True, timeout=20)
        subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], env=env, capture_output=True, timeout=20)
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
        kill_jobs(f"SLURM_CONF={conf}")
