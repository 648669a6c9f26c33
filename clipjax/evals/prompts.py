"""Class names and prompt templates by name, for zero-shot classification: those here, and those of `datasets`.

A template holds one `{}` for the class name.
"""

import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from clipjax.data.scenes.language import CLASS_NAMES, TEMPLATES
from clipjax.evals import datasets
from clipjax.evals.datasets.labels import aliases_of, order_names
from clipjax.runtime.storage import is_address, read_small

CLASSES: dict[str, tuple[str, ...]] = {"scenes": tuple(CLASS_NAMES)}

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "scenes": tuple(TEMPLATES),
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "imagenet_7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Templates by name. `imagenet_7` are those of ImageNet's 80 that `notebooks/Prompt_Engineering_for_ImageNet.ipynb` of
openai/CLIP selects."""

LISTS = "a JSON file with a list of strings, or a .txt file with one a line"

_MAX_FILE_BYTES = 10_000_000
_MOST_SHOWN = 10  # class names in a message


def load_classes(name: str) -> tuple[str, ...]:
    """Return class names by name, or from a file, in the order of the labels.

    A file is JSON with a list of strings or, as CLIP_benchmark's `classnames.txt`, text with one name a line.

    Raises:
        ValueError: neither a known name nor such a file; or a file with a blank name, or one name twice.
    """
    if name in datasets.names():
        return datasets.prompts_of(name).classes
    names = _load(name, CLASSES, "classes")
    if name in CLASSES:
        return names
    labels = Counter(names)
    twice = [each for each, count in labels.items() if count > 1]
    if twice:
        places = [label for label, each in enumerate(names) if each == twice[0]]
        raise ValueError(
            f"classes={name!r}: labels {', '.join(map(str, places))} all have the name {twice[0]!r}, so texts cannot "
            "tell them apart; give each its own"
        )
    return names


def load_classes_for(name: str, labels: Sequence[str] | None) -> tuple[str, ...]:
    """Return class names in the order in which data numbers them; see `load_classes`.

    Args:
        name: of a list, or a file.
        labels: the data's own names of its labels, in their order; None: it has none.

    Raises:
        ValueError: as `load_classes` and `labels.order_names`.
    """
    is_file = name not in CLASSES and name not in datasets.names()
    return order_names(load_classes(name), labels, field=f"classes={name!r}", is_file=is_file, aliases=aliases_of(name))


def load_templates(name: str) -> tuple[str, ...]:
    """Return templates by name, or from a file.

    A file is JSON with a list of strings or, as CLIP_benchmark's `zeroshot_classification_templates.txt`, text with one
    a line, where `{c}` stands for the name.

    Raises:
        ValueError: neither a known name nor such a file, or a template without exactly one `{}`.
    """
    if name in datasets.names():
        return datasets.prompts_of(name).templates
    templates = _load(name, TEMPLATE_SETS, "templates")
    if _is_text(name):
        templates = tuple(template.replace("{c}", "{}") for template in templates)
    check_templates(templates, f"templates={name!r}")
    return templates


def check_texts(field: str, texts: Sequence[str]) -> None:
    """Refuse what is no sequence of strings, or an empty one.

    Raises:
        ValueError: a single string, which would count as one text a letter; no text; something else than a string.
    """
    if isinstance(texts, str):
        raise ValueError(f"{field}={texts!r} must be a sequence of strings; put a single one into a list: [{texts!r}]")
    if not len(texts):
        raise ValueError(f"{field} is empty; give at least one string")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{field}[{index}]={text!r} must be a string")


def check_templates(templates: Sequence[str], field: str = "templates") -> None:
    """Refuse templates that are not strings with one `{}` each.

    Raises:
        ValueError: the first of them that is not.
    """
    check_texts(field, templates)
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{field}: {template!r} must hold one {{}} for the class name")


def load_paraphrases(name: str, names: Sequence[str], templates: Sequence[str]) -> dict[str, list[str]]:
    """Return other texts by class name: `templates` makes them of the templates, else a JSON file holds them.

    Args:
        name: `templates`, or a JSON file with an object: for class names, a list of strings each.
        names: of the classes.
        templates: of the prompts.

    Raises:
        ValueError: no such file, a class that is not there, or fewer than two texts for one.
    """
    if name == "templates":
        if len(templates) < 2:
            raise ValueError(f"paraphrases='templates' needs at least two templates; there is one: {templates[0]!r}")
        return {each: [template.replace("{}", each) for template in templates] for each in names}
    values = _read_json(name, "paraphrases", "templates, or a JSON file with a list of texts for class names")
    if not isinstance(values, dict) or not values:
        raise ValueError(f"paraphrases={name!r} must be a JSON object: a list of texts for each of some class names")
    for each, texts in values.items():
        if each not in names:
            raise ValueError(f"paraphrases={name!r}: {each!r} is no class name; they are {_shown(names)}")
        if not isinstance(texts, list) or len(texts) < 2:
            raise ValueError(f"paraphrases={name!r}: {each!r} needs a list of at least two texts; got {texts!r}")
        _check_filled(f"paraphrases={name!r}, {each!r}", texts)
    return values


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check_filled(field: str, texts: Sequence[str]) -> None:
    """Refuse what is no string, and blank ones.

    Raises:
        ValueError: the first of them.
    """
    check_texts(field, texts)
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"{field}: number {index} is {text!r}, a blank text; give it words")


def _load(name: str, known: dict[str, tuple[str, ...]], field: str) -> tuple[str, ...]:
    if name in known:
        return known[name]
    named = ", ".join([*known, *datasets.names()])
    what = f"one of {named}, {LISTS}"
    if _is_text(name):
        values: Any = read_lines(_read(name, field, what), f"{field}={name!r}")
    else:
        values = _read_json(name, field, what)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{field}={name!r} must be a list of strings, with at least one")
    _check_filled(f"{field}={name!r}", values)
    return tuple(values)


def read_lines(content: bytes, field: str) -> list[str]:
    """Return the lines of a text without the blanks around them; blank lines at its end do not count.

    Raises:
        ValueError: it is no UTF-8; `field` is named.
    """
    try:
        return [line.strip() for line in content.decode("utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{field} is no text in UTF-8: {error}") from error


def _is_text(name: str) -> bool:
    return name.lower().endswith(".txt")


def _read(name: str, field: str, what: str) -> bytes:
    """Return the content of a file.

    Raises:
        ValueError: there is none; the text says what the field must be.
    """
    if not is_address(name) and not pathlib.Path(name).is_file():
        raise ValueError(f"{field}={name!r} must be {what}")
    try:
        return read_small(name, _MAX_FILE_BYTES)
    except (ValueError, OSError) as error:
        raise ValueError(f"{field}: {error}") from error


def _read_json(name: str, field: str, what: str) -> Any:
    """Return the content of a JSON file; errors as in `_read`."""
    content = _read(name, field, what)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}={name!r} is no JSON: {error}") from error
