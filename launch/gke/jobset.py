#!/usr/bin/env python3
"""A JobSet for clipjax train on GKE, as JSON for `kubectl apply -f -`: TPU slices or GPU nodes.

    launch/gke/jobset.py --name=NAME --image=IMAGE --tpu=tpu-v5-lite-podslice --topology=4x4 [--slices=N] [--chips=4] \\
        --service_account=ACCOUNT -- --config=FILE --workdir=gs://BUCKET/runs/NAME [any argument of clipjax train]
    launch/gke/jobset.py --name=NAME --image=IMAGE --gpu=nvidia-h100-80gb --nodes=2 [--gpus=8] ... -- ...

Print it, read it, then pipe it: `launch/gke/jobset.py ... | kubectl apply -f -`. The script itself never talks to a
cluster; `--dry-run` shows command and manifest on stderr and leaves stdout empty, so that a pipe applies nothing.

`--service_account` names one that may write to the bucket of the workdir. `--bucket=NAME` mounts one at /bucket by the
Cloud Storage FUSE driver, for what clipjax reads by path alone; the cluster needs that driver for it. A failed
or preempted process restarts the whole set, at most --restarts times, and the run goes on from its checkpoint; exit
codes 2 (refused arguments) and 3 (unusable data or checkpoint) fail the set at once.
"""

import argparse
import json
import math
import re
import sys
from typing import Any

PORT = 8476


def main(argv: list[str]) -> int:
    """Print the manifest; 2 for a user's error."""
    options = _parse(argv)
    try:
        text = json.dumps(manifest(options), indent=2)
    except ValueError as error:
        print(f"launch/gke/jobset.py: error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(f"+ kubectl apply -f - <<'END'\n{text}\nEND", file=sys.stderr)
    else:
        print(text)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("name", "image"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--bucket", help="to mount at /bucket (none)")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tpu", help="value of cloud.google.com/gke-tpu-accelerator")
    kind.add_argument("--gpu", help="value of cloud.google.com/gke-accelerator")
    parser.add_argument("--topology", help="of one TPU slice, like 4x4")
    parser.add_argument("--slices", type=int, help="of that topology (1)")
    parser.add_argument("--chips", type=int, help="TPU chips per host (4)")
    parser.add_argument("--nodes", type=int, help="GPU nodes, one process on each (1)")
    parser.add_argument("--gpus", type=int, help="per node (8)")
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--service_account", default="default")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("train", nargs="*", metavar="-- clipjax train arguments")
    return parser.parse_args(argv)


def manifest(options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet.

    Raises:
        ValueError: A name, number or topology cannot be.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise ValueError(
            f"--name={options.name} must be at most 40 of a-z, 0-9 and -, begin with a letter, not end in -"
        )
    kind, others = ("gpu", ("topology", "slices", "chips")) if options.gpu else ("tpu", ("nodes", "gpus"))
    for field in others:
        if getattr(options, field) is not None:
            raise ValueError(f"--{field}={getattr(options, field)} does not go with --{kind}; leave it out")
    for field, default in {"slices": 1, "chips": 4, "nodes": 1, "gpus": 8}.items():
        if getattr(options, field) is None:
            setattr(options, field, default)
        if getattr(options, field) < 1:
            raise ValueError(f"--{field}={getattr(options, field)} must be at least 1")
    if options.restarts < 0:
        raise ValueError(f"--restarts={options.restarts} must be at least 0")
    if not options.train:
        raise ValueError("the arguments of clipjax train are missing; give them after --")
    pods, jobs = (options.nodes, 1) if options.gpu else (_hosts(options), options.slices)
    exclusive = {} if options.gpu else {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    annotations = {"gke-gcsfuse/volumes": "true"} if options.bucket else {}
    template = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2, 3]}}
            ]
        },
        "template": {"metadata": {"annotations": annotations}, "spec": _pod(options)},
    }
    rules = [{"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "annotations": exclusive},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": options.name},
            "failurePolicy": {"maxRestarts": options.restarts, "rules": rules},
            "replicatedJobs": [{"name": "train", "replicas": jobs, "template": {"spec": template}}],
        },
    }


def _hosts(options: argparse.Namespace) -> int:
    if not options.topology or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", options.topology):
        raise ValueError(f"--topology={options.topology} must be like 4x4 or 4x4x8")
    chips = math.prod(map(int, options.topology.split("x")))
    if chips % options.chips:
        raise ValueError(f"--topology={options.topology} has {chips} chips, not a multiple of --chips={options.chips}")
    return chips // options.chips


def _pod(options: argparse.Namespace) -> dict[str, Any]:
    # On TPUs GKE injects TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, and JobSet MEGASCALE_* for several slices.
    limits, nodes = {"google.com/tpu": str(options.chips)}, {"cloud.google.com/gke-tpu-accelerator": options.tpu}
    env: list[dict[str, Any]] = []
    if options.gpu:
        limits, nodes = {"nvidia.com/gpu": str(options.gpus)}, {"cloud.google.com/gke-accelerator": options.gpu}
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        env = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{options.name}-train-0-0.{options.name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(options.nodes)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]
    else:
        nodes["cloud.google.com/gke-tpu-topology"] = options.topology
    container = {
        "name": "train",
        "image": options.image,
        "command": ["clipjax", "train", *options.train],
        "env": env,
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "memory", "mountPath": "/dev/shm"}],
    }
    volumes: list[dict[str, Any]] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    if options.bucket:
        bucket = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {"bucketName": options.bucket}}
        volumes.append({"name": "bucket", "csi": bucket})
        container["volumeMounts"].append({"name": "bucket", "mountPath": "/bucket"})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "serviceAccountName": options.service_account,
        "nodeSelector": nodes,
        "containers": [container],
        "volumes": volumes,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
