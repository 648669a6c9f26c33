"""Hostile inputs: some from a fixed seed, and those of `corpus/`, made by hand; `make chaos` reads many more."""

import json
import pathlib

import pytest

from clipjax.data.sample import BadSample
from tests.faults.fuzz import FUZZERS, fuzz, read_json, read_picture, read_tar

REGRESSIONS: dict[str, tuple[int, ...]] = {}
"""Seeds by fuzzer of inputs that broke an earlier version."""
CORPUS = pathlib.Path(__file__).parent / "corpus"
OUTCOMES: dict[str, str] = json.loads((CORPUS / "outcomes.json").read_text())
"""What reading each file of the corpus gives: "read", "refused: " with words of the reason, or the sample left out."""
READERS = {"tar": read_tar, "picture": read_picture, "json": read_json}


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it then reads
@pytest.mark.parametrize("name", FUZZERS)
def test_hostile_inputs_give_what_is_promised_and_nothing_else(name):
    found = fuzz(name, first=0, count=300)
    for seed in REGRESSIONS.get(name, ()):
        found.wrong += fuzz(name, first=seed, count=1).wrong
    assert not found.wrong
    assert len(found.outcomes) > 1, "the inputs are not varied"


def test_every_file_of_the_corpus_has_its_outcome():
    files = {path.relative_to(CORPUS).as_posix() for path in CORPUS.glob("*/*")}
    assert files == OUTCOMES.keys() and len(files) > 60


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OUTCOMES)
def test_a_file_of_the_corpus_has_the_outcome_that_is_promised(tmp_path, name):
    content, expected = (CORPUS / name).read_bytes(), OUTCOMES[name]
    (tmp_path / "inside").mkdir()
    try:
        outcome = READERS[name.partition("/")[0]](content, tmp_path / "inside")
    except ValueError as error:
        outcome = f"refused: {error.reason if isinstance(error, BadSample) else error}"
        assert expected.startswith("refused: ") and expected.removeprefix("refused: ") in outcome, outcome
    else:
        assert outcome == expected
    assert [path.name for path in tmp_path.iterdir()] == ["inside"], "nothing is written beside"
