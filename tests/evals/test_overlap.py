"""Accuracy on the clean and the overlapping part of a set, against brute force and exact fractions."""

import json
import math
import pathlib
from fractions import Fraction

import numpy as np
import pytest

from clipjax.config import Config, TaskConfig
from clipjax.data.sources import ArraySource
from clipjax.evals import overlap as overlaps
from clipjax.evals.overlap import Overlap, TrainingPart, accuracy_interval, chance_of_more, load_overlap, to_json
from clipjax.evals.results import write_results
from clipjax.evals.runner import Evaluation, build_tasks, check_metric
from clipjax.evals.zero_shot import ZeroShot
from clipjax.training.fingerprints import prompts_fingerprint
from tests.evals.test_evals import FakeEncoder, batch, unit


def tail(right: int, total: int, accuracy: Fraction) -> Fraction:
    """The chance of `right` or more of `total`, exactly."""
    return sum(
        (math.comb(total, k) * accuracy**k * (1 - accuracy) ** (total - k) for k in range(right, total + 1)),
        Fraction(0),
    )


@pytest.mark.parametrize(("right", "total"), [(0, 7), (7, 7), (1, 1), (3, 10), (199, 200), (41, 90)])
def test_p_values_and_intervals_are_those_of_exact_fractions(right, total):
    for accuracy in (Fraction(0), Fraction(1, 3), Fraction(17, 20), Fraction(1)):
        exact = float(tail(right, total, accuracy))
        assert chance_of_more(right, total, float(accuracy)) == pytest.approx(exact, rel=1e-11, abs=0)
    low, high = accuracy_interval(right, total, 0.995)
    assert 0 <= low <= right / total <= high <= 1
    if right == 0:
        assert low == 0
    else:  # as many or more have 0.25 % at the lower end
        assert float(tail(right, total, Fraction(low))) == pytest.approx(0.0025, rel=1e-9)
    if right == total:
        assert high == 1
    else:  # as few or fewer have 0.25 % at the upper end
        assert float(1 - tail(right + 1, total, Fraction(high))) == pytest.approx(0.0025, rel=1e-9)


def overlap_of(size: int, *, overlapping=(), not_compared=(), pictures=None) -> Overlap:
    training = [TrainingPart("train.tar", 1000, 3, list(overlapping)), TrainingPart("more.tar", 10, 0, [])]
    return Overlap("test.tar", size, pictures or {}, 6, list(not_compared), training)


class TwoProcesses(FakeEncoder):
    """Rows come back in another order than this process reads them, as from several processes."""

    def embed_images(self, image: np.ndarray) -> np.ndarray:
        return super().embed_images(image)[::-1]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return rows[::-1]


@pytest.fixture
def made_up():
    """An encoder of 40 images, their labels (some without), the batches, and which images are right."""
    rng = np.random.default_rng(3)
    table = {f"a {name}": unit(rng.normal(size=4)) for name in "xyz"}
    rows, labels = unit(rng.normal(size=(40, 4))), rng.integers(-1, 3, 40)
    scores = rows @ np.stack([*table.values()]).T
    right = scores.argmax(axis=1) == labels
    padding = [False, False]
    batches = [
        batch([*range(20)], labels[:20].tolist(), [()] * 20),
        batch([*range(20, 40), 0, 0], [*labels[20:].tolist(), 0, 0], [()] * 22, mask=[True] * 20 + padding),
    ]
    batches[1]["index"][-2:] = -1
    return (rows, table), labels, batches, right


@pytest.mark.parametrize("encoder_class", [FakeEncoder, TwoProcesses])
def test_parts_are_measured_as_by_masks(made_up, encoder_class, tmp_path):
    tables, labels, batches, right = made_up
    rng = np.random.default_rng(4)
    part = rng.choice(3, 40, p=[0.5, 0.4, 0.1])
    given = overlap_of(40, overlapping=np.flatnonzero(part == 1), not_compared=np.flatnonzero(part == 2))
    measure = ZeroShot([*"xyz"], ["a {}"], overlap=given)
    found = measure(encoder_class(*tables), batches)
    plain = ZeroShot([*"xyz"], ["a {}"])(encoder_class(*tables), batches)
    assert {name: found[name] for name in plain if name != "details"} == {
        name: value for name, value in plain.items() if name != "details"
    }
    clean, overlapping = (right[(part == each) & (labels >= 0)] for each in (0, 1))
    assert found["top1_clean"] == clean.mean() and found["top1_overlapping"] == overlapping.mean()
    assert found["num_overlapping"] == len(overlapping)
    details = found["details"]["overlap"]
    assert details["against"] == [
        {"source": "train.tar", "num_samples": 1000, "num_unusable": 3, "num_overlapping": int((part == 1).sum())},
        {"source": "more.tar", "num_samples": 10, "num_unusable": 0, "num_overlapping": 0},
    ]
    assert (details["distance"], details["confidence"]) == (6, 0.995)
    for name, hits in (("clean", clean), ("overlapping", overlapping)):
        assert (details[name]["num_examples"], details[name]["num_right"]) == (len(hits), hits.sum())
        assert details[name]["interval"] == list(accuracy_interval(int(hits.sum()), len(hits)))
    assert details["num_not_compared"] == ((part == 2) & (labels >= 0)).sum() > 0
    assert details["inflation"] == pytest.approx(right[labels >= 0].mean() - clean.mean(), abs=1e-15)
    null = Fraction(int(clean.sum()), len(clean))
    assert details["p_value"] == pytest.approx(float(tail(int(overlapping.sum()), len(overlapping), null)), rel=1e-12)
    metrics = {name: value for name, value in found.items() if name != "details"}
    evaluation = Evaluation({"t": metrics}, {}, {"t": found["details"]})
    assert not write_results(tmp_path / "r.json", "c", evaluation)
    assert json.loads((tmp_path / "r.json").read_text())["details"]["t"]["overlap"] == details


@pytest.mark.parametrize(
    ("overlapping", "kept", "left_out"), [((), "clean", "overlapping"), (range(40), "overlapping", "clean")]
)
def test_a_part_without_images_is_left_out(made_up, overlapping, kept, left_out):
    tables, labels, batches, _ = made_up
    found = ZeroShot([*"xyz"], ["a {}"], overlap=overlap_of(40, overlapping=overlapping))(FakeEncoder(*tables), batches)
    assert found[f"top1_{kept}"] == found["top1"] and f"top1_{left_out}" not in found
    assert found["num_overlapping"] == (len(overlapping) and (labels >= 0).sum())
    details = found["details"]["overlap"]
    assert details[left_out] == {"num_examples": 0, "num_right": 0, "interval": None}
    assert details["p_value"] is None
    assert details["inflation"] == (0 if kept == "clean" else None)


def pictures(seed: int, size: int = 5) -> list[bytes | np.ndarray]:
    return [*np.random.default_rng(seed).integers(0, 256, (size, 4, 4, 3), np.uint8)]


def source_of(seed: int, size: int = 5) -> ArraySource:
    return ArraySource(pictures(seed, size), ["words"] * size, labels=[0] * size)


def written(tmp_path, data, /, **changes) -> str:
    given = overlap_of(len(data), overlapping=[1, 3], not_compared=[2], pictures=overlaps.picture_digests(data))
    path = tmp_path / "overlap.json"
    path.write_text(json.dumps(json.loads(to_json(given)) | changes))
    return str(path)


def test_a_file_is_read_for_the_set_that_it_is_of_whatever_its_captions_and_labels(tmp_path):
    path = written(tmp_path, source_of(0))
    same = ArraySource(pictures(0), ["other"] * 5, labels=[4] * 5)
    overlap = load_overlap(path, same)
    assert overlap.parts().tolist() == [0, 1, 2, 1, 0]
    assert json.loads(to_json(overlap)) == json.loads(pathlib.Path(path).read_text())


def test_samples_that_cannot_be_read_in_one_of_both_do_not_count(tmp_path):
    path = written(tmp_path, source_of(0))
    images = pictures(0)
    assert load_overlap(path, ArraySource(images, ["words", "", "words", "words", "words"])).num_samples == 5
    with pytest.raises(ValueError, match="has no picture in common with the task's source that can be read"):
        load_overlap(path, ArraySource(images, [""] * 5))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            source_of(0, 4),
            "is of 'test.tar' with 5 samples; the task's source has 4; write it with `clipjax data dedup",
        ),
        (source_of(1), "of 5 pictures that were compared, 5 are not those of the task's source, .* number 0; write it"),
        (
            ArraySource([*pictures(0)[:4], pictures(1)[4]], ["words"] * 5),
            "of 5 pictures that were compared, 1 are not those of the task's source, the first of them number 4",
        ),
    ],
)
def test_the_overlap_of_another_set_is_refused(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        load_overlap(written(tmp_path, source_of(0)), source)


def training(**changes) -> dict:
    return {"source": "a", "num_samples": 1, "num_unusable": 0, "overlapping": []} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": 1}, "the file must be a JSON object with against, distance, .*, and nothing else; write it"),
        ({"num_samples": True}, "num_samples must be a whole number of at least 0"),
        ({"num_samples": -5}, "num_samples must be a whole number"),
        ({"distance": 6.0}, "distance must be a whole number"),
        ({"source": None}, "source must be a string"),
        ({"pictures": ["a"]}, "pictures must be an object with digests by number, below 5"),
        ({"pictures": {"5": "a"}}, "pictures must be an object with digests by number, below 5"),
        ({"pictures": {"-1": "a"}}, "pictures must be an object"),
        ({"against": []}, "against must be a list of training sources, at least one"),
        ({"against": [1]}, "each of against must be a JSON object with num_samples, num_unusable, overlapping, source"),
        (
            {"against": [training(overlapping=[0, 5, 9])]},
            "2 of 3 numbers are no sample of a set of 5, .* them 5; write",
        ),
        ({"against": [training(overlapping=[-1])]}, "1 of 1 numbers are no sample of a set of 5"),
        ({"against": [training(overlapping=[True])]}, "overlapping must be a list of whole numbers"),
        ({"against": [training(overlapping=[1, 1])]}, "overlapping must have each number once"),
        ({"not_compared": "2"}, "not_compared must be a list of whole numbers"),
        ({"not_compared": [0, 3, 1]}, "2 samples are both overlapping and not_compared, the first of them 1"),
    ],
)
def test_damaged_files_are_refused(tmp_path, changes, message):
    path = written(tmp_path, source_of(0), **changes)
    with pytest.raises(ValueError, match=f"^overlap='{path}': .*{message}"):
        load_overlap(path, source_of(0))


@pytest.mark.parametrize("text", ["", "b.tar/key\nb.tar/other\n", "[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "drop.txt").write_text(text)
    for path in (tmp_path / "drop.txt", tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=f"overlap='{path}' cannot be read: .*; write it with"):
            load_overlap(str(path), source_of(0))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="the file must be a JSON object"):
        load_overlap(str(tmp_path / "list.json"), source_of(0))


def test_a_task_reads_its_file_and_its_content_enters_the_fingerprint(tmp_path):
    config = Config()
    task = TaskConfig(source="s", classes="scenes", templates="photo")
    config.eval.tasks = {"t": task}
    plain = prompts_fingerprint(build_tasks(config, lambda spec, **_: source_of(0)))
    task.overlap = written(tmp_path, source_of(0))
    tasks = build_tasks(config, lambda spec, **_: source_of(0))
    measure = tasks["t"].measure
    assert isinstance(measure, ZeroShot) and measure.overlap is not None
    assert measure.overlap.parts().tolist() == [0, 1, 2, 1, 0]
    first = prompts_fingerprint(tasks)
    with pytest.raises(ValueError, match="best_metric='t:top1_clean' must be TASK:METRIC, one of t:top1, "):
        check_metric("t:top1_clean", tasks)  # a part may have no image
    assert plain.items() < first.items()
    written(tmp_path, source_of(0), against=[training(overlapping=[1])])
    assert prompts_fingerprint(build_tasks(config, lambda spec, **_: source_of(0))) != first
    with pytest.raises(ValueError, match="eval.tasks.t: overlap=.* are not those of the task's source"):
        build_tasks(config, lambda spec, **_: source_of(1))
