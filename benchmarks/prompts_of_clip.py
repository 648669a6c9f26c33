"""Class names and prompt templates of the paper's datasets, which openai/CLIP publishes, into `clipjax/evals/datasets`.

    git clone https://github.com/openai/CLIP
    python -m benchmarks.prompts_of_clip --repository=CLIP

They are the facts of `data/prompts.md` and of `notebooks/Prompt_Engineering_for_ImageNet.ipynb` (MIT licence), one JSON
file a dataset. The same commit gives the same bytes.
"""

import argparse
import ast
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

FOLDER = pathlib.Path(__file__).parents[1] / "clipjax/evals/datasets"
SOURCE = "https://github.com/openai/CLIP"
MARKDOWN, NOTEBOOK = "data/prompts.md", "notebooks/Prompt_Engineering_for_ImageNet.ipynb"
NAMES = {
    "Birdsnap": "birdsnap",
    "CIFAR10": "cifar10",
    "CIFAR100": "cifar100",
    "CLEVRCounts": "clevr_counts",
    "Caltech101": "caltech101",
    "Country211": "country211",
    "DescribableTextures": "dtd",
    "EuroSAT": "eurosat",
    "FGVCAircraft": "fgvc_aircraft",
    "FacialEmotionRecognition2013": "fer2013",
    "Flowers102": "flowers102",
    "Food101": "food101",
    "GTSRB": "gtsrb",
    "HatefulMemes": "hateful_memes",
    "KITTI": "kitti",
    "Kinetics700": "kinetics700",
    "MNIST": "mnist",
    "OxfordPets": "oxford_pets",
    "PascalVOC2007": "voc2007",
    "PatchCamelyon": "pcam",
    "RESISC45": "resisc45",
    "SST2": "rendered_sst2",
    "STL10": "stl10",
    "SUN397": "sun397",
    "StanfordCars": "stanford_cars",
    "UCF101": "ucf101",
}
"""Names here by those in `prompts.md`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=pathlib.Path, required=True, help="a clone of openai/CLIP, bare or not")
    repository = parser.parse_args(argv).repository
    commit = git(repository, "rev-parse", "HEAD").strip()
    found = {NAMES[title]: lists for title, lists in of_markdown(git(repository, "show", f"HEAD:{MARKDOWN}"))}
    found["imagenet"] = of_notebook(git(repository, "show", f"HEAD:{NOTEBOOK}"))
    FOLDER.mkdir(exist_ok=True)
    for name, (classes, templates) in found.items():
        file = NOTEBOOK if name == "imagenet" else MARKDOWN
        content = {
            "source": f"{SOURCE}/blob/{commit}/{file}",
            "licence": "MIT",
            "classes": classes,
            "templates": templates,
        }
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {len(classes)} classes, {len(templates)} templates")
    return 0


def of_markdown(text: str) -> Iterator[tuple[str, tuple[list[str], list[str]]]]:
    """Yield title, class names and templates of each section."""
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if "classes = [" in body:
            yield title.strip(), (_list(body, "classes"), _list(body, "templates"))


def of_notebook(text: str) -> tuple[list[str], list[str]]:
    """Return ImageNet's class names and templates."""
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
    classes, templates = (
        next(_list(cell, name) for cell in cells if cell.startswith(f"{name} = ["))
        for name in ("imagenet_classes", "imagenet_templates")
    )
    return classes, templates


def _list(code: str, name: str) -> list[str]:
    """Return the list of strings that code assigns to a name, the first of several words for one."""
    for node in ast.walk(
        ast.parse(re.sub(r"^```.*$", "", code[code.index(f"{name} = [") :].split("```")[0], flags=re.M))
    ):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            values = ast.literal_eval(node.value)
            return [str(value[0] if isinstance(value, list) else value) for value in values]
    raise ValueError(f"no list {name}")


def git(repository: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
