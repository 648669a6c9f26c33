"""Results of evaluations as JSON, and beside each other."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from clipjax.evals.runner import DETAILS, Evaluation, Results
from clipjax.runtime import storage
from clipjax.runtime.terminal import format_table, printable

_SHORT = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def to_json(checkpoint: str, evaluation: Evaluation) -> str:
    """Return `{"checkpoint": ..., "tasks": {NAME: {METRIC: value}}}`, and `"failed": {NAME: reason}` if a task did.

    Under `"shifts"` there is what tasks lose that are shifts of others, under `"details"` more about some tasks.
    """
    content = _content(checkpoint, evaluation)
    details = content.pop(DETAILS, None)
    text = json.dumps(content, indent=2, allow_nan=False)
    if details:  # on one line, as a confusion matrix would fill thousands
        text = f'{text.removesuffix("}").rstrip()},\n  "{DETAILS}": {json.dumps(details, allow_nan=False)}\n}}'
    return text + "\n"


def several_to_json(parts: Sequence[tuple[str, Evaluation]]) -> str:
    """Return `{"checkpoints": [...]}` with an object each as `to_json` gives it, a line each."""
    lines = ",\n    ".join(json.dumps(_content(name, evaluation), allow_nan=False) for name, evaluation in parts)
    return f'{{\n  "checkpoints": [\n    {lines}\n  ]\n}}\n'


def _content(checkpoint: str, evaluation: Evaluation) -> dict[str, Any]:
    content: dict[str, Any] = {"checkpoint": checkpoint, "tasks": evaluation.results}
    if evaluation.failures:
        content["failed"] = evaluation.failures
    if evaluation.shifts:
        content["shifts"] = evaluation.shifts
    if evaluation.details:
        content[DETAILS] = evaluation.details
    return content


def write_results(path: pathlib.Path | str, checkpoint: pathlib.Path | str, evaluation: Evaluation) -> str:
    """Write `to_json`; the file is whole or absent. Return why it is absent, empty if it is not."""
    return write_text(path, to_json(str(checkpoint), evaluation))


def write_text(path: pathlib.Path | str, text: str) -> str:
    """Write a file that is whole or absent; return why it is absent, empty if it is not."""
    try:
        storage.write(path, text)
    except OSError as error:
        return str(error)
    return ""


def compare(parts: Sequence[tuple[str, Results]]) -> list[tuple[str, str, list[float | None]]]:
    """Return of several models each task, its first metric, and the values; None where a model gave none.

    Args:
        parts: name of a model, and its results by task.
    """
    first: dict[str, str] = {}
    for _, results in parts:
        for task, metrics in results.items():
            first.setdefault(task, next(iter(metrics)))
    return [
        (task, metric, [results.get(task, {}).get(metric) for _, results in parts]) for task, metric in first.items()
    ]


def comparison_table(parts: Sequence[tuple[str, Results]]) -> str:
    """Return a table of each task's first metric, a column for each of several models, and what each column is."""
    letters = [_SHORT[i] if i < len(_SHORT) else str(i + 1) for i in range(len(parts))]
    rows = [
        [task, metric, *("failed" if value is None else f"{100 * value:.1f} %" for value in values)]
        for task, metric, values in compare(parts)
    ]
    legend = [f"{letter}: {name}" for letter, (name, _) in zip(letters, parts, strict=True)]
    return "\n".join([format_table(rows, ("task", "metric", *letters)), *map(printable, legend)])
