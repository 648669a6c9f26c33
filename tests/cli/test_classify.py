"""`clipjax classify`: probabilities of labels, and everything that can be wrong with what a person names."""

import json
from unittest import mock

import numpy as np
import pytest

import clipjax
from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.cli import classify, opened_model
from clipjax.data.tokenizers.protocol import NoTokenizer
from tests.cli.opened_models import huge_png, place  # noqa: F401
from tests.commands import exit_code

GIVEN = ["photos", "--checkpoint=run", "--labels=red over green,blue over white"]


@pytest.fixture
def no_encoder(monkeypatch):
    """No parameters are read and nothing is compiled: what is refused is refused before."""
    monkeypatch.setattr(opened_model.OpenedModel, "encoder", lambda self: pytest.fail("the model is loaded"))


class FakeEncoder:
    """Embeddings on two axes: bright pictures and the text "a photo of a bright." on the first."""

    logit_scale = 10.0

    def __init__(self, **params):
        self.params = params

    def embed_images(self, image):
        return unit_rows(image.mean(axis=(1, 2, 3)) <= 128)

    def embed_texts(self, texts):
        return unit_rows(np.asarray(["bright" not in text for text in texts]))


def unit_rows(axis: np.ndarray) -> np.ndarray:
    """Return unit vectors of the checkpoint's length along the first axis, or the second."""
    return np.eye(10, dtype=np.float32)[axis.astype(int)]


@pytest.mark.heavy
def test_the_probabilities_are_those_of_the_library(place, capsys):  # noqa: F811
    assert exit_code(classify.main, [*GIVEN, "--output=found/a.json", "--top=1"]) == 0
    found = json.loads((place / "found" / "a.json").read_text())
    model = clipjax.load("run")
    files = sorted(str(path.relative_to(place)) for path in (place / "photos").iterdir())
    from PIL import Image

    image = model.encode_image([Image.open(file) for file in files]).astype(np.float64)
    labels = GIVEN[2].partition("=")[2].split(",")
    text = model.encode_text([f"a photo of a {label}." for label in labels]).astype(np.float64)
    wanted = np.exp(model.logit_scale * image @ text.T)
    wanted /= wanted.sum(axis=1, keepdims=True)
    assert [each["image"] for each in found["images"]] == files
    shares = np.array([[each["probabilities"][label] for label in labels] for each in found["images"]])
    np.testing.assert_allclose(shares, wanted, atol=1e-5)
    assert [each["label"] for each in found["images"]] == [labels[i] for i in wanted.argmax(axis=1)]
    assert (found["step"], found["params"], found["probabilities"]) == (9, "ema", "softmax")
    assert found["checkpoint"] == str(place / "run" / "checkpoints" / "9") and found["unusable"] == {}
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 + len(files) + 2
    assert out[2].split() == [files[0], *found["images"][0]["label"].split(), f"{wanted[0].max():.4f}"]


def test_pictures_that_cannot_be_used_are_told_and_the_others_go_on(place, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(opened_model.OpenedModel, "encoder", lambda self: FakeEncoder(logit_bias=np.float32(-5)))
    (place / "photos" / "broken.png").write_bytes(b"no picture")
    (place / "photos" / "huge.png").write_bytes(huge_png())
    argv = ["photos", "--checkpoint=run", "--labels=bright,dark\x1b[31m", "--output=a.json"]
    assert exit_code(classify.main, argv) == 3
    found, shown = json.loads((place / "a.json").read_text()), capsys.readouterr()
    assert found["unusable"] == {"photos/broken.png": "corrupt_image", "photos/huge.png": "image_too_large"}
    assert len(found["images"]) == 8
    assert "photos/huge.png: unusable (image_too_large, data.max_image_pixels=" in shown.err
    assert "pictures left out: 2 (corrupt_image 1, image_too_large 1)" in shown.err
    assert found["probabilities"] == "sigmoid" and "they do not sum to one" in shown.out
    for each in found["images"]:
        fits = 1 / (1 + np.exp(-(10 - 5)))
        assert sorted(each["probabilities"].values()) == pytest.approx([1 - 1 / (1 + np.exp(-5)), fits])
    assert "\x1b" not in shown.out


def test_no_usable_picture_at_all(place, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(opened_model.OpenedModel, "encoder", lambda self: FakeEncoder())
    (place / "broken.png").write_bytes(b"no picture")
    assert exit_code(classify.main, ["broken.png", *GIVEN[1:]]) == 3
    assert "no picture can be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (GIVEN[1:], "IMAGE is missing"),
        (["none.png", *GIVEN[1:]], "IMAGE=none.png: there is no such file or folder"),
        ([*GIVEN[:2], "--labels=a,,b"], "label 2 of 3 is blank"),
        ([*GIVEN[:2], "--labels=a,a"], "labels 1 and 2 are both 'a'"),
        ([*GIVEN[:2], "--labels=cat"], "--labels=cat: a single label has probability 1 whatever the picture"),
        ([*GIVEN[:2]], "--labels=A,B|FILE is missing"),
        ([GIVEN[0], GIVEN[2]], "--checkpoint=WORKDIR_OR_STEP is missing"),
        ([*GIVEN, "--templates=a photo"], "--templates=a photo: must be a file"),
        ([*GIVEN, "--templates=a {} of {x}{}"], "must hold one {}"),
        ([GIVEN[0], "--checkpoint=photos", GIVEN[2]], "photos"),
        ([*GIVEN, "--output=photos"], "--output=photos is a folder"),
        ([*GIVEN, "--top=0"], "--top=0 must be a whole number of at least 1"),
        ([*GIVEN, "--label=a"], "unknown option --label; did you mean --labels?"),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(place, no_encoder, capsys, argv, message):  # noqa: F811
    assert exit_code(classify.main, argv) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_is_refused(place, no_encoder, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(SavedCheckpoint, "tokenizer", lambda self: NoTokenizer())
    assert exit_code(classify.main, GIVEN) == 2
    assert "The model came without its tokenizer" in capsys.readouterr().err


def test_a_model_that_embeds_nothing_and_several_processes_are_refused(place, no_encoder, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(opened_model, "check_embeddings", mock.Mock(side_effect=ValueError("it has no embeddings")))
    assert exit_code(classify.main, GIVEN) == 2
    assert "it has no embeddings" in capsys.readouterr().err
    slurm = {"NTASKS": "2", "PROCID": "0", "LOCALID": "0", "STEP_NUM_TASKS": "2", "JOB_ID": "1"}
    for name, value in {**slurm, "STEP_NODELIST": "a", "JOB_NODELIST": "a"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert exit_code(classify.main, GIVEN) == 2
    assert "this command runs as one process, and 2 were started (Slurm" in capsys.readouterr().err
