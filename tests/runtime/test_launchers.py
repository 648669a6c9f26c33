"""Which environments and flags mean several processes, where they meet, and which GPUs each takes."""

import http.server
import threading

import pytest

from clipjax.runtime.launchers import Launch, find_launch, gpu_share

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "PMIX_NAMESPACE": "1434517505",
}
FLAGS = {"coordinator": "host:1", "num_processes": "4", "process_id": "3"}


def words(launch: Launch | None) -> tuple | None:
    """All but the port, which is a hash."""
    if launch is None:
        return None
    host = None if launch.coordinator is None else launch.coordinator.rpartition(":")[0]
    return launch.launcher, host, launch.num_processes, launch.process_id


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # A batch script outside of srun: one process, whatever the job was given.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM, ("Slurm", "node001", 4, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7,gpu9"}, ("Slurm", "gpu7", 4, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "rack[2-3]n[05,07-09]-ib,x1"}, ("Slurm", "rack2n05-ib", 4, 3)),
        (OPEN_MPI, ("Open MPI", "localhost", 4, 2)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLURM | OPEN_MPI, ("Open MPI", "localhost", 4, 2)),  # mpirun inside of a Slurm step
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "9.0;tcp://10.0.0.1,10.1.0.1:34"},
            ("Open MPI", "10.0.0.1", 4, 2),
        ),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "9.0;tcp6://[fe80::1,fd::2]:34"},
            ("Open MPI", "[fe80::1]", 4, 2),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "worker-0,worker-1"}, ("TPU pod", None, None, None)),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, ("TPU pod", None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, ("TPU pod", None, None, None)),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            ("environment", "host", 4, 3),
        ),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "other:1"}, ("Slurm", "other", 4, 3)),
        # An indexed Job or a JobSet.
        (
            {"JAX_COORDINATOR_ADDRESS": "job-0.set:1", "JAX_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "5"},
            ("environment", "job-0.set", 8, 5),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "job-0.set:1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            ("Kubernetes", "job-0.set", None, None),
        ),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "1"}, None),
    ],
)
def test_the_environment_tells(environment, expected):
    assert words(find_launch({}, environment)) == expected


def test_all_processes_of_a_job_find_one_port_and_another_job_another():
    ports = [
        find_launch({}, SLURM | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_PROCID": process}).coordinator
        for job, step, process in [("7", "0", "0"), ("7", "0", "1"), ("8", "0", "0"), ("7", "1", "0")]
    ]
    assert ports[0] == ports[1]
    assert len(set(ports)) == 3
    assert all(61440 <= int(port.rpartition(":")[2]) <= 65535 for port in ports)
    assert find_launch({}, SLURM | {"JAX_COORDINATOR_PORT": "99"}).coordinator == "node001:99"


def test_flags_beat_the_environment():
    assert find_launch(FLAGS, SLURM | OPEN_MPI) == Launch(
        launcher="flags", coordinator="host:1", num_processes=4, process_id=3, gpus=(2,)
    )
    assert find_launch({"coordinator": "host:1", "num_processes": "1", "process_id": "0"}, SLURM) is None


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"coordinator": "host:1"}, {}, "--coordinator=host:1 without --num_processes and --process_id: each of"),
        ({"num_processes": "2", "process_id": "0"}, {}, "without --coordinator"),
        ({"coordinator": "host:1"}, SLURM, "without --num_processes and --process_id"),  # no mixture
        ({"process_id": "0", "coordinator": ""}, {}, "--process_id=0 without --coordinator and --num_processes"),
        (FLAGS | {"coordinator": "host"}, {}, "--coordinator=host must be HOST:PORT"),
        (FLAGS | {"coordinator": ":80"}, {}, "--coordinator=:80 must be HOST:PORT"),
        (FLAGS | {"coordinator": "host:0"}, {}, "a port from 1 to 65535"),
        (FLAGS | {"coordinator": "host:65536"}, {}, "a port from 1 to 65535"),
        (FLAGS | {"num_processes": "0"}, {}, "--num_processes=0 must be a whole number of at least 1"),
        (FLAGS | {"num_processes": "two"}, {}, "--num_processes=two must be"),
        (FLAGS | {"process_id": "4"}, {}, "--process_id=4 must be a whole number from 0 to --num_processes - 1 = 3"),
        (FLAGS | {"process_id": "-1"}, {}, "--process_id=-1 must be"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "host:1"}, "without JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({}, {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=4 without JAX_COORDINATOR_ADDRESS"),
        ({}, {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 without JAX_COORDINATOR_ADDRESS"),
        ({}, OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        ({}, SLURM | {"SLURM_STEP_NODELIST": ""}, "names no machine; set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_half_of_it_and_nonsense_are_refused_by_name(options, environment, message):
    with pytest.raises(ValueError) as refusal:
        find_launch(options, environment)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # alone: all of them
        # One process on each machine takes all GPUs of it; JAX would give it one.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "3", "SLURM_LOCALID": "0"}, None),
        (SLURM, (1,)),  # no list: one each, as JAX does
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (4, 5, 6, 7)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, None),  # its own already
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:2"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPU_BIND": "closest"}, None),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0"}, None),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "CUDA_VISIBLE_DEVICES": "0,1,2"}, (1,)),
        (OPEN_MPI, (2,)),
        (OPEN_MPI | {"ROCR_VISIBLE_DEVICES": "0,1,2,3"}, (2,)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, None),
    ],
)
def test_gpus_of_one_process(environment, gpus):
    assert gpu_share(environment) == gpus


def test_gpus_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(ValueError, match=r"3 GPUs \(0,1,2\) cannot be shared evenly by the 2 processes"):
        gpu_share(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"})


@pytest.mark.parametrize(("endpoints", "several"), [("10.0.0.1,10.0.0.2", True), ("10.0.0.1", False), (None, False)])
def test_metadata_of_a_tpu_machine_tells_of_other_workers(endpoints, several):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(404 if endpoints is None else 200)
            self.end_headers()
            self.wfile.write((endpoints or "").encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        environment = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        launches = [find_launch({}, environment, on_tpu=on_tpu) for on_tpu in (False, True)]
        launches.append(find_launch({}, environment | {"TPU_SKIP_MDS_QUERY": "1"}, on_tpu=True))
        server.shutdown()
        thread.join()
    assert launches == [None, Launch(launcher="TPU pod") if several else None, None]
    assert asked == [("/computeMetadata/v1/instance/attributes/worker-network-endpoints", "Google")]
