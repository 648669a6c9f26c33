"""Ranges of numbers, kept in the `metadata` of the field that they bound.

`bounded` declares such a field; `validation` reads the ranges of all fields in one walk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

RANGES, USED_BY = "ranges", "used_by"
"""Keys of a field's metadata: its ranges, and the choice of another field without which it would be ignored."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold; not a number and infinities lie in no range.

    Attributes:
        rule: the end of an error's sentence.
        holds: True for a number inside.
    """

    rule: str
    holds: Callable[[float], bool]


POSITIVE = Range("must be greater than 0", lambda value: value > 0)
AT_LEAST_ONE = Range("must be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Range("must not be negative", lambda value: value >= 0)
AT_LEAST_ZERO = Range("must be at least 0", lambda value: value >= 0)
FRACTION = Range("must lie between 0 and 1", lambda value: 0 <= value <= 1)
INSIDE_ONE = Range("must lie between 0 and 1", lambda value: 0 < value < 1)
BELOW_ONE = Range("must be at least 0 and below 1", lambda value: 0 <= value < 1)
LESS_THAN_ONE = Range("must be at least 0 and less than 1", lambda value: 0 <= value < 1)
FINITE = Range("must be a finite number", lambda value: True)


def bounded(default: T, *ranges: Range, used_by: Any = None) -> T:
    """Declare a field of a config dataclass whose numbers lie in these ranges.

    Args:
        default: of the field.
        ranges: the first that does not hold is the one that an error names. The items of a tuple lie in them one by
            one; None lies in all.
        used_by: the loss kind without which the field would be ignored.
    """
    metadata: Mapping[str, Any] = {RANGES: ranges} | ({} if used_by is None else {USED_BY: used_by})
    return field(default=default, metadata=metadata)
