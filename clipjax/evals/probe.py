"""Linear probe: multinomial logistic regression on features (arXiv 2103.00020, section 3.2 and appendix A.3).

Reading order: `fit`, `sweep`, `Classifier`. Axes: n examples, d features, r directions in which they vary, k classes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

MAX_STEPS = 4000
TOLERANCE = 1e-5
"""Largest component of the gradient, of the mean over examples in scaled directions, at which a fit has converged."""

RELATIVE_TOLERANCE = 0.01
"""The same as a share of the penalty's own gradient, its largest component: the smaller of the two limits counts."""

STEPS_PER_DECADE = 8
DECADES = (-6, 6)
_COARSE = 2 * STEPS_PER_DECADE  # from 1e-6 to 1e6 by factors of 100
_MEMORY = 20  # pairs of steps that L-BFGS remembers
_BLOCK = 65536  # rows in float64 at once


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted probe.

    Attributes:
        classes: labels that occur in training, ascending, int64 `[k]`.
        weight: float64 `[d, k]`.
        intercept: float64 `[k]`.
        converged: the gradient is within `TOLERANCE` and `RELATIVE_TOLERANCE`.
        steps: that the fit took.
    """

    classes: np.ndarray
    weight: np.ndarray
    intercept: np.ndarray
    converged: bool
    steps: int

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return logits float64 `[n, k]` of features `[n, d]`."""
        blocks = range(0, len(features), _BLOCK)
        rows = [features[start : start + _BLOCK].astype(np.float64) @ self.weight for start in blocks]
        return np.concatenate([np.zeros((0, len(self.classes))), *rows]) + self.intercept

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return labels int64 `[n]` of features `[n, d]`."""
        return self.classes[self.scores(features).argmax(axis=1)]


class Problem:
    """Training examples, prepared for fits of any strength with one compiled program.

    Features are centred, which changes the intercept alone, and turned to their principal directions in float64, which
    changes neither logits nor the penalty. Scaling each direction for the strength then makes the fit well conditioned,
    so that float32 suffices on the device.

    Args:
        features: finite, `[n, d]`.
        labels: int `[n]`, not negative.

    Raises:
        ValueError: fewer than two classes occur; numbers of features and labels differ, or features are not finite.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        if len(features) != len(labels):
            raise ValueError(f"{len(features)} rows of features for {len(labels)} labels; give one label a row")
        self.classes, index = np.unique(np.asarray(labels, np.int64), return_inverse=True)
        if len(self.classes) < 2:
            raise ValueError(f"a probe needs two classes or more; the training examples have {len(self.classes)}")
        if not np.isfinite(features).all():
            raise ValueError("the features are not finite; see that the checkpoint's parameters are")
        self._index = index.astype(np.int32)
        self._mean = features.mean(axis=0, dtype=np.float64)
        self._directions, self._variance = _principal(features, self._mean)
        rows = range(0, len(features), _BLOCK)
        turned = [(features[start : start + _BLOCK] - self._mean) @ self._directions for start in rows]
        self._turned = np.concatenate([each / np.sqrt(self._variance) for each in turned]).astype(np.float32)

    def fit(self, strength: float) -> Classifier:
        """Return the minimiser of `strength * (sum of cross entropies) + 0.5 * (squared norm of the weights)`.

        The intercept is not penalised. Two classes have one weight vector, as in scikit-learn.

        Args:
            strength: the inverse of the regularisation, scikit-learn's `C`; positive.
        """
        if not (np.isfinite(strength) and strength > 0):
            raise ValueError(f"strength={strength} must be a positive number")
        count, num_classes = len(self._index), len(self.classes)
        decay = 1.0 / (strength * count)
        # In a direction of variance v the curvature is about v / 4 of the mean cross entropy, and the decay.
        scale = np.sqrt(self._variance / (self._variance + 4 * decay))
        penalty = decay * scale**2 / self._variance
        columns = num_classes if num_classes > 2 else 1
        arguments = self._turned, self._index, scale.astype(np.float32), penalty.astype(np.float32)
        with jax.default_device(jax.local_devices()[0]):
            weight, bias, steps, converged = map(np.asarray, _minimise(columns, *arguments))
        weight = self._directions @ (weight.astype(np.float64) * (scale / np.sqrt(self._variance))[:, None])
        bias = bias.astype(np.float64)
        if columns == 1:
            weight, bias = np.pad(weight, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
        return Classifier(self.classes, weight, bias - self._mean @ weight, bool(converged), int(steps))


def fit(features: np.ndarray, labels: np.ndarray, strength: float) -> Classifier:
    """Return the probe of one strength; see `Problem`."""
    return Problem(features, labels).fit(strength)


def sweep(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return the best strength of 97 between 1e-6 and 1e6, and all scores that were looked at.

    The search begins with factors of 100, and halves the interval around the best until there are 8 steps in a decade.
    Of equal scores the smallest strength is taken.

    Source:
        arXiv 2103.00020, appendix A.3.

    Args:
        score: of a strength, the larger the better.
    """
    last = (DECADES[1] - DECADES[0]) * STEPS_PER_DECADE
    seen: dict[int, float] = {}
    step, places = _COARSE, list(range(0, last + 1, _COARSE))
    while True:
        for place in places:
            if place not in seen:
                seen[place] = score(_strength(place))
        best = max(sorted(seen), key=lambda place: seen[place])
        if step == 1:
            return _strength(best), {_strength(place): seen[place] for place in sorted(seen)}
        step //= 2
        places = [place for place in (best - step, best + step) if 0 <= place <= last]


def split(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which examples validate: of each class about a share, but never the last one. Bool `[n]`.

    Args:
        labels: int `[n]`.
        share: of a class's examples, from 0 to 1.
        seed: of the draw.
    """
    generator, chosen = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = generator.permutation(np.flatnonzero(labels == label))
        chosen[own[: min(round(share * len(own)), len(own) - 1)]] = True
    return chosen


def _strength(place: int) -> float:
    return float(10.0 ** (DECADES[0] + place / STEPS_PER_DECADE))


def _principal(features: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the directions in which features vary, float64 `[d, r]`, and the variances, `[r]`."""
    count, width = features.shape
    if width > count:
        centred = features - mean
        values, left = np.linalg.eigh(centred @ centred.T / count)
        kept = values > values.max(initial=0.0) * 1e-12
        directions = centred.T @ left[:, kept]
        return directions / np.sqrt(values[kept] * count), values[kept]
    total = np.zeros((width, width))
    for start in range(0, count, _BLOCK):
        centred = features[start : start + _BLOCK] - mean
        total += centred.T @ centred
    values, directions = np.linalg.eigh(total / count)
    kept = values > values.max(initial=0.0) * 1e-12
    return directions[:, kept], values[kept]


@functools.partial(jax.jit, static_argnums=0)
def _minimise(
    columns: int,
    x: Float[Array, "n r"],
    index: Int[Array, " n"],
    scale: Float[Array, " r"],
    penalty: Float[Array, " r"],
) -> tuple[Float[Array, "r c"], Float[Array, " c"], Int[Array, ""], Bool[Array, ""]]:
    """Return weights in scaled directions, intercepts, the number of steps, and whether they converged."""
    high = jax.lax.Precision.HIGHEST

    def loss(params: tuple[Array, Array]) -> Array:
        weight, bias = params
        logits = jnp.matmul(x, weight * scale[:, None], precision=high) + bias[None]
        if columns == 1:
            logits = jnp.pad(logits, ((0, 0), (1, 0)))
        # By the others' lead: on examples that are told apart, one minus a probability near 1 would be noise.
        is_right = jax.nn.one_hot(index, logits.shape[1], dtype=bool)
        right = jnp.take_along_axis(logits, index[:, None], axis=1)[:, 0]
        others = jax.nn.logsumexp(logits, axis=1, where=~is_right)
        return jax.nn.softplus(others - right).mean() + 0.5 * jnp.sum(penalty[:, None] * jnp.square(weight))

    tx = optax.lbfgs(memory_size=_MEMORY)
    value_and_grad = optax.value_and_grad_from_state(loss)
    start = jnp.zeros((x.shape[1], columns)), jnp.zeros((columns,))

    def size(grads: tuple[Array, Array]) -> Array:
        return jnp.maximum(jnp.max(jnp.abs(grads[0]), initial=0.0), jnp.max(jnp.abs(grads[1])))

    def goes_on(carry: tuple) -> Array:
        params, _, steps, grads = carry
        return (steps < MAX_STEPS) & (size(grads) > tolerance(params))

    def tolerance(params: tuple[Array, Array]) -> Array:
        pull = jnp.max(penalty[:, None] * jnp.abs(params[0]), initial=0.0)
        return jnp.where(pull > 0, jnp.minimum(TOLERANCE, RELATIVE_TOLERANCE * pull), TOLERANCE)

    def step(carry: tuple) -> tuple:
        params, state, steps, _ = carry
        value, grads = value_and_grad(params, state=state)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        params = optax.apply_updates(params, updates)
        return params, state, steps + 1, optax.tree.get(state, "grad")

    params, _, steps, grads = jax.lax.while_loop(goes_on, step, (start, tx.init(start), 0, jax.grad(loss)(start)))
    return *params, steps, size(grads) <= tolerance(params)  # type: ignore[return-value]
