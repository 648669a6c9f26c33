"""A checkpoint's zero-shot, retrieval and probe counts by clipjax, CLIP_benchmark and open_clip: equal, one by one.

    python -m benchmarks.parity.clip_benchmark --peer_python=PEER/bin/python --checkpoint=runs/quickstart \\
        --tfds_dir=data [--output=benchmarks/results/parity_clip_benchmark.json]

PEER: `pip install torch==2.13.0 torchvision open_clip_torch==3.3.0 webdataset==0.2.86 clip-benchmark requests
'numpy<2.4'`.

The checkpoint is one that knows `scenes` (configs/quickstart.py). The data goes into WebDataset shards that both sides
read, the weights through `clipjax export` to open_clip's loader. CLIP_benchmark's own command and `clipjax eval` run in
float32. A query that is a hit on one side alone is named, with its margin by PyTorch in float64.
"""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import clipjax
from benchmarks import machine
from benchmarks.parity import layouts, ranks
from benchmarks.parity.wds_layout import with_own_captions, write_captioned, write_labelled
from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.config import DataConfig, Dtype
from clipjax.data.images import make_decoder, make_eval_transform
from clipjax.data.sample import Sample
from clipjax.data.sources import build_source
from clipjax.data.tokenizers.protocol import tokenize
from clipjax.evals.captioned import split_lines
from clipjax.evals.probe import Problem
from clipjax.evals.prompts import load_classes, load_templates
from clipjax.evals.zero_shot import make_prompts
from clipjax.inference import Model
from clipjax.monitoring import run_record
from clipjax.runtime import storage

PEER = pathlib.Path(__file__).with_name("clip_benchmark_peer.py")
RESULTS = pathlib.Path("benchmarks/results/parity_clip_benchmark.json")
DEPTHS = (1, 5, 10)
FIVE, ONE, REPEATED = "captions", "first_caption", "repeated_captions"
MOST = {FIVE: 5, ONE: 1, REPEATED: 5}
"""Sets for retrieval, with the captions of an image; only in the last one have several images the same caption."""

MULTI = "multi_label"
"""The set of `benchmarks.parity.average_precision`."""

NUM_REPEATED = 1_000
"""Images of the last of these."""

STRENGTHS = (0.1, 1.0, 10.0)
PROBE_LIMIT = 0.001
"""Difference of a probe's accuracy, as a share."""

EXACT = 1e-12
"""Margin in float64 of two texts, or two images, that are the same."""

MOST_SHOWN = 20
"""Queries of a row that the record lists; all are counted."""


def main() -> int:
    """Compare, print and write; return 1 if a difference is not explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", type=pathlib.Path, required=True)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a workdir or a step")
    parser.add_argument("--tfds_dir", type=pathlib.Path, required=True, help="where `clipjax data scenes` has put them")
    parser.add_argument("--num_train", type=int, default=6_000, help="examples that the probe learns from, at most")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    if not options.peer_python.is_file():
        parser.error(f"--peer_python={options.peer_python} is no file; make the environment that --help names")
    if options.num_train < 1:
        parser.error(f"--num_train={options.num_train} must be 1 or more")
    storage.require_writable(options.output, "--output")
    with tempfile.TemporaryDirectory() as place:
        record = about("benchmarks.parity.clip_benchmark") | compare(options, pathlib.Path(place))
    write(options.output, record)
    print(table(record["rows"]))
    return 0 if record["agrees"] else 1


def about(module: str) -> dict[str, Any]:
    """Return when, by which module and where a comparison is made."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "machine": machine.describe(),
    }


def write(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Write the record as JSON."""
    path.write_text(json.dumps(record, indent=1) + "\n")


def compare(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Run both sides in a folder of their own, and return the record."""
    write_sets(options.tfds_dir, folder, num_train=options.num_train)
    peer = Peer(options.peer_python, folder)
    layouts.run(("export", "--to=open_clip", f"--checkpoint={options.checkpoint}", f"--output={peer.exported}"))
    found = layouts.evaluate(options.checkpoint, folder, tuple(MOST))
    model, results = load(options.checkpoint), found["tasks"]
    labelled = Both("labelled", model, folder / "labelled/test", peer.evaluate("labelled"))
    rows, inputs = classification_rows(labelled, results["labelled"]), {"labelled": labelled.different_inputs()}
    for name in MOST:
        pairs = Both(name, model, folder / name / "test", peer.evaluate(name))
        rows += retrieval_rows(pairs, results[name])
        inputs[name] = pairs.different_inputs()
    record = {
        "versions": {"clipjax's side": run_record.versions(), "the peers' side": labelled.peer_versions()},
        "step": SavedCheckpoint(options.checkpoint).step,
        "inputs": inputs,
        "rows": rows,
        "probe": probe_rows(model, peer, folder, results["probe"]),
    }
    checked = [*rows, *record["probe"], *inputs.values()]
    return record | {"agrees": all(each["agrees"] for each in checked)}


def write_sets(tfds_dir: pathlib.Path, folder: pathlib.Path, *, num_train: int) -> None:
    """Write the data sets that both sides read."""
    data = DataConfig(tfds_dir=str(tfds_dir))
    test, train = (build_source(f"tfds:scenes/{split}", data=data) for split in ("val", "train"))
    samples = [test[index] for index in range(len(test))]
    learnt = [train[index] for index in range(min(len(train), num_train))]
    names, templates = load_classes("scenes"), load_templates("scenes")
    write_labelled(folder / "labelled", {"test": samples, "train": learnt}, names, templates)
    for name, most in MOST.items():
        chosen = samples[:NUM_REPEATED] if name == REPEATED else with_own_captions(samples, most=most)
        write_captioned(folder / name, chosen, most=most)


def load(checkpoint: pathlib.Path) -> Model:
    """Return the model, which computes in float32."""
    model = clipjax.load(checkpoint)
    model.config.model.compute_dtype, model.config.model.matmul_dtype = Dtype.FLOAT32, Dtype.FLOAT32
    return Model(model.config, model.params, model.tokenizer, batch_size=layouts.BATCH)


class Peer:
    """CLIP_benchmark's command, and scikit-learn, in an environment of their own.

    Args:
        python: of that environment.
        folder: of the data sets, and of what comes back.
    """

    def __init__(self, python: pathlib.Path, folder: pathlib.Path) -> None:
        self._python, self._folder = python, folder
        self.exported = folder / "exported"

    def evaluate(self, name: str, split: str = "test") -> dict[str, Any]:
        """Return what the command said of a data set, under `metrics`, and the arrays behind it."""
        said, arrays = self._folder / f"{name}_{split}.json", self._folder / f"{name}_{split}.npz"
        task = "zeroshot_retrieval" if name in MOST else "zeroshot_classification"
        words = ["eval", "--dataset", f"wds/{name}", "--dataset_root", self._folder / name, "--split", split]
        words += ["--task", task, "--model", f"local-dir:{self.exported}", "--pretrained", "", "--no_amp"]
        words += ["--batch_size", 64, "--num_workers", 0, "--recall_k", *DEPTHS, "--output", said, "--quiet"]
        self._run("eval", arrays, *words)
        with np.load(arrays, allow_pickle=False) as content:
            return {**content, "metrics": json.loads(said.read_text())["metrics"]}

    def probe(self, strengths: Sequence[float]) -> dict[str, np.ndarray]:
        """Return which test images scikit-learn's probes get right, `right` bool `[c, n]`; `evaluate` has been run."""
        arrays = self._folder / "probe.npz"
        splits = [self._folder / f"labelled_{split}.npz" for split in ("train", "test")]
        self._run("probe", arrays, *splits, *map(repr, strengths))
        with np.load(arrays, allow_pickle=False) as content:
            return dict(content)

    def _run(self, command: str, *words: object) -> None:
        line = [
            self._python,
            "-P",
            "-W",
            "ignore",
            PEER,
            command,
            *map(str, words),
        ]  # -P: this file has the peer's name
        apart = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        told = subprocess.run(line, env=apart, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if told.returncode:
            raise RuntimeError(told.stdout)


class Both:
    """A data set on both sides: what went into the models, and embeddings, in the order of the shards.

    Args:
        name: of the set.
        model: clipjax's.
        folder: of the shards.
        peer: what `Peer.evaluate` returned.
    """

    def __init__(self, name: str, model: Model, folder: pathlib.Path, peer: dict[str, Any]) -> None:
        self.name, self.peer = name, peer
        samples = read_shards(folder)
        self.labels = np.asarray([sample.label for sample in samples])
        decode, view = make_decoder(model.config.data), make_eval_transform(model.config)
        self._pixels = np.stack([view(decode(sample.image)) for sample in samples])
        texts = [split_lines("\n".join(sample.captions)) for sample in samples]
        self.owners = np.repeat(np.arange(len(texts)), list(map(len, texts)))
        names, templates = load_classes("scenes"), load_templates("scenes")
        flat = make_prompts(names, templates) if name == "labelled" else [text for own in texts for text in own]
        self._tokens = tokenize(model.tokenizer, flat, model.config.model.text.context_length)
        self.num_classes, self._data = len(names), model.config.data
        self.image, self.text = model.encode_image(self._pixels), model.embed_tokens(self._tokens)

    def different_inputs(self) -> dict[str, Any]:
        """Return how many pixels and token ids the two models got that are not the same."""
        mean, std = (np.asarray(each, np.float64)[:, None, None] for each in (self._data.mean, self._data.std))
        theirs = np.rint((self.peer["pixels"] * std + mean) * 255).transpose(0, 2, 3, 1)
        pixels, tokens = int((theirs != self._pixels).sum()), int((self.peer["tokens"] != self._tokens).sum())
        rows = {"images": len(self._pixels), "texts": len(self._tokens)}
        return rows | {"pixels_differ": pixels, "tokens_differ": tokens, "agrees": pixels + tokens == 0}

    def peer_versions(self) -> dict[str, str]:
        """Return the versions of the peers."""
        return json.loads(str(self.peer["versions"]))


def read_shards(folder: pathlib.Path) -> list[Sample]:
    """Return the samples of a split, in the order in which CLIP_benchmark reads them."""
    last = int((folder / "nshards.txt").read_text()) - 1
    source = build_source(f"{folder}/{{0..{last}}}.tar", data=DataConfig())
    return [source[index] for index in range(len(source))]


def classification_rows(both: Both, results: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row each for top-1 and top-5, and one for the mean of the classes' recalls."""
    peer, total = both.peer, len(both.labels)
    is_right = ranks.one_hot(both.labels, both.num_classes)
    exact = peer["image64"] @ ranks.ensemble(peer["text64"], both.num_classes).T
    places = [ranks.best_places(each, is_right) for each in (scores_of(both), peer["logits"])]
    rows = []
    for depth, own, other in ((1, "top1", "acc1"), (5, "top5", "acc5")):
        counts = {
            "clipjax": ranks.to_count(results[own], total),
            "clip_benchmark": ranks.to_count(peer["metrics"][other], total),
            "open_clip": ranks.to_count(float(peer[f"open_clip_{other}"]), total),
        }
        hits = [place < depth for place in places]
        rows.append(count_row("labelled", other, total, counts, hits, ranks.margins(exact, is_right, depth)))
    recalls = {"clipjax": results["per_class"], "clip_benchmark": peer["metrics"]["mean_per_class_recall"]}
    gap = abs(recalls["clipjax"] - recalls["clip_benchmark"])
    row = {"set": "labelled", "metric": "mean_per_class_recall", "of": total, **recalls, "differ": []}
    return [*rows, row | {"agrees": gap < 1e-12 or bool(rows[0]["differ"])}]


def scores_of(both: Both) -> np.ndarray:
    """Return clipjax's cosines of images and classes, float32 `[n, k]`."""
    return both.image @ ranks.ensemble(both.text, both.num_classes).T


def retrieval_rows(both: Both, results: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row for each direction and depth."""
    peer, owned = both.peer, ranks.one_hot(both.owners, len(both.image))
    rows = []
    for way, own, theirs in (("image", "text_to_image", "text_to_image"), ("text", "image_to_text", "image_to_text")):
        turn = (lambda x: x) if way == "image" else np.transpose
        is_right, exact = turn(owned), turn(peer["text64"] @ peer["image64"].T)
        place = ranks.best_places(turn(both.text @ both.image.T), is_right)
        for depth in DEPTHS:
            metric, total = f"{way}_retrieval_recall@{depth}", len(is_right)
            counts = {
                "clipjax": ranks.to_count(results[f"{own}_r{depth}"], total),
                "clip_benchmark": ranks.to_count(peer["metrics"][metric], total),
            }
            if both.name == ONE:
                counts["open_clip"] = ranks.to_count(float(peer[f"open_clip_{theirs}_R@{depth}"]), total)
            hits = [place < depth, peer[f"{way}_retrieval_{depth}"]]
            rows.append(count_row(both.name, metric, total, counts, hits, ranks.margins(exact, is_right, depth)))
    return rows


def count_row(
    name: str, metric: str, total: int, counts: Mapping[str, int], hits: Sequence[np.ndarray], margin: np.ndarray
) -> dict[str, Any]:
    """Return the counts of all sides, the count in float64, and the queries on which clipjax and CLIP_benchmark differ.

    It agrees if each of these queries is a tie in float32, and no two counts, nor those of the hits that were looked at
    one by one, are further apart than there are ties.
    """
    differ = ranks.differences(*hits, margin)
    every = [*counts.values(), *(int(each.sum()) for each in hits)]
    ties = int((np.abs(margin) < ranks.TIE).sum())
    return {
        "set": name,
        "metric": metric,
        "of": total,
        **counts,
        "float64": int((margin > 0).sum()),
        "ties": ties,
        "exact_ties": int((np.abs(margin) < EXACT).sum()),
        "num_differ": len(differ),
        "differ": differ[:MOST_SHOWN],
        "agrees": all(each["is_tie"] for each in differ) and max(every) - min(every) <= ties,
    }


def probe_rows(model: Model, peer: Peer, folder: pathlib.Path, results: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row for each strength; the first is the one that `clipjax eval` has chosen."""
    peer.evaluate("labelled", "train")
    learnt, test = (Both("labelled", model, folder / "labelled" / split, {}) for split in ("train", "test"))
    strengths = [results["best_c"], *(each for each in STRENGTHS if each != results["best_c"])]
    theirs, problem, rows = peer.probe(strengths), Problem(learnt.image, learnt.labels), []
    for strength, right, iterations in zip(strengths, theirs["right"], theirs["iterations"], strict=True):
        fitted, total = problem.fit(strength), len(test.labels)
        count = int((fitted.predict(test.image) == test.labels).sum())
        if strength == results["best_c"]:
            count = ranks.to_count(results["top1"], total)
        row = {"c": strength, "of": total, "learnt": len(learnt.labels), "clipjax": count}
        row |= {"scikit_learn": int(right.sum()), "scikit_learn_iterations": int(iterations)}
        rows.append(row | {"agrees": abs(count - int(right.sum())) <= PROBE_LIMIT * total})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    columns = ("set", "metric", "of", "clipjax", "clip_benchmark", "open_clip", "float64", "ties", "num_differ")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in rows)])


if __name__ == "__main__":
    sys.exit(main())
