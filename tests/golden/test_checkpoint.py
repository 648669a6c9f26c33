"""Checkpoints that earlier versions wrote still open, evaluate and train on as they did then.

    python -m tests.golden.test_checkpoint NAME        # writes golden files of the newest format

`NAME/` is the workdir of a run that SIGTERM stopped; `NAME.json` holds what the same code then made of it.
`checkpoint_before_layout` is of format 1, without manifest, health and digests of its data; `checkpoint_format_2` has
all of them. They are kept for ever; a new format gets a new name. The data is made here, so no other file is needed.
"""

import hashlib
import io
import json
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path(__file__).parent
NAMES = ("checkpoint_before_layout", "checkpoint_format_2")
TRAIN = ("train", "--config=config.py", "--workdir=run")
EVAL = ("eval", "--checkpoint=run", "--output=evaluated.json")
TIMINGS = ("examples_per_second", "input_wait_fraction", "seconds_left", "goodput", "wall_seconds")
STOP_AFTER = 7
"""Steps in the log when SIGTERM is sent."""
XLA_FLAGS = "--xla_backend_optimization_level=0"
"""Halves the time to compile, which is most of the test's."""
TOLERANCE, GRADIENT_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-5, 5e-5, 1e-9
"""CPUs round differently: with the instructions of SSE4.2, AVX2 and AVX-512, and with and without optimization, the
metrics of the resumed steps are at most 4e-6 apart (relative), norms of gradients 9e-6, and the results of the tasks
are equal. The last learning rates are near 0, where their own rounding needs an absolute tolerance."""
EMBED_TOLERANCE = 1e-6
"""Absolute, of unit vectors: a few roundings of float32."""
NEAR_TIE = 1e-5
"""Of similarities: roundings of ten products within `EMBED_TOLERANCE`."""

CONFIG = '''
"""A tiny run with what a checkpoint can hold: towers of different widths, AdamW's moments, a moving average."""
from clipjax.config import *

def get_config():
    return Config(
        seed=5,
        total_examples=384,
        warmup_examples=64,
        global_batch_size=16,
        model=ModelConfig(
            embed_dim=10,
            image=ViTConfig(image_size=16, patch_size=8, width=8, depth=2, num_heads=2, mlp_dim=16),
            text=TextTransformerConfig(
                context_length=20, vocab_size=259, width=6, depth=2, num_heads=3, mlp_dim=16
            ),
            compute_dtype=Dtype.FLOAT32,
        ),
        optim=OptimConfig(learning_rate=3e-3, ema_decay=0.9, max_grad_norm=1.0),
        data=DataConfig(train="train.tar", tokenizer="bytes"),
        eval=EvalConfig(
            every_examples=192,
            batch_size=16,
            tasks={
                "colours": TaskConfig(source="val.tar", classes="classes.json", templates="plain"),
                "pairs": TaskConfig(kind=TaskKind.RETRIEVAL, source="val.tar"),
            },
        ),
        checkpoint=CheckpointConfig(keep_last=1),
        log=LogConfig(every_examples=16, tensorboard=False),
    )
'''
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "white": (235, 235, 235)}


def make_picture(name: str, top: str, bottom: str) -> np.ndarray:
    """Return 20 x 20 pixels: one colour over another, with noise that is fixed by the name."""
    digests = (hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(38))
    noise = np.frombuffer(b"".join(digests), np.uint8)[:1200].reshape(20, 20, 3) % 20
    pixels = np.empty((20, 20, 3), np.uint8)
    pixels[:10], pixels[10:] = COLOURS[top], COLOURS[bottom]
    return pixels + noise


def make_pairs(prefix: str, count: int) -> Iterator[tuple[str, np.ndarray, str, int]]:
    """Yield name, pixels, caption and class (the upper colour) of pairs."""
    colours = list(COLOURS)
    for i in range(count):
        top, bottom = colours[i % 4], colours[(i // 4 + i) % 4]
        name = f"{prefix}{i:03d}"
        yield name, make_picture(name, top, bottom), f"{top} over {bottom}", i % 4


def write_inputs(folder: pathlib.Path) -> None:
    """Write the config and the data that it names."""
    (folder / "config.py").write_text(CONFIG)
    (folder / "classes.json").write_text(json.dumps(list(COLOURS)))
    for prefix, count in (("train", 64), ("val", 32)):
        with tarfile.open(folder / f"{prefix}.tar", "w") as tar:
            for name, pixels, caption, label in make_pairs(prefix, count):
                picture = io.BytesIO()
                Image.fromarray(pixels).save(picture, "PNG")
                for suffix, content in (("png", picture.getvalue()), ("txt", caption.encode()), ("cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def start(folder: pathlib.Path, *arguments: str) -> subprocess.Popen:
    """Start a command of this repository's code in a folder, on one device."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    fixed = {"JAX_PLATFORMS": "cpu", "NPROC": "2", "XLA_FLAGS": XLA_FLAGS, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "clipjax", *arguments],
        cwd=folder,
        env=kept | fixed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: pathlib.Path, *arguments: str) -> None:
    """Run a command to its end, which must be a success."""
    process = start(folder, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def read_log(workdir: pathlib.Path, after: int) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl after a step, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["step"] > after]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in kept]


def embed(workdir: pathlib.Path) -> dict[str, Any]:
    """Return what `clipjax.load` makes of the first four pairs of the evaluation."""
    import clipjax

    model = clipjax.load(workdir)
    pairs = list(make_pairs("val", 4))
    return {
        "logit_scale": model.logit_scale,
        "image_embed": model.encode_image([pixels for _, pixels, _, _ in pairs]).tolist(),
        "text_embed": model.encode_text([caption for _, _, caption, _ in pairs]).tolist(),
    }


def near_ties(workdir: pathlib.Path) -> dict[str, float]:
    """Return by recall the share of queries whose own item is a near tie with that at the cut.

    Each of the captions stands twice, and an image's own one and its twin are a rounding apart or equal, as the CPU's
    instructions have it: it may rank either before the other.
    """
    import clipjax

    model = clipjax.load(workdir)
    _, pictures, captions, _ = zip(*make_pairs("val", 32), strict=True)
    images, texts = np.asarray(model.encode_image(pictures), float), np.asarray(model.encode_text(captions), float)
    similarity = images @ texts.T
    shares = {}
    for name, rows in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        others = np.sort(np.where(np.eye(len(rows), dtype=bool), -np.inf, rows))[:, ::-1]
        for k in (1, 5, 10):
            shares[f"{name}_r{k}"] = float(np.mean(np.abs(np.diag(rows) - others[:, k - 1]) < NEAR_TIE))
    return shares


def assert_close(ours: Any, golden: Any, ties: dict[str, float], path: str = "") -> None:
    """Compare nested values: all that was there then must be there now, whole numbers equal, others nearly."""
    if isinstance(golden, dict):
        for name, value in golden.items():
            assert name in ours, f"{path}/{name} is missing"
            assert_close(ours[name], value, ties, f"{path}/{name}")
    elif isinstance(golden, list):
        assert len(ours) == len(golden), path
        for i, (one, other) in enumerate(zip(ours, golden, strict=True)):
            assert_close(one, other, ties, f"{path}[{i}]")
    elif isinstance(golden, float):
        relative = GRADIENT_TOLERANCE if "grad_norm" in path else TOLERANCE
        absolute = ties.get(path.rpartition("/")[2], 0.0) + ABSOLUTE_TOLERANCE
        assert ours == pytest.approx(golden, rel=relative, abs=absolute), path
    else:
        assert ours == golden, path


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """The name of the golden files."""
    return request.param


@pytest.fixture(scope="module")
def golden(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@pytest.fixture
def folder(name: str, tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with the data and a copy of the stopped run."""
    write_inputs(tmp_path)
    shutil.copytree(FOLDER / name, tmp_path / "run")
    return tmp_path


@pytest.mark.newest
def test_it_opens_and_embeds_as_then(name, golden):
    ours = embed(FOLDER / name)
    assert ours["logit_scale"] == pytest.approx(golden["embedded"]["logit_scale"], rel=EMBED_TOLERANCE)
    for name in ("image_embed", "text_embed"):
        np.testing.assert_allclose(ours[name], golden["embedded"][name], rtol=0, atol=EMBED_TOLERANCE, err_msg=name)


@pytest.mark.process
def test_it_evaluates_as_then(golden, folder):
    run(folder, *EVAL)
    evaluated = json.loads((folder / "evaluated.json").read_text())["tasks"]
    assert_close(evaluated, golden["evaluated"], near_ties(folder / "run"))


@pytest.mark.process
def test_it_trains_on_as_then(golden, folder):
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    run(folder, *TRAIN)
    assert (folder / "run" / "metrics.jsonl").read_bytes().startswith(before)
    ties = near_ties(folder / "run")
    assert max(ties.values()) <= 0.25, "the recalls shall say something"
    assert_close(read_log(folder / "run", golden["step"]), golden["resumed"], ties)
    assert_close(json.loads((folder / "run" / "results.json").read_text())["tasks"], golden["results"], ties)


def stop_part_way(folder: pathlib.Path) -> int:
    """Start the run, stop it with SIGTERM, and return the step that it saved."""
    process, log = start(folder, *TRAIN), folder / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= STOP_AFTER):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, output
    return max(int(path.name) for path in (folder / "run" / "checkpoints").iterdir() if path.name.isdigit())


def main(name: str, folder: pathlib.Path) -> None:
    """Write the golden files of a name, by way of an empty folder."""
    workdir = FOLDER / name
    write_inputs(folder)
    step = stop_part_way(folder)
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(folder / "run" / "checkpoints", workdir / "checkpoints")
    shutil.copyfile(folder / "run" / "metrics.jsonl", workdir / "metrics.jsonl")
    first = json.loads((folder / "run" / "run.json").read_text())["starts"][0]
    run(folder, *EVAL)
    evaluated = json.loads((folder / "evaluated.json").read_text())["tasks"]
    run(folder, *TRAIN)
    record = {
        "command": shlex.join(["clipjax", *TRAIN]),
        "stopped": f"by SIGTERM once {STOP_AFTER} lines were logged",
        "machine": platform.machine(),
        "versions": first["versions"],
        "step": step,
        "embedded": embed(workdir),
        "evaluated": evaluated,
        "resumed": read_log(folder / "run", step),
        "results": json.loads((folder / "run" / "results.json").read_text())["tasks"],
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{workdir}: step {step}")


if __name__ == "__main__":
    import tempfile

    if sys.argv[1:] != [NAMES[-1]]:
        sys.exit(f"name the golden files to write: {NAMES[-1]}, the newest; older ones stay as they are")
    with tempfile.TemporaryDirectory() as place:
        main(NAMES[-1], pathlib.Path(place))
