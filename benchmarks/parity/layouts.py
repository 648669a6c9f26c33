"""`clipjax eval` on the shards of `clip_benchmark.py`, on devices that are simulated, and in several processes."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

BATCH = 256
"""Over all devices; the number of examples of no set is a multiple of it, nor of the devices."""

CONFIG = """
from clipjax.config import *

def get_config():
    folder = {folder!r}
    labelled = {{"source": folder + "/labelled/test/*.tar"}}
    pairs = {{"kind": TaskKind.RETRIEVAL, "captions_by_line": True}}
    tasks = {{
        "labelled": TaskConfig(classes="scenes", templates="scenes", **labelled),
        "probe": TaskConfig(
            kind=TaskKind.LINEAR_PROBE,
            features=FeatureKind.EMBEDDING,
            train_source=folder + "/labelled/train/*.tar",
            **labelled,
        ),
    }}
    tasks |= {{name: TaskConfig(source=f"{{folder}}/{{name}}/test/*.tar", **pairs) for name in {retrieval!r}}}
    return Config(eval=EvalConfig(tasks=tasks))
"""


def evaluate(
    checkpoint: pathlib.Path,
    folder: pathlib.Path,
    retrieval: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    devices: int = 1,
    processes: int = 1,
) -> dict[str, Any]:
    """Return the results of `clipjax eval`: metrics under `tasks`, by name, and `details`. It computes in float32.

    Args:
        checkpoint: a workdir or a step.
        folder: of the data sets; config and results are written there, too.
        retrieval: names of the sets with captions.
        tasks: that are run; none: all.
        devices: simulated ones of each process.
        processes: on this machine.

    Raises:
        RuntimeError: the command fails, with what it printed.
    """
    config, output = folder / "tasks.py", folder / f"results_{devices}_{processes}.json"
    config.write_text(CONFIG.format(folder=str(folder), retrieval=tuple(retrieval)))
    chosen = (f"--tasks={','.join(tasks)}",) if tasks else ()
    run((*eval_command(checkpoint, config, output), *chosen), devices=devices, processes=processes)
    return json.loads(output.read_text())


def eval_command(checkpoint: pathlib.Path, config: pathlib.Path, output: pathlib.Path) -> tuple[str, ...]:
    """Return the arguments of an evaluation in float32."""
    command = ("eval", f"--checkpoint={checkpoint}", f"--tasks_from={config}", f"--output={output}")
    precision = ("--config.model.compute_dtype=float32", "--config.model.matmul_dtype=float32")
    return (*command, *precision, f"--config.eval.batch_size={BATCH}")


def run(arguments: Sequence[str], *, devices: int = 1, processes: int = 1) -> None:
    """Run a command of clipjax in a process, or several, of its own.

    Raises:
        RuntimeError: it fails, with what it printed.
    """
    places = [()]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        shared = (f"--coordinator={address}", f"--num_processes={processes}")
        places = [(*shared, f"--process_id={rank}") for rank in range(processes)]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with contextlib.ExitStack() as stack:
        commands = [[sys.executable, "-m", "clipjax", *arguments, *place] for place in places]
        started = [stack.enter_context(subprocess.Popen(each, env=environment, **pipes)) for each in commands]
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("\n\n".join(outputs))


def different_metrics(first: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return TASK:METRIC of all metrics that are not the same number, or on one side alone."""
    flat = [{f"{task}:{name}": value for task in side for name, value in side[task].items()} for side in (first, other)]
    return sorted(name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name))
