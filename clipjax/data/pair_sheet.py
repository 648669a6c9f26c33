"""A sheet of near-duplicates: pairs of pictures side by side, with their keys and the bits in which they differ.

Reading order: `choose_examples`, `draw_pairs`, `_draw_pair`.
"""

import io
from collections.abc import Sequence
from typing import Any

from clipjax.config import DataConfig
from clipjax.data.contact_sheet import draw_title, fit, font, wrap
from clipjax.data.duplicates import Example
from clipjax.data.images import Decoder, make_decoder
from clipjax.data.sample import BadSample, Source, UnreadableData
from clipjax.runtime.terminal import printable

PAIRS = 24
"""Pairs on a sheet."""

_COLUMNS = 3
_SIDE, _INNER, _GAP, _MARGIN, _TITLE, _LINE_HEIGHT = 176, 6, 30, 28, 46, 16  # pixels
_PAPER, _INK, _FAINT, _FRAME, _BACK, _LEAK = (
    (255, 255, 255), (32, 33, 36), (128, 134, 139), (218, 220, 224), (245, 246, 248), (176, 0, 32),
)  # fmt: skip
_MAX_KEY = 400  # characters that are measured


def choose_examples(examples: Sequence[Example]) -> list[Example]:
    """Return up to `PAIRS` pairs, leaks first, with as many of each distance as there is room for.

    The pairs that differ most tell whether the distance is too large; those of distance 0 say little.
    """
    kinds: dict[tuple[bool, int], list[Example]] = {}
    for example in examples:
        kinds.setdefault((example.against < 0, -example.distance), []).append(example)
    chosen: list[Example] = []
    turn = 0
    while len(chosen) < PAIRS and any(turn < len(kind) for kind in kinds.values()):
        chosen += [kinds[name][turn] for name in sorted(kinds) if turn < len(kinds[name])]
        turn += 1
    return sorted(chosen[:PAIRS], key=lambda example: (example.against < 0, -example.distance, example.sample))


def draw_pairs(
    source: Source, against: Sequence[Source], examples: Sequence[Example], *, title: str, subtitle: str
) -> bytes:
    """Draw pairs as a PNG; a leaked sample is on the left, the one of the evaluation set on the right.

    Args:
        source: the samples.
        against: evaluation sets.
        examples: pairs to draw.
        title: first line of the sheet.
        subtitle: second line, in grey.
    """
    from PIL import Image, ImageDraw

    height = _SIDE + 6 + 3 * _LINE_HEIGHT + _GAP
    width = 2 * _MARGIN + _COLUMNS * (2 * _SIDE + _INNER + _GAP) - _GAP
    rows = max(1, -(-len(examples) // _COLUMNS))
    sheet = Image.new("RGB", (width, 2 * _MARGIN + _TITLE + rows * height - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_title(draw, printable(title), printable(subtitle), width - 2 * _MARGIN)
    decoder = make_decoder(DataConfig())
    for place, example in enumerate(examples):
        row, column = divmod(place, _COLUMNS)
        corner = _MARGIN + column * (2 * _SIDE + _INNER + _GAP), _MARGIN + _TITLE + row * height
        other = source if example.against < 0 else against[example.against]
        _draw_picture(sheet, draw, corner, (source, example.sample, decoder))
        _draw_picture(sheet, draw, (corner[0] + _SIDE + _INNER, corner[1]), (other, example.other, decoder))
        note, ink = (f"{example.distance} bits apart", _FAINT)
        if example.against >= 0:
            note, ink = f"leak: {note}; right: evaluation set {example.against + 1}", _LEAK
        draw.text((corner[0], corner[1] + _SIDE + 6), note, ink, font(11))
    if not examples:
        draw.text((_MARGIN, _MARGIN + _TITLE), "no near-duplicates", _INK, font(13))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _draw_picture(sheet: Any, draw: Any, corner: tuple[int, int], sample: tuple[Source, int, Decoder]) -> None:
    (left, top), (source, index, decoder) = corner, sample
    draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill=_BACK, outline=_FRAME)
    try:
        read = source[index]
        picture, key = fit(decoder(read.image)), read.key
    except (BadSample, UnreadableData) as error:  # it has been written anew since
        picture, key = None, str(error)
    if picture is not None:
        sheet.paste(picture, (left + (_SIDE - picture.width) // 2, top + (_SIDE - picture.height) // 2))
    for number, line in enumerate(wrap(printable(key[:_MAX_KEY]), font(12), _SIDE, 2)):
        draw.text((left, top + _SIDE + 7 + (number + 1) * _LINE_HEIGHT), line, _INK, font(12))
