"""`clipjax search`: the order of what is found, and the checkpoint that made it."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import clipjax
from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.cli import embed, opened_model, search
from clipjax.data.tokenizers.protocol import NoTokenizer
from tests.cli.opened_models import huge_png, place  # noqa: F401
from tests.cli.test_embed import FakeEncoder
from tests.commands import exit_code
from tests.golden.test_checkpoint import make_pairs

MADE = ["val.tar", "--checkpoint=run", "--output=out", "--batch_size=8", "--samples_per_part=8"]


@pytest.fixture
def fake(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr(opened_model.OpenedModel, "encoder", lambda self: FakeEncoder())


@pytest.fixture
def out(fake, place):  # noqa: F811
    """The folder of the images of `val.tar`, by the fake encoder."""
    assert exit_code(embed.main, MADE) == 0
    return place / "out"


@pytest.mark.heavy
def test_a_query_finds_what_the_library_finds(place, capsys):  # noqa: F811
    assert exit_code(embed.main, [*MADE, "--what=both"]) == 0
    model, pairs = clipjax.load("run"), list(make_pairs("val", 32))
    images = model.encode_image([pixels for _, pixels, _, _ in pairs]).astype(np.float64)
    texts = model.encode_text([caption for _, _, caption, _ in pairs]).astype(np.float64)
    assert exit_code(search.main, ["out", "blue over red", "--top=32", "--output=a.json"]) == 0
    found = json.loads(pathlib.Path("a.json").read_text())
    exact = images @ model.encode_text("blue over red")[0].astype(np.float64)
    assert [each["similarity"] for each in found["found"]] == pytest.approx(sorted(exact, reverse=True), abs=1e-5)
    assert [exact[each["index"]] for each in found["found"]] == pytest.approx(sorted(exact, reverse=True), abs=1e-5)
    assert {each["index"] for each in found["found"]} == set(range(32))
    assert (found["query"], found["among"], found["step"]) == ("blue over red", "images", 9)
    best = found["found"][0]
    assert best["id"] == pairs[best["index"]][0] and best["caption"] == pairs[best["index"]][2]
    shown = capsys.readouterr().out
    assert shown.splitlines()[-34].split()[:3] == ["1", f"{best['similarity']:.4f}", best["id"]]
    assert "the best 32 of 32 images" in shown
    assert exit_code(search.main, ["out", "--image=photos/val003.png", "--among=texts", "--output=b.json"]) == 0
    found = json.loads(pathlib.Path("b.json").read_text())
    exact = texts @ images[3]
    assert [each["similarity"] for each in found["found"]] == pytest.approx(sorted(exact)[:-11:-1], abs=1e-5)
    assert found["image"] == "photos/val003.png" and "query" not in found


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_a_picture_finds_itself_first(fake, place, capsys, form):  # noqa: F811
    assert exit_code(embed.main, [*MADE, f"--format={form}"]) == 0
    capsys.readouterr()
    assert exit_code(search.main, ["out", "--image=photos/val005.png", "--top=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["1", "1.0000", "val005"]
    assert len(lines) == 5 and lines[-1] == "the best 2 of 32 images"
    assert exit_code(search.main, ["out", "x", "--top=100"]) == 0
    assert "the best 32 of 32 images" in capsys.readouterr().out


def test_the_checkpoint_is_that_of_the_folder_wherever_it_lies(out, place, capsys, monkeypatch):  # noqa: F811
    shutil.move("run", "moved")
    assert exit_code(search.main, ["out", "x"]) == 2
    told = capsys.readouterr().err
    assert f"those of the checkpoint {place}/run/checkpoints/9, which is not there; give its place" in told
    assert exit_code(search.main, ["out", "x", "--checkpoint=moved"]) == 0
    monkeypatch.setattr(search, "digest_of", lambda saved: "another")
    assert exit_code(search.main, ["out", "x", "--checkpoint=moved"]) == 2
    assert "--checkpoint=moved (step 9) is not the one that made the embeddings" in capsys.readouterr().err


def test_a_picture_that_cannot_be_used(out, place, capsys):  # noqa: F811
    for name, content, reason in (("a.png", b"no picture", "corrupt_image"), ("b.png", huge_png(), "image_too_large")):
        (place / name).write_bytes(content)
        assert exit_code(search.main, ["out", f"--image={name}"]) == 3
        assert f"{name}: unusable ({reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "DIR is missing"),
        (["out"], "a query is missing: give a text behind the folder, or --image=FILE"),
        (["out", " "], "the query ' ' is blank"),
        (["out", "a", "red", "circle"], "3 queries are given; put the words of one into quotes: 'a red circle'"),
        (["out", "a", "--image=photos/val000.png"], "the query 'a' and --image=photos/val000.png: give one of them"),
        (["out", "--image=none.png"], "--image=none.png: there is no such file"),
        (["out", "--image=photos"], "--image=photos stands for 8 pictures; name one"),
        (["photos", "a"], "photos is no folder of embeddings: it has no manifest.json"),
        (["out", "a", "--among=texts"], "--among=texts: the folder has images only; clipjax embed --what=texts"),
        (["out", "a", "--top=0"], "--top=0 must be a whole number of at least 1"),
        (["out", "a", "--checkpoint=photos"], "photos"),
        (["out", "a", "--output=photos"], "--output=photos is a folder"),
        (["out", "a", "-x"], "unknown option -x"),
    ],
)
def test_what_is_refused(out, capsys, argv, message):
    assert exit_code(search.main, argv) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_damaged_or_has_no_row(out, place, capsys, monkeypatch):  # noqa: F811
    part = out / "images" / "part-00002.parquet"
    part.write_bytes(b"x" * part.stat().st_size)
    assert exit_code(search.main, ["out", "x"]) == 3
    assert "part-00002.parquet is damaged" in capsys.readouterr().err
    part.unlink()
    assert exit_code(search.main, ["out", "x"]) == 2
    assert "part-00002.parquet is missing; the same clipjax embed makes it anew" in capsys.readouterr().err
    assert exit_code(embed.main, [*MADE[:2], "--output=npy", "--format=npy"]) == 0
    part = place / "npy" / "images" / "part-00000.parquet"
    part.write_bytes(b"x" * part.stat().st_size)
    assert exit_code(search.main, ["npy", "x"]) == 3
    assert "part-00000.parquet is damaged" in capsys.readouterr().err
    rows = np.load("npy/images/part-00000.npy", mmap_mode="r+")
    rows[17, 3] = np.nan
    rows.flush()
    assert exit_code(search.main, ["npy", "x"]) == 3
    assert "embeddings are not finite: their files are damaged" in capsys.readouterr().err
    for path in (place / "photos").iterdir():
        path.write_bytes(b"no picture")
    assert exit_code(embed.main, ["photos", "--checkpoint=run", "--output=none"]) == 3
    assert exit_code(search.main, ["none", "x"]) == 2
    assert "the folder has no images" in capsys.readouterr().err


def test_a_picture_needs_no_tokenizer_and_a_query_does(out, capsys, monkeypatch):
    monkeypatch.setattr(SavedCheckpoint, "tokenizer", lambda self: NoTokenizer())
    assert exit_code(search.main, ["out", "--image=photos/val005.png"]) == 0
    assert exit_code(search.main, ["out", "x"]) == 2
    assert "The model came without its tokenizer" in capsys.readouterr().err
