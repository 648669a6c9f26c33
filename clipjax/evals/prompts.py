"""Class names and prompt templates by name, for zero-shot classification.

A template holds one `{}` for the class name.
"""

import json
import pathlib
from collections.abc import Sequence

from clipjax.data.scenes.language import CLASS_NAMES, TEMPLATES
from clipjax.runtime.storage import is_address, read_small

CLASSES: dict[str, tuple[str, ...]] = {"scenes": tuple(CLASS_NAMES)}

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "scenes": tuple(TEMPLATES),
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
}

_MAX_FILE_BYTES = 10_000_000


def load_classes(name: str) -> tuple[str, ...]:
    """Return class names by name, or from a JSON file with a list of strings, in the order of the labels.

    Raises:
        ValueError: neither a known name nor such a file.
    """
    return _load(name, CLASSES, "classes")


def load_templates(name: str) -> tuple[str, ...]:
    """Return templates by name, or from a JSON file with a list of strings.

    Raises:
        ValueError: neither a known name nor such a file, or a template without exactly one `{}`.
    """
    templates = _load(name, TEMPLATE_SETS, "templates")
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


def _load(name: str, known: dict[str, tuple[str, ...]], field: str) -> tuple[str, ...]:
    if name in known:
        return known[name]
    if not is_address(name) and not pathlib.Path(name).is_file():
        raise ValueError(f"{field}={name!r} must be one of {', '.join(known)}, or a JSON file with a list of strings")
    try:
        content = read_small(name, _MAX_FILE_BYTES)
    except (ValueError, OSError) as error:
        raise ValueError(f"{field}: {error}") from error
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}={name!r} is no JSON: {error}") from error
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{field}={name!r} must be a JSON list of strings, with at least one")
    return tuple(values)
