"""Accuracies of many models on a reference set and on a shifted one: published ones by name, or those of a JSON file.

`benchmarks/shift_points.py` writes the files here, each with the tables that it comes from.
"""

import functools
import json
import math
import pathlib
from dataclasses import dataclass
from typing import Any

from clipjax.evals.robustness import Baseline, fit_baseline
from clipjax.runtime.storage import is_address, read_small

_FOLDER = pathlib.Path(__file__).parent
_KEYS = ("reference", "source", "licence", "standard", "others")
_MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class Point:
    """A model's accuracies on the reference and on the shifted set, both between 0 and 1, these excluded."""

    name: str
    reference: float
    shifted: float


@dataclass(frozen=True)
class ShiftPoints:
    """Models beside which others are seen.

    Attributes:
        name: of the points, or the file that they are from.
        reference: name of the reference set; empty if the file does not tell it.
        standard: models that the baseline is fitted to.
        others: models to draw beside.
        baseline: of the standard models.
    """

    name: str
    reference: str
    standard: tuple[Point, ...]
    others: tuple[Point, ...]
    baseline: Baseline


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of the published points."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


@functools.cache
def load_shift_points(name: str) -> ShiftPoints:
    """Return points by name, or from a JSON file, which is read once: the work and its report see the same.

    The file holds an object: `standard` and, if there are such, `others` are lists of `[name, accuracy on the
    reference, accuracy on the shifted set]`; `reference`, `source` and `licence` may tell what it is.

    Raises:
        ValueError: neither a known name nor such a file, or points that no line can be fitted to.
    """
    field = f"shift_points={name!r}"
    try:
        content = json.loads(_read(name))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{field}: {error}") from error
    if not isinstance(content, dict) or (unknown := set(content) - set(_KEYS)) or "standard" not in content:
        told = f"; it has {', '.join(map(repr, sorted(unknown)))}" if isinstance(content, dict) and unknown else ""
        raise ValueError(f"{field} must be a JSON object with standard, and at most {', '.join(_KEYS)} besides{told}")
    reference = content.get("reference", "")
    if not isinstance(reference, str):
        raise ValueError(f"{field}, reference={reference!r} must be a string, the name of the reference set")
    standard = _to_points(content["standard"], f"{field}, standard")
    others = _to_points(content.get("others", []), f"{field}, others")
    try:
        baseline = fit_baseline([(each.reference, each.shifted) for each in standard])
    except ValueError as error:
        raise ValueError(f"{field}, standard: {error}") from error
    return ShiftPoints(name, reference, standard, others, baseline)


def _read(name: str) -> bytes | str:
    if name in names():
        return (_FOLDER / f"{name}.json").read_text(encoding="utf-8")
    if not is_address(name) and not pathlib.Path(name).is_file():
        raise ValueError(f"must be one of {', '.join(names())}, or a JSON file with points of standard models")
    return read_small(name, _MAX_FILE_BYTES)


def _to_points(rows: Any, field: str) -> tuple[Point, ...]:
    if not isinstance(rows, list):
        raise ValueError(f"{field} must be a list of [name, accuracy on the reference, accuracy on the shifted set]")
    return tuple(_to_point(row, f"{field}[{number}]") for number, row in enumerate(rows))


def _to_point(row: Any, field: str) -> Point:
    if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and all(map(_is_share, row[1:]))):
        raise ValueError(
            f"{field}={_shown(row)} must be [name, accuracy on the reference, accuracy on the shifted set], the "
            "accuracies as shares between 0 and 1; 0 and 1 themselves have no logit"
        )
    return Point(row[0], float(row[1]), float(row[2]))


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 < value < 1


def _shown(row: Any) -> str:
    text = json.dumps(row)
    return text if len(text) <= 100 else f"{text[:100]}..."
