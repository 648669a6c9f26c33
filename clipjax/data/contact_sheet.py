"""A contact sheet: small pictures of samples in a grid, with their captions under them.

Reading order: `draw_sheet`, `_make_tile` (content), `_draw_tile` (drawing), `wrap`.
"""

import functools
import io
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.data.digests import spread
from clipjax.data.images import Decoder
from clipjax.data.sample import BadSample, Source
from clipjax.runtime.terminal import printable

TILES = 40
"""Samples on a sheet."""

_COLUMNS = 8
_SIDE, _GAP, _MARGIN = 176, 18, 28  # pixels
_MIN_WIDTH = 600
_TITLE, _LINE_HEIGHT, _LINES = 46, 17, 5
_PAPER, _INK, _FAINT, _FRAME, _BACK, _BAD, _BAD_INK = (
    (255, 255, 255), (32, 33, 36), (128, 134, 139), (218, 220, 224), (245, 246, 248), (225, 225, 228), (176, 0, 32),
)  # fmt: skip
_MAX_TEXT = 600  # characters of a caption that are measured


@dataclass(frozen=True, slots=True)
class _Tile:
    """A sample on the sheet: a picture that fits or None, a line about it, wrapped captions, why it is unusable."""

    picture: Any
    note: str
    lines: Sequence[str]
    reason: str


def draw_sheet(source: Source, decoder: Decoder, *, title: str, subtitle: str = "") -> bytes:
    """Draw up to `TILES` samples, spread evenly over a source, as a PNG.

    An unusable sample is a grey tile with the reason on it.

    Args:
        source: samples.
        decoder: of the images.
        title: first line of the sheet.
        subtitle: second line, in grey.
    """
    from PIL import Image, ImageDraw

    tiles = [_make_tile(source, decoder, index) for index in spread(len(source), TILES)]
    rows = [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]
    heights = [_SIDE + 8 + _LINE_HEIGHT * (1 + max(len(tile.lines) for tile in row)) + _GAP for row in rows]
    width = 2 * _MARGIN + max(_MIN_WIDTH, len(rows[0]) * (_SIDE + _GAP) - _GAP)
    sheet = Image.new("RGB", (width, 2 * _MARGIN + _TITLE + sum(heights) - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_title(draw, printable(title), printable(subtitle), width - 2 * _MARGIN)
    top = _MARGIN + _TITLE
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            _draw_tile(sheet, draw, (_MARGIN + column * (_SIDE + _GAP), top), tile)
        top += height
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _make_tile(source: Source, decoder: Decoder, index: int) -> _Tile:
    note = f"#{index}"
    try:
        sample = source[index]
    except BadSample as bad:
        return _Tile(None, note, (), bad.reason)
    note += f"  class {sample.label}" if sample.label >= 0 else ""
    note += f"  classes {', '.join(map(str, sample.labels))}" if sample.labels else ""
    text = " | ".join(printable(caption[:_MAX_TEXT]) for caption in sample.captions[:_LINES])
    lines = wrap(text, font(12), _SIDE, _LINES) if text else ()
    try:
        pixels = decoder(sample.image)
    except BadSample as bad:
        return _Tile(None, note, lines, bad.reason)
    reason = "" if sample.captions or sample.label >= 0 or sample.labels is not None else "missing_caption"
    return _Tile(fit(pixels), f"{note}  {pixels.shape[1]} × {pixels.shape[0]}", lines, reason)


@functools.cache
def font(size: int, *, bold: bool = False) -> Any:
    """Return DejaVu Sans, which matplotlib brings along: it has most alphabets, Pillow's own font has one."""
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def draw_title(draw: Any, title: str, subtitle: str, width: int) -> None:
    """Draw the two lines above a sheet, the second in grey, both cut to a width in pixels."""
    bold, plain = font(17, bold=True), font(13)
    draw.text((_MARGIN, _MARGIN - 6), wrap(title, bold, width, 1)[0], _INK, bold)
    if subtitle:
        draw.text((_MARGIN, _MARGIN + 17), wrap(subtitle, plain, width, 1)[0], _FAINT, plain)


def _draw_tile(sheet: Any, draw: Any, corner: tuple[int, int], tile: _Tile) -> None:
    left, top = corner
    right, bottom = left + _SIDE - 1, top + _SIDE - 1
    draw.rectangle((left, top, right, bottom), fill=_BAD if tile.picture is None else _BACK, outline=_FRAME)
    if tile.picture is not None:
        place = left + (_SIDE - tile.picture.width) // 2, top + (_SIDE - tile.picture.height) // 2
        sheet.paste(tile.picture, place)
    if tile.reason:
        bold = font(13, bold=True)
        lines = wrap(tile.reason.replace("_", " "), bold, _SIDE - 20, 3)
        start = top + _SIDE // 2 - 9 * len(lines)
        draw.rectangle((left, start - 7, right, start + 18 * len(lines) + 5), fill=_BAD)
        for i, line in enumerate(lines):
            draw.text((left + _SIDE // 2, start + 18 * i), line, _BAD_INK, bold, anchor="ma")
    draw.text((left, top + _SIDE + 6), tile.note, _FAINT, font(11))
    for i, line in enumerate(tile.lines):
        draw.text((left, top + _SIDE + 7 + (i + 1) * _LINE_HEIGHT), line, _INK, font(12))


def fit(pixels: np.ndarray) -> Any:
    """Return a picture that fits into a tile, as large as it can be but not blown up more than four times."""
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = min((_SIDE - 2) / max(height, width), 4.0)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(pixels)
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC, reducing_gap=3.0)


def wrap(text: str, font: Any, width: int, most: int) -> list[str]:
    """Break a text into at most so many lines of a width in pixels; an ellipsis stands for the rest."""
    lines, rest = [], text.strip()
    while rest and len(lines) < most:
        end = _fitting(rest, font, width)
        if end < len(rest):
            if len(lines) + 1 == most:
                return [*lines, rest[: _fitting(rest, font, width - font.getlength("…"))].rstrip() + "…"]
            space = rest.rfind(" ", 0, end + 1)
            end = space if space > 0 else end
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines or [""]


def _fitting(text: str, font: Any, width: float) -> int:
    """Return how many characters fit, at least one."""
    low, high = 1, min(len(text), 2 * int(width))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
