"""Time of one training step beside open_clip's, alternating in one run on one machine.

    python benchmarks/step_speed.py --peer_python=PEER_VENV/bin/python --output=benchmarks/results/step_speed.json

Both train the model of `configs/emoji.py` (towers of width 128 and depth 6, 64 pixels in patches of 8, 32 tokens of
CLIP's vocabulary) on one random batch that is already in memory: forward, loss, backward, AdamW. Each contestant is a
process of its own that waits while the other works; open_clip's runs with bfloat16 autocast, its faster way on this
kind of CPU, ours as its config says. The peer's environment needs torch and open_clip_torch.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the peer's environment has no clipjax

from benchmarks import machine  # noqa: E402

OURS, PEER = "clipjax", "open_clip"
SETTLE = 2  # uncounted updates at the start of a round: caches and clocks have forgotten the program


def clipjax_step(batch_size: int) -> tuple[Callable[[], float], dict]:
    """One update by the step that `clipjax train` runs."""
    import jax
    import numpy as np

    from clipjax.runtime import sharding
    from clipjax.training.program import build_program
    from configs.emoji import get_config

    config = get_config()
    config.global_batch_size = batch_size
    mesh = sharding.make_mesh(config.mesh)
    program = build_program(config, mesh, num_samples=1)
    jax.set_mesh(mesh)
    state = jax.jit(program.init_state)(jax.random.key(0))
    step = jax.jit(program.train_step, donate_argnums=0)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (batch_size, 64, 64, 3)).astype(np.uint8),
        "tokens": rng.integers(1, 49_407, (batch_size, 32)).astype(np.int32),
        "skip_reason": np.full(batch_size, -1, np.int32),
    }

    def update() -> float:
        nonlocal state
        state, metrics = step(state, sharding.global_batch(mesh, batch))
        return float(metrics["loss"])

    model = config.model
    about = {
        "jax": jax.__version__,
        "compute_dtype": model.compute_dtype.value,
        "matmul_dtype": model.matmul_dtype.value,
    }
    return update, about | {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}


def open_clip_step(batch_size: int) -> tuple[Callable[[], float], dict]:
    """One update as open_clip's trainer does it."""
    import torch

    # The CPU build of torch has no compiled torchvision beside it, which open_clip imports for its transforms only.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    model = CLIP(
        128,
        CLIPVisionCfg(layers=6, width=128, head_width=32, patch_size=8, image_size=64),
        CLIPTextCfg(context_length=32, vocab_size=49_408, width=128, heads=4, layers=6),
        quick_gelu=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    loss_function = ClipLoss()
    image = torch.randn(batch_size, 3, 64, 64)
    tokens = torch.randint(1, 49_407, (batch_size, 32))

    def update() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_function(*model(image, tokens))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss.item()

    about = {"open_clip": open_clip.__version__, "torch": torch.__version__, "compute_dtype": "bfloat16 autocast"}
    return update, about | {"parameters": sum(p.numel() for p in model.parameters())}


def contestant(name: str, batch_size: int) -> None:
    """First tell who is running; then answer each line N of the input with the seconds of N updates."""
    update, about = {OURS: clipjax_step, PEER: open_clip_step}[name](batch_size)
    update()  # compiles
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        for _ in range(SETTLE):
            update()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            loss = update()
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(seconds | {"loss": loss}), flush=True)


def start(name: str, python: str, batch_size: int) -> tuple[subprocess.Popen, dict]:
    process = subprocess.Popen(
        [python, __file__, f"--contestant={name}", f"--batch_size={batch_size}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Large pages for both, as the console script asks for. Torch's threads must not spin while the other works.
        env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OMP_WAIT_POLICY": "passive"},
    )
    return process, ask(process)


def ask(process: subprocess.Popen, steps: int | None = None) -> dict:
    assert process.stdin is not None and process.stdout is not None
    if steps is not None:
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args} ended early; its error stands above")
    return json.loads(line)


def compare(arguments: argparse.Namespace) -> dict:
    """Alternate, and say how many times as many pairs per second ours does."""
    pythons = {OURS: sys.executable, PEER: arguments.peer_python}
    results: dict = {"about": {}, "rounds": {OURS: [], PEER: []}}
    processes = {}
    for name, python in pythons.items():
        processes[name], results["about"][name] = start(name, python, arguments.batch_size)
    for process in processes.values():
        ask(process, 1)
    for _ in range(arguments.rounds):
        for name, process in processes.items():
            results["rounds"][name].append(ask(process, arguments.steps))
    pairs = arguments.steps * arguments.batch_size
    for name, process in processes.items():
        process.kill()
        rounds = results["rounds"][name]
        results[f"{name}_pairs_per_second"] = pairs / statistics.median(r["seconds"] for r in rounds)
        results[f"{name}_pairs_per_cpu_second"] = pairs / statistics.median(r["cpu_seconds"] for r in rounds)
    results["ratio"] = results[f"{OURS}_pairs_per_second"] / results[f"{PEER}_pairs_per_second"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", help="interpreter of an environment with torch and open_clip_torch")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="updates in a round")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--contestant", choices=(OURS, PEER), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contestant(arguments.contestant, arguments.batch_size)
        return
    if not arguments.peer_python:
        parser.error("--peer_python=PYTHON is missing: the peer has an environment of its own")
    results = {
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d"),
        "batch_size": arguments.batch_size,
        "steps_per_round": arguments.steps,
        **compare(arguments),
    }
    for name in (OURS, PEER):
        print(f"{name:10} {results[f'{name}_pairs_per_second']:7.1f} pairs/s   {results['about'][name]}")
    print(f"ratio      {results['ratio']:7.2f}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
