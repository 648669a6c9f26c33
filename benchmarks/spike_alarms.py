"""False alarms of the rule for loss spikes (`clipjax/training/health.py`) on recorded runs that had no spike.

    python -m benchmarks.spike_alarms --data=data --output=benchmarks/results/spike_alarms.json

Trains three runs of 2,000 steps of the quickstart's model, which differ in batch, learning rate and loss, logs every
loss, and replays each through the rule at several numbers of standard deviations. The second stands still at first, as
its learning rate is ten times too high. The losses are kept, so that a later rule can be tried on the same runs
(`--recorded=FILE` in place of training). `--data`: what `make quickstart` has made.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from clipjax.monitoring.run_record import versions
from clipjax.training import health

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 2000
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "batch 16, learning rate 2e-3": (16, ("--config.optim.learning_rate=2e-3",)),
    "batch 32, learning rate 1e-2": (32, ("--config.optim.learning_rate=1e-2",)),
    "batch 32, sigmoid loss": (
        32,
        ("--config.loss.kind=sigmoid", "--config.model.init_logit_bias=-10", "--config.model.init_logit_scale=10"),
    ),
}
"""Batch and overrides of the quickstart."""
CONFIG = """
import runpy

def get_config():
    config = runpy.run_path(QUICKSTART)["get_config"]()
    config.eval.tasks = {}
    return config
"""
SIGMAS = (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)


def count_alarms(losses: Sequence[float], sigmas: float) -> int:
    """Return how many losses of a run the rule calls spikes."""

    def step(state: health.Health, loss: jax.Array) -> tuple[health.Health, jax.Array]:
        return health.observe(state, loss, jnp.isfinite(loss), sigmas)

    spikes = jax.jit(lambda values: jax.lax.scan(step, health.init_health(), values)[1])
    return int(spikes(jnp.asarray(losses, jnp.float32)).sum())


def record(data: pathlib.Path, batch: int, options: Sequence[str]) -> list[float]:
    """Train a run; return the loss of each step, as float32."""
    with tempfile.TemporaryDirectory() as folder:
        workdir, config = pathlib.Path(folder) / "run", pathlib.Path(folder) / "config.py"
        config.write_text(CONFIG.replace("QUICKSTART", repr(str(ROOT / "configs" / "quickstart.py"))))
        command = [
            *(sys.executable, "-m", "clipjax", "train", f"--config={config}"),
            *(f"--workdir={workdir}", f"--config.data.tfds_dir={data}"),
            f"--config.data.tokenizer=sentencepiece:{data / 'scenes.model'}",
            *(f"--config.total_examples={STEPS * batch}", f"--config.global_batch_size={batch}"),
            *(f"--config.log.every_examples={batch}", "--config.recovery.spike_sigmas=none", *options),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
    if len(losses) != STEPS:
        raise RuntimeError(f"{len(losses)} losses were logged in place of {STEPS}")
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("data"))
    parser.add_argument("--recorded", type=pathlib.Path, help="an earlier --output, replayed in place of training")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    options = parser.parse_args()
    if options.recorded:
        result: dict[str, Any] = json.loads(options.recorded.read_text())
    else:
        losses = {name: record(options.data.absolute(), *run) for name, run in RUNS.items()}
        result = {"date": time.strftime("%Y-%m-%d"), **machine.describe(), **versions(), "losses": losses}
    result["alarms"] = {
        f"{sigmas:g}": {name: count_alarms(losses, sigmas) for name, losses in result["losses"].items()}
        for sigmas in SIGMAS
    }
    if options.output:
        shown = {**result, "losses": {k: [float(np.float32(x)) for x in v] for k, v in result["losses"].items()}}
        options.output.write_text(json.dumps(shown) + "\n")
    for sigmas, alarms in result["alarms"].items():
        print(f"{sigmas:>3} standard deviations: {alarms}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
