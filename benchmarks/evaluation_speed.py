"""Evaluation beside the bare encoder, and exact search beside a bare product of matrices, each pair in one run.

    python -m benchmarks.evaluation_speed [--rounds=5] [--output=benchmarks/results/evaluation_speed.json]

*Evaluation*: the zero-shot task on JPEGs in memory (decoding, resizing, embedding, scoring), beside the same compiled
encoder over the same batches that are already arrays. The ViT has width 384, depth 6 and 128 pixels in patches of 16,
so that the encoder is the larger part, as it is in real models. *Texts*: the prompts of 1,000 classes in 80 templates,
the first time and again. *Search*: a million embeddings of 512 numbers in a mapped file; one query, and 256, beside
NumPy's product of the same queries with the same rows in memory. Medians of the rounds, in which contestants alternate.
"""

import argparse
import datetime
import io
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from clipjax.config import Config, Dtype, TaskConfig, TextTransformerConfig, ViTConfig
from clipjax.data.sources import ArraySource
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.evals.encoder import Encoder
from clipjax.evals.runner import build_tasks
from clipjax.evals.search import nearest
from clipjax.models.clip import build_clip
from clipjax.runtime.sharding import make_mesh

IMAGES, BATCH, SIZE = 512, 64, 128
ROWS, WIDTH, QUERIES = 1_000_000, 512, 256


def seconds(work: Callable[[], Any]) -> float:
    """Return how long work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(rounds: int, **contestants: Callable[[], Any]) -> dict[str, float]:
    """Return the median seconds of each contestant; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            taken = seconds(work)
            if number:
                found[name].append(taken)
    return {name: statistics.median(each) for name, each in found.items()}


def make_config() -> Config:
    """Return a model whose encoder takes most of the time."""
    config = Config()
    config.model.embed_dim = 256
    config.model.image = ViTConfig(image_size=SIZE, patch_size=16, width=384, depth=6, num_heads=6)
    config.model.text = TextTransformerConfig(context_length=48, vocab_size=259, width=128, depth=2, num_heads=4)
    config.model.compute_dtype = Dtype.FLOAT32
    config.data.tokenizer = "bytes"
    config.eval.batch_size = BATCH
    config.eval.tasks = {"t": TaskConfig(source="memory", classes="imagenet", templates="plain")}
    return config


def pictures() -> list[bytes]:
    """Return JPEGs of photographs' size of file and shape: 256 x 256, with noise of few frequencies."""
    from PIL import Image

    rng, found = np.random.default_rng(0), []
    for _ in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8).astype(np.uint8))
        stream = io.BytesIO()
        small.resize((256, 256), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        found.append(stream.getvalue())
    return found


def evaluation(rounds: int) -> dict[str, Any]:
    """Return seconds of the task and of the bare encoder, and of texts."""
    config = make_config()
    source = ArraySource(pictures(), [()] * IMAGES, labels=list(np.arange(IMAGES) % 1000))
    task = build_tasks(config, lambda *_, **__: source)["t"]
    mesh, clip = make_mesh(config.mesh), build_clip(config.model, data=config.data)
    with jax.set_mesh(mesh):
        params = jax.jit(clip.init)(jax.random.key(0))
        encoder = Encoder(config, clip, mesh, BytesTokenizer(), params)
        batches = [batch["image"] for batch in task._batches(source)]
        run = jax.jit(lambda params, image: clip.encode_image(params, image))

        def bare() -> None:
            for image in batches:
                np.asarray(run(params, image))

        times = alternate(rounds, task=lambda: task(encoder), bare_encoder=bare)
        names, templates = task.measure.names, [f"{i} {{}}" for i in range(80)]  # type: ignore[union-attr]
        texts = [template.replace("{}", name) for name in names for template in templates]
        first, again = (seconds(lambda: encoder.embed_texts(texts)) for _ in range(2))
    return {
        "images": IMAGES,
        "seconds": times,
        "ratio": times["task"] / times["bare_encoder"],
        "texts": {"count": len(texts), "first_s": first, "again_s": again},
    }


def search(rounds: int) -> dict[str, Any]:
    """Return seconds of exact search and of the bare product."""
    rng = np.random.default_rng(0)
    queries = machine.unit_rows(rng, QUERIES, WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.npy"
        rows = machine.unit_rows(rng, ROWS, WIDTH)
        np.save(path, rows)
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)

        def find(count: int) -> Callable[[], Any]:
            return lambda: nearest(queries[:count], iter([mapped]), 10)

        one = alternate(rounds, search=find(1), bare_product=lambda: queries[:1] @ rows.T)
        many = alternate(rounds, search=find(QUERIES), bare_product=lambda: queries @ rows.T)
        _, places = nearest(queries[:4], iter([mapped]), 10)
        assert (places == np.argsort(-(queries[:4] @ rows.T), axis=1, kind="stable")[:, :10]).all()
    return {
        "rows": ROWS,
        "width": WIDTH,
        "one_query": {**one, "ratio": one["search"] / one["bare_product"]},
        f"{QUERIES}_queries": {**many, "ratio": many["search"] / many["bare_product"]},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/results/evaluation_speed.json")
    options = parser.parse_args()
    facts = {
        "machine": machine.describe(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.evaluation_speed --rounds={options.rounds}",
    }
    text = json.dumps({**facts, "evaluation": evaluation(options.rounds), "search": search(options.rounds)}, indent=2)
    pathlib.Path(options.output).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
