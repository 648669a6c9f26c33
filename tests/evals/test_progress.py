"""An evaluation that is killed and goes on; results in CLIP_benchmark's columns."""

import csv
import json

import numpy as np
import pytest

from clipjax.config import TaskConfig, TaskKind
from clipjax.data.sources import ArraySource
from clipjax.evals.columns import to_csv, to_rows
from clipjax.evals.progress import ENDING, Progress
from clipjax.evals.runner import run_tasks
from clipjax.runtime import objects
from tests.evals.test_evals import FakeEncoder, make_task
from tests.runtime.stores import BUCKET


class Killed(BaseException):
    pass


@pytest.fixture
def tasks():
    images = np.zeros((4, 1, 1, 3), np.uint8)
    return {name: make_task(ArraySource(images, ["a"] * 4, labels=[0] * 4)) for name in ("first", "second", "third")}


@pytest.fixture
def encoder():
    return FakeEncoder(np.eye(4, dtype=np.float32), {"zero": np.eye(4)[0], "one": np.eye(4)[1]})


def run(tasks, encoder, progress, *, killed_after=99):
    ran = []

    def keep(name, metrics, details):
        progress.add(name, metrics, details)
        ran.append(name)
        if len(ran) == killed_after:
            raise Killed

    return run_tasks(tasks, encoder, done=dict(progress.results), keep=keep), ran


def test_a_killed_evaluation_goes_on_behind_the_last_task(tasks, encoder, tmp_path):
    whole, _ = run(tasks, encoder, Progress(tmp_path / "whole.json", "key"))
    with pytest.raises(Killed):
        run(tasks, encoder, Progress(tmp_path / "r.json", "key"), killed_after=2)
    progress = Progress(tmp_path / "r.json", "key")
    assert [*progress.results] == ["first", "second"]
    assert progress.details["first"] == whole.details["first"]
    again, ran = run(tasks, encoder, progress)
    assert ran == ["third"]
    assert again.results == whole.results and [*again.results] == [*tasks]
    progress.finish()
    assert not (tmp_path / f"r.json{ENDING}").exists()


def test_on_a_store_too(s3, tasks, encoder):
    place = f"s3://{BUCKET}/unfinished/r.json"
    with pytest.raises(Killed):
        run(tasks, encoder, Progress(place, "key"), killed_after=1)
    progress = Progress(place, "key")
    assert [*progress.results] == ["first"]
    progress.finish()
    assert not objects.list_folder(f"s3://{BUCKET}/unfinished")


@pytest.mark.parametrize(
    "content",
    [
        None,
        "no JSON",
        "[]",
        "{}",
        "[" * 100_000,
        '{"key": "other", "tasks": {"first": {"top1": 1.0}}, "details": {}}',
        '{"key": "key", "tasks": {"first": {"top1": NaN}}, "details": {}}',
        '{"key": "key", "tasks": {"first": {"top1": true}}, "details": {}}',
        '{"key": "key", "tasks": {"first": [1]}, "details": {}}',
        '{"key": "key", "tasks": [1], "details": {}}',
    ],
)
def test_what_is_no_progress_of_this_evaluation_is_not_used(tasks, encoder, tmp_path, content):
    if content is not None:
        (tmp_path / f"r.json{ENDING}").write_text(content)
    progress = Progress(tmp_path / "r.json", "key")
    assert progress.results == {} and progress.details == {}
    _, ran = run(tasks, encoder, progress)
    assert ran == [*tasks]
    assert json.loads((tmp_path / f"r.json{ENDING}").read_text())["key"] == "key"


def test_a_disk_that_takes_no_progress_costs_none_of_the_results(tasks, encoder, tmp_path):
    (tmp_path / f"r.json{ENDING}").mkdir()
    evaluation, ran = run(tasks, encoder, Progress(tmp_path / "r.json", "key"))
    assert ran == [*evaluation.results] == [*tasks]


def test_rows_have_the_names_of_clip_benchmark():
    tasks = {
        "imagenet": TaskConfig(source="a", classes="x", templates="y"),
        "coco": TaskConfig(kind=TaskKind.RETRIEVAL, source="a"),
        "same": TaskConfig(kind=TaskKind.IMAGE_RETRIEVAL, source="a", gallery="b"),
    }
    results = {
        "imagenet": {"top1": 0.5, "top5": 0.75, "per_class": 0.25, "num_examples": 4.0, "num_skipped": 0.0},
        "coco": {"image_to_text_r5": 0.1, "text_to_image_r5": 0.2, "text_to_image_r1": 0.3, "num_texts": 5.0},
        "same": {"source_to_gallery_r1": 1.0},
    }
    rows = to_rows(results, tasks, "runs/a, b/7")
    head = {"model": "clipjax", "pretrained": "runs/a, b/7", "language": "en", "model_fullname": "clipjax runs/a, b/7"}
    classified = {"acc1": 0.5, "acc5": 0.75, "mean_per_class_recall": 0.25}
    # Retrieval of images: a text asks for its image.
    retrieved = {"text_retrieval_recall@5": 0.1, "image_retrieval_recall@5": 0.2, "image_retrieval_recall@1": 0.3}
    assert rows == [
        {"dataset": "imagenet", "task": "zeroshot_classification", **head, **classified},
        {"dataset": "coco", "task": "zeroshot_retrieval", **head, **retrieved},
    ]
    read = list(csv.DictReader(to_csv(rows).splitlines()))
    assert read[0]["acc1"] == "0.5" and read[0]["image_retrieval_recall@5"] == ""
    assert read[1]["pretrained"] == "runs/a, b/7" and float(read[1]["text_retrieval_recall@5"]) == 0.1
