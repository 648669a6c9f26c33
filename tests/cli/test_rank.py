"""`clipjax rank`: the order of pictures by a prompt."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.cli import opened_model, rank
from clipjax.data.tokenizers.protocol import NoTokenizer
from tests.cli.opened_models import huge_png, place  # noqa: F401
from tests.cli.test_embed import FakeEncoder
from tests.commands import exit_code


@pytest.fixture
def fake(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr(opened_model.OpenedModel, "encoder", lambda self: FakeEncoder())


def test_the_best_comes_first_and_equals_keep_their_order(fake, place, capsys):  # noqa: F811
    shutil.copy("photos/val004.png", "twin.png")
    shutil.copy("photos/val004.png", "photos/zwin.png")
    assert exit_code(rank.main, ["a red one", "twin.png", "photos", "--checkpoint=run", "--output=a.json"]) == 0
    found, encoder = json.loads(pathlib.Path("a.json").read_text()), FakeEncoder()
    from PIL import Image

    files = ["twin.png", *sorted(f"photos/{path.name}" for path in (place / "photos").iterdir())]
    resized = [np.asarray(Image.open(file).resize((16, 16), Image.Resampling.BICUBIC)) for file in files]
    exact = encoder.embed_images(resized).astype(float) @ encoder.embed_texts(["a red one"])[0].astype(float)
    assert [each["image"] for each in found["images"]] == [files[i] for i in np.argsort(-exact, kind="stable")]
    assert [each["similarity"] for each in found["images"]] == pytest.approx(sorted(exact, reverse=True), abs=1e-12)
    assert [each["rank"] for each in found["images"]] == list(range(1, 11))
    order = [each["image"] for each in found["images"]]
    start = order.index("twin.png")
    assert order[start : start + 3] == ["twin.png", "photos/val004.png", "photos/zwin.png"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["1", f"{max(exact):.4f}", order[0]] and len(lines) == 13
    assert found["prompt"] == "a red one"


def test_pictures_that_cannot_be_used_are_told(fake, place, capsys):  # noqa: F811
    (place / "photos" / "huge.png").write_bytes(huge_png())
    assert exit_code(rank.main, ["a", "photos", "--checkpoint=run", "--output=a.json"]) == 3
    found = json.loads(pathlib.Path("a.json").read_text())
    assert len(found["images"]) == 8 and found["unusable"] == {"photos/huge.png": "image_too_large"}
    assert "pictures left out: 1 (image_too_large 1)" in capsys.readouterr().err
    assert exit_code(rank.main, ["a", "photos/huge.png", "--checkpoint=run"]) == 3
    assert "no picture can be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint=run"], "a prompt and IMAGE are missing"),
        (["a red one", "--checkpoint=run"], "IMAGE is missing"),
        ([" ", "photos", "--checkpoint=run"], "the prompt ' ' is blank"),
        (["photos/val000.png", "--checkpoint=run"], "the prompt 'photos/val000.png' is a file; the prompt comes first"),
        (["photos", "--checkpoint=run"], "IMAGE is missing"),
        (["a", "none.png", "--checkpoint=run"], "IMAGE=none.png: there is no such file"),
        (["a", "photos"], "--checkpoint=WORKDIR_OR_STEP is missing"),
        (["a", "photos", "--checkpoint=run", "--output=photos"], "--output=photos is a folder"),
        (["a", "photos", "--checkpoint=run", "--top=3"], "unknown option --top"),
    ],
)
def test_what_is_refused(place, monkeypatch, capsys, argv, message):  # noqa: F811
    monkeypatch.setattr(opened_model.OpenedModel, "encoder", lambda self: pytest.fail("the model is loaded"))
    assert exit_code(rank.main, argv) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_is_refused(fake, capsys, monkeypatch):
    monkeypatch.setattr(SavedCheckpoint, "tokenizer", lambda self: NoTokenizer())
    assert exit_code(rank.main, ["a", "photos", "--checkpoint=run"]) == 2
    assert "The model came without its tokenizer" in capsys.readouterr().err
