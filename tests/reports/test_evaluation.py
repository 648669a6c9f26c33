"""The page of an evaluation: what it says, what a browser shows of it, and hostile names."""

import html
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clipjax.config import FeatureKind, TaskConfig, TaskKind
from clipjax.data.sources import ArraySource
from clipjax.evals.class_counts import ClassCounts
from clipjax.evals.examples import Example, Examples, collect
from clipjax.evals.robustness import Shift, describe_shifts
from clipjax.evals.runner import Evaluation
from clipjax.evals.shift_points import load_shift_points
from clipjax.reports.evaluation import render
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


def probe(source, **changes):
    return TaskConfig(kind=TaskKind.LINEAR_PROBE, source=source, train_source="t.tar", **changes)


def compared(names=HOSTILE):
    """Return an evaluation of probes beside zero-shot, and of shifts, and its tasks."""
    tasks = {name: TaskConfig(source=f"{name}.tar", classes="x", templates="y") for name in names[:3]}
    tasks["probe"] = probe(f"{names[0]}.tar")
    tasks["pixels"] = probe(f"{names[0]}.tar", features=FeatureKind.PIXELS)
    tasks["better"] = probe(f"{names[1]}.tar")
    tasks["others"] = probe(f"{names[1]}.tar", tfds_label_key="coarse")
    tasks["a part"] = probe(f"{names[1]}.tar", max_examples=50)
    tasks["few"] = TaskConfig(kind=TaskKind.FEW_SHOT, source="f.tar", train_source="t.tar")
    top1 = dict(zip(names[:3], (0.5, 0.7, 0.4), strict=True))
    top1 |= {"probe": 0.75, "pixels": 0.6, "better": 0.6, "others": 0.9, "a part": 0.9}
    results = {name: {"top1": value, "num_examples": 100.0} for name, value in top1.items()}
    results["a part"]["num_examples"] = 50.0
    results["probe"]["best_c"] = 0.31622776
    results["few"] = {"top1_1_shot": 0.25, "top1_1_shot_std": 0.0625, "top1_2_shot": 0.5, "top1_2_shot_std": 0.0}
    details = {"probe": {"validation": [{"c": 0.01, "top1": 0.5}, {"c": 0.31622776, "top1": 0.8}]}}
    shifts = {names[1]: Shift(names[0], load_shift_points("imagenet_v2")), names[2]: Shift(names[0])}
    found = describe_shifts(results, shifts | {"better": Shift("lost <b>")})
    return Evaluation(results, {}, details, found), tasks


def rows(text, heading):
    """Return the cells of the rows of the first table behind a heading, without tags."""
    table = re.search(f"<h2>{heading}</h2>.*?<tbody>(.*?)</tbody>", text, re.DOTALL)
    found = [] if table is None else re.findall(r"<tr>(.*?)</tr>", table[1])
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<td.*?</td>", row)] for row in found]


def test_zero_shot_stands_beside_probes_on_the_same_images_the_weakest_first():
    evaluation, tasks = compared()
    text = render(evaluation, tasks, {}, title="T", facts=[])
    assert rows(text, "Zero-shot against a probe") == [
        [HOSTILE[0], "+25.0", "50.0 %", "75.0 %", "probe", "before projection"],
        [HOSTILE[0], "+10.0", "50.0 %", "60.0 %", "pixels", "pixels"],
        [HOSTILE[1], "-10.0", "70.0 %", "60.0 %", "better", "before projection"],
    ]


def test_shifts_are_told_with_their_robustness_and_without():
    evaluation, tasks = compared()
    text = render(evaluation, tasks, {}, title="T", facts=[])
    expected = load_shift_points("imagenet_v2").baseline.expected(0.5)
    robustness, expected = f"{100 * (0.7 - expected):+.1f} *", f"{100 * expected:.1f} %"
    assert rows(text, "Distribution shift") == [
        [HOSTILE[2], "-10.0", "–", "40.0 %", "50.0 %", "–", HOSTILE[0]],
        [HOSTILE[1], "+20.0", robustness, "70.0 %", "50.0 %", expected, HOSTILE[0]],
    ]
    assert "none of them is as good" in text and "its reference lost &lt;b&gt; gave no result" in text


def test_a_probe_shows_its_c_and_a_few_shot_probe_its_levels():
    evaluation, tasks = compared()
    text = render(evaluation, tasks, {}, title="T", facts=[])
    assert '<td>C</td><td class="number">0.316</td>' in text and "Choice of C" in text
    assert "top-1, 2 of each class" in text and "A few examples of each class" in text
    assert '<td>its standard deviation over draws</td><td class="number">6.2 %</td>' in text


def test_nothing_to_compare_is_nothing_on_the_page():
    text = page()
    assert "Zero-shot against a probe" not in text and "Distribution shift" not in text


def test_what_is_folded_is_folded_on_a_screen_alone():
    text = page()
    assert "<details" not in text and text.count('class="fold"') == 2
    folds = re.findall(r"@media (\w+) \{[^@]*\.fold > input:not\(:checked\)[^}]*display: none", text)
    assert folds == ["screen"] and text.count("display: none") == 1
    ids = re.findall(r'<input type="checkbox" id="([^"]+)"', text)
    assert sorted(ids) == sorted(re.findall(r'<label for="([^"]+)"', text)) and len({*ids}) == len(ids)


@pytest.mark.process
@pytest.mark.skipif(browser.find() is None, reason=f"no browser here: none of {', '.join(browser.NAMES)}")
def test_a_browser_shows_comparisons_on_a_phone_and_prints_what_is_folded(tmp_path):
    evaluation, tasks = compared()
    shown = browser.show(render(evaluation, tasks, {}, title="T", facts=[]), tmp_path, width=360)
    assert shown["width"] <= 360 and shown["plots"] == 5 and shown["links"] == [] and shown["loaded"] == []
    counts = ClassCounts(250)  # more than the confusion matrix is drawn of
    counts.add(np.arange(250), np.eye(250))
    names = [f"class {i}" for i in range(250)]
    printed = []
    for content in ({}, {"t": counts.details(names)}):
        found = Evaluation({"t": counts.metrics(), "u": {"top1": 1.0}}, {}, content)
        folded = render(found, dict.fromkeys("tu", TaskConfig(source="a")), {}, title="T", facts=[])
        assert "checked>" not in folded
        printed.append(browser.count_printed_pages(folded, tmp_path))
    assert printed[1] >= printed[0] + 2, "100 rows fill pages of their own"


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
