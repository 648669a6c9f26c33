"""Average precision of each class by clipjax and CLIP_benchmark, on images with several classes.

    python -m benchmarks.parity.average_precision --peer_python=PEER/bin/python --checkpoint=runs/quickstart \\
        --tfds_dir=data [--output=benchmarks/results/parity_average_precision.json]

Environment and checkpoint are those of `benchmarks.parity.clip_benchmark`. The images are those of `scenes/val` with a
single thing in it; its classes are its colour and its shape.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.parity import layouts, ranks
from benchmarks.parity.clip_benchmark import MULTI, Peer, about, write
from benchmarks.parity.wds_layout import write_multi_labelled
from clipjax.config import DataConfig
from clipjax.data.sources import build_source
from clipjax.evals.prompts import load_classes, load_templates
from clipjax.runtime import storage

RESULTS = pathlib.Path("benchmarks/results/parity_average_precision.json")
LIMIT = 1e-6
"""Difference of a class's average precision, which CLIP_benchmark adds up in float32."""

CONFIG = """
from clipjax.config import *

def get_config():
    task = TaskConfig(kind=TaskKind.MULTI_LABEL, source={source!r}, classes={classes!r}, templates="scenes")
    return Config(eval=EvalConfig(tasks={{{name!r}: task}}))
"""


def main() -> int:
    """Compare, print and write; return 1 if a class differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", type=pathlib.Path, required=True)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a workdir or a step")
    parser.add_argument("--tfds_dir", type=pathlib.Path, required=True, help="where `clipjax data scenes` has put them")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    if not options.peer_python.is_file():
        parser.error(f"--peer_python={options.peer_python} is no file; make the environment of clip_benchmark.py")
    storage.require_writable(options.output, "--output")
    with tempfile.TemporaryDirectory() as place:
        record = about("benchmarks.parity.average_precision") | compare(options, pathlib.Path(place))
    write(options.output, record)
    print(json.dumps({name: value for name, value in record.items() if name != "classes"}, indent=1))
    return 0 if record["agrees"] else 1


def compare(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Run both sides in a folder of their own, and return the record."""
    names = write_set(options.tfds_dir, folder)
    config, output = folder / "tasks.py", folder / "results.json"
    source, classes = str(folder / MULTI / "test" / "*.tar"), str(folder / "classes.json")
    config.write_text(CONFIG.format(source=source, classes=classes, name=MULTI))
    layouts.run(layouts.eval_command(options.checkpoint, config, output))
    ours = json.loads(output.read_text())
    peer = Peer(options.peer_python, folder)
    layouts.run(("export", "--to=open_clip", f"--checkpoint={options.checkpoint}", f"--output={peer.exported}"))
    theirs = peer.evaluate(MULTI)
    rows = class_rows(names, ours["details"][MULTI]["average_precision"], theirs)
    means = {"clipjax": ours["tasks"][MULTI]["map"], "clip_benchmark": theirs["metrics"]["mean_average_precision"]}
    is_equal = abs(means["clipjax"] - means["clip_benchmark"]) < LIMIT
    return {
        "versions": json.loads(str(theirs["versions"])),
        "images": len(theirs["target"]),
        "map": means,
        "largest_difference": max(row["difference"] for row in rows),
        "classes": rows,
        "agrees": is_equal and all(row["agrees"] for row in rows),
    }


def write_set(tfds_dir: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Write the data set that both sides read; return the names of its classes, all colours and then all shapes."""
    pairs = [name.split() for name in load_classes("scenes")]
    names = list(dict.fromkeys([color for color, _ in pairs] + [shape for _, shape in pairs]))
    source = build_source("tfds:scenes/val", data=DataConfig(tfds_dir=str(tfds_dir)))
    samples = [sample for sample in (source[index] for index in range(len(source))) if sample.label >= 0]
    labels = [[names.index(word) for word in pairs[sample.label]] for sample in samples]
    write_multi_labelled(folder / MULTI, samples, labels, names, load_templates("scenes"))
    (folder / "classes.json").write_text(json.dumps(names))
    return names


def class_rows(
    names: Sequence[str], ours: Sequence[Mapping[str, Any]], theirs: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Return a row for each class: its average precision on both sides, and in float64 from PyTorch's embeddings."""
    exact = theirs["image64"] @ ranks.ensemble(theirs["text64"], len(names)).T
    rows = []
    for label, (name, own) in enumerate(zip(names, ours, strict=True)):
        values = {"clipjax": own["map"], "clip_benchmark": float(theirs["average_precision"][label])}
        values["float64"] = average_precision(exact[:, label], theirs["target"][:, label] > 0)
        gap = max(values.values()) - min(values.values())
        row = {"class": name, "num_examples": int(theirs["target"][:, label].sum()), **values, "difference": gap}
        rows.append(row | {"agrees": own["name"] == name and gap < LIMIT})
    return rows


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean precision at the places of the right ones: none of the scores is to be equal to another.

    Args:
        scores: float64 `[n]`.
        truth: bool `[n]`, at least one.
    """
    places = np.flatnonzero(truth[np.argsort(-scores)])
    return float(np.mean(np.arange(1, len(places) + 1) / (places + 1)))


if __name__ == "__main__":
    sys.exit(main())
