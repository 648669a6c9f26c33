"""Losses of one small run on 1, 2 and 4 processes with 1 to 4 CPU devices each, and their differences.

    python -m benchmarks.processes --output=benchmarks/results/processes.json

Every layout trains on the same global batches of 48 for 20 steps; the yardstick is one process with one device. The
processes' digests of the samples that they fed into each step are added up, and compared with those of one process.
Then a process of two is killed (`kill -9`) or frozen (SIGSTOP), and it is measured how long the other goes on.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

LAYOUTS = [(count, each) for count in (1, 2, 4) for each in (1, 2, 3, 4)]
STEPS = 20
CONFIG = """
from clipjax.config import *

def get_config():
    return Config(
        seed=3,
        total_examples=TOTAL,
        warmup_examples=96,
        global_batch_size=48,
        model=ModelConfig(
            embed_dim=16,
            image=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
            text=TextTransformerConfig(context_length=32, vocab_size=260, width=16, depth=1, num_heads=2),
            compute_dtype=Dtype.FLOAT32,
        ),
        optim=OptimConfig(learning_rate=1e-3),
        data=DataConfig(train="tfds:scenes/tiny/train", tfds_dir=FOLDER, tokenizer="bytes"),
        eval=EvalConfig(batch_size=48),
        log=LogConfig(every_examples=48, tensorboard=False),
    )
"""


def start(folder: pathlib.Path, name: str, count: int, each: int, total: int) -> list[subprocess.Popen]:
    """All processes of one run."""
    config = folder / f"{name}.py"
    config.write_text(CONFIG.replace("FOLDER", repr(str(folder / "tfds"))).replace("TOTAL", str(total)))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={each}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2", "XLA_FLAGS": flags}
    words = [sys.executable, "-m", "clipjax", "train", f"--config={config}", f"--workdir={folder / name}"]
    return [
        subprocess.Popen(
            [*words, f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{name}.{index}.txt").open("w"),
        )
        for index in range(count)
    ]


def train(folder: pathlib.Path, count: int, each: int) -> dict[str, Any]:
    """Losses by step, and the sum of the digests of the samples of each step."""
    name, began = f"run_{count}x{each}", time.monotonic()
    processes = start(folder, name, count, each, 48 * STEPS)
    codes = [process.wait() for process in processes]
    assert not any(codes), (folder / f"{name}.0.txt").read_text()
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    sums = [0] * STEPS
    for index in range(count):
        log = (folder / name / "logs" / f"rank-{index:05d}.log").read_text()
        for step, digest in re.findall(r"step (\d+): .* samples ([0-9a-f]{16})$", log, re.MULTILINE):
            sums[int(step) - 1] = (sums[int(step) - 1] + int(digest, 16)) % 2**64
    return {
        "processes": count,
        "devices_each": each,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "samples": [f"{value:016x}" for value in sums],
        "seconds": round(time.monotonic() - began, 1),
    }


def kill_one(folder: pathlib.Path, victim: int, number: signal.Signals, attempt: int) -> dict[str, Any]:
    """Signal one of two processes in the middle of training: after how long the other ended, and how."""
    name = f"{number.name}_{victim}_{attempt}"
    processes = start(folder, name, 2, 1, 48 * 1_000_000)
    metrics = folder / name / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 10):
        assert all(process.poll() is None for process in processes), name
        time.sleep(0.05)
    processes[victim].send_signal(number)
    began = time.monotonic()
    code = processes[1 - victim].wait(timeout=120)
    seconds = round(time.monotonic() - began, 2)
    processes[victim].kill()
    return {"signal": number.name, "victim": victim, "seconds": seconds, "exit_code_of_the_other": code}


def main() -> None:
    from benchmarks.machine import describe
    from clipjax.data.scenes.builder import build_scenes

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=3, help="of each of the two processes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        build_scenes(folder / "tfds", "tiny")
        runs = [train(folder, count, each) for count, each in LAYOUTS]
        kills = [
            kill_one(folder, victim, number, i)
            for number in (signal.SIGKILL, signal.SIGSTOP)
            for victim in (0, 1)
            for i in range(arguments.kills)
        ]
    yardstick = runs[0]
    for run in runs:
        errors = [abs(ours / theirs - 1) for ours, theirs in zip(run["losses"], yardstick["losses"], strict=True)]
        run |= {"first": errors[0], "last": errors[-1], "largest": max(errors)}
        run["same_samples"] = run["samples"] == yardstick["samples"]
        print(
            f"| {run['processes']} x {run['devices_each']} | {run['losses'][0]:.9f} | {errors[0]:.1e} | "
            f"{run['losses'][-1]:.7f} | {errors[-1]:.1e} | {max(errors):.1e} | "
            f"{'yes' if run['same_samples'] else 'NO'} |"
        )
    for kill in kills:
        print(kill)
    record = {"machine": describe(), "date": time.strftime("%Y-%m-%d"), "runs": runs, "kills": kills}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
