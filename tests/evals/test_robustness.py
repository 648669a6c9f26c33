"""Effective robustness against sums by hand, NumPy's fit in float64 and published points; and what fixes no line."""

import json
import math
import re

import numpy as np
import pytest

from clipjax.config import Config, TaskConfig
from clipjax.data.sources import ArraySource
from clipjax.evals.results import write_results
from clipjax.evals.robustness import (
    Baseline,
    Shift,
    describe_shifts,
    effective_robustness,
    expit,
    fit_baseline,
    logit,
)
from clipjax.evals.runner import Evaluation, build_tasks, run_tasks
from clipjax.evals.shift_points import load_shift_points, names
from tests.evals.test_evals import FakeEncoder

pytestmark = pytest.mark.newest


def test_logit_and_its_inverse():
    assert logit(0.75) == pytest.approx(math.log(3), rel=1e-15) and logit(0.5) == 0
    for value in (-800.0, -30.0, -1.5, 0.0, 1.5, 30.0, 800.0):
        exact = 1 / (1 + np.exp(-np.longdouble(value)))
        assert expit(value) == pytest.approx(float(exact), rel=1e-14)
    assert expit(logit(0.123)) == pytest.approx(0.123, rel=1e-15)


def test_none_right_and_all_right_are_taken_for_half_an_example():
    assert logit(0.0, 50) == pytest.approx(math.log(0.01 / 0.99))
    assert logit(1.0, 50) == pytest.approx(math.log(0.99 / 0.01))
    assert logit(0.02, 50) == logit(0.02), "one example right is what it is"
    assert logit(0.0, 1) == logit(1.0, 1) == 0


@pytest.mark.parametrize("accuracy", [0.0, 1.0, -0.1, 1.1, 75.0, math.nan, math.inf])
def test_what_is_no_share_has_no_logit(accuracy):
    with pytest.raises(ValueError, match=f"accuracy={accuracy} must be a share between 0 and 1"):
        logit(accuracy)
    if accuracy not in (0.0, 1.0):
        with pytest.raises(ValueError, match="must be a share"):
            logit(accuracy, 100)
    with pytest.raises(ValueError, match="num_examples=0 must be 1 or more"):
        logit(accuracy, 0)


def test_two_models_are_on_their_line():
    baseline = fit_baseline([(0.5, 0.25), (0.75, 0.5)])  # logits 0, log 3 to -log 3, 0
    assert baseline.slope == pytest.approx(1) and baseline.intercept == pytest.approx(-math.log(3))
    assert (baseline.low, baseline.high, baseline.num_models) == (0.5, 0.75, 2)
    assert baseline.expected(0.9) == pytest.approx(0.75)  # odds 9 to 3
    assert effective_robustness(baseline, 0.9, 0.85) == pytest.approx(0.1)
    assert effective_robustness(baseline, 0.9, 0.7) == pytest.approx(-0.05)
    assert effective_robustness(baseline, 1.0, 0.5, 10) == pytest.approx(0.5 - 19 / 22)  # odds 19 to 19 / 3


def test_the_line_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 0.9, 40)
    y = rng.uniform(0.1, 0.8, 40)
    slope, intercept = np.polyfit(np.log(x / (1 - x)), np.log(y / (1 - y)), 1)
    baseline = fit_baseline(list(zip(x, y, strict=True)))
    assert baseline.slope == pytest.approx(slope, rel=1e-12) and baseline.intercept == pytest.approx(intercept)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "needs the accuracies of two standard models or more; got 0"),
        ([(0.5, 0.5)], "got 1"),
        ([(0.7, 0.5), (0.7, 0.6), (0.7, 0.4)], "all 3 models have the accuracy 0.7 on the reference, and fix no line"),
        ([(0.5, 0.5), (0.6, 0.0)], "accuracy=0.0 must be a share"),
        ([(0.5, 0.5), (60.0, 50.0)], "accuracy=60.0 must be a share"),
    ],
)
def test_points_that_fix_no_line_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        fit_baseline(points)


CLIP_L14_336 = {"imagenet_v2": 5.8, "imagenet_r": 51.2, "objectnet": 39.7, "imagenet_sketch": 35.0}
"""Points by which zero-shot CLIP is better than a ResNet-101 of its accuracy, in figure 13 of arXiv 2103.00020."""


@pytest.mark.parametrize("name", CLIP_L14_336)
def test_published_points_give_the_papers_robustness_of_clip(name):
    points = load_shift_points(name)
    assert name in names() and points.reference == "ImageNet"
    assert len(points.standard) >= 80 and len(points.others) == 17
    everything = [each.name for each in (*points.standard, *points.others)]
    assert len({*everything}) == len(everything)
    clip = next(each for each in points.others if each.name == "ViT-L-14-336 openai")
    found = 100 * effective_robustness(points.baseline, clip.reference, clip.shifted)
    assert found == pytest.approx(CLIP_L14_336[name], abs=4), "one ResNet there, the line of many models here"
    mean = np.mean([effective_robustness(points.baseline, each.reference, each.shifted) for each in points.standard])
    assert abs(mean) < 0.005, "standard models lie around their line"


def test_a_file_of_ones_own_points(tmp_path):
    path = tmp_path / "points.json"
    path.write_text(json.dumps({"standard": [["a", 0.5, 0.25], ["b", 0.75, 0.5]]}))
    points = load_shift_points(str(path))
    assert (points.reference, points.others, points.baseline.slope) == ("", (), pytest.approx(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be a JSON object with standard, and at most reference, source, licence, standard, others besides"),
        ({}, "must be a JSON object with standard"),
        ({"standard": [], "standards": []}, "besides; it has 'standards'"),
        ({"standard": {}}, "standard must be a list of"),
        ({"standard": [], "reference": 5}, "reference=5 must be a string"),
        ({"standard": [["a", 0.5, 0.5]]}, "standard: a baseline needs the accuracies of two standard models"),
        ({"standard": [["a", 0.5, 0.5], ["b", 0.5, 0.6]]}, "standard: all 2 models have the accuracy 0.5"),
        ({"standard": [["a", 50, 40]]}, r'standard\[0\]=\["a", 50, 40\] must be .* shares between 0 and 1'),
        ({"standard": [["a", 0.5, True]]}, r"standard\[0\]="),
        ({"standard": [["a", 0.5]]}, r"standard\[0\]="),
        ({"standard": [["a", 0.5, 0.4]], "others": [[1, 0.5, 0.4]]}, r"others\[0\]="),
        ({"standard": [["a", 0.5, float("nan")]]}, r"standard\[0\]="),
    ],
)
def test_files_that_hold_no_points_are_refused(tmp_path, content, message):
    path = tmp_path / "points.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"shift_points='{path}'") + ".*" + message):
        load_shift_points(str(path))


def test_a_name_that_is_none_and_a_file_that_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="shift_points='imagenet_a': must be one of imagenet_r, .* or a JSON file"):
        load_shift_points("imagenet_a")
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="a.json'"):
        load_shift_points(str(tmp_path / "a.json"))


def test_what_is_lost_is_described_and_extrapolation_told():
    points = load_shift_points("imagenet_v2")
    results = {name: {"top1": top1, "num_examples": 100.0} for name, top1 in {"a": 0.7, "b": 0.6, "c": 0.1}.items()}
    shifts = {"b": Shift("a", points), "c": Shift("b"), "d": Shift("a"), "a": Shift("lost", points)}
    found = describe_shifts(results, shifts)
    expected = points.baseline.expected(0.7)
    assert found["b"] == {
        "reference": "a",
        "reference_top1": 0.7,
        "top1": 0.6,
        "gap": pytest.approx(-0.1),
        "points": "imagenet_v2",
        "expected": pytest.approx(expected),
        "effective_robustness": pytest.approx(0.6 - expected),
        "is_extrapolated": False,
    }
    assert found["c"] == {"reference": "b", "reference_top1": 0.6, "top1": 0.1, "gap": pytest.approx(-0.5)}
    assert found["a"] == {"reference": "lost"} and "d" not in found
    beyond = describe_shifts({"a": {"top1": 1.0, "num_examples": 9.0}, "b": results["b"]}, {"b": Shift("a", points)})
    assert beyond["b"]["is_extrapolated"] and 0 < beyond["b"]["expected"] < 1


def shifted_config(**changes):
    config = Config()
    for name in ("set", "shifted"):
        config.eval.tasks[name] = TaskConfig(source=f"{name}.tar", classes="scenes", templates="plain")
    config.eval.tasks["shifted"].shift_of = "set"
    for field, value in changes.items():
        setattr(config.eval.tasks["shifted"], field, value)
    return config


def test_an_evaluation_writes_what_its_tasks_lose(tmp_path):
    def source(spec, **options):
        images = np.zeros((4, 1, 1, 3), np.uint8)
        images[:, 0, 0, 0] = range(4) if spec == "set.tar" else [0, 1, 3, 2]
        return ArraySource(images, ["x"] * 4, labels=[0, 1, 2, 3])

    config = shifted_config(shift_points="imagenet_v2")
    config.model.image.image_size = 1
    tasks = build_tasks(config, source)
    assert tasks["set"].shift is None and tasks["shifted"].shift.reference == "set"
    names_of_classes = tasks["set"].measure.names
    directions = np.eye(len(names_of_classes), dtype=np.float32)
    encoder = FakeEncoder(directions, dict(zip(names_of_classes, directions, strict=True)))
    object.__setattr__(encoder, "config", config)
    evaluation = run_tasks(tasks, encoder)
    assert not evaluation.failures
    assert evaluation.shifts["shifted"]["gap"] == -0.5 and evaluation.shifts["shifted"]["is_extrapolated"]
    assert write_results(tmp_path / "r.json", "here", evaluation) == ""
    assert json.loads((tmp_path / "r.json").read_text())["shifts"] == evaluation.shifts
    again = run_tasks({"shifted": tasks["shifted"]}, encoder)
    assert again.shifts == {"shifted": {"reference": "set"}}, "the reference was not evaluated"
    assert write_results(tmp_path / "s.json", "here", Evaluation({"a": {}}, {})) == ""
    assert "shifts" not in json.loads((tmp_path / "s.json").read_text())


def test_points_that_cannot_be_used_are_refused_before_the_work():
    config = shifted_config(shift_points="imagenet_v3")
    with pytest.raises(ValueError, match="eval.tasks.shifted: shift_points='imagenet_v3': must be one of"):
        build_tasks(config, lambda *_, **__: ArraySource(np.zeros((1, 1, 1, 3), np.uint8), ["x"], labels=[0]))


def test_a_line_that_falls_is_a_line():
    assert Baseline(-1.0, 0.0, 0.1, 0.9, 2).expected(0.9) == pytest.approx(0.1)
