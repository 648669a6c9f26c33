"""Published accuracies on ImageNet and on shifted sets of its classes, into `clipjax/evals/shift_points`.

    git clone https://github.com/modestyachts/imagenet-testbed
    git clone https://github.com/mlfoundations/open_clip
    python -m benchmarks.shift_points --testbed=imagenet-testbed --open_clip=open_clip

The standard models are those that the testbed (arXiv 2007.00644, MIT licence) draws its lines through: kind STANDARD in
`plotting/model_types.py`, 55 % on ImageNet or more, none of the models trained on subsets or by its "aws" and "batch64"
recipes. The others are the zero-shot models of `docs/openclip_results.csv` (MIT licence) named in `ZERO_SHOT`. The same
commits give the same bytes. ImageNet-A is left out: its images are those that ResNet-50 gets wrong, and the standard
models lie on two lines, which the testbed draws.
"""

import argparse
import csv
import io
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

FOLDER = pathlib.Path(__file__).parents[1] / "clipjax/evals/shift_points"
TESTBED, OPEN_CLIP = "https://github.com/modestyachts/imagenet-testbed", "https://github.com/mlfoundations/open_clip"
TABLES = "robustness_top1s.csv", "docs/openclip_results.csv"
SHIFTS = {
    "imagenet_v2": ("imagenetv2-matched-frequency-format-val", "ImageNet v2"),
    "imagenet_sketch": ("imagenet-sketch", "ImageNet Sketch"),
    "imagenet_r": ("imagenet-r", "ImageNet-R"),
    "objectnet": ("objectnet-1.0-beta", "ObjectNet"),
}
"""By name, the columns of both tables. All are against accuracy on the whole of ImageNet's validation set."""

ZERO_SHOT = re.compile(r"openai|laion2b_s(32b|34b)_b(79|82|88)k|datacomp_xl_s13b_b90k")
"""Of the column `pretrained`."""

LEAST = 55.0  # per cent on ImageNet, of a standard model


def show(repository: pathlib.Path, path: str) -> str:
    return subprocess.run(
        ["git", "-C", str(repository), "show", f"HEAD:{path}"], check=True, capture_output=True, text=True
    ).stdout


def standard_points(repository: pathlib.Path, column: str) -> list[list]:
    """Return name and both accuracies of each standard model, the best on ImageNet first."""
    kinds = dict(re.findall(r"^\s*'([^']+)': ModelTypes\.(\w+)", show(repository, "plotting/model_types.py"), re.M))
    points = []
    for row in csv.DictReader(io.StringIO(show(repository, TABLES[0]))):
        name, reference = row["model"], row["val"]
        if kinds.get(name) != "STANDARD" or re.search("aws|batch64|subsample", name):
            continue
        if row[column] and float(reference) >= LEAST:
            points.append([name, *(round(float(each) / 100, 4) for each in (reference, row[column]))])
    return sorted(points, key=lambda each: (-each[1], each[0]))


def zero_shot_points(repository: pathlib.Path, column: str) -> list[list]:
    """Return the same of zero-shot models; one with quick GELU and one without are the same weights, and stand once."""
    points = {}
    for row in csv.DictReader(io.StringIO(show(repository, TABLES[1]))):
        if ZERO_SHOT.fullmatch(row["pretrained"]):
            name = f"{row['name'].removesuffix('-quickgelu')} {row['pretrained']}"
            points[name] = [name, float(row["ImageNet 1k"]), float(row[column])]
    return sorted(points.values(), key=lambda each: (-each[1], each[0]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=pathlib.Path, required=True)
    parser.add_argument("--open_clip", type=pathlib.Path, required=True)
    options = parser.parse_args(argv)
    sources = []
    for repository, url, table in zip((options.testbed, options.open_clip), (TESTBED, OPEN_CLIP), TABLES, strict=True):
        command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
        commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        sources.append(f"{url}/blob/{commit}/{table}")
    for name, (theirs, column) in SHIFTS.items():
        content = {
            "reference": "ImageNet",
            "source": sources,
            "licence": "MIT",
            "standard": standard_points(options.testbed, theirs),
            "others": zero_shot_points(options.open_clip, column),
        }
        lines = json.dumps(content, indent=1)
        lines = re.sub(r"\[\s+(\"[^\"]*\"),\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2, \3]", lines)
        (FOLDER / f"{name}.json").write_text(lines + "\n", encoding="utf-8")
        print(f"{name}: {len(content['standard'])} standard models, {len(content['others'])} others")
    return 0


if __name__ == "__main__":
    sys.exit(main())
