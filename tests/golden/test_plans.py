"""What a step costs, by the TPU compiler, is no worse than when it was written down: `plans.json`, a digest per preset.

    python -m tests.golden.test_plans [NAME ...]        # writes the digests anew, after a change that is meant

With the versions that the file names, numbers repeat exactly; another compiler schedules a little differently.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections import defaultdict

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).with_name("plans.json")
PRESETS = ("vit_b32", "vit_b16", "vit_l14", "vit_l14_336", "vit_h14", "so400m")
RUNS = {
    **{preset: (f"--config=configs/clip.py:{preset}", "--topology=v5e:16x16") for preset in PRESETS},
    "small": (
        "--config=configs/clip.py:tiny,batch=512",
        "--topology=v5e:2x2",
        "--config.mesh.fsdp=2",
        "--config.microbatch_size=None",
        "--config.model.compute_dtype=bfloat16",
        "--config.model.remat=dots",
        "--config.model.image.width=128",
        "--config.model.image.depth=2",
        "--config.model.text.width=128",
        "--config.model.text.depth=2",
    ),
}
SLACK = 1.01
"""Between versions of the compiler; sums of bytes that a program has to send do not depend on them at all."""


def digest(name: str) -> dict:
    """Of the step of a run, compiled now."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "plan.json"
        command = [sys.executable, "-m", "clipjax", "plan", *RUNS[name], f"--output={output}"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        plan = json.loads(output.read_text())
    return summary(plan)


def summary(plan: dict) -> dict:
    """What of a plan is kept."""
    sent: dict[str, int] = defaultdict(int)
    for one in plan["collectives"]:
        sent[f"{one['kind']} {one['axis']} {'hidden' if one['overlapped'] else 'exposed'}"] += one["bytes"]
    return {
        "peak_hbm_bytes": plan["peak_hbm_bytes"],
        "sent_bytes": dict(sorted(sent.items())),
        "own_microseconds": round(1e6 * (plan["predicted_seconds"]["compute"] + plan["predicted_seconds"]["kernels"])),
        "versions": {name: plan["versions"][name] for name in ("jax", "libtpu")},
    }


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")
@pytest.mark.parametrize("name", ["small", *(pytest.param(preset, marks=pytest.mark.slow) for preset in PRESETS)])
@pytest.mark.process
@pytest.mark.compile_ahead
def test_a_step_costs_no_more_than_it_did(name):
    known, now = json.loads(GOLDEN.read_text())[name], digest(name)
    remedy = f"if that is meant, python -m tests.golden.test_plans {name}\nbefore: {known}\nnow: {now}"
    assert now["peak_hbm_bytes"] <= SLACK * known["peak_hbm_bytes"], f"more memory; {remedy}"
    assert now["own_microseconds"] <= SLACK * known["own_microseconds"], f"more computation; {remedy}"
    for what in now["sent_bytes"].keys() | known["sent_bytes"].keys():
        of_kind = what.rpartition(" ")[0]
        before, after = (
            sum(size for kind, size in plan["sent_bytes"].items() if kind.startswith(of_kind)) for plan in (known, now)
        )
        assert after <= SLACK * before, f"more sent by {of_kind}; {remedy}"
    exposed_before, exposed_now = (
        sum(size for kind, size in plan["sent_bytes"].items() if kind.endswith("exposed")) for plan in (known, now)
    )
    assert exposed_now <= SLACK * exposed_before, f"less is hidden; {remedy}"


def main(names: list[str]) -> None:
    """Write the digests of these runs, or of all."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name in names or RUNS:
        golden[name] = digest(name)
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
        print(name, golden[name], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
