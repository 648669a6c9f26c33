"""A look at a source: counts by reason, quantiles, and the contact sheet."""

import io

import numpy as np
import pytest
from PIL import Image

from clipjax.data.contact_sheet import TILES, draw_sheet, font, wrap
from clipjax.data.images import Decoder
from clipjax.data.sources import ArraySource
from clipjax.data.survey import survey

pytestmark = pytest.mark.newest

DECODER = Decoder(10_000)


def png(height: int, width: int, value: int = 200) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (value, 20, 30)).save(stream, "PNG")
    return stream.getvalue()


def mixed() -> ArraySource:
    """Six good samples of heights 10 to 60, and one of each of four faults."""
    images = [png(10 * i, 20 * i) for i in range(1, 7)] + [png(9, 9)[:-30], b"%PDF-1.7", png(200, 200), png(9, 9)]
    captions = [("x" * i,) for i in range(1, 7)] + ["cut", "document", "large", ()]
    return ArraySource(images, captions)


def test_survey():
    found = survey(mixed(), DECODER)
    assert [look.index for look in found.looks] == list(range(10))
    assert found.reasons() == {"corrupt_image": 1, "unsupported_format": 1, "image_too_large": 1, "missing_caption": 1}
    assert [look.size for look in found.looks[:6]] == [(20 * i, 10 * i) for i in range(1, 7)]
    assert found.looks[7].captions == ("document",)
    lines = found.describe()
    assert lines[0] == "looked at 10 of them, spread evenly; 6 are usable"
    numbers = {line[2:26].strip(): line[26:].strip() for line in lines[1:]}
    assert numbers["width"] == "min 20, 5 % 20, median 60, 95 % 120, max 120"  # values that are there
    assert numbers["height"].startswith("min 10,") and numbers["height"].endswith("max 60")
    assert numbers["characters of a caption"].endswith("max 6")
    assert numbers["unusable"] == "corrupt_image 1, unsupported_format 1, image_too_large 1, missing_caption 1"


def test_survey_of_good_samples_has_no_word_of_faults():
    found = survey(ArraySource([png(9, 9)] * 3, ["a"] * 3), DECODER)
    assert found.reasons() == {} and not any("unusable" in line for line in found.describe())


def test_a_class_stands_for_a_caption():
    found = survey(ArraySource([png(9, 9)] * 3, [(), (), ()], labels=[4, 9, -1]), DECODER)
    assert [look.reason for look in found.looks] == ["", "", "missing_caption"]
    assert any(" ".join(line.split()) == "classes 2 seen, from 4 to 9" for line in found.describe())


def test_survey_is_spread_over_the_source():
    found = survey(ArraySource([png(1, 1)] * 105, ["a"] * 105), DECODER, most=30)
    assert [look.index for look in found.looks] == [*range(10), *range(48, 58), *range(95, 105)]
    for size in (1, 9, 10, 11, 29, 30, 31, 33):
        places = [look.index for look in survey(ArraySource([b"x"] * size, ["a"] * size), DECODER, most=30).looks]
        assert len(places) == len(set(places)) == min(size, 30) and places[0] == 0 and places[-1] == size - 1


def test_survey_of_nothing_usable():
    assert survey(ArraySource([b"x"], ["a"]), DECODER).describe() == [
        "looked at 1 of them, spread evenly; 0 are usable",
        "  unusable                 corrupt_image 1",
    ]


def sheet_of(source, **options) -> np.ndarray:
    data = draw_sheet(source, DECODER, title="a title", **options)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def has_colour(sheet: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((sheet == colour).all(axis=2).sum())


def test_sheet():
    sheet = sheet_of(mixed(), subtitle="more")
    assert sheet.shape[1] == 2 * 28 + 8 * 176 + 7 * 18  # eight tiles in a row
    assert has_colour(sheet, (200, 20, 30)) > 8000  # the pictures
    assert has_colour(sheet, (225, 225, 228)) > 3 * 176 * 120  # three grey tiles, with their reason on them
    assert has_colour(sheet, (176, 0, 32)) > 50
    good = sheet_of(ArraySource([png(9, 9)] * 3, ["a"] * 3))
    assert has_colour(good, (225, 225, 228)) == has_colour(good, (176, 0, 32)) == 0


def test_a_large_source_has_a_sheet_of_some():
    sheet = sheet_of(ArraySource([png(30, 40)] * 500, ["a"] * 500))
    assert has_colour(sheet, (200, 20, 30)) == TILES * has_colour(
        sheet_of(ArraySource([png(30, 40)], ["a"])), (200, 20, 30)
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 9999), (9999, 1)])
def test_odd_shapes_have_tiles(shape):
    assert has_colour(sheet_of(ArraySource([png(*shape)], ["a"])), (200, 20, 30)) > 0


def test_texts_are_wrapped():
    plain = font(12)
    assert wrap("a bird", plain, 176, 5) == ["a bird"]
    assert wrap("", plain, 176, 5) == [""]
    lines = wrap("word " * 200, plain, 176, 5)
    assert len(lines) == 5 and lines[-1].endswith("…") and all(plain.getlength(line) <= 176 for line in lines)
    assert all(not line.startswith(" ") for line in lines)
    lines = wrap("x" * 3000, plain, 176, 3)
    assert len(lines) == 3 and all(plain.getlength(line) <= 176 for line in lines)
    text = "it is all here, word by word, in several lines of the sheet"
    assert " ".join(wrap(text, plain, 176, 9)) == text


def test_captions_of_others_cannot_break_a_sheet():
    captions = ["\x1b[2J\u202e\n\t\0", "\U0001f600" * 500, ("a",) * 50, "x" * 60_000]
    assert sheet_of(ArraySource([png(9, 9)] * 4, captions)).shape[2] == 3
