"""Mean average precision: by hand, by brute force, and what cannot be one."""

import numpy as np
import pytest

from clipjax.data.sample import Sample
from clipjax.evals.encoder import Encoder, unit_norm
from clipjax.evals.multi_label import MultiLabel, average_precision

pytestmark = pytest.mark.newest
NAMES = ["cat", "dog", "eel"]


class Tables(Encoder):
    """Embeddings out of tables; pixels are rows of the first."""

    def __init__(self, images, texts):
        for name, value in {"images": images, "texts": texts}.items():
            object.__setattr__(self, name, value)

    def embed_images(self, image):
        return self.images[image]

    def embed_texts(self, texts):
        return np.stack([self.texts[text] for text in texts])

    def gather(self, rows):
        return rows


def batches(labels, size=4, bad=()):
    for start in range(0, len(labels), size):
        rows = np.arange(start, min(start + size, len(labels)))
        yield {
            "image": rows,
            "labels": [labels[row] for row in rows],
            "mask": np.asarray([row not in bad for row in rows]),
        }


def by_thresholds(scores, truth):
    """Average precision as its definition has it: a point for each value that a threshold can take."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        points.append(((chosen & truth).sum() / truth.sum(), (chosen & truth).sum() / chosen.sum()))
    area, before = 0.0, 0.0
    for recall, precision in points:
        area, before = area + (recall - before) * precision, recall
    eleven = [max(p for r, p in points if r >= level / 10 - 1e-12) for level in range(11)]
    return area, sum(eleven) / 11


def test_average_precision_by_hand():
    truth = np.asarray([True, False, True, False])
    assert average_precision(np.asarray([4.0, 3.0, 2.0, 1.0]), truth)[0] == pytest.approx((1 + 2 / 3) / 2)
    # Recall 0 to 0.5 has precision 1 (six points), the other five 2/3.
    assert average_precision(np.asarray([4.0, 3.0, 2.0, 1.0]), truth)[1] == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert average_precision(np.zeros(4), truth) == (0.5, 0.5)  # all equal: one rank
    assert average_precision(np.asarray([1.0, 2.0, 3.0]), np.ones(3, bool)) == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_that_of_its_definition(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 12, size=40) / 7.0  # with equal ones
    truth = generator.random(40) < 0.3
    truth[seed] = True
    np.testing.assert_allclose(average_precision(scores, truth), by_thresholds(scores, truth), rtol=1e-12)


def test_each_image_counts_once_whatever_the_batches_and_bad_ones_never():
    generator = np.random.default_rng(0)
    images, texts = unit_norm(generator.normal(size=(13, 5))), unit_norm(generator.normal(size=(3, 5)))
    encoder = Tables(images, dict(zip(NAMES, texts, strict=True)))
    labels = [(0,), (0, 1), (), (1,), None, (0,), (1,), (0, 1), (), (1,), (0,), (1,), (0,)]
    kept = [row for row in range(13) if row not in (4, 6)]
    scores = (images @ texts.T)[kept]
    truth = np.asarray([[name in labels[row] for name in range(3)] for row in kept])
    expected = np.mean([by_thresholds(scores[:, k], truth[:, k]) for k in range(2)], axis=0)  # no image is an eel
    for size in (4, 13, 1):
        found = MultiLabel(NAMES, ["{}"])(encoder, batches(labels, size, bad=(6,)))
        np.testing.assert_allclose([found["map"], found["map_11_points"]], expected, rtol=1e-12)
        assert found["num_examples"] == 11 and found["num_unlabelled"] == 1
        classes = found["details"]["average_precision"]
        assert [each["num_examples"] for each in classes] == truth.sum(axis=0).tolist()
        assert "map" in classes[0] and "map" not in classes[2]


def test_labels_that_do_not_fit_are_refused():
    encoder = Tables(unit_norm(np.ones((2, 5))), {name: unit_norm(np.ones(5)) for name in NAMES})
    measure = MultiLabel(NAMES, ["{}"])
    for labels, message in (
        ([(0,), (0, 3)], "label 3 has no class name: there are 3"),
        ([None, None], "no sample has a list of labels"),
        ([(), ()], "no image has any class"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(encoder, batches(labels))
    for samples, is_all, message in (
        ([Sample(b"", (), labels=(1, 7))], False, "label 7 has no class name"),
        ([Sample(b"", (), label=1)], False, "multi_label needs one per image, zero_shot a single label"),
        ([Sample(b"", ("a",))], True, "no sample has a list of labels"),
    ):
        with pytest.raises(ValueError, match=message):
            measure.check_samples(samples, is_all=is_all)
    measure.check_samples([Sample(b"", ("a",))], is_all=False)  # the others may have some
    measure.check_samples([Sample(b"", (), labels=())], is_all=True)
