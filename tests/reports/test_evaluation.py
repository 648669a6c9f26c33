"""The page of an evaluation: what it says, what a browser shows of it, and hostile names."""

import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clipjax.config import TaskConfig, TaskKind
from clipjax.data.sources import ArraySource
from clipjax.evals.class_counts import ClassCounts
from clipjax.evals.examples import Example, Examples, collect
from clipjax.evals.runner import Evaluation
from clipjax.reports.evaluation import confusion_plot, render
from tests.evals.test_evals import FakeEncoder, make_task
from tests.reports import browser

pytestmark = pytest.mark.newest

HOSTILE = ["<script>alert(1)</script>", 'a"b\' onload="x', "cost $5 and $6_x^2", "bell\a\x1b[31m", "{{ 7 * 7 }} & <b>"]


def examples(names, *, with_matrix):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "JPEG")
    each = [Example(content.getvalue(), name, [(names[0], 0.75), (names[1], 0.25)]) for name in names]
    return Examples(each, np.linspace(-0.1, 0.9, len(names) ** 2).reshape(len(names), -1) if with_matrix else None)


def page(names=HOSTILE, **changes):
    counts = ClassCounts(len(names))
    rng = np.random.default_rng(0)
    counts.add(rng.integers(0, len(names), 200), rng.normal(size=(200, len(names))))
    details = counts.details(names, np.eye(len(names)))
    details["wordings"] = [{"name": names[0], "wordings": [{"text": names[1], "probability": 0.125}]}]
    metrics = counts.metrics() | {"top1_names": 0.25, "top1_one_template": 0.5}
    results = {"zero & shot": metrics, "pairs": {"image_to_text_r1": 0.375, "num_texts": 5.0}}
    evaluation = Evaluation(results, {"lost": f"it broke: {names[0]}"}, {"zero & shot": details})
    tasks = {
        "zero & shot": TaskConfig(source="a.tar", classes="x", templates="y"),
        "pairs": TaskConfig(kind=TaskKind.RETRIEVAL, source="b.tar"),
    }
    shown = {"zero & shot": examples(names, with_matrix=False), "pairs": examples(names, with_matrix=True)}
    return render(evaluation, tasks, shown, title="Evaluation", facts=[("checkpoint", names[0])], **changes)


def test_the_page_loads_nothing_and_escapes_what_others_have_written():
    text = page()
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            assert not [name for name, _ in attrs if name.startswith("on")]

    Reader().feed(text)
    assert "script" not in tags and {"table", "figure", "svg"} <= {*tags}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "{{ 7 * 7 }}" in text
    assert "\a" not in text and "\x1b" not in text
    places = [place for place in re.findall(r'(?:src|href|url\()\s*=?\s*["\']?([^"\')>\s]+)', text) if place[0] != "#"]
    assert places and all(place.startswith("data:image/") for place in places)


def test_a_plot_is_valid_xml_whatever_the_names():
    text = confusion_plot(HOSTILE, [(0, 0, 3), (0, 1, 1), (4, 2, 5)])
    root = ElementTree.fromstring(text)
    words = "".join(root.itertext())
    assert "cost $5 and $6_x^2" in words and "<script>alert(1)</script>" in words
    assert confusion_plot(HOSTILE, [(0, 0, 3), (0, 1, 1), (4, 2, 5)]) == text


def test_a_task_without_details_or_examples_and_one_that_nobody_has_thought_of():
    results = {"odd": {"something_new": 0.5, "num_examples": 3.0}, "few": {"top1": 1.0}}
    tasks = {"odd": TaskConfig(source="a", classes="x", templates="y"), "few": TaskConfig(source="a")}
    text = render(Evaluation(results, {}, {}), tasks, {}, title="T", facts=[])
    assert "something new" in text and "50.0 %" in text and "100.0 %" in text and "Failed" not in text


def test_links_of_the_overview_lead_to_their_tasks():
    results = {"no headline": {"something_new": 0.5}, "second": {"top1": 1.0}}
    tasks = {name: TaskConfig(source="a") for name in results}
    text = render(Evaluation(results, {}, {}), tasks, {}, title="T", facts=[])
    (number,) = re.findall(r'<a href="#(task-\d+)">second</a>', text)
    assert f'<h2 id="{number}">second</h2>' in text


def test_only_classes_that_occur_or_are_chosen_are_drawn():
    counts = ClassCounts(1000)
    counts.add(np.array([3, 3, 900]), np.eye(1000)[[3, 17, 900]])
    names = [f"class {i}" for i in range(1000)]
    evaluation = Evaluation({"t": counts.metrics()}, {}, {"t": counts.details(names)})
    text = render(evaluation, {"t": TaskConfig(source="a")}, {}, title="T", facts=[])
    drawn = "".join(ElementTree.fromstring(re.search(r"<svg.*</svg>", text, re.DOTALL)[0]).itertext())
    assert all(f"class {i}" in drawn for i in (3, 17, 900)) and "class 4" not in drawn


@pytest.mark.process
@pytest.mark.skipif(browser.find() is None, reason=f"no browser here: none of {', '.join(browser.NAMES)}")
@pytest.mark.parametrize("width", [360, 1100])
def test_a_browser_shows_all_of_it_without_overflow(tmp_path, width):
    shown = browser.show(page(), tmp_path, width=width)
    assert shown["width"] <= width, "nothing is wider than the screen"
    assert shown["scripts"] == 0 and shown["loaded"] == [] and shown["links"] == []
    assert shown["figures"] == 2 * len(HOSTILE) and shown["images"] == 3 * len(HOSTILE) and shown["broken"] == 0
    assert (shown["rows"], shown["cells"], shown["plots"]) == (len(HOSTILE), len(HOSTILE) ** 2, 1)
    for text in (
        "zero & shot",
        "it broke: <script>alert(1)</script>",
        "class names alone",
        "37.5 %",
        "{{ 7 * 7 }} & <b>",
    ):
        assert text in shown["text"], text
    assert shown["height"] > 1000


def test_examples_are_usable_samples_with_the_models_ranking():
    task = make_task_of_pictures()
    found = collect(task, encoder_of_pictures(), 3)
    assert found is not None and found.similarity is None
    assert [each.text for each in found.examples] == ["zero", "one"]  # a batch has two, and sample 3 has no label
    for each in found.examples:
        (best, share), (_, rest) = each.guesses
        assert best == each.text and share + rest == pytest.approx(1)
        assert each.picture.startswith(b"\xff\xd8")


def encoder_of_pictures():
    encoder = FakeEncoder(np.eye(4, dtype=np.float32)[[0, 1, 0, 1]], {"zero": np.eye(4)[0], "one": np.eye(4)[1]})
    object.__setattr__(encoder, "params", {"log_logit_scale": np.log(np.float32(20))})
    object.__setattr__(encoder, "config", make_task_of_pictures().config)
    return encoder


def make_task_of_pictures():
    images = np.zeros((4, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = [0, 1, 2, 3]
    return make_task(ArraySource(images, ["a"] * 4, labels=[0, 1, 0, -1]))
