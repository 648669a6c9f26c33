"""Labels and templates that a person gives on a command line, and the probabilities of labels.

Reading order: `read_labels`, `read_templates`, `probabilities`. Axes: n images, k labels, e embed.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clipjax.evals import datasets, prompts
from clipjax.runtime.storage import is_address, read_small

PLAIN = "photo"
"""The templates of labels that bring none of their own."""

_MAX_FILE_BYTES = 10_000_000
_FILE_ENDINGS = (".json", ".txt", ".csv", ".tsv")


def read_labels(text: str, option: str = "--labels") -> tuple[str, ...]:
    """Return labels.

    Args:
        text: a file (a JSON list, or a line each), a name of `prompts` and `datasets`, or labels with commas between.
        option: that gives it, for messages.

    Raises:
        ValueError: a file that cannot be read, a blank label, or one label twice.
    """
    is_file = _is_file(text)
    if is_file:
        labels = _read_lines(text, option)
    elif text in prompts.CLASSES or text in datasets.names():
        labels = list(prompts.load_classes(text))
    else:
        _refuse_missing_file(text, option, "labels with commas between, or a file of them")
        labels = [label.strip() for label in text.split(",")]
    remedy = "" if is_file else "; labels that hold a comma go into a file, a line each"
    for number, label in enumerate(labels, 1):
        if not label.strip():
            raise ValueError(f"{option}={text}: label {number} of {len(labels)} is blank; give it words{remedy}")
        if (first := labels.index(label) + 1) != number:
            raise ValueError(
                f"{option}={text}: labels {first} and {number} are both {label!r}, so texts cannot tell them apart; "
                "leave one out"
            )
    return tuple(labels)


def read_templates(text: str | None, labels: str, option: str = "--templates") -> tuple[str, ...]:
    """Return templates, each with one `{}` for the label.

    Args:
        text: a file (a JSON list, or a line each), a name of `prompts` and `datasets`, or one template; None: those of
            the labels' own name, else `PLAIN`.
        labels: as for `read_labels`.
        option: that gives it, for messages.

    Raises:
        ValueError: a file that cannot be read, or a template without one `{}`.
    """
    if text is None:
        is_named = not _is_file(labels) and (labels in prompts.TEMPLATE_SETS or labels in datasets.names())
        return prompts.load_templates(labels if is_named else PLAIN)
    if _is_file(text):
        templates = _read_lines(text, option)
    elif text in prompts.TEMPLATE_SETS or text in datasets.names():
        return prompts.load_templates(text)
    elif "{" in text:
        templates = [text]
    else:
        known = ", ".join([*prompts.TEMPLATE_SETS, *datasets.names()])
        raise ValueError(f"{option}={text}: must be a file, a template with {{}} for the label, or one of {known}")
    prompts.check_templates(templates, f"{option}={text}")
    return tuple(templates)


def probabilities(
    image_embed: Float[np.ndarray, "n e"],
    label_embed: Float[np.ndarray, "k e"],
    logit_scale: float,
    logit_bias: float | None = None,
) -> Float[np.ndarray, "n k"]:
    """Return the probability of each label, float64.

    Without a bias it is the softmax over labels, so that each row sums to one. With one, as models of the sigmoid loss
    have it, it is the sigmoid of each pair by itself: any number of labels may fit an image, also none.

    Args:
        image_embed: unit-norm.
        label_embed: unit-norm.
        logit_scale: factor of cosines.
        logit_bias: added to them.

    Source:
        arXiv 2103.00020, section 3.1.2; arXiv 2303.15343, equation 1.
    """
    logits = logit_scale * (image_embed.astype(np.float64) @ label_embed.astype(np.float64).T)
    if logit_bias is not None:
        return np.exp(-np.logaddexp(0, -(logits + logit_bias)))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def _is_file(text: str) -> bool:
    try:
        return is_address(text) or pathlib.Path(text).is_file()
    except (OSError, ValueError):  # a long list of labels is no path
        return False


def _refuse_missing_file(text: str, option: str, what: str) -> None:
    if text.lower().endswith(_FILE_ENDINGS) and "," not in text:
        raise ValueError(f"{option}={text}: there is no such file; it must be {what}")


def _read_lines(place: str, option: str) -> list[str]:
    """Return the strings of a file: a JSON list, or a line each.

    Raises:
        ValueError: it cannot be read, is no UTF-8, is no list of strings, or has none.
    """
    try:
        content = read_small(place, _MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}={place} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from error
    if not place.lower().endswith(".json"):
        lines: Sequence[str] = [line.strip() for line in content.rstrip().splitlines()]
    else:
        try:
            lines = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{option}={place} is no JSON: {error}") from error
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{option}={place} must be a JSON list of strings, or hold a line for each; at least one")
    return lines
