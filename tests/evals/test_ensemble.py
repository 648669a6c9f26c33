"""Ensembles beside the mean of their members' logits, or embeddings, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest

from clipjax.config import FeatureKind
from clipjax.evals.encoder import Encoder, unit_norm
from clipjax.evals.ensemble import Ensemble, EnsembleKind, JointTask
from clipjax.evals.probe_tasks import LinearProbe
from clipjax.evals.zero_shot import zero_shot, zero_shot_classifier

pytestmark = pytest.mark.newest
NAMES, TEMPLATES = ["cat", "dog", "eel"], ["a {}", "the {}"]
TEXTS = [template.replace("{}", name) for name in NAMES for template in TEMPLATES]


class Member(Encoder):
    """Embeddings out of tables; pixels are numbers of rows, and a member sees those of its own."""

    def __init__(self, seed: int, width: int, scale: float, *, has_embeddings: bool = True) -> None:
        generator = np.random.default_rng(seed)
        images, texts = (unit_norm(generator.normal(size=(size, width))) for size in (20, len(TEXTS)))
        config = SimpleNamespace(
            model=SimpleNamespace(embed_dim=width), loss=SimpleNamespace(contrastive_weight=float(has_embeddings))
        )
        values = {"images": images, "texts": dict(zip(TEXTS, texts, strict=True)), "config": config, "shift": seed}
        values |= {"params": {"log_logit_scale": np.log(np.float32(scale))}}
        for name, value in (values | dict.fromkeys(("clip", "mesh", "tokenizer"))).items():
            object.__setattr__(self, name, value)

    def embed_images(self, image):
        return self.images[image - self.shift]

    def image_features(self, image):
        return 2 * self.embed_images(image)

    def embed_texts(self, texts):
        return np.stack([self.texts[text] for text in texts])

    def logits(self):
        classifier = zero_shot_classifier(self.embed_texts, NAMES, TEMPLATES).astype(np.float64)
        return self.logit_scale * self.images.astype(np.float64) @ classifier.T


def batches(members, labels, *, size=7):
    for start in range(0, len(labels), size):
        rows = np.arange(start, min(start + size, len(labels)))
        image = tuple(rows + member.shift for member in members)
        yield {"image": image, "label": labels[rows].astype(np.int32), "mask": np.ones(len(rows), bool)}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(Encoder, "gather", lambda _, rows: rows)


def test_logits_are_the_mean_of_the_members_logits():
    members = [Member(1, 4, 10.0), Member(2, 6, 50.0), Member(3, 4, 3.0)]
    ensemble = Ensemble.of(members, EnsembleKind.LOGITS)
    expected = np.mean([member.logits() for member in members], axis=0)
    classifier = zero_shot_classifier(ensemble.embed_texts, NAMES, TEMPLATES, normalise=ensemble.normalise)
    images = ensemble.embed_images(tuple(np.arange(20) + member.shift for member in members))
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(classifier, axis=1), 1.0, atol=1e-6)
    # Sums of 14 products of float32 numbers up to 1, times a scale of 21.
    np.testing.assert_allclose(ensemble.logit_scale * images @ classifier.T, expected, atol=21 * 14 * 2e-7)
    labels = expected.argmax(axis=1)
    assert not (members[0].logits().argmax(axis=1) == labels).all()
    found = zero_shot(ensemble, batches(members, labels), NAMES, TEMPLATES, compares_prompts=False)
    assert found["top1"] == 1.0 and found["num_examples"] == 20


def test_embeddings_are_the_mean_of_the_members_embeddings():
    members = [Member(1, 4, 10.0), Member(2, 4, 50.0)]
    ensemble = Ensemble.of(members, EnsembleKind.EMBEDDINGS)
    images = ensemble.embed_images((np.arange(20) + 1, np.arange(20) + 2))
    mean = (members[0].images.astype(np.float64) + members[1].images) / 2
    np.testing.assert_allclose(images, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    assert ensemble.logit_scale == pytest.approx(30.0) and images.shape == (20, 4)
    rows = np.full((3, 4), 2.0)
    np.testing.assert_allclose(ensemble.normalise(rows), 0.5, atol=1e-6)
    assert ensemble.image_features((np.arange(20) + 1, np.arange(20) + 2)).shape == (20, 8)


def test_a_text_is_cut_if_it_is_for_one_member(monkeypatch):
    ensemble = Ensemble.of([Member(3, 4, 1.0), Member(5, 4, 1.0)], EnsembleKind.LOGITS)
    monkeypatch.setattr(Member, "is_cut", lambda member, text: len(text) > member.shift)
    assert [ensemble.is_cut(text) for text in ("abc", "abcd", "abcdef")] == [False, True, True]


def test_what_has_no_mean_is_refused():
    for members, kind, message in (
        ([Member(1, 4, 1.0)], EnsembleKind.LOGITS, "needs two models or more"),
        ([Member(1, 4, 1.0), Member(2, 6, 1.0)], EnsembleKind.EMBEDDINGS, "embeddings of 4, 6 numbers"),
        ([Member(1, 4, 1.0), Member(2, 4, 1.0, has_embeddings=False)], EnsembleKind.LOGITS, "contrastive_weight=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Ensemble.of(members, kind)
    pixels = SimpleNamespace(measure=LinearProbe(FeatureKind.PIXELS))
    with pytest.raises(ValueError, match="features=pixels are not those of a model"):
        JointTask.of([pixels, pixels])


def test_a_sample_counts_if_each_member_can_use_it():
    def task(image, reason):
        mask = np.asarray(reason) < 0
        batch = {"image": np.asarray(image), "mask": mask, "label": np.where(mask, 1, -1)}
        return SimpleNamespace(
            measure=None,
            config=None,
            sources=(),
            max_examples=None,
            frames=None,
            shift="of a reference",
            read_together=lambda encoder, number: iter([(batch, np.asarray(reason))]),
        )

    joint = JointTask.of([task([1, 2, 3], [-1, 4, -1]), task([5, 6, 7], [-1, -1, 2])])
    assert joint.shift == "of a reference"
    ((batch, reasons),) = joint.read_together(None, 0)
    assert batch["mask"].tolist() == [True, False, False] and reasons.tolist() == [-1, 4, 2]
    assert [image.tolist() for image in batch["image"]] == [[1, 2, 3], [5, 6, 7]]
