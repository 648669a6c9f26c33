"""Overlap of an evaluation set with training data, and accuracy with and without it (arXiv 2103.00020, section 5).

`clipjax data dedup --overlap` finds near-duplicates and writes the file that a task reads here.

Reading order: `Overlap`, `to_json`, `load_overlap`, `Overlap.measure`. Axes: n samples, b batch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.data.digests import CONTENTS, Hasher, spread
from clipjax.data.sample import BadSample, Source
from clipjax.runtime.storage import read_small

CLEAN, OVERLAPPING, NOT_COMPARED = range(3)
"""Parts of an evaluation set; a sample whose picture has no hash was not compared."""

CONFIDENCE = 0.995
"""Of the intervals, as in the paper."""

_MAX_FILE_BYTES = 2**26
_KEYS = {"source", "num_samples", "pictures", "distance", "not_compared", "against"}
_AGAINST_KEYS = {"source", "num_samples", "num_unusable", "overlapping"}


@dataclass(frozen=True)
class TrainingPart:
    """One training source, and the samples of the evaluation set that it has too.

    Attributes:
        source: the string that names it.
        num_samples: of it.
        num_unusable: samples of it whose pictures have no hash, so that nothing was compared with them.
        overlapping: numbers of the evaluation set's samples that are near one of its samples, ascending.
    """

    source: str
    num_samples: int
    num_unusable: int
    overlapping: Sequence[int]


@dataclass(frozen=True)
class Overlap:
    """Samples of an evaluation set that training data has too, or nearly so.

    Attributes:
        source: the string that named the evaluation set.
        num_samples: of the set.
        pictures: digests of some of its pictures by number, to know the set again.
        distance: most bits in which hashes of near-duplicates differ.
        not_compared: numbers of samples without a hash, ascending.
        against: the training sources.
    """

    source: str
    num_samples: int
    pictures: Mapping[int, str]
    distance: int
    not_compared: Sequence[int]
    against: Sequence[TrainingPart]

    def parts(self) -> np.ndarray:
        """Return the part of each sample: int32 `[n]`."""
        found = np.full(self.num_samples, CLEAN, np.int32)
        found[np.asarray(self.not_compared, np.int64)] = NOT_COMPARED
        for each in self.against:
            found[np.asarray(each.overlapping, np.int64)] = OVERLAPPING
        return found

    def measure(self, hits: np.ndarray, parts: np.ndarray) -> tuple[dict[str, float], dict[str, Any]]:
        """Return metrics, and details as JSON.

        The metrics are `num_overlapping` and, of parts that have images, `top1_clean` and `top1_overlapping`. The
        details hold the counts of right images and an interval of each part; how many samples of the whole set each
        training source has; `inflation`, top-1 of all images less that of the clean ones; and `p_value`, the chance
        that as many overlapping images, or more, were right by the accuracy on clean ones. What a part without images
        leaves undefined is None.

        Args:
            hits: whether the class of each image was chosen, bool `[n]`, at least one.
            parts: of the same images, int `[n]`.

        Source: arXiv 2103.00020, section 5: All - Clean, the one-tailed binomial test, the Clopper-Pearson interval.
        """
        names = {"clean": CLEAN, "overlapping": OVERLAPPING}
        counts = {name: (int(hits[parts == part].sum()), int((parts == part).sum())) for name, part in names.items()}
        metrics = {f"top1_{name}": right / total for name, (right, total) in counts.items() if total}
        clean = metrics.get("top1_clean")
        right, total = counts["overlapping"]
        details = {
            "distance": self.distance,
            "against": [
                {
                    "source": each.source,
                    "num_samples": each.num_samples,
                    "num_unusable": each.num_unusable,
                    "num_overlapping": len(each.overlapping),
                }
                for each in self.against
            ],
            "confidence": CONFIDENCE,
            **{name: _describe(*count) for name, count in counts.items()},
            "num_not_compared": int((parts == NOT_COMPARED).sum()),
            "inflation": None if clean is None else float(hits.mean()) - clean,
            "p_value": None if clean is None or not total else chance_of_more(right, total, clean),
        }
        return {**metrics, "num_overlapping": float(total)}, details


def _describe(right: int, total: int) -> dict[str, Any]:
    bounds = list(accuracy_interval(right, total)) if total else None
    return {"num_examples": total, "num_right": right, "interval": bounds}


def accuracy_interval(right: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of an accuracy.

    Args:
        right: number of right images, from 0 to `total`.
        total: number of images, 1 or more.
        confidence: of the interval, between 0 and 1.
    """
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = float(betaincinv(right, total - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, total - right, 1 - tail)) if right < total else 1.0
    return low, high


def chance_of_more(right: int, total: int, accuracy: float) -> float:
    """Return the probability that of `total` images `right` or more are right, each with the chance `accuracy`.

    It is the p-value of the one-tailed binomial test whose null hypothesis is this accuracy.
    """
    from scipy.special import betainc

    return float(betainc(right, total - right + 1, accuracy)) if right > 0 else 1.0


def picture_digests(source: Source) -> dict[int, str]:
    """Return digests of a few pictures, as they are encoded, by number; those that cannot be read are left out.

    Unlike `Source.digests` they do not depend on the fields of captions and labels.
    """
    found = {}
    for index in spread(len(source), CONTENTS):
        try:
            image = source[index].image
        except BadSample:
            continue
        hasher = Hasher()
        hasher.add(*((image,) if isinstance(image, bytes) else (repr(image.shape).encode(), image.tobytes())))
        found[index] = hasher.hexdigest()
    return found


def to_json(overlap: Overlap) -> str:
    """Return the text of the file that `load_overlap` reads."""
    content = {
        "source": overlap.source,
        "num_samples": overlap.num_samples,
        "pictures": {str(index): digest for index, digest in overlap.pictures.items()},
        "distance": overlap.distance,
        "not_compared": [int(index) for index in overlap.not_compared],
        "against": [
            {
                "source": each.source,
                "num_samples": each.num_samples,
                "num_unusable": each.num_unusable,
                "overlapping": [int(index) for index in each.overlapping],
            }
            for each in overlap.against
        ],
    }
    return json.dumps(content) + "\n"


def load_overlap(path: str, source: Source) -> Overlap:
    """Return the overlap of a source from a file.

    Args:
        path: path or address of what `clipjax data dedup --overlap` wrote.
        source: the evaluation set.

    Raises:
        ValueError: no such file, a damaged one, or one of another set.
    """
    field = f"overlap={path!r}"
    try:
        content = json.loads(read_small(path, _MAX_FILE_BYTES))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{field} cannot be read: {error}; {_REMEDY}") from error
    try:
        overlap = _parse(content)
    except ValueError as error:
        raise ValueError(f"{field}: {error}; {_REMEDY}") from error
    _check_set(overlap, source, field)
    return overlap


_REMEDY = "write it with `clipjax data dedup SOURCE --against=TRAINING_SOURCE --overlap=FILE`, SOURCE as in the task"


def _check_set(overlap: Overlap, source: Source, field: str) -> None:
    """Refuse the overlap of another set.

    Raises:
        ValueError: it is of one.
    """
    if overlap.num_samples != len(source):
        raise ValueError(
            f"{field} is of {overlap.source!r} with {overlap.num_samples} samples; the task's source has "
            f"{len(source)}; {_REMEDY}"
        )
    found = picture_digests(source)
    both = [index for index in overlap.pictures if index in found]
    if not both:
        raise ValueError(f"{field} has no picture in common with the task's source that can be read; {_REMEDY}")
    if different := [index for index in both if overlap.pictures[index] != found[index]]:
        raise ValueError(
            f"{field} is of {overlap.source!r}: of {len(both)} pictures that were compared, {len(different)} are not "
            f"those of the task's source, the first of them number {different[0]}; {_REMEDY}"
        )


def _parse(content: Any) -> Overlap:
    """Return what the JSON of a file holds.

    Raises:
        ValueError: it is damaged.
    """
    _check_keys(content, _KEYS, "the file")
    size = _whole(content, "num_samples")
    pictures = content["pictures"]
    if not isinstance(pictures, dict) or not all(
        index.isdecimal() and int(index) < size and isinstance(digest, str) for index, digest in pictures.items()
    ):
        raise ValueError(f"pictures must be an object with digests by number, below {size}")
    if not isinstance(content["against"], list) or not content["against"]:
        raise ValueError("against must be a list of training sources, at least one")
    for each in content["against"]:
        _check_keys(each, _AGAINST_KEYS, "each of against")
    against = [
        TrainingPart(
            _text(each), _whole(each, "num_samples"), _whole(each, "num_unusable"), _numbers(each, "overlapping", size)
        )
        for each in content["against"]
    ]
    not_compared = _numbers(content, "not_compared", size)
    if twice := set(not_compared) & {index for each in against for index in each.overlapping}:
        raise ValueError(f"{len(twice)} samples are both overlapping and not_compared, the first of them {min(twice)}")
    digests = {int(index): digest for index, digest in pictures.items()}
    return Overlap(_text(content), size, digests, _whole(content, "distance"), not_compared, against)


def _check_keys(value: Any, keys: set[str], name: str) -> None:
    if not isinstance(value, dict) or set(value) != keys:
        raise ValueError(f"{name} must be a JSON object with {', '.join(sorted(keys))}, and nothing else")


def _text(content: dict[str, Any]) -> str:
    if not isinstance(content["source"], str):
        raise ValueError("source must be a string")
    return content["source"]


def _whole(content: dict[str, Any], name: str) -> int:
    value = content[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0")
    return value


def _numbers(content: dict[str, Any], name: str, size: int) -> list[int]:
    values = content[name]
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"{name} must be a list of whole numbers")
    if outside := [value for value in values if not 0 <= value < size]:
        raise ValueError(
            f"{name}: {len(outside)} of {len(values)} numbers are no sample of a set of {size}, the first of them "
            f"{outside[0]}"
        )
    if len(set(values)) != len(values):
        raise ValueError(f"{name} must have each number once")
    return values
