"""Hostile inputs from a fixed seed, and those that once went wrong (`REGRESSIONS`); `make chaos` reads many more."""

import pytest

from tests.faults.fuzz import FUZZERS, fuzz

REGRESSIONS: dict[str, tuple[int, ...]] = {}
"""Seeds by fuzzer of inputs that broke an earlier version."""


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it then reads
@pytest.mark.parametrize("name", FUZZERS)
def test_hostile_inputs_give_what_is_promised_and_nothing_else(name):
    found = fuzz(name, first=0, count=300)
    for seed in REGRESSIONS.get(name, ()):
        found.wrong += fuzz(name, first=seed, count=1).wrong
    assert not found.wrong
    assert len(found.outcomes) > 1, "the inputs are not varied"
