"""Class names and prompt templates of datasets, a JSON file each, with the place where they were published.

Those of the paper (arXiv 2103.00020, section 3.1.4 and appendix A) are the ones that openai/CLIP publishes;
`benchmarks/prompts_of_clip.py` writes their files, `benchmarks/subsets_of_imagenet.py` those of ImageNet-A and -R.
"""

import functools
import json
import pathlib
from dataclasses import dataclass

_FOLDER = pathlib.Path(__file__).parent


@dataclass(frozen=True)
class Prompts:
    """Class names and templates of a dataset.

    Attributes:
        classes: names in the order of the labels. One can stand there twice: ImageNet's list has two such pairs.
        templates: each with one `{}` for the name.
        source: where they were published.
        licence: of that.
        ids: WordNet's ids of the classes, in the order of the names, for a part of ImageNet's; else none.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    source: str
    licence: str
    ids: tuple[str, ...] = ()


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of the datasets."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


@functools.cache
def prompts_of(name: str) -> Prompts:
    """Return class names and templates of a dataset among `names`."""
    content = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    lists = {field: tuple(content.get(field, ())) for field in ("classes", "templates", "ids")}
    return Prompts(**lists, source=content["source"], licence=content["licence"])
