"""A tiny run: the `tiny` scenes, a byte tokenizer, a model that compiles in seconds."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.commands import QUICK_COMPILE

TINY = '''
"""A run of seconds, for tests."""
from clipjax.config import *

def get_config():
    zero_shot = dict(kind=TaskKind.ZERO_SHOT, classes="scenes", templates="plain", max_examples=64)
    return Config(
        seed=3,
        total_examples=384,
        warmup_examples=64,
        global_batch_size=32,
        model=ModelConfig(
            embed_dim=16,
            image=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
            text=TextTransformerConfig(context_length=32, vocab_size=260, width=16, depth=1, num_heads=2),
            compute_dtype=Dtype.FLOAT32,
        ),
        optim=OptimConfig(learning_rate=1e-3, ema_decay=0.9),
        data=DataConfig(train="tfds:scenes/tiny/train", tfds_dir=TFDS_DIR, tokenizer="bytes"),
        eval=EvalConfig(
            batch_size=32,
            every_examples=192,
            tasks={
                "scenes/val": TaskConfig(source="tfds:scenes/tiny/val", **zero_shot),
                "scenes/pairs": TaskConfig(kind=TaskKind.RETRIEVAL, source="tfds:scenes/tiny/val", max_examples=64),
            },
        ),
        checkpoint=CheckpointConfig(every_examples=96, keep_last=2, best_metric="scenes/val:top1"),
        log=LogConfig(every_examples=32, tensorboard=False),
    )
'''


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The config file of the tiny run; its data is made first."""
    from clipjax.data.scenes.builder import build_scenes

    folder = tmp_path_factory.mktemp("tiny")
    build_scenes(folder / "tfds", "tiny")
    path = folder / "config.py"
    path.write_text(TINY.replace("TFDS_DIR", repr(str(folder / "tfds"))))
    return path


@pytest.fixture(scope="session")
def cache(compile_cache: pathlib.Path) -> dict[str, str]:
    """Environment of processes that share compiled steps."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(compile_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def environment(**changes: str) -> dict[str, str]:
    """One device, two threads, one set of compiler flags: what bitwise comparisons need to be told."""
    flags = f"{QUICK_COMPILE} {changes.pop('XLA_FLAGS', '')}".strip()
    return {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2", "XLA_FLAGS": flags, **changes}


def start(*arguments: str, **changes: str) -> subprocess.Popen:
    """A front door as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "clipjax", *arguments],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: str, expect: int = 0, **changes: str) -> str:
    """Run a front door to its end; its output."""
    process = start(*arguments, **changes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expect, output
    return output
