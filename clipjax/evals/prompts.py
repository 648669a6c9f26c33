"""Class names and prompt templates by name: the data of zero-shot classification.

A template holds one `{}` for the class name.
"""

import json
import pathlib

from clipjax.data.scenes.language import CLASS_NAMES, TEMPLATES
from clipjax.runtime.files import read_bounded

CLASSES: dict[str, tuple[str, ...]] = {"scenes": tuple(CLASS_NAMES)}

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "scenes": tuple(TEMPLATES),
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
}

_MAX_FILE_BYTES = 10_000_000


def load_classes(name: str) -> tuple[str, ...]:
    """Class names by name, or from a JSON file with a list of strings, in the order of the labels.

    Raises:
        ValueError: neither a known name nor such a file.
    """
    return _load(name, CLASSES, "classes")


def load_templates(name: str) -> tuple[str, ...]:
    """Templates by name, or from a JSON file with a list of strings.

    Raises:
        ValueError: neither a known name nor such a file, or a template without exactly one `{}`.
    """
    templates = _load(name, TEMPLATE_SETS, "templates")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates={name!r}: {template!r} must hold one {{}} for the class name")
    return templates


def _load(name: str, known: dict[str, tuple[str, ...]], field: str) -> tuple[str, ...]:
    if name in known:
        return known[name]
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f"{field}={name!r} must be one of {', '.join(known)}, or a JSON file with a list of strings")
    try:
        content = read_bounded(path, _MAX_FILE_BYTES)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}={name!r} is no JSON: {error}") from error
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{field}={name!r} must be a JSON list of strings, with at least one")
    return tuple(values)
