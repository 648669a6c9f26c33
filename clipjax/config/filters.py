"""Conditions over the metadata of samples: `width>=200`, `language==en`, `a/b!=x`.

A condition is a name, one of `< <= > >= == !=`, and a number or a text; it is compared, and never evaluated as code.

Reading order: `parse_condition`, `Condition`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ASPECT = "aspect"
"""Name of width divided by height, where a sample has both."""

_CONDITION = re.compile(r"([^<>=!]+)(<=|>=|==|!=|<|>)([^<>=!].*)", re.DOTALL)
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_LONGEST = 200
_RULE = "must be NAME, one of < <= > >= == !=, and a number or a text, for example 'width>=200' or 'language==en'"


@dataclass(frozen=True)
class Condition:
    """One condition; a sample whose metadata lacks the field does not meet it, whatever the operator.

    Attributes:
        text: as it was written.
        name: of a field, or the way to it through objects: `a/b`.
        operator: one of the six.
        value: to compare with: a number, or a text.
    """

    text: str
    name: str
    operator: str
    value: int | float | str

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of a table that the condition may need."""
        derived = ("width", "height") if self.name == ASPECT else ()
        return tuple(dict.fromkeys((self.name, self.name.partition("/")[0], *derived)))

    def is_met(self, metadata: Mapping[str, Any]) -> bool:
        """Return True if the sample of this metadata is kept."""
        found = _find(metadata, self.name)
        if isinstance(self.value, str):
            found = _text(found)
            return found is not None and (found == self.value) == (self.operator == "==")
        found = _number(found)
        return found is not None and _compare(found, self.operator, self.value)


def parse_condition(text: str) -> Condition:
    """Return the condition that a text writes.

    Raises:
        ValueError: it is none.
    """
    match = _CONDITION.fullmatch(text)
    name, operator, value = (part.strip() for part in match.groups()) if match else ("", "", "")
    if not (name and value) or len(text) > _LONGEST:
        raise ValueError(f"{text[:_LONGEST]!r} {_RULE}")
    number = _parse_number(value)
    if number is None and operator not in ("==", "!="):
        raise ValueError(f"{text!r} compares with a text, {value!r}, by {operator}; {operator} needs a number")
    if number is None and value[0] == value[-1] and value[0] in "\"'" and len(value) > 1:
        value = value[1:-1]
    return Condition(text, name, operator, value if number is None else number)


def condition_errors(filters: Sequence[str], field: str) -> list[str]:
    """Return what is wrong with conditions, a line each."""
    errors = []
    for text in filters:
        try:
            parse_condition(text)
        except ValueError as error:
            errors.append(f"{field}: {error}")
    if doubled := sorted({text for text in filters if filters.count(text) > 1}):
        errors.append(f"{field}: {doubled[0]!r} is there twice; leave one out")
    return errors


def _find(metadata: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, None where there is none."""
    if name == ASPECT:
        width, height = (_number(metadata.get(side)) for side in ("width", "height"))
        if width is not None and height is not None and width > 0 and height > 0:
            return width / height
    if name in metadata:
        return metadata[name]
    found: Any = metadata
    for part in name.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def _parse_number(text: str) -> int | float | None:
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and len(text) <= _LONGEST:
        number = float(text)
        return number if abs(number) != float("inf") else None
    return None


def _number(value: Any) -> int | float | None:
    """Return a number, also one that a table holds as a text; None for all else."""
    if isinstance(value, str):
        return _parse_number(value.strip()) if len(value) <= _LONGEST else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return value


def _text(value: Any) -> str | None:
    """Return the text of a value that has one; numbers and truth values as JSON writes them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return None if isinstance(value, int) and value.bit_length() > 1000 else str(value)
    return value.strip() if isinstance(value, str) and value.strip() else None


def _compare(found: int | float, operator: str, value: int | float) -> bool:
    match operator:
        case "<":
            return found < value
        case "<=":
            return found <= value
        case ">":
            return found > value
        case ">=":
            return found >= value
        case "==":
            return found == value
        case _:
            return found != value
