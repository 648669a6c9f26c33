"""img2dataset, the real one, downloads into an S3 bucket, and clipjax trains on the shards there, in blocks.

    python -m venv /tmp/img2dataset && /tmp/img2dataset/bin/pip install img2dataset==1.47.0 s3fs
    python -m benchmarks.data.img2dataset_s3 --img2dataset=/tmp/img2dataset/bin/img2dataset [--shared=DIR]

Web server and S3 server run here. Among the links are dead ones and one to a page that is no picture. The run ends by a
check of its own: the shards hold what img2dataset counted, and the loss has fallen.
"""

import argparse
import csv
import json
import logging
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence

from benchmarks.machine import describe
from clipjax.runtime import objects
from tests.runtime.stores import BUCKET, Files, StoreServer, s3_server

SHARDS = f"s3://{BUCKET}/pairs"
PAIRS, DEAD, STEPS, BATCH = 600, 20, 40, 64
CONFIG = """
from clipjax.config import *

def get_config():
    return Config(
        total_examples={examples}, warmup_examples=640, global_batch_size={batch},
        model=ModelConfig(
            embed_dim=64,
            image=ViTConfig(image_size=32, patch_size=8, width=64, depth=2, num_heads=2),
            text=TextTransformerConfig(context_length=32, vocab_size=260, width=64, depth=2, num_heads=2),
            compute_dtype=Dtype.FLOAT32, scan_layers=False,
        ),
        optim=OptimConfig(learning_rate=1e-3, max_grad_norm=1.0),
        data=DataConfig(train="{shards}/*.tar", tokenizer="bytes"),
        checkpoint=CheckpointConfig(every_examples=1280),
        log=LogConfig(every_examples=64, tensorboard=False),
    )
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--img2dataset", required=True)
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/img2dataset_s3.json"))
    options = parser.parse_args(argv)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's lines
    with tempfile.TemporaryDirectory() as folder, s3_server() as (s3, environment):
        work = pathlib.Path(folder)
        web = serve(options.shared, work)
        os.environ |= environment
        variables = {**os.environ, "XDG_CACHE_HOME": str(work / "cache"), "CLIPJAX_STAGING": str(work / "staging")}
        download(options.img2dataset, work, variables)
        web.close()
        stats = [json.loads(objects.read_bytes(path, 2**20)) for path in objects.list_files(f"{SHARDS}/*_stats.json")]
        s3.requests.clear()
        found = train(work, variables)
        found |= {
            "links": PAIRS + DEAD,
            "successes_of_img2dataset": sum(each["successes"] for each in stats),
            "shards": len(stats),
            "range_reads_of_shards": sum(1 for each in s3.requests if each.startswith("GET") and ".tar" in each),
            "machine": describe(),
            "command": "python -m benchmarks.data.img2dataset_s3",
        }
    print(json.dumps(found, indent=2))
    right = found["samples"] == found["successes_of_img2dataset"] == PAIRS and found["last_loss"] < found["first_loss"]
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if right else 1


def serve(shared: pathlib.Path, work: pathlib.Path) -> StoreServer:
    """Serve pictures of the emoji shards, and write the table of links and captions."""
    web = StoreServer(Files())
    members: dict[str, dict[str, bytes]] = {}
    for shard in sorted((shared / "data/emoji").glob("*noto-train*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                content = archive.extractfile(member)
                members.setdefault(key, {})[extension] = b"" if content is None else content.read()
    rows = []
    for key, parts in list(members.items())[:PAIRS]:
        picture = next(name for name in parts if name in ("png", "jpg", "webp"))
        web.backend.contents[f"/{key}.{picture}"] = parts[picture]
        rows.append([f"{web.url}/{key}.{picture}", parts["txt"].decode()])
    web.backend.contents["/page.html"] = b"<html>no picture</html>"
    rows += [[f"{web.url}/gone-{i}.png" if i else f"{web.url}/page.html", f"nothing {i}"] for i in range(DEAD)]
    with (work / "links.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["url", "caption"], *rows])
    return web


def download(program: str, work: pathlib.Path, variables: Mapping[str, str]) -> None:
    """Let img2dataset write shards into the bucket."""
    options = {
        "url_list": work / "links.csv",
        "input_format": "csv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": SHARDS,
        "number_sample_per_shard": 128,
        "image_size": 64,
        "processes_count": 1,
        "thread_count": 8,
        "retries": 0,
    }
    command = [program, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, env=dict(variables), cwd=work, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def train(work: pathlib.Path, variables: Mapping[str, str]) -> dict[str, object]:
    """Look at the shards and train on them with a workdir in the same bucket; return what came of it."""
    (work / "config.py").write_text(CONFIG.format(examples=STEPS * BATCH, batch=BATCH, shards=SHARDS))
    workdir = f"s3://{BUCKET}/run"
    shown = run(["data", "show", f"{SHARDS}/*.tar"], variables)
    run(["train", f"--config={work}/config.py", f"--workdir={workdir}"], variables)
    lines = [json.loads(line) for line in objects.read_bytes(f"{workdir}/metrics.jsonl", 2**26).splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "samples": int(shown.split(" samples")[0].split()[-1].replace(",", "")),
        "steps": lines[-1]["step"],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "bad_samples": sum(lines[-1]["samples_skipped"].values()),
        "checkpoints_in_bucket": len(objects.list_files(f"{workdir}/checkpoints/*/manifest.json")),
    }


def run(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """Run clipjax; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "clipjax", *words], env=dict(variables), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
