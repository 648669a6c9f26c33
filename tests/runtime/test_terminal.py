"""Text for people."""

import numpy as np
import pytest

from clipjax.runtime.terminal import format_duration, format_table


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3661, "1:01:01"), (100 * 3600, "100:00:00"), (np.inf, "?")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_table_aligns_numbers_right():
    assert format_table([["a", "1.5", "2%"], ["long", "10", ""], ["c", "-", "1,000"]], ["name", "x", "share"]) == (
        "name    x  share\n----  ---  -----\na     1.5     2%\nlong   10\nc       -  1,000"
    )


def test_empty_table_and_ragged_rows():
    assert format_table([], ["a", "bb"]) == "a  bb\n-  --"
    with pytest.raises(ValueError, match="zip"):
        format_table([["1"]], ["a", "b"])


def test_wide_characters_take_their_two_columns():
    assert format_table([["\u5199\u771f", "1"], ["photo", "12"]], ["name", "n"]) == (
        "name    n\n-----  --\n\u5199\u771f    1\nphoto  12"
    )


def test_cells_are_never_cut_wrapped_or_read_as_markup(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    cell = "[bold]" + "x" * 500
    assert format_table([[cell, "1"]], ["path", "n"]).splitlines()[2] == f"{cell}  1"
