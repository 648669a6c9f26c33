"""The losses and their gradients by hand, in float64 NumPy, on whole matrices: the reference of all measurements.

Axes: n pairs, e embed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Truth:
    """Loss, gradients, and the sizes that errors are relative to.

    The gradient of the scale is a sum whose terms cancel, and so is that of the bias: their size is the sum of the
    terms' sizes.
    """

    loss: float
    grads: dict[str, Any]
    sizes: dict[str, float]


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x))."""
    return np.logaddexp(0, x)


def _shares(logits: np.ndarray, axis: int) -> np.ndarray:
    """Softmax along an axis."""
    weights = np.exp(logits - logits.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def _log_sum(logits: np.ndarray, axis: int) -> np.ndarray:
    peak = logits.max(axis)
    return peak + np.log(np.exp(logits - np.expand_dims(peak, axis)).sum(axis))


def softmax(
    logits: np.ndarray, same: np.ndarray, *, positives: bool = False, label_smoothing: float = 0.0
) -> tuple[float, np.ndarray]:
    """Loss, and its derivative by each logit. `same`: other pairs of the same group, bool [n, n]."""
    n, own = len(logits), np.eye(len(logits), dtype=bool)
    if positives:
        target = (same | own) / (same | own).sum(1)
        loss = sum(np.mean(_log_sum(logits, axis) - (target * logits).sum(axis)) for axis in (0, 1)) / 2
        return loss, sum(_shares(logits, axis) - target for axis in (0, 1)) / (2 * n)
    logits = np.where(same, -np.inf, logits)
    others = np.where(own, -np.inf, logits)
    loss, logit_grads = 0.0, np.zeros((n, n))
    for axis in (0, 1):
        peak = np.maximum(others.max(axis), -1e300)
        with np.errstate(divide="ignore"):
            excess = peak + np.log(np.exp(others - np.expand_dims(peak, axis)).sum(axis)) - np.diag(logits)
        loss += softplus(excess).mean() / 2
        share = np.exp(logits - np.expand_dims(np.diag(logits) + softplus(excess), axis))
        logit_grads += np.where(own, -np.expand_dims(1 / (1 + np.exp(-excess)), axis), share) / (2 * n)
    if label_smoothing:
        loss += label_smoothing * (np.diag(logits).mean() - logits.mean())
        logit_grads += label_smoothing * (own / n - 1 / n**2)
    return loss, logit_grads


def sigmoid(logits: np.ndarray, same: np.ndarray, *, positives: bool = False) -> tuple[float, np.ndarray]:
    """Loss, and its derivative by each logit."""
    n, own = len(logits), np.eye(len(logits), dtype=bool)
    sign = np.where(own | same if positives else own, 1.0, -1.0)
    counts = np.ones((n, n), bool) if positives else ~same
    loss = np.sum(counts * softplus(-sign * logits)) / n
    return loss, counts * -sign / (1 + np.exp(sign * logits)) / n


def global_(
    logits: np.ndarray, same: np.ndarray, *, log_mean: np.ndarray, gamma: float, epsilon: float
) -> tuple[float, np.ndarray]:
    """Loss, and the derivative by each logit that FastCLIP takes (arXiv 2407.01445)."""
    n, own = len(logits), np.eye(len(logits), dtype=bool)
    loss, logit_grads = 0.0, np.zeros((n, n))
    for side, axis in enumerate((1, 0)):
        ratio = np.where(own | same, 0, np.exp(logits - np.expand_dims(np.diag(logits), axis))) / (n - 1)
        new, old = ratio.sum(axis), np.exp(log_mean[:, side])
        average = np.where(old == 0, new, (1 - gamma) * old + gamma * new)
        loss += np.mean(np.log(epsilon + average)) / 2
        share = ratio / np.expand_dims(epsilon + average, axis)
        logit_grads += np.where(own, -np.expand_dims(share.sum(axis), axis), share) / (2 * n)
    return loss, logit_grads


def distilled(logits: np.ndarray, teacher: np.ndarray, out: np.ndarray) -> tuple[float, np.ndarray]:
    """Cross-entropy of the student's rows and columns against the teacher's, and its derivative by each logit.

    `out`: pairs that do not count, bool [n, n].
    """
    loss, logit_grads = 0.0, np.zeros(logits.shape)
    teacher, masked = np.where(out, -np.inf, teacher), np.where(out, -np.inf, logits)
    for axis in (0, 1):
        target = _shares(teacher, axis)
        loss += np.mean(_log_sum(masked, axis) - (target * logits).sum(axis)) / 2
        logit_grads += (_shares(masked, axis) - target) / (2 * len(logits))
    return loss, logit_grads


LOSSES: dict[str, Callable[..., tuple[float, np.ndarray]]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "global": global_,
}


def reference(
    kind: str,
    image: np.ndarray,
    text: np.ndarray,
    scale: float,
    bias: float = 0.0,
    *,
    group: np.ndarray | None = None,
    teacher: tuple[np.ndarray, np.ndarray, float] | None = None,
    distill_weight: float = 1.0,
    rho: float | None = None,
    **options: Any,
) -> Truth:
    """Loss and gradients of a kind; `options` are those of its function here."""
    image, text, n = image.astype(np.float64), text.astype(np.float64), len(image)
    similarity = image @ text.T
    logits = scale * similarity + bias
    group = np.arange(n) if group is None else group
    same = (group[:, None] == group[None, :]) & ~np.eye(n, dtype=bool)
    loss, logit_grads = LOSSES[kind](logits, same, **options)
    if teacher is not None:
        of_images, of_texts, teacher_scale = teacher
        learned = teacher_scale * (of_images.astype(np.float64) @ of_texts.astype(np.float64).T)
        more, more_grads = distilled(logits, learned, same & (not options.get("positives", False)))
        loss, logit_grads = loss + distill_weight * more, logit_grads + distill_weight * more_grads
    by_scale, scale_size = (logit_grads * similarity).sum(), float(np.abs(logit_grads * similarity).sum())
    if rho is not None:
        loss, logit_grads = (loss + rho) / scale, logit_grads / scale
        by_scale, scale_size = (by_scale - loss) / scale, (scale_size + loss) / scale
    grads = {
        "image": scale * logit_grads @ text,
        "text": scale * logit_grads.T @ image,
        "scale": by_scale,
        "bias": logit_grads.sum() if kind == "sigmoid" else 0.0,
    }
    sizes = {name: float(np.linalg.norm(grads[name])) for name in ("image", "text")}
    sizes |= {"scale": scale_size, "bias": float(np.abs(logit_grads).sum())}
    return Truth(float(loss), grads, {"loss": abs(float(loss)), **sizes})
