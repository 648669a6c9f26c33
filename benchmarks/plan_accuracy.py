"""Accuracy of `clipjax plan`: each step compiled for a described GPU, then run on the real one.

    python -m benchmarks.plan_accuracy --chip=h200 --output=benchmarks/results/plan_accuracy_h200.json

Needs one GPU of that kind. All steps are first compiled for `CHIP:1` in processes that see no GPU, side by side; then
one after the other with `--topology=here --measure=yes`. What a described GPU cannot compile (cuDNN's attention) is run
only. Prints predicted over measured, peak memory and seconds.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

CASES = {
    "ViT-B/32, batch 1024": ("vit_b32,batch=1024", "--config.model.remat=none"),
    "ViT-B/32, batch 1024, products kept": ("vit_b32,batch=1024", "--config.model.remat=dots"),
    "ViT-B/32, batch 1024, products kept, cuDNN attention": (
        "vit_b32,batch=1024",
        "--config.model.remat=dots",
        "--config.model.attention=cudnn",
    ),
    "ViT-B/16, batch 512": ("vit_b16,batch=512",),
    "ViT-B/16, batch 512, cuDNN attention": ("vit_b16,batch=512", "--config.model.attention=cudnn"),
    "ViT-L/14, batch 256": ("vit_l14,batch=256", "--config.mesh.fsdp=1", "--config.model.remat=full"),
    "ViT-L/14, batch 256, products kept": (
        "vit_l14,batch=256",
        "--config.mesh.fsdp=1",
        "--config.model.remat=dots",
    ),
    "ViT-L/14, batch 256, products kept, cuDNN attention": (
        "vit_l14,batch=256",
        "--config.mesh.fsdp=1",
        "--config.model.remat=dots",
        "--config.model.attention=cudnn",
    ),
}


def command(case: str, topology: str, output: pathlib.Path, *more: str) -> list[str]:
    config, *overrides = CASES[case]
    config = f"--config=configs/clip.py:{config}"
    return [
        sys.executable, "-m", "clipjax", "plan", config, f"--topology={topology}", f"--output={output}",
        *overrides, *more,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", required=True, help="as clipjax plan calls it")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    from benchmarks import machine

    folder = pathlib.Path(tempfile.mkdtemp())
    planned = [case for case in arguments.cases if "cuDNN" not in case]
    paths = {case: (folder / f"{i}.plan.json", folder / f"{i}.here.json") for i, case in enumerate(arguments.cases)}
    blind = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(command(case, f"{arguments.chip}:1", paths[case][0]), env=blind, stdout=subprocess.DEVNULL)
        for case in planned
    ]
    for process in processes:
        process.wait()
    rows = []
    for case in arguments.cases:
        ran = subprocess.run(command(case, "here", paths[case][1], "--measure=yes"), check=False)
        row = {"case": case, "command": " ".join(command(case, "here", pathlib.Path("PLAN"), "--measure=yes")[1:])}
        if ran.returncode == 0:
            here = json.loads(paths[case][1].read_text())
            row |= {"here": here, "measured": here["measured"]}
        if paths[case][0].exists():
            row["described"] = json.loads(paths[case][0].read_text())
        rows.append(row)
        print(describe(row), flush=True)
        about = {"machine": machine.describe(), "date": time.strftime("%Y-%m-%d"), "chip": arguments.chip}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def describe(row: dict) -> str:
    if "measured" not in row:
        return f"{row['case']}: did not run"
    measured = row["measured"]
    text = f"{row['case']}: {1e3 * measured['step_seconds']:.1f} ms, MFU {measured['mfu']:.1%}, "
    text += f"peak {measured['peak_hbm_bytes']:,}"
    for name in ("described", "here"):
        if plan := row.get(name):
            peak = plan["peak_hbm_bytes"] / measured["peak_hbm_bytes"]
            seconds = plan["predicted_step_seconds"] / measured["step_seconds"]
            text += f"; {name}: memory x {peak:.3f}, seconds x {seconds:.2f}"
    return text


if __name__ == "__main__":
    main()
