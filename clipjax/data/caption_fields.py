"""Captions by named fields: what each sample has of them, and the draw of those that are trained on at one sight.

Reading order: `Weights`, `read_captions` (a source's side), `draw_captions` (the training stream's side).
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.data.digests import spread
from clipjax.data.sample import BadSample, FieldCaptions, Source, clean_captions
from clipjax.runtime.terminal import printable

Weights = tuple[tuple[str, float], ...]
"""Fields of captions that a source reads, each with its weight; none: the source's own field."""

_LOOKS = 32  # samples that are looked at for fields that none has
_MAX_CAPTIONS = 1000
_log = logging.getLogger(__name__)
_SHOWN = 20


def to_weights(captions: Mapping[str, float] | None) -> Weights:
    """Return the weights that a config holds; the order of its fields does not matter."""
    return tuple(sorted((captions or {}).items()))


def require_fields(weights: Weights, there: Sequence[str], place: str) -> None:
    """Refuse fields of captions that a source can never give.

    Args:
        weights: of the fields.
        there: names of those that it has.
        place: the source, for the message.

    Raises:
        ValueError: with the fields that are there.
    """
    if missing := [name for name, _ in weights if name not in there]:
        listed = ", ".join(map(repr, there[:_SHOWN])) + (", ..." if len(there) > _SHOWN else "")
        raise ValueError(
            f"{place}: data.captions names {', '.join(map(repr, missing))}, and the fields that are there are "
            f"{listed or 'none'}; name some of these"
        )


def tell_absent(weights: Weights, source: Source, place: str) -> None:
    """Warn of fields that none of some samples has: a source of single objects cannot tell which fields it has.

    Args:
        weights: of the fields.
        source: reads them.
        place: its name, for the message.

    Raises:
        UnreadableData: the source cannot be read.
    """
    places, seen = spread(len(source), _LOOKS), set[str]()
    for index in places:
        with contextlib.suppress(BadSample):
            seen |= {field.name for field in source[index].fields}
    if absent := [name for name, _ in weights if name not in seen]:
        names = ", ".join(printable(repr(name)) for name in absent)
        _log.warning("data.captions: none of %d samples of %s has %s", len(places), printable(place), names)


def read_captions(
    weights: Weights, value_of: Callable[[str], Any], *, max_bytes: int
) -> tuple[tuple[str, ...], tuple[FieldCaptions, ...]]:
    """Return all captions of a sample, and the same by field.

    A field that the sample lacks, or that cannot be used, is left out as long as there is another one.

    Args:
        weights: of the fields.
        value_of: field -> a text, several, or None; raises `BadSample` for one that cannot be read.
        max_bytes: limit of a caption.

    Raises:
        BadSample: no field can be used: the reason of the first that is there, `missing_caption` if none is.
    """
    found: list[FieldCaptions] = []
    fault = BadSample("missing_caption")
    is_missing = True
    for name, weight in weights:
        try:
            captions = clean_captions(_texts(value_of(name)), max_bytes=max_bytes)
        except BadSample as bad:
            fault, is_missing = (bad, False) if is_missing else (fault, False)
            continue
        if captions:
            found.append(FieldCaptions(name, weight, captions))
    if not found:
        raise fault
    return tuple(caption for field in found for caption in field.captions), tuple(found)


def _texts(value: Any) -> list[bytes | str]:
    """Return the texts in a value: none, one or several; those that are None are blank.

    Raises:
        BadSample: `bad_metadata` for anything else.
    """
    if value is None:
        return []
    values = [value] if isinstance(value, str | bytes) else value
    if isinstance(values, np.ndarray):
        values = list(values)
    if not isinstance(values, list) or len(values) > _MAX_CAPTIONS:
        raise BadSample("bad_metadata")
    if not all(each is None or isinstance(each, str | bytes) for each in values):
        raise BadSample("bad_metadata")
    return ["" if each is None else each for each in values]


def find_value(values: Any, name: str) -> Any:
    """Return the value of a name in a JSON object, or that of `outer/inner` in objects inside of it; None: none."""
    if isinstance(values, dict) and name in values:
        return values[name]
    for part in name.split("/"):
        if not isinstance(values, dict):
            return None
        values = values.get(part)
    return values


def draw_captions(
    captions: Sequence[str], fields: Sequence[FieldCaptions], count: int, rng: np.random.Generator
) -> list[str]:
    """Draw the captions of one sight of an image.

    Args:
        captions: all of the sample, at least one.
        fields: the same by field, if the source reads fields.
        count: how many to draw, 1 or 2: of different fields if there are as many, else different ones of one field; a
            single caption is returned twice.
        rng: of the sight.
    """
    if not fields:
        return _draw_of_one(captions, count, rng)
    chosen = _draw_fields(fields, min(count, len(fields)), rng)
    if len(chosen) < count:
        return _draw_of_one(chosen[0].captions, count, rng)
    return [field.captions[int(rng.integers(len(field.captions)))] for field in chosen]


def _draw_fields(fields: Sequence[FieldCaptions], count: int, rng: np.random.Generator) -> list[FieldCaptions]:
    """Draw different fields, one after the other, each by its weight among those that are left."""
    left, chosen = list(fields), []
    for _ in range(count):
        bounds = np.cumsum([field.weight for field in left])
        place = int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))
        chosen.append(left.pop(min(place, len(left) - 1)))  # rounding may reach the last bound
    return chosen


def _draw_of_one(captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    first = captions[int(rng.integers(len(captions)))]
    if count == 1:
        return [first]
    others = [caption for caption in dict.fromkeys(captions) if caption != first]
    return [first, others[int(rng.integers(len(others)))] if others else first]
