"""Scripts of launch/: what --dry-run prints, what is refused, JobSet manifests, and four real processes."""

import contextlib
import copy
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from clipjax.cli.errors import UNUSABLE_DATA, USAGE_ERROR
from tests.e2e.conftest import environment
from tests.launch.conftest import until

pytestmark = pytest.mark.process

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
ENV = environment(CLIPJAX=f"{sys.executable} -m clipjax", PYTHONPATH=str(LAUNCH.parent))
GKE = ("--name=run", "--image=registry/clipjax", "--", "--config=c.py", "--workdir=gs://b/run")
GPU = ("--gpu=nvidia-h100-80gb", "--nodes=2", *GKE)
TPU = ("--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--slices=2", *GKE)


def call(script: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    command = [str(LAUNCH / script), *arguments]
    return subprocess.run(command, env={**ENV, **changes}, capture_output=True, text=True, timeout=300)


def fits(manifest: dict) -> bool:
    """Whether a manifest is of the JobSet API: no field unknown, missing or of another type, down to the containers."""
    try:
        return JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    except ValueError:
        return False


def changed(manifest: dict, path: tuple, value) -> dict:
    """A copy with another value at a path; None takes it out."""
    manifest = copy.deepcopy(manifest)
    *folders, name = path
    place = manifest["spec"]
    for folder in folders:
        place = place[folder]
    if value is None:
        del place[name]
    else:
        place[name] = value
    return manifest


JOB = ("replicatedJobs", 0, "template", "spec")
CONTAINER = (*JOB, "template", "spec", "containers", 0)


@pytest.mark.parametrize("arguments", [GPU, TPU, ("--bucket=data", *GPU)], ids=["gpu", "tpu", "bucket"])
def test_jobsets_fit_the_api(arguments):
    manifest = json.loads(call("gke/jobset.py", *arguments).stdout)
    assert fits(manifest)
    for path, value in (
        ((*CONTAINER, "name"), None),
        ((*CONTAINER, "resource"), {}),
        ((*CONTAINER, "command"), "clipjax train"),
        ((*JOB, "completions"), "2"),
        (("failurePolicy", "maxRestart"), 3),
        (("failurePolicy", "rules", 0, "action"), None),
    ):
        assert not fits(changed(manifest, path, value)), path
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    # Values that the API's types leave open. Kubernetes takes a podFailurePolicy only where pods are never restarted.
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"] == {
        "containerName": job["template"]["spec"]["containers"][0]["name"],
        "operator": "In",
        "values": [USAGE_ERROR, UNUSABLE_DATA],
    }
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_jobsets_name_the_processes():
    gpu, tpu = (json.loads(call("gke/jobset.py", *arguments).stdout) for arguments in (GPU, TPU))
    job = gpu["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert job["completions"] == 2 and container["env"][0]["value"] == "run-train-0-0.run:8476"
    assert container["command"] == ["clipjax", "train", "--config=c.py", "--workdir=gs://b/run"]
    assert [volume["name"] for volume in job["template"]["spec"]["volumes"]] == ["memory"]
    assert [mount["name"] for mount in container["volumeMounts"]] == ["memory"]
    assert not job["template"]["metadata"]["annotations"]
    mounted = json.loads(call("gke/jobset.py", "--bucket=data", *GPU).stdout)
    pod = mounted["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["spec"]["volumes"][1]["csi"]["volumeAttributes"] == {"bucketName": "data"}
    assert pod["spec"]["containers"][0]["volumeMounts"][1] == {"name": "bucket", "mountPath": "/bucket"}
    slices = tpu["spec"]["replicatedJobs"][0]
    assert slices["replicas"] == 2 and slices["template"]["spec"]["completions"] == 4


def test_a_dry_run_of_a_jobset_leaves_nothing_for_a_pipe():
    done = call("gke/jobset.py", "--dry-run", *GPU)
    assert done.returncode == 0 and not done.stdout
    assert done.stderr.startswith("+ kubectl apply -f -") and '"kind": "JobSet"' in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gke/jobset.py", ("--tpu=x", "--topology=4", *GKE), "--topology=4 must be like 4x4"),
        ("gke/jobset.py", ("--tpu=x", "--topology=3x3", *GKE), "has 9 chips, not a multiple of --chips=4"),
        ("gke/jobset.py", ("--gpu=x", "--nodes=0", *GKE), "--nodes=0 must be at least 1"),
        ("gke/jobset.py", ("--gpu=x", "--slices=2", *GKE), "--slices=2 does not go with --gpu"),
        ("gke/jobset.py", ("--tpu=x", "--topology=4x4", "--gpus=3", *GKE), "--gpus=3 does not go with --tpu"),
        ("tpu/pod.sh", ("train", "pod", "--queued"), "--queued is not an option of train; it takes --zone"),
        ("tpu/pod.sh", ("create", "pod", "--source=x"), "it takes --zone, --type, --version, --queued, --spot"),
        ("tpu/pod.sh", ("copy", "pod", "--zone=z"), "name what to copy"),
        ("local.sh", ("none", "--config=x"), "N=none must be a whole number of processes"),
        ("local.sh", ("2", "--devices=0", "--config=x"), "--devices=0 must be a whole number"),
        ("local.sh", ("2", "--restarts=x", "--config=x"), "--restarts=x must be a whole number"),
        ("local.sh", ("2",), "arguments of clipjax train are missing"),
        ("tpu/pod.sh", ("start", "pod"), "start is none of create"),
        ("tpu/pod.sh", ("create", "pod", "--zone=z"), "create needs --type=ACCELERATOR_TYPE"),
        ("tpu/pod.sh", ("train", "pod", "--config=x"), "--zone=ZONE is missing"),
    ],
)
def test_mistakes_are_refused(script, arguments, message):
    done = call(script, *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("create", "pod", "--type=v5litepod-16", "--version=r"),
            "tpu-vm create pod --zone=z --accelerator-type=v5lite",
        ),
        (
            ("create", "pod", "--type=v5litepod-16", "--version=r", "--queued"),
            "queued-resources create pod --node-id=pod",
        ),
        (("train", "pod", "--config=x", "--workdir=w"), "tpu-vm ssh pod --zone=z --worker=all --command=clipjax-env"),
        (("copy", "pod", "configs", "a b"), "tpu-vm scp --recurse configs a\\ b pod: --zone=z --worker=all"),
        (("delete", "pod", "--queued"), "queued-resources delete pod --zone=z --force"),
    ],
)
def test_dry_runs_of_tpu_pods(arguments, expected):
    done = call("tpu/pod.sh", *arguments, "--zone=z", "--dry-run")
    assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr


def test_gpus_are_shared_out():
    done = call("local.sh", "2", "--dry-run", "--config=a b", CUDA_VISIBLE_DEVICES="3,5", JAX_PLATFORMS="")
    lines = done.stderr.splitlines()
    assert "JAX_PROCESS_ID=0 CUDA_VISIBLE_DEVICES=3 " in lines[0] and "CUDA_VISIBLE_DEVICES=5 " in lines[1]
    assert "train --config=a\\ b" in lines[1]
    hidden = call("local.sh", "2", "--dry-run", "--config=x", CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="")
    assert hidden.returncode == 0 and "CUDA_VISIBLE_DEVICES" not in hidden.stderr
    refused = call("local.sh", "3", "--dry-run", "--config=x", CUDA_VISIBLE_DEVICES="3,5", JAX_PLATFORMS="")
    assert refused.returncode == 2 and "N=3 processes need a GPU each, but there are 2" in refused.stderr


def start_two(config, workdir, cache) -> subprocess.Popen:
    command = [str(LAUNCH / "local.sh"), "2", "--restarts=1", "--devices=1"]
    command += [f"--config={config}", f"--workdir={workdir}"]
    return subprocess.Popen(command, env=ENV | cache, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen) -> None:
    """End local.sh and its processes, which have sessions of their own, whatever the test came to."""
    if process.poll() is None:
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [process.pid, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.communicate()


def begun(process: subprocess.Popen, workdir: pathlib.Path) -> bool:
    assert process.poll() is None, process.communicate()[0]
    return (workdir / "metrics.jsonl").exists()


def test_a_signal_is_passed_on_and_ends_all_for_good(tiny_config, tmp_path):
    process = start_two(tiny_config, tmp_path, {})  # without the cache: compiling the step takes long
    try:
        until(lambda: begun(process, tmp_path), 120, lambda: "never began")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
        assert process.returncode == 143 and "starting all ranks again" not in output, output
    finally:
        end(process)


def test_failures_that_need_no_person_start_all_again(tmp_path):
    """The command leaves with the code that its file says, the first time, and then with 0."""
    command = tmp_path / "command"
    command.write_text('#!/bin/sh\nif mkdir "$0-$JAX_PROCESS_ID"; then exit $CODE; fi 2>/dev/null\n')
    command.chmod(0o755)
    final = [(code, 1, code) for code in (2, 3, 130, 143)]  # refused, for a person, stopped
    for code, restarts, expected in ((1, 1, 0), (137, 1, 0), *final, (1, 0, 1)):
        for rank in (0, 1):
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / f"command-{rank}").rmdir()
        done = call("local.sh", "2", f"--restarts={restarts}", "--devices=1", "x", CLIPJAX=str(command), CODE=str(code))
        assert done.returncode == expected, (code, done.stderr)
        assert ("exit code " + f"{code} (restart 1 of 1)" in done.stderr) == (expected == 0)


@pytest.mark.slow
def test_four_processes_train_with_fsdp(tiny_config, tmp_path):
    done = call(
        "local.sh", "4", "--devices=1", f"--config={tiny_config}", f"--workdir={tmp_path}", "--config.mesh.fsdp=2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 12/12" in done.stdout + done.stderr and (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_a_sweep_whose_trials_have_two_processes(tiny_config, tmp_path):
    (tmp_path / "sweep.py").write_text(
        "from clipjax.sweeps import *\n"
        "def get_sweep():\n"
        '    search = Grid({"optim.learning_rate": [0.001, 0.002]})\n'
        '    return Sweep(search=search, metric="scenes/val:top1")\n'
    )
    command = [sys.executable, "-m", "clipjax", "sweep", f"--train_command={LAUNCH / 'local.sh'} 2 --devices=1"]
    command += [f"--config={tiny_config}", f"--sweep={tmp_path / 'sweep.py'}", f"--workdir={tmp_path / 'work'}"]
    done = subprocess.run([*command, "--config.total_examples=64"], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best: " in done.stdout
    for folder in (tmp_path / "work").glob("trial-*"):
        start = json.loads((folder / "run.json").read_text())["starts"][0]
        assert start["num_processes"] == 2
        assert (folder / "logs" / "rank-00001.log").exists()
