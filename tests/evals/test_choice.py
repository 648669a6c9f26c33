"""Right captions among wrong ones, and pairs of images and captions, against brute force on made-up embeddings."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Config, TaskConfig, TaskKind
from clipjax.config.validation import validate
from clipjax.data.sample import BadSample, Sample
from clipjax.data.sources import ArraySource
from clipjax.evals.choice import CaptionChoice, PairChoice, caption_choice, pair_choice
from clipjax.evals.encoder import NotFiniteEmbeddings
from clipjax.evals.runner import build_tasks, check_samples
from tests.config.test_config import valid
from tests.evals.test_evals import FakeEncoder, batch, unit


def encoder_of(seed: int, num_images: int, texts: list[str]) -> FakeEncoder:
    rng = np.random.default_rng(seed)
    table = dict(zip(texts, unit(rng.normal(size=(len(texts), 5))), strict=True))
    return FakeEncoder(unit(rng.normal(size=(num_images, 5))), table)


@pytest.mark.parametrize("num_captions", [2, 5])
def test_the_first_caption_must_be_the_nearest(num_captions):
    captions = [tuple(f"{i} {k}" for k in range(num_captions)) for i in range(40)]
    encoder = encoder_of(0, 40, [text for own in captions for text in own])
    batches = [batch(list(range(start, start + 8)), [-1] * 8, captions[start : start + 8]) for start in range(0, 40, 8)]
    found = CaptionChoice()(encoder, batches)
    images, table = encoder.tables
    right = [np.argmax([images[i] @ table[text] for text in own]) == 0 for i, own in enumerate(captions)]
    assert found["text_score"] == np.mean(right) and 0 < np.mean(right) < 1
    assert (found["num_examples"], found["num_ties"], found["num_left_out"]) == (40, 0, 0)


def test_a_tie_is_no_choice():
    eye = np.eye(3, dtype=np.float32)
    table = {"right": eye[0], "same": eye[0], "nearly": unit(eye[0] + 1e-4 * eye[1]), "wrong": eye[1]}
    captions = [("right", "same"), ("right", "right"), ("right", "nearly"), ("right", "wrong")]
    found = caption_choice(FakeEncoder(eye[[0, 0, 0, 0]], table), [batch([0, 1, 2, 3], [-1] * 4, captions)])
    assert (found["text_score"], found["num_ties"]) == (0.25, 3)


def test_images_with_another_number_of_captions_are_left_out():
    """A blank caption is dropped when a tar is read: were it the right one, a wrong one would stand in its place."""
    eye = np.eye(2, dtype=np.float32)
    encoder = FakeEncoder(eye[[0] * 6], {"right": eye[0], "wrong": eye[1]})
    captions = [("right", "wrong", "wrong")] * 2 + [("wrong", "wrong"), ("wrong",), (), ("right", "wrong", "wrong")]
    found = caption_choice(encoder, [batch(list(range(6)), [-1] * 6, captions, mask=[True] * 5 + [False])])
    assert (found["text_score"], found["num_examples"], found["num_left_out"]) == (1.0, 2, 2)


def test_lines_are_captions_if_the_task_says_so(capsys):
    eye = np.eye(2, dtype=np.float32)
    encoder = FakeEncoder(eye, {"right": eye[0], "wrong": eye[1]})
    batches = [batch([0, 1], [-1] * 2, [("right\nwrong\n",), ("right\r\nwrong",)])]
    assert CaptionChoice(by_line=True)(encoder, batches)["text_score"] == 0.5
    with pytest.raises(ValueError, match="no sample has a second caption; caption_choice needs the right one first"):
        CaptionChoice()(encoder, batches)
    assert "2 captions hold several lines" in capsys.readouterr().err


def test_pairs_are_scored_as_winoground_defines():
    captions = [f"text {i}" for i in range(120)]
    encoder = encoder_of(2, 120, captions)
    encoder.tables[0][:] = unit(encoder.tables[0] + 0.4 * np.stack(list(encoder.tables[1].values())))
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(60), 2))
    rows = list(range(120))
    batches = [
        batch(rows[s : s + 8], labels[s : s + 8].tolist(), [(captions[i],) for i in rows[s : s + 8]]) for s in rows[::8]
    ]
    found = PairChoice()(encoder, batches)
    score = encoder.tables[0].astype(float) @ np.stack([encoder.tables[1][text] for text in captions]).astype(float).T
    text, image = [], []
    for label in range(60):
        a, b = np.flatnonzero(labels == label)
        text.append(score[a, a] > score[a, b] and score[b, b] > score[b, a])
        image.append(score[a, a] > score[b, a] and score[b, b] > score[a, b])
    assert found["text_score"] == np.mean(text) and found["image_score"] == np.mean(image)
    assert found["group_score"] == np.mean(np.logical_and(text, image))
    assert 0 < found["group_score"] < min(found["text_score"], found["image_score"]) and text != image
    assert (found["num_examples"], found["num_ties"], found["num_left_out"]) == (60, 0, 0)


def test_images_without_one_partner_are_left_out():
    eye = np.eye(8, dtype=np.float32)
    encoder = FakeEncoder(eye, {str(i): eye[i] for i in range(8)})
    labels, mask = [3, 3, 5, 7, 7, 7, -1, -1], [True] * 8
    batches = [batch(list(range(8)), labels, [(str(i), "another") for i in range(8)], mask)]
    found = pair_choice(encoder, batches)
    assert (found["group_score"], found["num_examples"], found["num_left_out"]) == (1.0, 1, 6)
    mask[1] = False
    with pytest.raises(ValueError, match="no two samples share a label; pair_choice needs one label for both images"):
        pair_choice(encoder, [batch(list(range(8)), labels, [(str(i),) for i in range(8)], mask)])


def test_a_bag_of_words_scores_nothing_in_pairs():
    """Both captions have the same words, so both are equally near: where text alone decides, each pair ties."""
    eye = np.eye(4, dtype=np.float32)
    encoder = FakeEncoder(eye, {"a b": eye[0], "b a": eye[0]})
    found = pair_choice(encoder, [batch([0, 1], [0, 0], [("a b",), ("b a",)])])
    names = ("text_score", "image_score", "group_score", "num_ties")
    assert tuple(map(found.get, names)) == (0, 0, 0, 1)


@pytest.mark.parametrize("measure", [CaptionChoice(), PairChoice()])
def test_sources_without_a_usable_sample_and_bad_embeddings_are_refused(measure):
    eye = np.eye(2, dtype=np.float32)
    encoder = FakeEncoder(eye, {"a": eye[0], "b": eye[1]})
    for batches in ([], [batch([0], [0], [()])], [batch([0], [0], [("a", "b")], mask=[False])]):
        with pytest.raises(ValueError, match="no sample has a caption"):
            measure(encoder, batches)
    assert set(measure.metrics) <= set(measure(encoder, [batch([0, 1], [0, 0], [("a", "b"), ("b", "a")])]))
    encoder = FakeEncoder(eye, {"a": eye[0] * np.nan, "b": eye[1]})
    with pytest.raises(NotFiniteEmbeddings, match="text embeddings are not finite"):
        measure(encoder, [batch([0, 1], [0, 0], [("a", "b"), ("b", "a")])])


@pytest.mark.parametrize(
    ("kind", "captions", "labels", "message"),
    [
        (TaskKind.CAPTION_CHOICE, (), [0, 0], "no sample has a caption"),
        (TaskKind.CAPTION_CHOICE, "one", [0, 0], "no sample has a second caption"),
        (TaskKind.PAIR_CHOICE, (), [0, 0], "no sample has a caption"),
        (TaskKind.PAIR_CHOICE, "one", [0, 1], "no two samples share a label"),
        (TaskKind.PAIR_CHOICE, "one", [-1, -1], "no two samples share a label"),
    ],
)
def test_data_that_cannot_do_is_refused_before_the_work(kind, captions, labels, message):
    config = Config()
    config.eval.tasks = {"t": TaskConfig(kind=kind, source="a.tar")}
    pixels = np.zeros((2, 1, 1, 3), np.uint8)
    with pytest.raises(ValueError, match=f"eval.tasks.t: {message}"):
        check_samples(build_tasks(config, lambda *_, **options: ArraySource(pixels, [captions] * 2, labels=labels)))
    good = ArraySource(pixels, [("one", "two")] * 2, labels=[4, 4])
    check_samples(build_tasks(config, lambda *_, **options: good))


def test_lines_count_in_the_look_at_the_data_too():
    samples = [Sample(b"", ("one\ntwo",))]
    CaptionChoice(by_line=True).check_samples(samples, is_all=True)
    with pytest.raises(ValueError, match="no sample has a second caption"):
        CaptionChoice().check_samples(samples, is_all=True)


def test_the_config_refuses_what_a_choice_ignores():
    config = valid()
    for kind, by_line in itertools.product((TaskKind.CAPTION_CHOICE, TaskKind.PAIR_CHOICE), (False, True)):
        task = config.eval.tasks["t"] = TaskConfig(kind=kind, source="a.tar", captions_by_line=by_line)
        assert task.reads_texts
        if kind is TaskKind.PAIR_CHOICE and by_line:
            with pytest.raises(ValueError, match="eval.tasks.t.captions_by_line=True: pair_choice would ignore it"):
                validate(config)
        else:
            validate(config)


def test_sugarcrepe_becomes_json_lines_as_the_docs_say(tmp_path):
    """Its captions keep their order, and a blank one costs the sample instead of putting a wrong one first."""
    rows = {
        "0": {"filename": "0.png", "caption": "a dog bites a man", "negative_caption": "a man bites a dog"},
        "7": {"filename": "7.png", "caption": " ", "negative_caption": "a cat"},
    }
    lines = []
    for row in rows.values():  # docs/evaluation.md
        lines.append(json.dumps({"path": row["filename"], "caption": [row["caption"], row["negative_caption"]]}))
        Image.new("RGB", (2, 2)).save(tmp_path / row["filename"])
    (tmp_path / "swap.jsonl").write_text("\n".join(lines))
    config = Config()
    config.eval.tasks = {"t": TaskConfig(kind=TaskKind.CAPTION_CHOICE, source=str(tmp_path / "swap.jsonl"))}
    tasks = build_tasks(config)
    check_samples(tasks)
    (source,) = tasks["t"].sources
    assert source[0].captions == ("a dog bites a man", "a man bites a dog")
    with pytest.raises(BadSample, match="empty_caption"):
        source[1]
