"""Probes, few-shot probes and nearest neighbours as tasks, against brute force on features that the test makes up."""

import math

import numpy as np
import pytest

from clipjax.config import FeatureKind, TaskConfig, TaskKind
from clipjax.data.sample import Sample
from clipjax.evals import few_shot, nearest
from clipjax.evals.probe import fit
from clipjax.evals.probe_tasks import FewShot, LinearProbe, NearestNeighbours, read_labelled
from tests.evals.test_evals import FakeEncoder, batch, unit

pytestmark = pytest.mark.newest

CENTRES = unit(np.array([[1.0, 0.0, 0.2], [0.0, 1.0, 0.2], [-1.0, -1.0, 0.2]]))
LABELS = np.arange(60) % 3


@pytest.fixture(scope="module")
def encoder() -> FakeEncoder:
    noise = np.random.default_rng(0).normal(size=(60, 3))
    return FakeEncoder(unit(CENTRES[LABELS] + 0.05 * noise), {f"a {c}": CENTRES[i] for i, c in enumerate("xyz")})


def batches(rows: range, labels: np.ndarray = LABELS) -> list[dict]:
    return [batch([row], [int(labels[row])], [()]) for row in rows]


def test_a_linear_probe_counts_each_labelled_image_once(encoder):
    labels = LABELS.copy()
    labels[[1, 50]] = -1  # one in training, one in the test
    test = [*batches(range(40, 60), labels), batch([3], [0], [()], mask=[False])]
    found = LinearProbe(FeatureKind.EMBEDDING)(encoder, test, batches(range(40), labels))
    kept = np.flatnonzero(labels[:40] >= 0)  # a fit on all of these, those for validation among them
    fitted = fit(encoder.tables[0][kept], labels[kept], found["best_c"])
    tested = np.flatnonzero(labels[40:] >= 0) + 40
    assert found["top1"] == (fitted.predict(encoder.tables[0][tested]) == labels[tested]).mean()
    best = max(each["top1"] for each in found["details"]["validation"])
    assert best == next(each["top1"] for each in found["details"]["validation"] if each["c"] == found["best_c"])
    assert (found["num_examples"], found["num_unlabelled"], found["num_of_unseen_classes"]) == (19, 2, 0)
    assert found["best_c"] in [each["c"] for each in found["details"]["validation"]]
    assert found["details"]["converged"]


def test_images_of_a_class_that_training_lacks_are_wrong_and_told(encoder):
    labels = LABELS.copy()
    labels[40:45] = 7
    for task in (LinearProbe(FeatureKind.EMBEDDING), NearestNeighbours(FeatureKind.EMBEDDING, 5)):
        found = task(encoder, batches(range(40, 60), labels), batches(range(40)))
        assert found["num_of_unseen_classes"] == 5
        assert found["top1"] == 15 / 20
        assert found["per_class"] == 3 / 4


def test_few_shot_tells_levels_that_training_is_too_small_for_and_zero_shot_beside(encoder):
    task = FewShot(FeatureKind.EMBEDDING, 2, (("x", "y", "z"), ("a {}",)))
    found = task(encoder, batches(range(40, 60)), batches(range(30)))
    assert found["details"]["left_out"] == [16]
    assert found["details"]["smallest_class"] == 10
    assert found["top1_zero_shot"] == 1.0
    levels = [found[f"top1_{shots}_shot"] for shots in (1, 2, 4, 8)]
    assert found["details"]["shots_to_zero_shot"] == few_shot.shots_to_reach(1.0, (1, 2, 4, 8), levels)
    assert "top1_16_shot" not in found
    with pytest.raises(ValueError, match="label 2 has no class name: there are 2"):
        FewShot(FeatureKind.EMBEDDING, 1, (("x", "y"), ("a {}",)))(encoder, batches(range(9)), batches(range(9)))


def test_draws_hold_the_smaller_ones():
    one, four = few_shot.draw(LABELS, 1, 0), few_shot.draw(LABELS, 4, 0)
    assert set(one) < set(four)
    np.testing.assert_array_equal(np.bincount(LABELS[four]), [4, 4, 4])
    assert set(four) != set(few_shot.draw(LABELS, 4, 1))


def test_the_level_of_zero_shot_lies_on_a_line_over_the_logarithm():
    shots, accuracies = (1, 2, 4), (0.2, 0.4, 0.6)
    assert few_shot.shots_to_reach(0.5, shots, accuracies) == pytest.approx(2 * math.sqrt(2))
    assert few_shot.shots_to_reach(0.4, shots, accuracies) == pytest.approx(2)
    assert few_shot.shots_to_reach(0.1, shots, accuracies) == 1
    assert few_shot.shots_to_reach(0.7, shots, accuracies) is None


def test_neighbours_vote_as_by_brute_force_in_blocks(monkeypatch):
    monkeypatch.setattr(nearest, "_BLOCK", 4)
    generator = np.random.default_rng(1)
    train, queries = generator.normal(size=(30, 5)), generator.normal(size=(10, 5))
    index = generator.integers(0, 4, 30)
    found = nearest.nearest_scores(train, index, queries, neighbours=7, num_classes=4)
    cosine = queries @ train.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(train, axis=1)
    for row, own in zip(found, cosine, strict=True):
        chosen = np.argsort(-own)[:7]
        votes = np.bincount(index[chosen], np.exp((own[chosen] - own.max()) / 0.07), 4)
        np.testing.assert_allclose(row, votes, rtol=1e-4, atol=1e-12)  # cosines are float32
    with pytest.raises(ValueError, match="neighbours=31, but there are 30 training examples"):
        nearest.nearest_scores(train, index, queries, neighbours=31, num_classes=4)


def test_sources_that_no_probe_can_learn_from_are_refused(encoder):
    with pytest.raises(ValueError, match="no sample of the training source has a label"):
        LinearProbe(FeatureKind.EMBEDDING)(encoder, batches(range(3)), batches(range(3), np.full(60, -1)))
    with pytest.raises(ValueError, match="no class has 3 or more examples"):
        LinearProbe(FeatureKind.EMBEDDING)(encoder, batches(range(3)), batches(range(6)))
    sample = Sample(image=b"", captions=(), label=-1)
    with pytest.raises(ValueError, match="needs an integer label per image"):
        LinearProbe(FeatureKind.EMBEDDING).check_samples([sample], is_all=True)
    LinearProbe(FeatureKind.EMBEDDING).check_samples([sample], is_all=False)


def test_pixels_are_features_between_0_and_1(encoder):
    found = read_labelled(encoder, batches(range(5)), FeatureKind.PIXELS, "source")
    np.testing.assert_allclose(found.features[:, 0], np.arange(5) / 255, rtol=1e-6)
    assert found.features.shape == (5, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": TaskKind.LINEAR_PROBE},
            "train_source=None: linear_probe, few_shot, nearest_neighbours need a",
        ),
        ({"train_source": "b", "classes": "scenes", "templates": "plain"}, "train_source='b'.*others none"),
        ({"kind": TaskKind.RETRIEVAL, "features": FeatureKind.PIXELS}, "features=pixels: retrieval would ignore it"),
        ({"kind": TaskKind.LINEAR_PROBE, "train_source": "b", "seeds": 2}, "seeds=2: linear_probe would ignore it"),
        ({"kind": TaskKind.FEW_SHOT, "train_source": "b", "neighbours": 2}, "neighbours=2: few_shot would ignore"),
        ({"kind": TaskKind.FEW_SHOT, "train_source": "b", "classes": "scenes"}, "give both or none"),
        ({"kind": TaskKind.LINEAR_PROBE, "train_source": "b", "classes": "scenes"}, "would ignore classes and templ"),
    ],
)
def test_fields_that_are_missing_or_ignored_are_told(fields, message):
    errors = TaskConfig(source="a", **fields).errors("eval.tasks.t")
    assert len(errors) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(errors[0])


def test_whole_tasks_have_no_errors():
    for kind in (TaskKind.LINEAR_PROBE, TaskKind.FEW_SHOT, TaskKind.NEAREST_NEIGHBOURS):
        task = TaskConfig(kind=kind, source="a", train_source="b")
        assert task.errors("t") == []
        assert task.sources == ["a", "b"]
        assert not task.reads_texts
