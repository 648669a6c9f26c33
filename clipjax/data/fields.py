"""Columns of tables: which of them holds the image, the caption, the class and the key."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clipjax.data.caption_fields import Weights, require_fields
from clipjax.data.sample import BadSample, clean_caption, is_label

IMAGE_BYTES = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "img", "picture", "bytes")
"""Names of columns with encoded images, the first that is there; img2dataset's and those of Hugging Face."""

IMAGE_PATHS = ("filepath", "image", "image_path", "path", "file_name", "filename", "file", "img", "img_path")
"""Names of columns with the places of images; open_clip's is the first."""

CAPTIONS = ("caption", "captions", "title", "text", "txt", "texts")
"""Names of columns with one caption or several."""

KEYS = ("key", "id", "__key__")
"""Names of columns with the name of a sample."""

_MAX_CAPTIONS = 1000
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Fields:
    """Columns of a table by their use; None: there is none.

    Attributes:
        image: encoded images, or their places.
        caption: one caption or several; None where `captions` has columns.
        label: the class.
        key: name of the sample.
        captions: columns of captions that are read by field.
    """

    image: str
    caption: str | None
    label: str | None
    key: str | None
    captions: tuple[str, ...] = ()


def choose_fields(
    columns: Sequence[str],
    *,
    place: str,
    images: Sequence[str],
    image_field: str | None,
    caption_field: str | None,
    label_key: str,
    captions: Weights = (),
    holds_images: Callable[[str], bool] = lambda column: True,
) -> Fields:
    """Choose the columns to read: those that the config names, otherwise those of a usual name.

    Args:
        columns: names that are there.
        place: the table, for messages.
        images: usual names of the image's column.
        image_field: the config's choice.
        caption_field: the config's choice.
        label_key: name of the column of classes.
        captions: columns of captions that are read by field, with their weights; none: one column is.
        holds_images: True for a column that may be the image's without being named.

    Raises:
        ValueError: a column that is named is not there, or there is no image, or neither caption nor class.
    """
    listed = ", ".join(repr(name) for name in columns[:_SHOWN]) + (", ..." if len(columns) > _SHOWN else "")
    there = f"{place}: the columns are {listed or 'none'}"
    image = _find(columns if image_field else list(filter(holds_images, columns)), images, image_field)
    caption = None if captions else _find([name for name in columns if name != image], CAPTIONS, caption_field)
    label = _find(columns, (label_key,), None)
    if image is None:
        expected = f"none is {image_field!r}" if image_field else f"none is called {', '.join(images)}"
        raise ValueError(f"{there}; {expected}: set data.image_field to the column of the images")
    require_fields(captions, [name for name in columns if name != image], place)
    if caption is None and not captions and (caption_field or label is None):
        expected = f"none is {caption_field!r}" if caption_field else f"none is called {', '.join(CAPTIONS)}"
        raise ValueError(f"{there}; {expected}: set data.caption_field to the column of the captions")
    key = _find([name for name in columns if name not in (image, caption)], KEYS, None)
    return Fields(image, caption, label, key, tuple(name for name, _ in captions))


def _find(columns: Iterable[str], names: Sequence[str], chosen: str | None) -> str | None:
    """Return the column that is chosen, or the first usual name, upper and lower case alike."""
    if chosen is not None:
        return chosen if chosen in columns else None
    lower: dict[str, str] = {}
    for column in columns:
        lower.setdefault(column.lower(), column)
    return next((lower[name.lower()] for name in names if name.lower() in lower), None)


def captions_of(value: Any, *, max_bytes: int) -> tuple[str, ...]:
    """Return the captions in a cell: a text, a list of texts, or nothing.

    Raises:
        BadSample: `bad_metadata`, or those of `clean_caption`.
    """
    if value is None:
        return ()
    values = [value] if isinstance(value, str | bytes) else value
    if not isinstance(values, list) or len(values) > _MAX_CAPTIONS:
        raise BadSample("bad_metadata")
    if not all(isinstance(each, str | bytes) for each in values):
        raise BadSample("bad_metadata")
    return tuple(clean_caption(each, max_bytes=max_bytes) for each in values)


def label_of(value: Any) -> int:
    """Return the class number in a cell, also if it is written as a text; -1 for nothing.

    Raises:
        BadSample: `bad_metadata` for what is no class number.
    """
    if value is None or value == "":
        return -1
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        value = int(value)
    if not is_label(value):
        raise BadSample("bad_metadata")
    return int(value)


def key_of(value: Any, default: str) -> str:
    """Return the name of a sample from a cell."""
    return value if isinstance(value, str) and value else json.dumps(value) if isinstance(value, int) else default
