"""Figures: what they draw, with hostile names, extreme values and single points."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from clipjax.evals.shift_points import load_shift_points
from clipjax.reports.figures import Shown, confusion_plot, difference_plot, few_shot_plot, shift_plot, sweep_plot
from tests.reports.test_evaluation import HOSTILE

pytestmark = pytest.mark.newest


def words(svg: str) -> str:
    texts = [each for each in ElementTree.fromstring(svg).iter() if each.tag.endswith("text")]
    return " ".join("".join(each.itertext()) for each in texts)


def test_a_confusion_matrix_is_valid_xml_whatever_the_names():
    text = confusion_plot(HOSTILE, [(0, 0, 3), (0, 1, 1), (4, 2, 5)])
    assert "cost $5 and $6_x^2" in words(text) and "<script>alert(1)</script>" in words(text)
    assert confusion_plot(HOSTILE, [(0, 0, 3), (0, 1, 1), (4, 2, 5)]) == text


def test_a_few_shot_curve_tells_what_equals_zero_shot():
    text = words(few_shot_plot([1, 2, 4], [0.2, 0.4, 0.6], [0.1, 0.05, 0.0], 0.5, 2.828))
    assert "equal at 2.83 a class" in text and "zero-shot" in text and "examples of each class" in text
    without = words(few_shot_plot([1], [0.2], [0.1], None, None))
    assert "zero-shot" not in without and "few-shot probe" in without
    assert "equal" not in words(few_shot_plot([1, 2], [0.2, 0.3], [0.0, 0.0], 0.9, None))


def test_a_sweep_is_drawn_in_order_whatever_the_order_of_trials():
    one = sweep_plot([1e-6, 1.0, 1e6], [0.1, 0.9, 0.5], 1.0)
    assert sweep_plot([1e6, 1e-6, 1.0], [0.5, 0.1, 0.9], 1.0) == one
    assert "chosen: 1" in words(one)


def test_differences_are_signed_and_names_are_text():
    text = words(difference_plot(HOSTILE, [-0.25, 0.125, 0.0, -1.0, 0.5]))
    assert all(value in text for value in ("-25.0", "+12.5", "+0.0", "-100.0", "+50.0"))
    assert "cost $5 and $6_x^2" in text and "\\x1b" in text and "\x1b" not in text
    long = words(difference_plot(["a" * 40 + "/first", "a" * 40 + "/second"], [0.1, 0.2]))
    assert "…aaaaaa/first" in long and "…aaaaa/second" in long, "names that share their beginning can be told apart"


@pytest.mark.parametrize("points", [None, "imagenet_v2"])
def test_a_shift_is_drawn_at_any_accuracy(points):
    beside = None if points is None else load_shift_points(points)
    shown = [Shown(name, 0.5, each) for name, each in zip(HOSTILE, (0.0, 0.3, 0.5, 0.999, 1.0), strict=True)]
    svg = shift_plot(shown, HOSTILE[2], beside)
    text = words(svg)
    assert "cost $5 and $6_x^2, %" in text and "y = x" in text
    assert all(("baseline" in text, "standard models" in text)) == (points is not None)
    assert all(_start(name) in text for name in HOSTILE)
    numbers = [float(each) for each in re.findall(r' [xy]="(-?[\d.]+)"', svg)]
    assert numbers and np.isfinite(numbers).all()
    alone = words(shift_plot([Shown("_a", 1.0, 1.0)], "b", None))
    assert "_a" in alone and "99.9" in alone


def _start(name: str) -> str:
    return {HOSTILE[3]: "bell\\x07"}.get(name, name[:11])
