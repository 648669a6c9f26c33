"""A scene as pixels: supersampled polygons over a shaded, grainy background. Axes: h height, w width, c channels."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipjax.data.scenes.world import Item, Scene

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Points = Sequence[tuple[float, float]]

COLOR_RGB = {
    "red": (218, 38, 40),
    "orange": (246, 138, 24),
    "yellow": (250, 218, 40),
    "green": (44, 156, 62),
    "cyan": (40, 200, 216),
    "blue": (36, 76, 214),
    "purple": (128, 48, 178),
    "pink": (246, 120, 190),
    "brown": (122, 74, 38),
    "black": (28, 28, 34),
}
BACKGROUND_RGB = {
    "white": (242, 242, 242),
    "grey": (188, 190, 194),
    "beige": (232, 218, 190),
    "mint": (196, 232, 212),
    "lavender": (214, 206, 238),
    "charcoal": (66, 70, 78),
}
_PALE_MARKS, _DARK_MARKS = (250, 250, 250), (70, 66, 60)
_MARK_STRENGTH = 0.4  # share of the marks' own tone; the rest is the item's, so that its silhouette stays in one colour
_COLORS_WITH_DARK_MARKS = ("yellow", "cyan")  # white marks would hardly show on them
_OUTLINE = 0.14  # width of an outline, in radii of the item
_SUPERSAMPLING = 3
_JPEG_QUALITY = 88


def draw(scene: Scene, size: int, *, outlines: bool = False) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: scene to draw.
        size: side of the picture in pixels.
        outlines: draw the items' contours alone, without texture.

    Returns:
        uint8 [size, size, 3].
    """
    picture = _draw_background(scene, size)
    for item in scene.items:
        _draw_item(picture, item, size, outlines)
    return np.ascontiguousarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def encode(picture: np.ndarray) -> bytes:
    """Encode uint8 [h, w, 3] as JPEG, with full colour resolution: the colour of a small shape is its meaning."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _draw_background(scene: Scene, size: int) -> np.ndarray:
    """Return float32 [3, size, size]: a shaded tint, grain, faint lines and spots. Channels first blends faster."""
    rng = np.random.Generator(np.random.Philox(scene.noise_seed))
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = ramp[None, :] * scene.shading[0] + ramp[:, None] * scene.shading[1]
    light += scene.noise * rng.standard_normal((size, size), dtype=np.float32)
    light += (20 * rng.random() - 10) * _draw_clutter(rng, size)
    return light + _planes(BACKGROUND_RGB[scene.background]) + _planes(scene.tint)


def _draw_clutter(rng: np.random.Generator, size: int) -> np.ndarray:
    image, pen = _new_mask(size)
    side = size * _SUPERSAMPLING
    for x, y, dx, dy, width in (rng.random((int(rng.integers(6)), 5)) * side).tolist():
        pen.line([(x, y), (dx, dy)], fill=255, width=1 + int(width * 0.03))
        pen.ellipse(_box(dx, dy, 4 + width * 0.05), fill=255)
    return _shrink(image)


def _draw_item(picture: np.ndarray, item: Item, size: int, outlines: bool) -> None:
    """Paint an item over `picture` in place."""
    rgb = _planes(COLOR_RGB[item.color]) + _planes(item.tint)
    contours = [_place(points, item, size) for points in CONTOURS[item.shape]]
    image, pen = _new_mask(size)
    for contour, fill in zip(contours, (255, 0), strict=False):  # the second contour is the hole
        pen.polygon(contour, fill=fill)
    if outlines:
        image = _hollow(image, contours, round(_OUTLINE * item.radius * size * _SUPERSAMPLING))
    coverage = _shrink(image)
    paint = rgb
    if item.texture != "solid" and not outlines:
        marks = _planes(_DARK_MARKS if item.color in _COLORS_WITH_DARK_MARKS else _PALE_MARKS)
        paint = rgb + _MARK_STRENGTH * (marks - rgb) * _draw_marks(item, contours, size)
    picture += (paint - picture) * coverage


def _hollow(image: "Image.Image", contours: list[list[tuple[float, float]]], width: int) -> "Image.Image":
    """Return a mask without what lies farther inside its contours than a width, in supersampled pixels."""
    from PIL import ImageChops, ImageDraw

    inside = image.copy()
    pen = ImageDraw.Draw(inside)
    for contour in contours:  # half of the line lies inside
        pen.line([*contour, *contour[:2]], fill=0, width=2 * max(width, 1), joint="curve")
    return ImageChops.subtract(image, inside)


def _draw_marks(item: Item, contours: list[list[tuple[float, float]]], size: int) -> np.ndarray:
    """Return the share of each pixel, 0..1, that the texture's marks cover; the rim keeps the item's colour."""
    image, pen = _new_mask(size)
    for polygon in MARKS[item.texture]:
        pen.polygon(_place(polygon, item, size), fill=255)
    rim = round(0.22 * item.radius * size * _SUPERSAMPLING)  # half of it lies inside the contour
    for contour in contours:
        pen.line([*contour, contour[0]], fill=0, width=rim)
    return _shrink(image)


def _place(points: Points, item: Item, size: int) -> list[tuple[float, float]]:
    """Turn, scale and move points from an item's own frame (its radius is 1) to the supersampled picture."""
    side = size * _SUPERSAMPLING
    scale = item.radius * side
    cos, sin = scale * math.cos(math.radians(item.angle)), scale * math.sin(math.radians(item.angle))
    left, top = item.x * side, item.y * side
    return [(left + cos * x - sin * y, top + sin * x + cos * y) for x, y in points]


def _new_mask(size: int) -> tuple["Image.Image", "ImageDraw.ImageDraw"]:
    from PIL import Image, ImageDraw

    image = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING))
    return image, ImageDraw.Draw(image)


def _shrink(image: Any) -> np.ndarray:
    """Average a supersampled mask to float32 [size, size] in 0..1."""
    return np.asarray(image.reduce(_SUPERSAMPLING), np.float32) / 255


def _planes(rgb: tuple[float, float, float]) -> np.ndarray:
    """Return a colour as float32 [3, 1, 1]."""
    return np.array(rgb, np.float32)[:, None, None]


def _box(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return (x - radius, y - radius, x + radius, y + radius)


def _arc(radius: float, first: float, last: float, count: int, x: float = 0.0) -> list[tuple[float, float]]:
    """Return `count` points of a circle round (x, 0), from angle `first` to `last` in degrees."""
    angles = np.radians(np.linspace(first, last, count))
    return [(x + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _star() -> list[tuple[float, float]]:
    outer, inner = _arc(1.12, -90, 198, 5), _arc(0.44, -54, 234, 5)
    return [point for both in zip(outer, inner, strict=True) for point in both]


def _heart() -> list[tuple[float, float]]:
    points = []
    for t in np.linspace(0, 2 * math.pi, 40, endpoint=False):
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(height + 2.5) / 16))
    return points


def _cross(length: float = 1.02, width: float = 0.3) -> list[tuple[float, float]]:
    arm = [(width, -width), (length, -width), (length, width)]
    quarter_turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    return [(cos * x - sin * y, sin * x + cos * y) for cos, sin in quarter_turns for x, y in arm]


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _grid(step: float, count: int) -> list[tuple[int, int, float, float]]:
    """Return row, column, x and y of the nodes of a centred grid with `2 * count + 1` rows."""
    line = range(-count, count + 1)
    return [(row, column, column * step, row * step) for row in line for column in line]


CONTOURS: dict[str, tuple[Points, ...]] = {
    "circle": (_arc(0.95, 0, 352, 45),),
    "square": (_rectangle(-0.82, -0.82, 0.82, 0.82),),
    "triangle": (_arc(1.14, -90, 150, 3),),
    "star": (_star(),),
    "heart": (_heart(),),
    "cross": (_cross(),),
    "ring": (_arc(1.0, 0, 352, 45), _arc(0.52, 0, 352, 45)),
    # The outer arc, then back along a second circle through the same two tips.
    "crescent": (_arc(1.05, 48, 312, 34) + _arc(0.81, 286, 74, 28, x=0.48),),
}
"""Outline of each shape, then its hole if it has one, in units of the item's radius."""

MARKS: dict[str, tuple[Points, ...]] = {
    "striped": tuple(_rectangle(-1.2, y - 0.1, 1.2, y + 0.1) for y in np.linspace(-0.88, 0.88, 5).tolist()),
    "dotted": tuple([(x + dx, y + dy) for dx, dy in _arc(0.13, 0, 315, 8)] for _, _, x, y in _grid(0.44, 2)),
    "checkered": tuple(
        _rectangle(x - 0.15, y - 0.15, x + 0.15, y + 0.15) for row, column, x, y in _grid(0.3, 3) if (row + column) % 2
    ),
}
"""Polygons of each texture's marks, in units of the item's radius."""
