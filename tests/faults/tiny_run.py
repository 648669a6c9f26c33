"""A run of 200 steps in seconds, to be broken; the same run undisturbed; the comparison of the two, bit by bit."""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tests.commands import QUICK_COMPILE

ROOT = pathlib.Path(__file__).parents[2]
LAST_STEP, SAVE_EVERY = 200, 20
TIMINGS = ("examples_per_second", "input_wait_fraction", "seconds_left", "goodput", "wall_seconds", "ranks")
"""Fields of `metrics.jsonl` that depend on the clock."""

CONFIG = '''
"""A run of 200 steps with a save every 20, a moving average, and an evaluation in the middle and at the end."""
from clipjax.config import *

def get_config():
    return Config(
        seed=7,
        total_examples=1600,
        warmup_examples=80,
        global_batch_size=8,
        compile_cache=CACHE,
        model=ModelConfig(
            embed_dim=8,
            image=ViTConfig(image_size=16, patch_size=8, width=8, depth=1, num_heads=2, mlp_dim=16),
            text=TextTransformerConfig(context_length=12, vocab_size=259, width=8, depth=1, num_heads=2, mlp_dim=16),
            compute_dtype=Dtype.FLOAT32,
        ),
        optim=OptimConfig(learning_rate=1e-3, ema_decay=0.9),
        data=DataConfig(train=TRAIN, tokenizer="bytes", num_threads=2),
        eval=EvalConfig(
            every_examples=800,
            batch_size=8,
            tasks={"pairs": TaskConfig(kind=TaskKind.RETRIEVAL, source=TRAIN, max_examples=16)},
        ),
        checkpoint=CheckpointConfig(every_examples=160, keep_last=2),
        log=LogConfig(every_examples=8, tensorboard=False),
    )
'''


def write_pairs(path: pathlib.Path, *, first: int = 0, count: int = 64) -> None:
    """Write a tar of pictures of one colour, each with its caption."""
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            colour = np.random.default_rng(i).integers(0, 256, 3, np.uint8)
            picture = io.BytesIO()
            Image.fromarray(np.broadcast_to(colour, (18, 18, 3))).save(picture, "PNG")
            for suffix, content in (("png", picture.getvalue()), ("txt", f"colour {i}".encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@dataclass(frozen=True)
class TinyRun:
    """The files of a run that is going to be broken.

    Attributes:
        folder: of the config, the data and the compile cache; each workdir lies in it.
        options: overrides of the config.
    """

    folder: pathlib.Path
    options: tuple[str, ...] = ()

    def write(self) -> None:
        """Write config and data."""
        self.shard.parent.mkdir(parents=True, exist_ok=True)
        cache = self.folder / "compiled"
        cache.mkdir(mode=0o700, exist_ok=True)
        write_pairs(self.shard)
        text = CONFIG.replace("TRAIN", repr(str(self.shard))).replace("CACHE", repr(str(cache)))
        (self.folder / "config.py").write_text(text)

    @property
    def shard(self) -> pathlib.Path:
        """The file of all its pairs."""
        return self.folder / "data" / "train.tar"

    def workdir(self, name: str) -> pathlib.Path:
        """Return a workdir."""
        return self.folder / name

    def command(self, name: str, *options: str) -> list[str]:
        """Return the arguments of `clipjax` that train in a workdir."""
        config, workdir = self.folder / "config.py", self.workdir(name)
        return ["train", f"--config={config}", f"--workdir={workdir}", *self.options, *options]

    def start(
        self,
        name: str,
        *options: str,
        prefix: tuple[str, ...] = ("-m", "clipjax"),
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen:
        """Start it in a session of its own, so that a signal to its group reaches it and its workers alone."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
        cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        fixed = {"JAX_PLATFORMS": "cpu", "NPROC": "2", "XLA_FLAGS": QUICK_COMPILE, "PYTHONPATH": str(ROOT)}
        with (self.folder / f"{name}.out").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *prefix, *self.command(name, *options)],
                env={**kept, **cache, **fixed, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def finish(self, name: str, *options: str, timeout: float = 300) -> None:
        """Train to the end, which must be a success."""
        process = self.start(name, *options)
        with ended(process):
            code = process.wait(timeout)
        assert code == 0, self.output(name)

    def output(self, name: str) -> str:
        """Return everything that the starts in a workdir have printed."""
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def first_steps(self, name: str) -> list[int]:
        """Return the step at which each start went on."""
        return [int(step) for step in re.findall(rf"^step (\d+) of {LAST_STEP}", self.output(name), re.MULTILINE)]

    def logged_step(self, name: str) -> int:
        """Return the last step in the metrics."""
        lines = read_lines(self.workdir(name) / "metrics.jsonl")
        return max((line["step"] for line in lines), default=0)


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Make sure that a process and its workers are gone after the block."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def wait_until(condition: Any, *, seconds: float, process: subprocess.Popen) -> bool:
    """Wait until a condition holds or the process has ended; return whether it holds."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return bool(holds)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the whole lines of a JSON lines file; none if there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # or it is just gone: a start that looks whether it can be written
        return []
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def losses(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the metrics without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_lines(workdir / "metrics.jsonl")
    ]


def complete_steps(workdir: pathlib.Path) -> list[int]:
    """Return the steps that have their manifest, by the files alone."""
    return sorted(
        int(path.parent.name) for path in workdir.glob("checkpoints/[0-9]*/manifest.json") if path.parent.name.isdigit()
    )


def final_arrays(workdir: pathlib.Path, step: int = LAST_STEP) -> dict[str, np.ndarray]:
    """Return all arrays of a checkpoint by their path, read by Orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    found: dict[str, np.ndarray] = {}
    for group in ("params", "train", "ema"):
        path = workdir / "checkpoints" / str(step) / group
        with warnings.catch_warnings(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            warnings.simplefilter("ignore")  # where the arrays lay is of no interest
            tree = reader.restore(path.absolute())
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
            typed = isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            found[group + jax.tree_util.keystr(key)] = np.asarray(jax.random.key_data(leaf) if typed else leaf)
    return found


def differences(run: TinyRun, name: str, undisturbed: str) -> list[str]:
    """Return everything in which a run that was broken differs from the undisturbed one."""
    ours, theirs = run.workdir(name), run.workdir(undisturbed)
    found = []
    mine, other = losses(ours), losses(theirs)
    if mine != other:
        first = next(
            (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other))
        )
        found.append(
            f"metrics.jsonl differs from line {first + 1} on: {mine[first : first + 1]} and {other[first : first + 1]}"
        )
    tasks = [json.loads((workdir / "results.json").read_text())["tasks"] for workdir in (ours, theirs)]
    if tasks[0] != tasks[1]:
        found.append(f"results.json differs: {tasks}")
    arrays, others = final_arrays(ours), final_arrays(theirs)
    if arrays.keys() != others.keys():
        found.append(f"leaves of the state differ: {sorted(arrays.keys() ^ others.keys())}")
    found += [path for path in arrays.keys() & others.keys() if arrays[path].tobytes() != others[path].tobytes()]
    return found
