"""Classes of ImageNet-A and -R, which their authors publish as parts of ImageNet's, into `clipjax/evals/datasets`.

    git clone https://github.com/hendrycks/natural-adv-examples
    git clone https://github.com/hendrycks/imagenet-r
    python -m benchmarks.subsets_of_imagenet --imagenet_a=natural-adv-examples --imagenet_r=imagenet-r

Both have `eval.py` (MIT licence), with the numbers or WordNet ids among ImageNet's 1,000 classes in their order. Names
and templates are ImageNet's own here.
"""

import argparse
import ast
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.prompts_of_clip import FOLDER, git

FILE = "eval.py"
REPOSITORIES = {"imagenet_a": "natural-adv-examples", "imagenet_r": "imagenet-r"}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, repository in REPOSITORIES.items():
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True, help=f"a clone of hendrycks/{repository}")
    options = vars(parser.parse_args(argv))
    code = {name: git(options[name], "show", f"HEAD:{FILE}") for name in REPOSITORIES}
    ids: list[str] = value_of(code["imagenet_r"], "all_wnids")
    chosen = value_of(code["imagenet_r"], "imagenet_r_wnids")
    places: dict[int, int] = value_of(code["imagenet_a"], "thousand_k_to_200")  # -1: not in ImageNet-A
    numbers = {
        "imagenet_a": sorted(number for number, place in places.items() if place >= 0),
        "imagenet_r": [number for number, each in enumerate(ids) if each in chosen],
    }
    imagenet = json.loads((FOLDER / "imagenet.json").read_text(encoding="utf-8"))
    for name, repository in REPOSITORIES.items():
        commit = git(options[name], "rev-parse", "HEAD").strip()
        content = {
            "source": f"https://github.com/hendrycks/{repository}/blob/{commit}/{FILE}; names: {imagenet['source']}",
            "licence": "MIT",
            "ids": [ids[number] for number in numbers[name]],
            "classes": [imagenet["classes"][number] for number in numbers[name]],
            "templates": imagenet["templates"],
        }
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {len(content['classes'])} classes")
    return 0


def value_of(code: str, name: str) -> Any:
    """Return the literal that code assigns to a name."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"no value {name}")


if __name__ == "__main__":
    sys.exit(main())
