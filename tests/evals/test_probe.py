"""Linear probes against the same objective minimised in float64, and the search for the strength."""

import jax
import numpy as np
import pytest
import scipy.optimize

from clipjax.config import MeshConfig
from clipjax.evals import probe
from clipjax.runtime import sharding

pytestmark = pytest.mark.newest


def make(count: int, width: int, num_classes: int, condition: float = 1.0, apart: float = 1.0):
    generator = np.random.default_rng(count + width)
    means, labels = apart * generator.normal(size=(num_classes, width)), np.arange(count) % num_classes
    features = means[labels] + generator.normal(size=(count, width))
    return (features * np.logspace(0, -np.log10(condition), width) + 3).astype(np.float32), labels


def reference(features: np.ndarray, labels: np.ndarray, strength: float) -> np.ndarray:
    """Return the logits of the training examples, less their mean."""
    mean = features.mean(axis=0, dtype=np.float64)
    x, hot = features - mean, np.eye(labels.max() + 1)[labels]
    width, columns = x.shape[1], hot.shape[1] if hot.shape[1] > 2 else 1

    def logits(params: np.ndarray) -> np.ndarray:
        z = x @ params[: width * columns].reshape(width, columns) + params[width * columns :]
        return z if columns > 1 else np.pad(z, ((0, 0), (1, 0)))

    def loss(params: np.ndarray) -> tuple[float, np.ndarray]:
        z = logits(params)
        log_sum = np.logaddexp.reduce(z, axis=1, keepdims=True)
        grad = (np.exp(z - log_sum) - hot)[:, -columns:]
        weight = params[: width * columns]
        value = strength * ((log_sum - z) * hot).sum()
        slope = np.concatenate([(strength * x.T @ grad).ravel() + weight, strength * grad.sum(axis=0)])
        scale = strength * len(x)
        return (value + 0.5 * weight @ weight) / scale, slope / scale

    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-10}
    start = np.zeros((width + 1) * columns)
    z = logits(scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)
    return z - z.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "strengths"),
    [
        ((150, 6, 4), (1e-4, 1.0, 100.0)),
        ((150, 6, 2), (1e-4, 1.0, 100.0)),
        ((150, 6, 4, 1e3), (1.0, 100.0)),  # ill-conditioned: standard deviations from 1 to 0.001
        ((50, 1000, 5), (1e-2, 1.0)),
        ((4, 6, 4), (1.0,)),  # one example of each class
        ((60, 6, 3, 1.0, 10.0), (1e4, 1e6)),  # separable: the gradient alone is small far from the minimum
    ],
)
def test_a_fit_is_the_minimum_in_float64(shape, strengths):
    features, labels = make(*shape)
    problem = probe.Problem(features, labels)
    for strength in strengths:
        fitted = problem.fit(strength)
        assert fitted.converged
        scores, expected = fitted.scores(features), reference(features, labels, strength)
        scores -= scores.mean(axis=1, keepdims=True)
        # The gradient stops at 1e-5 and at a hundredth of the penalty's: the logits are within about as much.
        assert np.abs(scores - expected).max() <= 1e-2 * np.abs(expected).max()
        assert (scores.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.999


def test_separable_examples_with_hardly_any_penalty_stay_finite():
    features, labels = make(60, 6, 3, apart=10.0)
    fitted = probe.fit(features, labels, 1e6)
    assert np.isfinite(fitted.scores(features)).all()
    np.testing.assert_array_equal(fitted.predict(features), labels)


def test_a_fit_that_did_not_converge_is_told(monkeypatch):
    monkeypatch.setattr(probe, "MAX_STEPS", 1)
    features, labels = make(31, 7, 3)
    fitted = probe.fit(features, labels, 100.0)
    assert not fitted.converged
    assert fitted.steps == 1


def test_classes_keep_their_numbers_and_constant_features_weigh_nothing():
    features, labels = make(60, 4, 3, apart=10.0)
    features[:, 1] = 7.0
    labels = np.asarray([2, 5, 9])[labels]  # the others do not occur in training
    fitted = probe.fit(features, labels, 1.0)
    np.testing.assert_array_equal(fitted.classes, [2, 5, 9])
    np.testing.assert_array_equal(fitted.predict(features), labels)
    np.testing.assert_allclose(fitted.weight[1], 0.0, atol=1e-9)


def test_what_no_probe_can_learn_is_refused():
    with pytest.raises(ValueError, match="needs two classes or more; the training examples have 1"):
        probe.Problem(np.ones((3, 2)), np.zeros(3, int))
    with pytest.raises(ValueError, match="3 rows of features for 2 labels"):
        probe.Problem(np.ones((3, 2)), np.zeros(2, int))
    with pytest.raises(ValueError, match="features are not finite"):
        probe.Problem(np.full((2, 2), np.nan), np.arange(2))
    for strength in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="must be a positive number"):
            probe.Problem(np.eye(2), np.arange(2)).fit(strength)


@pytest.mark.parametrize("peak", [-6.0, -5.875, -0.25, 0.0, 3.125, 6.0])
def test_the_sweep_finds_a_single_peak_with_few_fits(peak):
    best, scores = probe.sweep(lambda strength: -abs(np.log10(strength) - peak))
    assert np.log10(best) == pytest.approx(peak)
    assert {1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6} <= {float(f"{each:.6g}") for each in scores}
    assert len(scores) <= 7 + 2 * 4
    assert probe.sweep(lambda strength: 0.5)[0] == pytest.approx(1e-6)


def test_the_split_leaves_an_example_of_each_class_and_depends_on_the_seed():
    labels = np.repeat(np.arange(4), [1, 2, 10, 100])
    held = probe.split(labels, 0.2, seed=0)
    np.testing.assert_array_equal(np.bincount(labels[held], minlength=4), [0, 0, 2, 20])
    np.testing.assert_array_equal(held, probe.split(labels, 0.2, seed=0))
    assert (held != probe.split(labels, 0.2, seed=1)).any()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_fit_is_the_same_beside_any_mesh(devices):
    features, labels = make(60, 4, 3)
    alone = probe.fit(features, labels, 1.0)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:devices])):
        fitted = probe.fit(features, labels, 1.0)
    # One device computes it, by a program that may be compiled once more: the last bits are free.
    np.testing.assert_allclose(fitted.scores(features), alone.scores(features), rtol=1e-4, atol=1e-4)
