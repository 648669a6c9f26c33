"""Several checkpoints: compared, and as one."""

import csv
import json
import shutil

import pytest

from clipjax.cli import arguments
from clipjax.cli import eval as evaluate
from tests.cli.opened_models import place  # noqa: F401
from tests.commands import exit_code
from tests.golden.test_checkpoint import FOLDER


@pytest.fixture
def runs(place):  # noqa: F811
    """The checkpoint `run`, its `copy`, and `old` with other weights."""
    shutil.copytree(place / "run", place / "copy")
    shutil.copytree(FOLDER / "checkpoint_before_layout", place / "old")
    return place


def run(*options: str) -> int:
    return exit_code(evaluate.main, list(options))


@pytest.mark.heavy
def test_each_is_measured_and_copies_act_as_one_of_them(runs, capsys):
    assert run("--checkpoint=run", "--output=one.json") == 0
    one = json.loads((runs / "one.json").read_text())["tasks"]
    options = ["--ensemble=logits", "--output=r.json", "--csv=r.csv", "--report=page"]
    assert run("--checkpoint=run,copy,old", *options) == 0
    shown = capsys.readouterr().out
    found = json.loads((runs / "r.json").read_text())["checkpoints"]
    steps = [f"{name}/checkpoints/9" for name in ("run", "copy", "old")]
    assert [each["checkpoint"] for each in found] == [*steps, "mean of logits"]
    assert found[0]["tasks"] == found[1]["tasks"] == one and found[2]["tasks"].keys() == one.keys()
    legend = [f"{letter}: {step}" for letter, step in zip("ABC", steps, strict=True)]
    assert {*legend, "D: mean of logits"} <= set(shown.splitlines())
    with (runs / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["pretrained"] for row in rows] == [name for each in found for name in [each["checkpoint"]] * 2]
    assert not list(runs.glob("*.unfinished"))
    pages = [(runs / "page" / name).read_text() for name in ("index.html", "1.html", "2.html", "3.html")]
    for number, page in enumerate(pages):
        assert all(f'<a href="{name}">' in page for name in ("index.html", "1.html", "2.html", "3.html"))
        assert ("samples" in page.lower()) and (f"<dd>{(*steps, 'mean of logits')[number]}" in page)
    for kind in ("logits", "embeddings"):
        assert run("--checkpoint=run,copy", f"--ensemble={kind}", "--output=same.json") == 0
        same = json.loads((runs / "same.json").read_text())["checkpoints"]
        # Two equal models are one: not one image changes its place, as float32 halves and adds them exactly.
        assert same[2]["tasks"] == one


def test_what_cannot_be_compared_is_refused(runs):
    for options, message in (
        (["--checkpoint=run", "--ensemble=logits"], "--ensemble=logits needs several checkpoints: --checkpoint=A,B"),
        (["--checkpoint=run,run"], "--checkpoint=run,run names run twice"),
        (["--checkpoint=run,"], "--checkpoint"),
        (["--checkpoint=run,gone"], "gone"),
        (["--checkpoint=run,copy", "--ensemble=sum"], "--ensemble=sum"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            evaluate._open(options)


def test_a_comma_in_the_name_of_what_is_there_is_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert [str(each) for each in arguments.places("a,b")] == ["a,b"]
    assert [str(each) for each in arguments.places("a,c")] == ["a", "c"]
    assert arguments.places("gs://b/x,gs://b/y") == ["gs://b/x", "gs://b/y"]
