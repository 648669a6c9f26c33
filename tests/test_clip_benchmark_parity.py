"""The counting behind `benchmarks.parity.clip_benchmark`, and the shards it writes; the comparison needs its peers."""

import io
import json
import pathlib
import tarfile

import numpy as np
import pytest

from benchmarks.parity import clip_benchmark, ranks
from benchmarks.parity.average_precision import average_precision, class_rows
from benchmarks.parity.layouts import different_metrics
from benchmarks.parity.sharded import layout_row
from benchmarks.parity.wds_layout import (
    PER_SHARD,
    with_own_captions,
    write_captioned,
    write_labelled,
    write_multi_labelled,
)
from clipjax.data.sample import Sample
from clipjax.evals.multi_label import average_precision as of_clipjax

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
PIXEL = b"\xff\xd8 no reader decodes it here"


def problem(*, levels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores, in few levels if many are to be equal, and right candidates, one at least in each row."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 20)) if levels is None else rng.integers(0, levels, (50, 20)).astype(float)
    is_right = rng.random((50, 20)) < 0.1
    is_right[np.arange(50), rng.integers(0, 20, 50)] = True
    return scores, is_right


@pytest.mark.parametrize("levels", [None, 3])
def test_places_are_those_of_a_stable_sort(levels):
    scores, is_right = problem(levels=levels)
    orders = np.argsort(-scores, axis=1, kind="stable")
    expected = np.take_along_axis(is_right, orders, axis=1).argmax(axis=1)
    np.testing.assert_array_equal(ranks.best_places(scores, is_right), expected)


@pytest.mark.parametrize("depth", [1, 3, 20, 21])
def test_a_margin_has_the_sign_of_the_hit(depth):
    scores, is_right = problem(levels=None)
    margin = ranks.margins(scores, is_right, depth)
    np.testing.assert_array_equal(margin > 0, ranks.best_places(scores, is_right) < depth)


def test_a_margin_is_the_distance_to_the_candidate_in_the_last_place():
    scores, is_right = np.asarray([[0.5, 0.9, 0.7, 0.1]]), np.asarray([[True, False, False, True]])
    np.testing.assert_allclose(ranks.margins(scores, is_right, 1), [0.5 - 0.9])
    np.testing.assert_allclose(ranks.margins(scores, is_right, 2), [0.5 - 0.7])
    assert ranks.margins(scores, is_right, 3).item() == np.inf


def test_bad_scores_are_refused():
    with pytest.raises(ValueError, match="must be of one shape"):
        ranks.best_places(np.zeros((2, 3)), np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="1 queries have no right candidate, the first is 1"):
        ranks.best_places(np.zeros((2, 2)), np.asarray([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="depth=0 must be 1 or more"):
        ranks.margins(np.zeros((1, 2)), np.ones((1, 2), bool), 0)


@pytest.mark.parametrize("total", [3, 1287, 10_000])
def test_a_share_is_a_count_also_in_float32(total):
    for count in (0, 1, total // 3, total - 1, total):
        assert ranks.to_count(float(np.float32(count) / np.float32(total)), total) == count


@pytest.mark.parametrize("share", [0.5, 1.2, -0.1])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match="is no share of 5 queries"):
        ranks.to_count(share * (1 if share == 0.5 else 5), 5)


def test_differences_name_query_margin_and_tie():
    ours, theirs = np.asarray([True, True, False]), np.asarray([True, False, True])
    tie, clear = ranks.differences(ours, theirs, np.asarray([1.0, -1e-7, 0.01]))
    assert tie == {"query": 1, "clipjax": True, "peer": False, "float64_margin": -1e-7, "is_tie": True}
    assert (clear["query"], clear["is_tie"]) == (2, False)


def row(ours: list[bool], theirs: list[bool], margin: list[float], **counts: int) -> dict:
    given = {"clipjax": sum(ours), "clip_benchmark": sum(theirs)} | counts
    hits = [np.asarray(ours), np.asarray(theirs)]
    return clip_benchmark.count_row("set", "metric", len(ours), given, hits, np.asarray(margin))


def test_equal_counts_agree_and_ties_explain_others():
    assert row([True, False], [True, False], [0.1, -0.1])["agrees"]
    tie = row([True, True], [True, False], [0.1, 0.0])
    assert tie["agrees"]
    assert (tie["num_differ"], tie["ties"], tie["exact_ties"], tie["float64"]) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    "bad",
    [
        row([True, True], [True, False], [0.1, 0.01]),  # no tie
        row([True, False], [False, True], [0.1, 0.01]),  # equal counts of other queries
        row([True, False], [True, False], [0.1, -0.1], clipjax=2),  # said another number than its embeddings give
        row([True, False], [True, False], [0.1, -0.1], clip_benchmark=0),
    ],
)
def test_differences_without_a_tie_do_not_agree(bad):
    assert not bad["agrees"]


def test_open_clip_may_only_differ_by_ties():
    assert not row([True, False], [True, False], [0.1, -0.1], open_clip=2)["agrees"]
    assert row([True, False], [True, False], [0.1, 1e-9], open_clip=2)["agrees"]


def test_metrics_that_differ_are_named():
    first = {"a": {"top1": 0.5, "top5": 1.0}, "b": {"r1": 0.1}}
    assert different_metrics(first, first) == []
    assert different_metrics(first, {"a": {"top1": 0.25, "top5": 1.0}}) == ["a:top1", "b:r1"]


def test_a_layout_with_other_numbers_does_not_agree():
    first, other = {"a:b": {"top1": 0.5, "top5": 1.0}}, {"a:b": {"top1": 0.25, "top5": 1.0}}
    assert layout_row(first, first, 2, 1)["agrees"]
    row = layout_row(first, other, 2, 1)
    assert (row["differ"], row["num_metrics"], row["agrees"]) == ({"a:b:top1": [0.5, 0.25]}, 2, False)


def samples(count: int) -> list[Sample]:
    return [
        Sample(PIXEL, captions=(f"caption {i}", f"another of {i}"), label=i % 3 - 1, key=str(i)) for i in range(count)
    ]


def members(folder: pathlib.Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {each.name: tar.extractfile(each).read() for each in tar.getmembers()}
    return found


def test_labelled_shards_hold_what_has_a_label(tmp_path):
    write_labelled(tmp_path / "set", {"test": samples(2 * PER_SHARD)}, ["red cat", "dog"], ["a {}", "{}!"])
    found = members(tmp_path / "set" / "test")
    labels = {name: content for name, content in found.items() if name.endswith(".cls")}
    assert len(labels) == sum(sample.label >= 0 for sample in samples(2 * PER_SHARD))
    assert set(labels.values()) == {b"0", b"1"}
    assert len(found) == 2 * len(labels)
    assert (tmp_path / "set" / "test" / "nshards.txt").read_text() == "2\n"
    assert (tmp_path / "set" / "classnames.txt").read_text() == "red cat\ndog\n"
    assert (tmp_path / "set" / "zeroshot_classification_templates.txt").read_text() == "a {c}\n{c}!\n"


def test_shards_with_captions_are_read_in_order(tmp_path):
    write_captioned(tmp_path / "set", samples(PER_SHARD + 1), most=2)
    read, expected = clip_benchmark.read_shards(tmp_path / "set" / "test"), samples(PER_SHARD + 1)
    assert [each.captions[0].split("\n") for each in read] == [list(each.captions) for each in expected]
    assert (tmp_path / "set" / "dataset_type.txt").read_text() == "retrieval\n"


def test_texts_that_a_line_does_not_hold_are_refused(tmp_path):
    for names, templates in ((["cat "], ["{}"]), (["cat"], ["a\n{}"]), ([""], ["{}"])):
        with pytest.raises(ValueError, match="does not survive as a line"):
            write_labelled(tmp_path / "set", {"test": samples(3)}, names, templates)


def test_a_split_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no sample"):
        write_labelled(tmp_path / "set", {"test": samples(1)}, ["cat"], ["{}"])


def test_samples_with_captions_of_others_are_left_out():
    a, b, c = (Sample(PIXEL, captions=captions, label=0) for captions in (("x", "y"), ("z", "y"), ("w", "v")))
    assert with_own_captions([a, b, c], most=2) == [c]
    assert with_own_captions([a, b, c], most=1) == [a, b, c]


def test_several_labels_are_written_for_both_readers(tmp_path):
    write_multi_labelled(tmp_path / "set", samples(3), [[0, 2], [], [1]], ["a", "b", "c"], ["{}"])
    found = members(tmp_path / "set" / "test")
    targets = [np.load(io.BytesIO(found[f"{i:06d}.npy"]), allow_pickle=False).tolist() for i in range(3)]
    assert targets == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert [each.labels for each in clip_benchmark.read_shards(tmp_path / "set" / "test")] == [(0, 2), (), (1,)]
    assert (tmp_path / "set" / "dataset_type.txt").read_text() == "multilabel\n"


def test_the_reference_of_average_precision_is_its_definition():
    assert (
        average_precision(np.asarray([0.9, 0.8, 0.7, 0.6]), np.asarray([True, False, True, False])) == (1 + 2 / 3) / 2
    )
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=200), rng.random(200) < 0.2
    assert average_precision(scores, truth) == pytest.approx(of_clipjax(scores, truth)[0], abs=1e-12)


def test_a_class_whose_precision_differs_does_not_agree():
    image = np.eye(2)
    theirs = {"image64": image, "text64": image, "target": image, "average_precision": np.asarray([1.0, 1.0])}
    ours = [{"name": "a", "map": 1.0}, {"name": "b", "map": 0.5}]
    assert [row["agrees"] for row in class_rows(["a", "b"], ours, theirs)] == [True, False]
    assert [row["difference"] for row in class_rows(["a", "b"], ours, theirs)] == [0.0, 0.5]


@pytest.mark.parametrize("name", [f"parity_{kind}.json" for kind in ("average_precision", "clip_benchmark", "sharded")])
def test_the_recorded_comparisons_agree(name):
    recorded = json.loads((RESULTS / name).read_text())
    assert recorded["agrees"]
    rows = recorded.get("rows", recorded.get("classes"))
    assert all(each["agrees"] for each in rows)
    assert all(each["clipjax"] == each["clip_benchmark"] for each in rows if each.get("ties") == 0)
