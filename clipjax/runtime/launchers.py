"""Launchers: the place of this process among those that flags, Slurm, Open MPI, Kubernetes or a TPU pod started.

Reading order: `find_launch` (explicit options first, then the environment of launchers), `gpu_share` (the GPUs of this
process). Free of JAX; `clipjax.runtime.processes` acts on it.

JAX can find out much of this by itself, but not where that goes wrong: in a batch script outside of `srun`, Slurm has
set `SLURM_NTASKS` although there is one process; JAX gives the only process of a machine one GPU of eight; and Open
MPI 5 no longer says where its launcher runs.
"""

import os
import re
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

OPTIONS = {
    "coordinator": "HOST:PORT of process 0, where several processes are started by hand; with the next two",
    "num_processes": "how many processes share the work",
    "process_id": "which of them this one is, from 0",
}
"""Options of the commands that give the place outright."""

JAX_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Their names in the environment."""

_FIRST_PORT, _PORTS = 61440, 4096  # up to 65535, where JAX puts its coordinators too
_METADATA_SECONDS = 5.0
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of this process, and the way to the others.

    Attributes:
        launcher: name of the launcher, for messages.
        coordinator: HOST:PORT of process 0.
        num_processes: number of processes.
        process_id: number of this one, from 0. JAX finds out from TPU or Kubernetes any of these three that is None.
        gpus: GPUs that the process takes, of those that it sees; None: all of them, or those of JAX_LOCAL_DEVICE_IDS.
    """

    launcher: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    gpus: tuple[int, ...] | None = None


def find_launch(
    options: Mapping[str, str | None] | None = None,
    environment: Mapping[str, str] = os.environ,
    *,
    on_tpu: bool = False,
) -> Launch | None:
    """Return the launch of this process, or None if it is alone.

    Args:
        options: values of `OPTIONS`; they beat the environment.
        environment: variables that the launcher set.
        on_tpu: True if there are TPU chips here, so that the machine's metadata may name other workers.

    Raises:
        ValueError: a part of the values is missing or impossible.
    """
    given = {f"--{name}": value for name in OPTIONS if (value := (options or {}).get(name)) is not None}
    if given:
        launch = _explicit("flags", {f"--{name}": given.get(f"--{name}") for name in OPTIONS})
    elif environment.get(JAX_NAMES[0]):
        launch = _from_jax_names(environment, on_tpu=on_tpu)
    elif (ranks := _ranks(environment)) is not None:
        address = _open_mpi_address if ranks.launcher == "Open MPI" else _slurm_address
        launch = ranks if ranks.num_processes == 1 else replace(ranks, coordinator=address(environment))
    elif _several_tpu_workers(environment, on_tpu=on_tpu):
        return Launch(launcher="TPU pod")
    else:
        _refuse_lone_names(environment)
        return None
    return None if launch.num_processes == 1 else replace(launch, gpus=gpu_share(environment))


def _explicit(launcher: str, given: Mapping[str, str | None]) -> Launch:
    """Return the launch of three values, given by the name that the user knows.

    Raises:
        ValueError: one is missing or impossible.
    """
    missing = [name for name, value in given.items() if not value]
    if missing:
        present = " and ".join(f"{name}={value}" for name, value in given.items() if value)
        raise ValueError(
            f"{present or 'nothing'} without {' and '.join(missing)}: each of several processes needs all of "
            f"{', '.join(given)} (HOST:PORT of process 0, how many there are, which one it is from 0)"
        )
    (address_name, address), (count_name, count), (index_name, index) = given.items()
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(
            f"{address_name}={address} must be HOST:PORT with a port from 1 to 65535, for example node-0:8476; "
            "process 0 listens there"
        )
    if not str(count).isdecimal() or int(str(count)) < 1:
        raise ValueError(f"{count_name}={count} must be a whole number of at least 1")
    if not str(index).isdecimal() or int(str(index)) >= int(str(count)):
        raise ValueError(
            f"{index_name}={index} must be a whole number from 0 to {count_name} - 1 = {int(str(count)) - 1}"
        )
    return Launch(launcher=launcher, coordinator=address, num_processes=int(str(count)), process_id=int(str(index)))


def _from_jax_names(environment: Mapping[str, str], *, on_tpu: bool) -> Launch:
    """Return the launch of `JAX_COORDINATOR_ADDRESS`, its companions, and else the numbers of the launcher."""
    ranks = _ranks(environment)
    known = {name: environment.get(name) for name in JAX_NAMES}
    if ranks is not None:
        known["JAX_NUM_PROCESSES"] = known["JAX_NUM_PROCESSES"] or str(ranks.num_processes)
        known["JAX_PROCESS_ID"] = known["JAX_PROCESS_ID"] or str(ranks.process_id)
    # A pod of an indexed Kubernetes Job or JobSet.
    known["JAX_PROCESS_ID"] = known["JAX_PROCESS_ID"] or environment.get("JOB_COMPLETION_INDEX")
    if None in known.values() and (on_tpu or "KUBERNETES_SERVICE_HOST" in environment):
        return Launch(launcher="TPU pod" if on_tpu else "Kubernetes", coordinator=known["JAX_COORDINATOR_ADDRESS"])
    return _explicit("environment" if ranks is None else ranks.launcher, known)


def _refuse_lone_names(environment: Mapping[str, str]) -> None:
    """Refuse to train alone where others were meant: all of them would write into one workdir."""
    for name in JAX_NAMES[1:]:
        if environment.get(name, "") not in ("", "0", "1"):
            raise ValueError(
                f"{name}={environment[name]} without {JAX_NAMES[0]}: set {JAX_NAMES[0]}=HOST:PORT of process 0 too, "
                f"or unset {name}"
            )


def _ranks(environment: Mapping[str, str]) -> Launch | None:
    """Return the number of processes and of this one, as Open MPI or Slurm counts."""
    for launcher, count, index in (
        ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        # Of the step: only `srun` sets it. SLURM_NTASKS is set in batch scripts too, where one process runs.
        ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ):
        if count in environment and index in environment:
            return Launch(launcher=launcher, num_processes=int(environment[count]), process_id=int(environment[index]))
    return None


def _slurm_address(environment: Mapping[str, str]) -> str:
    """Return the first machine of the step, with a port of the job's and step's own."""
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)  # up to the first comma outside of brackets
    if first is None:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS={environment['SLURM_STEP_NUM_TASKS']} but SLURM_STEP_NODELIST={nodes!r} names no "
            f"machine; set {JAX_NAMES[0]}=HOST:PORT"
        )
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])  # node[001-004,007] -> node001
    return f"{host}:{_port(environment, 'SLURM_JOB_ID', 'SLURM_STEP_ID')}"


def _open_mpi_address(environment: Mapping[str, str]) -> str:
    """Return this machine if all processes are on it, else that of mpirun, as far as Open MPI names it."""
    port = _port(environment, "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri")
    if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environment["OMPI_COMM_WORLD_SIZE"]:
        return f"localhost:{port}"
    launcher = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if launcher is None:
        raise ValueError(
            f"Open MPI started {environment['OMPI_COMM_WORLD_SIZE']} processes on several machines, but does not say "
            f"where; name the machine of process 0: mpirun -x {JAX_NAMES[0]}=HOST:PORT ..."
        )
    return f"{launcher[1] or f'[{launcher[2]}]'}:{port}"


def _port(environment: Mapping[str, str], *names: str) -> str:
    """Return a port: the same on all processes, and another for another job on the same machine."""
    identity = "/".join(environment.get(name, "") for name in names)
    return environment.get("JAX_COORDINATOR_PORT") or str(_FIRST_PORT + zlib.crc32(identity.encode()) % _PORTS)


def _several_tpu_workers(environment: Mapping[str, str], *, on_tpu: bool) -> bool:
    """Return True on one machine of a TPU pod: GKE and multislice name it in the environment, GCE in its metadata."""
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    if workers is None and on_tpu and "TPU_SKIP_MDS_QUERY" not in environment:
        workers = _metadata(environment, "worker-network-endpoints")
    return "," in (workers or "") or (slices.isdecimal() and int(slices) > 1)


def _metadata(environment: Mapping[str, str], key: str) -> str | None:
    """Return an attribute of this machine from Google's metadata server; None outside of Google's cloud."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except OSError:  # no such server, or no such attribute
        return None


def gpu_share(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the GPUs that this process takes, of those that it sees, where several processes share a machine.

    None means all of them: it is the only process here, or the launcher shows each process its own already.

    Raises:
        ValueError: the GPUs cannot be shared out evenly.
    """
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # JAX reads it
    index, count = _place_on_machine(environment)
    if index is None or count == 1 or _gpus_are_bound(environment):
        return None
    visible = next((environment[name] for name in _VISIBLE_GPUS if environment.get(name)), None)
    if visible is None or count is None:
        return (index,)  # one each, as JAX does
    number = len(visible.split(","))
    if number == 1:
        return None
    if number % count:
        raise ValueError(
            f"{number} GPUs ({visible}) cannot be shared evenly by the {count} processes on this machine; start "
            "another number of them, or say which each takes: JAX_LOCAL_DEVICE_IDS=0,1"
        )
    each = number // count
    return tuple(range(index * each, (index + 1) * each))


def _place_on_machine(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return the number of this process on its machine, and how many there are; None where unknown."""
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
        size = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
        return int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]), None if size is None else int(size)
    if "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_LOCALID" not in environment:
        return None, None
    counts: list[int] = []  # tasks of each machine, from the short form "4(x2),3"
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(number)] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return int(environment["SLURM_LOCALID"]), counts[node] if node < len(counts) else None


def _gpus_are_bound(environment: Mapping[str, str]) -> bool:
    """Return True if Slurm shows each task its own GPUs."""
    bind = environment.get("SLURM_GPU_BIND", "none")
    return "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "") or bind != "none"
