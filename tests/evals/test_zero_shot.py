"""Zero-shot classification by class, with other prompts and other words, against brute force."""

import json

import numpy as np
import pytest

from clipjax.config import Config, TaskConfig, TaskKind
from clipjax.config.validation import validate
from clipjax.data.sources import ArraySource
from clipjax.evals.class_counts import ClassCounts
from clipjax.evals.prompts import load_classes, load_paraphrases, load_templates
from clipjax.evals.results import write_results
from clipjax.evals.runner import Evaluation, build_tasks
from clipjax.evals.zero_shot import ZeroShot, zero_shot
from tests.evals.test_evals import FakeEncoder, batch, unit


def test_accuracies_are_those_of_sorting_with_ties_to_the_lower_class():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (400, 9)).astype(np.float32)  # many ties
    labels = rng.integers(0, 8, 400)  # class 8 never occurs
    counts = ClassCounts(9)
    for start in range(0, 400, 150):
        counts.add(labels[start : start + 150], scores[start : start + 150])
    order = np.argsort(-scores, axis=1, kind="stable")
    metrics = counts.metrics()
    assert metrics["top1"] == np.mean(order[:, 0] == labels)
    assert metrics["top5"] == np.mean((order[:, :5] == labels[:, None]).any(axis=1))
    assert metrics["per_class"] == pytest.approx(
        np.mean([np.mean(order[labels == label, 0] == label) for label in range(8)]), abs=1e-12
    )
    assert metrics["num_examples"] == 400


def test_precision_recall_and_what_a_class_is_taken_for():
    counts = ClassCounts(4)
    chosen = np.array([0, 0, 1, 2, 2, 1, 1])
    labels = np.array([0, 0, 0, 0, 0, 1, 2])
    counts.add(labels, np.eye(4)[chosen])
    similarity = np.array([[1, 0.5, 0.9, 0.1], [0.5, 1, 0.2, 0.3], [0.9, 0.2, 1, 0.4], [0.1, 0.3, 0.4, 1]])
    details = counts.details(["zebra", "horse", "donkey", "lamp"], similarity)
    zebra, horse, donkey, lamp = details["classes"]
    assert (zebra["precision"], zebra["recall"], zebra["f1"]) == (1.0, 0.4, pytest.approx(2 * 0.4 / 1.4))
    assert zebra["taken_for"] == [
        {"name": "donkey", "share": 0.4, "cosine": 0.9, "place": 1},
        {"name": "horse", "share": 0.2, "cosine": 0.5, "place": 2},
    ]
    assert (horse["precision"], horse["recall"]) == (pytest.approx(1 / 3), 1.0)
    assert (donkey["precision"], donkey["recall"], donkey["f1"]) == (0.0, 0.0, 0.0)
    assert (lamp["num_examples"], lamp["precision"], lamp["recall"], lamp["f1"]) == (0, None, None, None)
    assert details["confusion"] == [[0, 0, 2], [0, 1, 1], [0, 2, 2], [1, 1, 1], [2, 1, 1]]
    assert sum(count for _, _, count in details["confusion"]) == len(labels)
    json.dumps(details, allow_nan=False)


def prompted(rng, names, templates):
    """An encoder with a random text embedding of each prompt and each bare name."""
    texts = [*names, *(template.replace("{}", name) for name in names for template in templates)]
    table = {text: unit(rng.normal(size=6)) for text in dict.fromkeys(texts)}
    encoder = FakeEncoder(unit(rng.normal(size=(50, 6))), table)
    object.__setattr__(encoder, "params", {"log_logit_scale": np.log(np.float32(20))})
    return encoder


@pytest.mark.parametrize("templates", [("{} here", "a photo of a {}.", "see {}"), ("{} here", "see {}")])
def test_names_alone_and_one_template_are_measured_beside_the_ensemble(templates):
    rng = np.random.default_rng(1)
    names = ["a", "b", "c"]
    encoder, labels = prompted(rng, names, templates), rng.integers(0, 3, 50)
    batches = [batch([*range(start, start + 25)], labels[start : start + 25].tolist(), [()] * 25) for start in (0, 25)]
    metrics = ZeroShot(names, templates, compares_prompts=True)(encoder, batches)
    one = "a photo of a {}." if "a photo of a {}." in templates else "{} here"
    for name, template in (("top1_names", "{}"), ("top1_one_template", one)):
        alone = zero_shot(encoder, batches, names, [template])
        assert metrics[name] == alone["top1"]
    assert {*metrics} >= {*ZeroShot(names, templates, compares_prompts=True).metrics}
    assert metrics["top1"] == zero_shot(encoder, batches, names, templates)["top1"]


def test_the_spread_over_wordings_is_that_of_the_right_classs_probability():
    rng = np.random.default_rng(2)
    names, templates = ["a", "b", "c"], ["{} here", "see {}"]
    encoder, labels = prompted(rng, names, templates), rng.integers(0, 3, 50)
    paraphrases = {"a": ["a here", "see a", "a"], "c": ["c", "see c"]}
    batches = [batch([*range(50)], labels.tolist(), [()] * 50)]
    metrics = ZeroShot(names, templates, paraphrases=paraphrases)(encoder, batches)
    images, table = encoder.tables
    ensemble = [unit(np.mean([table[t.replace("{}", name)] for t in templates], axis=0)) for name in names]
    found = {name: [] for name in paraphrases}
    for image, label in zip(images, labels, strict=True):
        if (name := names[label]) in paraphrases:
            logits = [20 * float(image @ row) for row in ensemble]
            row = []
            for text in paraphrases[name]:
                logits[label] = 20 * float(image @ table[text])
                row.append(np.exp(logits[label]) / np.exp(logits).sum())
            found[name].append(row)
    std = np.mean([np.std(row) for rows in found.values() for row in rows])
    ranges = np.mean([np.ptp(row) for rows in found.values() for row in rows])
    assert metrics["wording_std"] == pytest.approx(std, rel=1e-4)  # embeddings and products are float32
    assert metrics["wording_range"] == pytest.approx(ranges, rel=1e-4)
    of_a, of_c = metrics["details"]["wordings"]
    means = dict(zip(paraphrases["a"], np.mean(found["a"], axis=0), strict=True))
    assert of_a["name"] == "a" and of_c["name"] == "c"
    assert {each["text"]: each["probability"] for each in of_a["wordings"]} == pytest.approx(means, rel=1e-4)
    assert of_a["wordings"][0]["text"] == max(means, key=means.get)


def test_a_probability_that_is_nearly_one_or_nought_stays_finite():
    encoder = prompted(np.random.default_rng(3), ["a", "b"], ["{} x", "{} y"])
    object.__setattr__(encoder, "params", {"log_logit_scale": np.log(np.float32(10000))})
    batches = [batch([*range(50)], [0] * 50, [()] * 50)]
    metrics = ZeroShot(["a", "b"], ["{} x", "{} y"], paraphrases={"a": ["a x", "a y"]})(encoder, batches)
    assert 0 <= metrics["wording_std"] <= metrics["wording_range"] <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": ["x", "y"], "z": ["x", "y"]}, "'z' is no class name; they are a, b"),
        ({"a": ["x"]}, "'a' needs a list of at least two texts"),
        ({"a": "xy"}, "'a' needs a list of at least two texts; got 'xy'"),
        ({"a": ["x", " "]}, "number 1 is ' ', a blank text"),
        ({"a": ["x", 3]}, r"\[1\]=3 must be a string"),
        ([], "must be a JSON object"),
        ({}, "must be a JSON object"),
    ],
)
def test_paraphrases_that_cannot_be_used_are_refused(content, message, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_paraphrases(str(tmp_path / "p.json"), ["a", "b"], ["{}"])


def test_templates_are_paraphrases_if_there_are_several():
    assert load_paraphrases("templates", ["a", "b"], ["{}", "x {}"]) == {"a": ["a", "x a"], "b": ["b", "x b"]}
    with pytest.raises(ValueError, match="needs at least two templates"):
        load_paraphrases("templates", ["a"], ["{}"])
    with pytest.raises(ValueError, match="paraphrases='nowhere' must be templates, or a JSON file"):
        load_paraphrases("nowhere", ["a"], ["{}"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["crane", "dog", "crane"], "labels 0, 2 all have the name 'crane'"),
        (["crane", ""], "number 1 is '', a blank text"),
        (["crane", "\t"], "a blank text; give it words"),
    ],
)
def test_class_names_are_filled_and_each_its_own(names, message, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=message):
        load_classes(str(tmp_path / "c.json"))


def test_a_blank_template_is_refused(tmp_path):
    (tmp_path / "t.json").write_text('["{}", ""]')
    with pytest.raises(ValueError, match="number 1 is '', a blank text"):
        load_templates(str(tmp_path / "t.json"))


@pytest.mark.parametrize("fields", [{"compare_prompts": True}, {"paraphrases": "templates"}])
def test_other_kinds_of_tasks_compare_no_prompts(fields):
    config = Config()
    config.data.train = "a.tar"
    config.eval.tasks["t"] = TaskConfig(kind=TaskKind.RETRIEVAL, source="a.tar", **fields)
    with pytest.raises(ValueError, match=f"eval.tasks.t.{next(iter(fields))}=.*: retrieval would ignore it"):
        validate(config)


@pytest.mark.parametrize("fields", [{"compare_prompts": True}, {"paraphrases": "templates"}])
def test_a_model_without_embeddings_that_is_to_compare_prompts_is_refused_before_work(fields):
    config = Config()
    config.loss.contrastive_weight = 0
    config.eval.tasks["t"] = TaskConfig(source="a.tar", classes="scenes", templates="scenes", **fields)
    with pytest.raises(ValueError, match="eval.tasks.t: compare_prompts and paraphrases need embeddings"):
        build_tasks(config, lambda spec, **options: ArraySource([b"x"], ["a"]))


def test_details_stand_on_one_line_beside_the_results(tmp_path):
    evaluation = Evaluation({"val": {"top1": 0.5}}, {}, {"val": {"confusion": [[0, 0, 3], [0, 1, 3]]}})
    assert write_results(tmp_path / "r.json", "run", evaluation) == ""
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == {
        "checkpoint": "run",
        "tasks": {"val": {"top1": 0.5}},
        "details": {"val": {"confusion": [[0, 0, 3], [0, 1, 3]]}},
    }
    assert text.count("\n") < 12
