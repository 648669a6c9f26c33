"""Places of the right answers in rankings, counted one by one, and the reasons why two rankings differ.

Axes: q queries, c candidates. A query may have several right candidates; it is a hit at a depth if one of them is among
the first so many. Of equal scores the lower candidate comes first.
"""

from typing import Any

import numpy as np

TIE = 2e-6
"""Two cosines that are nearer than this are a tie in float32: those of the same pair on two sides differ by as much."""


def best_places(scores: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """Return the place of each query's best right candidate, from 0.

    Args:
        scores: `[q, c]`.
        is_right: bool `[q, c]`, at least one a row.

    Raises:
        ValueError: the shapes differ, or a query has no right candidate.
    """
    _check(scores, is_right)
    best = np.where(is_right, scores, -np.inf).argmax(axis=1)
    own = np.take_along_axis(scores, best[:, None], axis=1)
    is_before = np.arange(scores.shape[1]) < best[:, None]
    return ((scores > own) | ((scores == own) & is_before)).sum(axis=1)


def margins(scores: np.ndarray, is_right: np.ndarray, depth: int) -> np.ndarray:
    """Return by how much each query is a hit at a depth; below 0 by how much it is none, and 0 for a tie.

    It is the score of the best right candidate less that of the wrong one in place `depth`, infinite if there are
    fewer wrong ones.

    Args:
        scores: `[q, c]`.
        is_right: bool `[q, c]`, at least one a row.
        depth: of the hit, from 1.

    Raises:
        ValueError: the shapes differ, a query has no right candidate, or the depth is below 1.
    """
    _check(scores, is_right)
    if depth < 1:
        raise ValueError(f"depth={depth} must be 1 or more")
    own = np.where(is_right, scores, -np.inf).max(axis=1)
    if depth > scores.shape[1]:
        return np.full(len(scores), np.inf)
    wrong = np.where(is_right, -np.inf, scores)
    return own - np.partition(wrong, -depth, axis=1)[:, -depth]


def differences(ours: np.ndarray, theirs: np.ndarray, margin: np.ndarray) -> list[dict[str, Any]]:
    """Return the queries that are a hit on one side alone, each with the margin in float64 and whether that is a tie.

    Args:
        ours: hits, bool `[q]`.
        theirs: hits, bool `[q]`.
        margin: of float64 scores, `[q]`; see `margins`.
    """
    return [
        {
            "query": int(query),
            "clipjax": bool(ours[query]),
            "peer": bool(theirs[query]),
            "float64_margin": float(margin[query]),
            "is_tie": bool(abs(margin[query]) < TIE),
        }
        for query in np.flatnonzero(ours != theirs)
    ]


def one_hot(owners: np.ndarray, count: int) -> np.ndarray:
    """Return bool `[q, c]`, true where candidate `owners[q]` stands."""
    return np.asarray(owners)[:, None] == np.arange(count)


def ensemble(embed: np.ndarray, num_classes: int) -> np.ndarray:
    """Return unit-norm means of the prompts of each class.

    Args:
        embed: unit-norm rows, all prompts of the first class, then of the second.
        num_classes: that they belong to.
    """
    mean = embed.reshape(num_classes, -1, embed.shape[1]).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def to_count(share: float, total: int) -> int:
    """Return the number of queries that a share stands for.

    Raises:
        ValueError: it stands for none, so it is a share of something else.
    """
    count = round(share * total)
    if not 0 <= count <= total or abs(share * total - count) > 0.01:
        raise ValueError(f"{share} is no share of {total} queries: {share * total} is no whole number from 0 on")
    return count


def _check(scores: np.ndarray, is_right: np.ndarray) -> None:
    if scores.shape != is_right.shape or scores.ndim != 2:
        raise ValueError(f"scores {scores.shape} and is_right {is_right.shape} must be of one shape [q, c]")
    if not is_right.any(axis=1).all():
        bad = np.flatnonzero(~is_right.any(axis=1))
        raise ValueError(f"{len(bad)} queries have no right candidate, the first is {bad[0]}; leave them out")
