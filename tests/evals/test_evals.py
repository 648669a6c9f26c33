"""Zero-shot and retrieval against brute force on embeddings that the test makes up."""

import json
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from clipjax.config import Config, MeshConfig, TaskConfig, TaskKind
from clipjax.data.sample import Sample
from clipjax.data.sources import ArraySource
from clipjax.evals import prompts
from clipjax.evals.encoder import Encoder, NotFiniteEmbeddings
from clipjax.evals.retrieval import ImageRetrieval, Retrieval, image_retrieval, recalls, retrieval
from clipjax.evals.runner import (
    Evaluation,
    ReadFailed,
    Task,
    build_tasks,
    check_samples,
    run_tasks,
    write_results,
)
from clipjax.evals.zero_shot import ZeroShot, zero_shot, zero_shot_classifier
from clipjax.runtime import process_log
from clipjax.runtime.sharding import make_mesh

pytestmark = pytest.mark.newest


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class FakeEncoder(Encoder):
    """Embeddings out of tables: pixels hold the row of `image_embed` to return."""

    has_embeddings = True
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def __init__(self, image_embed: np.ndarray, text_table: dict[str, np.ndarray]) -> None:
        object.__setattr__(self, "tables", (image_embed, text_table))

    def embed_images(self, image: np.ndarray) -> np.ndarray:
        return self.tables[0][image[:, 0, 0, 0].astype(int)]

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.tables[1][text] for text in texts])

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return rows


def batch(rows: list[int], labels: list[int], captions: list[tuple[str, ...]], mask: list[bool] | None = None) -> dict:
    image = np.zeros((len(rows), 1, 1, 3), np.uint8)
    image[:, 0, 0, 0] = rows
    return {
        "image": image,
        "label": np.asarray(labels, np.int32),
        "mask": np.ones(len(rows), bool) if mask is None else np.asarray(mask),
        "index": np.asarray(rows, np.int64),
        "captions": captions,
    }


def test_classifier_is_the_mean_of_the_prompts_unit_norm():
    table = {"a cat": unit(np.array([1.0, 0.0])), "the cat": unit(np.array([0.0, 1.0]))}
    encoder = FakeEncoder(np.zeros((1, 2)), table)
    classifier = zero_shot_classifier(encoder.embed_texts, ["cat"], ["a {}", "the {}"])
    np.testing.assert_allclose(classifier, [[2**-0.5, 2**-0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ("red", ["a {}"], r"names='red' must be a sequence of strings; put a single one into a list: \['red'\]"),
        (["red"], "a {}", "templates='a {}' must be a sequence of strings"),
        ([], ["a {}"], "names is empty; give at least one"),
        (["red"], (), "templates is empty; give at least one"),
        (["red", 5], ["a {}"], r"names\[1\]=5 must be a string"),
        (["red"], ["a photo"], "'a photo' must hold one {} for the class name"),
        (["red"], ["{} and {}"], "must hold one {} for the class name"),
    ],
)
def test_classes_and_templates_are_sequences_of_strings(names, templates, message):
    encoder = FakeEncoder(np.eye(2, dtype=np.float32), {})
    with pytest.raises(ValueError, match=message):
        zero_shot_classifier(encoder.embed_texts, names, templates)
    with pytest.raises(ValueError, match=message):
        zero_shot(encoder, [], names, templates)


def test_sources_without_a_usable_sample_are_refused():
    encoder = FakeEncoder(np.eye(2, dtype=np.float32), {"a": unit(np.ones(2))})
    bad = batch([0, 1], [0, 0], [("a",), ("a",)], mask=[False, False])
    good = batch([0], [0], [("a",)])
    for batches in ([], [bad]):
        with pytest.raises(ValueError, match="no sample has a label"):
            zero_shot(encoder, batches, ["a"], ["{}"])
        with pytest.raises(ValueError, match="no sample has a caption"):
            retrieval(encoder, batches)
        with pytest.raises(ValueError, match="no usable sample of the source has a caption"):
            image_retrieval(encoder, batches, [good])
        with pytest.raises(ValueError, match="no usable sample of the gallery has a caption"):
            image_retrieval(encoder, [good], batches)
    with pytest.raises(ValueError, match="recalls of 0 images and 0 texts"):
        recalls(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, int))


def test_a_task_whose_source_is_empty_is_refused_before_work():
    config = Config()
    config.eval.tasks = {"names": TaskConfig(kind=TaskKind.RETRIEVAL, source="nothing.tar")}
    with pytest.raises(ValueError, match="eval.tasks.names: source 'nothing.tar' holds no sample"):
        build_tasks(config, lambda spec, **options: ArraySource([], []))


def test_zero_shot_counts_labelled_good_samples_only():
    names = [f"class {i}" for i in range(7)]
    directions = np.eye(7, dtype=np.float32)
    image_embed = directions[[0, 1, 2, 3, 3]]
    encoder = FakeEncoder(image_embed, dict(zip(names, directions, strict=True)))
    batches = [
        batch([0, 1], [0, 1], [(), ()]),  # right, right
        batch([2, 3], [5, -1], [(), ()]),  # wrong; no label
        batch([4, 0], [2, 0], [(), ()], mask=[True, False]),  # wrong, padding
    ]
    metrics = zero_shot(encoder, batches, names, ["{}"])
    assert metrics["num_examples"] == 4
    assert metrics["top1"] == 0.5
    # Ties among the wrong classes go to the lower label: 5 is not among the first five of image 2, 2 is for image 4.
    assert metrics["top5"] == 0.75


@pytest.mark.parametrize("num_classes", [1, 5, 6])
def test_tasks_tell_which_metrics_they_give(num_classes):
    """Preflight refuses a `checkpoint.best_metric` by these names."""
    names = [f"class {i}" for i in range(num_classes)]
    encoder = FakeEncoder(np.eye(6, dtype=np.float32), dict(zip(names, np.eye(6, dtype=np.float32), strict=False)))
    batches = [batch([0], [0], [("class 0",)])]
    task = ZeroShot(names, ["{}"])
    assert {*task.metrics, "num_examples", "details"} == set(task(encoder, batches))
    assert {*Retrieval.metrics, "num_examples", "num_texts"} == set(Retrieval()(encoder, batches))
    assert {*ImageRetrieval.metrics, "num_examples"} == set(ImageRetrieval()(encoder, batches, batches))


def test_zero_shot_refuses_labels_without_a_name_and_no_labels_at_all():
    encoder = FakeEncoder(np.eye(2, dtype=np.float32), {"a": unit(np.ones(2)), "b": unit(np.array([1.0, -1.0]))})
    with pytest.raises(ValueError, match="label 9 has no class name: there are 2"):
        zero_shot(encoder, [batch([0], [9], [()])], ["a", "b"], ["{}"])
    with pytest.raises(ValueError, match="no sample has a label"):
        zero_shot(encoder, [batch([0], [-1], [()])], ["a", "b"], ["{}"])


def test_recalls_agree_with_brute_force():
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(40, 8)))
    owners = np.sort(rng.integers(0, 40, 100))
    owners[:40] = np.arange(40)
    owners = np.sort(owners)
    texts = unit(images[owners] + rng.normal(size=(100, 8)))
    metrics = recalls(images, texts, owners)
    similarity = images @ texts.T
    for k in (1, 5, 10):
        by_image = [
            bool(set(np.argsort(-row)[:k]) & set(np.flatnonzero(owners == i))) for i, row in enumerate(similarity)
        ]
        by_text = [owners[j] in np.argsort(-column)[:k] for j, column in enumerate(similarity.T)]
        assert metrics[f"image_to_text_r{k}"] == pytest.approx(np.mean(by_image))
        assert metrics[f"text_to_image_r{k}"] == pytest.approx(np.mean(by_text))
    assert 0 < metrics["image_to_text_r1"] < 1


def test_retrieval_leaves_out_bad_samples_and_those_without_captions():
    directions = np.eye(4, dtype=np.float32)
    table = {"zero": directions[0], "also zero": directions[0], "three": directions[3]}
    batches = [
        batch([0, 1], [-1, -1], [("zero", "also zero"), ()]),
        batch([2, 3], [-1, -1], [("three",), ("three",)], mask=[False, True]),
    ]
    metrics = retrieval(FakeEncoder(directions, table), batches)
    assert (metrics["num_examples"], metrics["num_texts"]) == (2, 3)
    assert metrics["image_to_text_r1"] == metrics["text_to_image_r1"] == 1.0


def test_a_caption_of_several_images_is_embedded_once_and_the_first_image_is_the_nearest():
    """A text's embedding may differ in its last bits with its place in a batch: then the copies would not be equal."""
    asked = []

    class Uneven(FakeEncoder):
        def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
            asked.append(list(texts))
            rows = super().embed_texts(texts)
            return rows + 1e-7 * np.arange(len(rows), dtype=np.float32)[:, None]

    directions = np.eye(3, dtype=np.float32)
    table = {"same": directions[0], "other": directions[1]}
    batches = [batch([0, 1, 2], [-1] * 3, [("same", "other"), ("other",), ("same",)])]
    metrics = retrieval(Uneven(directions[[0, 1, 0]], table), batches)
    assert asked == [["same", "other"]]
    # Text 3, "same" of image 2: image 0 looks the same and comes first. Image 2: text 0 is the same and comes first.
    assert (metrics["text_to_image_r1"], metrics["image_to_text_r1"]) == (0.5, 1 / 3)
    assert (metrics["text_to_image_r5"], metrics["image_to_text_r5"]) == (1.0, 1.0)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n \n"])
def test_captions_of_several_lines_are_split_or_told(end, capsys):
    directions = np.eye(4, dtype=np.float32)
    table = {
        "zero": directions[0],
        "also zero": directions[0],
        "three": directions[3],
        f"zero{end}also zero": directions[3],
    }
    batches = [batch([0, 3], [-1, -1], [(f"zero{end}also zero",), ("three",)])]
    split = Retrieval(by_line=True)(FakeEncoder(directions, table), batches)
    assert (split["num_examples"], split["num_texts"], split["image_to_text_r1"]) == (2, 3, 1.0)
    assert capsys.readouterr().err == ""
    whole = Retrieval()(FakeEncoder(directions, table), batches)
    assert (whole["num_texts"], whole["text_to_image_r1"]) == (2, 0.5)
    told = capsys.readouterr().err
    assert "1 captions hold several lines" in told and "captions_by_line=True" in told
    alone = [batch([3], [-1], [("three",)])]
    assert Retrieval(by_line=True)(FakeEncoder(directions, table), alone) == Retrieval()(
        FakeEncoder(directions, table), alone
    )


def test_image_retrieval_matches_pictures_of_one_caption():
    directions = np.eye(4, dtype=np.float32)
    encoder = FakeEncoder(directions, {})
    source = [batch([0, 1, 2], [-1] * 3, [("sun",), ("moon",), ("only here",)])]
    gallery = [batch([1, 0, 3], [-1] * 3, [("sun",), ("moon",), ("only there",)])]
    metrics = image_retrieval(encoder, source, gallery)
    # The nearest picture of "sun" is the one called "moon", and the reverse: both come second.
    assert metrics["num_examples"] == 2
    assert metrics["source_to_gallery_r1"] == metrics["gallery_to_source_r1"] == 0
    assert metrics["source_to_gallery_r5"] == metrics["gallery_to_source_r5"] == 1
    with pytest.raises(ValueError, match="no picture of the source has the caption"):
        image_retrieval(encoder, [batch([2], [-1], [("only here",)])], [batch([3], [-1], [("only there",)])])


def test_retrieval_without_captions_is_refused():
    with pytest.raises(ValueError, match="no sample has a caption"):
        retrieval(FakeEncoder(np.eye(2, dtype=np.float32), {}), [batch([0, 1], [0, 0], [(), ()])])


def test_prompts_by_name_and_from_files(tmp_path):
    assert len(prompts.load_classes("scenes")) == 80
    assert prompts.load_templates("photo") == ("a photo of a {}.",)
    path = tmp_path / "names.json"
    path.write_text('["cat", "dog"]')
    assert prompts.load_classes(str(path)) == ("cat", "dog")
    with pytest.raises(ValueError, match="must hold one {} for the class name"):
        prompts.load_templates(str(path))
    for content, message in (("{", "is no JSON"), ('{"a": 1}', "must be a list of strings"), ("[]", "at least one")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            prompts.load_classes(str(path))
    with pytest.raises(ValueError, match="classes='birds' must be one of scenes, birdsnap, "):
        prompts.load_classes("birds")


def test_results_are_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "results.json"
    write_results(path, tmp_path / "checkpoints" / "7", Evaluation({"scenes/val": {"top1": 0.5}}, {}))
    content = json.loads(path.read_text())
    assert content == {"checkpoint": str(tmp_path / "checkpoints" / "7"), "tasks": {"scenes/val": {"top1": 0.5}}}
    assert list(path.parent.iterdir()) == [path]
    write_results(path, tmp_path, Evaluation({}, {"scenes/val": "label 9 has no class name"}))
    assert json.loads(path.read_text())["failed"] == {"scenes/val": "label 9 has no class name"}


@pytest.mark.parametrize("side", ["image", "text"])
def test_embeddings_that_are_not_finite_are_never_ranked(side):
    """All labels are 0, and every comparison with NaN is false: it would count as the best model."""
    image, table = np.eye(4, dtype=np.float32), {"zero": np.eye(4)[0], "one": np.eye(4)[1]}
    (image if side == "image" else table["zero"])[...] = np.nan
    encoder, source = FakeEncoder(image, table), [batch([0, 1], [0, 0], [("zero",), ("one",)])]
    with pytest.raises(NotFiniteEmbeddings, match="2 of 2 rows of class scores are not finite"):
        zero_shot(encoder, source, ["zero", "one"], ["{}"])
    count = "2 of 2 image embeddings" if side == "image" else "1 of 2 text embeddings"
    with pytest.raises(NotFiniteEmbeddings, match=f"{count} are not finite, so nothing can be ranked"):
        retrieval(encoder, source)
    if side == "image":
        with pytest.raises(NotFiniteEmbeddings, match=count):
            image_retrieval(encoder, source, source)


def make_task(source: ArraySource, measure=None) -> Task:
    config = Config()
    config.eval.batch_size = 2
    config.model.image.image_size = 1
    return Task(measure or ZeroShot(["zero", "one"], ["{}"]), config, [source], None)


class Unreadable(ArraySource):
    """A source whose third sample lies on a broken disk."""

    def __getitem__(self, index: int) -> Sample:
        if index == 2:
            raise OSError(5, "Input/output error", "shard.tar")
        return super().__getitem__(index)


def test_a_task_that_fails_is_named_and_the_others_go_on(tmp_path):
    images = np.zeros((4, 1, 1, 3), np.uint8)
    encoder = FakeEncoder(np.eye(4, dtype=np.float32), {"zero": np.eye(4)[0], "one": np.eye(4)[1]})

    class Defect(ZeroShot):
        def __call__(self, encoder, batches) -> dict[str, float]:
            raise KeyError("a defect")

    tasks = {
        "beyond": make_task(ArraySource(images, ["a"] * 4, labels=[0, 0, 2, 0])),
        "unreadable": make_task(Unreadable(images, ["a"] * 4, labels=[0] * 4)),
        "defect": make_task(ArraySource(images, ["a"] * 4), Defect(["a"], ["{}"])),
        "good": make_task(ArraySource(images, ["a"] * 4, labels=[0] * 4)),
    }
    with process_log.session():
        process_log.open_log(tmp_path, rank=0, header={})
        evaluation = run_tasks(tasks, encoder)
    assert evaluation.results == {"good": {"top1": 1.0, "per_class": 1.0, "num_examples": 4.0, "num_skipped": 0.0}}
    assert evaluation.failures == {
        "beyond": "label 2 has no class name: there are 2; check `classes`",
        "unreadable": "[Errno 5] Input/output error: 'shard.tar'",
        "defect": "KeyError: 'a defect'",
    }
    log = process_log.path_of(tmp_path, 0).read_text()
    assert "evaluation task unreadable failed:" in log and "Traceback" in log


@pytest.mark.parametrize("all_lack_it", [True, False])
def test_a_task_is_left_out_if_the_devices_of_all_processes_lack_memory(monkeypatch, all_lack_it):
    """Where only this process tells so, the other one may wait for it in the task."""
    told = {}

    class TooLarge(ZeroShot):
        def __call__(self, encoder, batches) -> dict[str, float]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    class OneOfTwo(FakeEncoder):
        def gather_json(self, value: str) -> list[str]:
            return [value, value]

    def kv_get(key: str, *, timeout_seconds: float) -> str:
        if key.endswith("/1") and not all_lack_it:
            raise TimeoutError
        return told[f"{key.rpartition('/')[0]}/0"]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("clipjax.runtime.processes.kv_set", lambda key, value: told.update({key: value}))
    monkeypatch.setattr("clipjax.runtime.processes.kv_get", kv_get)
    tasks = {"large": make_task(ArraySource(np.zeros((4, 1, 1, 3), np.uint8), ["a"] * 4), TooLarge(["a"], ["{}"]))}
    encoder = OneOfTwo(np.eye(2, dtype=np.float32), {})
    if all_lack_it:
        assert run_tasks(tasks, encoder).failures == {"large": "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"}
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
            run_tasks(tasks, encoder)
    assert len(told) == 1


def test_processes_agree_after_each_read(monkeypatch):
    """The other process cannot read its part of the second batch: this one stops there too, and says so."""
    source = ArraySource(np.zeros((6, 1, 1, 3), np.uint8), ["a"] * 6, labels=[0] * 6)
    sent = []

    class OneOfTwo(FakeEncoder):
        def gather(self, rows: np.ndarray) -> np.ndarray:
            sent.append(rows)
            theirs = np.full_like(rows, -2) if len(sent) == 3 else rows  # reasons, labels, reasons
            return np.concatenate([rows, theirs])

        def embed_images(self, image: np.ndarray) -> np.ndarray:
            return np.eye(2, dtype=np.float32)[np.zeros(2 * len(image), int)]

        def gather_json(self, value: str) -> list[str]:
            return [value, value or "[Errno 5] Input/output error"]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    encoder = OneOfTwo(np.eye(2, dtype=np.float32), {"zero": np.eye(2)[0], "one": np.eye(2)[1]})
    task = make_task(source)
    with pytest.raises(ReadFailed, match=r"^process 1: \[Errno 5\] Input/output error$"):
        task(encoder)
    assert len(sent) == 3
    monkeypatch.undo()
    unreadable = make_task(Unreadable(np.zeros((4, 1, 1, 3), np.uint8), ["a"] * 4, labels=[0] * 4))
    sent.clear()
    with pytest.raises(ReadFailed):
        unreadable(encoder)
    assert sent[2].tolist() == [-2, -2]  # told to the others, before they wait for this one


@pytest.mark.parametrize(
    ("measure", "labels", "caption", "message"),
    [
        (ZeroShot(["zero", "one"], ["{}"]), [0, 1, 2, 0], "a", "label 2 has no class name: there are 2"),
        (ZeroShot(["zero", "one"], ["{}"]), [-1] * 4, "a", "no sample has a label"),
        (Retrieval(), [0] * 4, (), "no sample has a caption"),
        (ImageRetrieval(), [0] * 4, (), "no sample has a caption"),
    ],
)
def test_data_that_cannot_do_is_refused_before_the_work(measure, labels, caption, message):
    source = ArraySource(np.zeros((4, 1, 1, 3), np.uint8), [caption] * 4, labels=labels)
    with pytest.raises(ValueError, match=rf"eval.tasks.t: {message}"):
        check_samples({"t": make_task(source, measure)})
    check_samples(
        {"t": make_task(ArraySource(np.zeros((99, 1, 1, 3), np.uint8), ["a"] * 99, labels=[1] * 99), measure)}
    )
