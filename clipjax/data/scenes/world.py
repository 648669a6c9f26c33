"""The contents of a scene, the combinations that are held out, and the draw of sample `i` of a split.

Lengths and positions are shares of the picture's side, with x to the right and y down; angles are in degrees.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "grey", "beige", "mint", "lavender", "charcoal")
DARK_COLORS = ("blue", "purple", "brown", "black")  # would drown in a charcoal background

SPLITS = ("train", "val", "unseen")

HELD_OUT = frozenset(
    {
        ("red", "circle"),
        ("red", "heart"),
        ("orange", "star"),
        ("yellow", "ring"),
        ("green", "square"),
        ("cyan", "heart"),
        ("blue", "crescent"),
        ("blue", "triangle"),
        ("purple", "triangle"),
        ("pink", "cross"),
        ("brown", "circle"),
        ("black", "star"),
    }
)
"""Combinations that occur in `unseen` only: one or two of every colour, one or two of every shape."""

COMBINATIONS = tuple((color, shape) for color in COLORS for shape in SHAPES)
"""All colours with all shapes; the position in this table is the class id, the `label` of a picture with one item."""

PLACES = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "middle": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}

# Shares of pictures that show two items, and of those whose items have one colour. Two colours nearly identify a
# picture, so that a contrastive loss hardly asks for shapes: with more, or more colourful, pairs they come much later.
PAIR_SHARE = {"train": 0.35, "val": 0.35, "unseen": 0.25}
_SAME_COLOR_SHARE = 0.5
# Radii by number of items: two large ones must still stand apart, yet every large item is larger than every small one.
_RADIUS = {
    1: {"small": (0.185, 0.205), "large": (0.28, 0.32)},
    2: {"small": (0.17, 0.19), "large": (0.22, 0.235)},
}
# How far an item turns, how often it is plain and (in `drawing`) how faint its marks are decide how long a small
# transformer needs to tell the shapes apart; with free rotation and bold marks it needs several times as long.
_LARGEST_ANGLE = 15.0
_TEXTURE_DRAWS = ("solid", "solid", *TEXTURES)
_PLACE_STEP, _PLACE_JITTER = 0.13, 0.02
_PAIR_STEP, _PAIR_JITTER = 0.26, 0.015  # along the line that joins the two
_PAIR_SIDESTEP = 0.07  # across it; far less than the distance, so that the relation is plain to see


@dataclass(frozen=True, slots=True)
class Item:
    """One coloured shape."""

    color: str
    shape: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[float, float, float]  # added to the colour's red, green and blue, each of 255


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: an item at a `place`, or two of which the first stands in `relation` to the second."""

    items: tuple[Item, ...]
    place: str | None
    relation: str | None
    background: str
    tint: tuple[float, float, float]  # of the background, as of an item
    shading: tuple[float, float]  # change of brightness, of 255, from left to right and from top to bottom
    noise: float  # standard deviation of the grain, of 255
    noise_seed: int  # of grain and clutter


def sample_stream(seed: int, split: str, index: int) -> np.random.Generator:
    """Return the random stream that everything about sample `index` of `split` is drawn from.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, SPLITS.index(split), index))))


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draw a scene. `train` and `val` hold no held-out combination, every scene of `unseen` at least one."""
    is_pair = rng.random() < PAIR_SHARE[split]
    combinations = _draw_combinations(rng, split, 2 if is_pair else 1)
    items, place, relation = _arrange_pair(rng, combinations) if is_pair else _arrange_single(rng, combinations)
    backgrounds = BACKGROUNDS
    if any(item.color in DARK_COLORS for item in items):
        backgrounds = tuple(name for name in BACKGROUNDS if name != "charcoal")
    return Scene(
        items=items,
        place=place,
        relation=relation,
        background=pick(rng, backgrounds),
        tint=_draw_tint(rng),
        shading=(rng.uniform(-15, 15), rng.uniform(-15, 15)),
        noise=rng.uniform(0, 5),
        noise_seed=int(rng.integers(2**32)),
    )


def class_id(scene: Scene) -> int:
    """Return the class of a scene with one item, and -1 for a scene with two, which has no single class."""
    if len(scene.items) != 1:
        return -1
    return COMBINATIONS.index((scene.items[0].color, scene.items[0].shape))


def pick(rng: np.random.Generator, choices: tuple[T, ...]) -> T:
    """Return one of `choices`, each equally likely (many times faster than `rng.choice`)."""
    return choices[int(rng.random() * len(choices))]


def _draw_combinations(rng: np.random.Generator, split: str, count: int) -> list[tuple[str, str]]:
    """Draw `count` different combinations; in `unseen` the first is a held-out one."""
    same_color = rng.random() < _SAME_COLOR_SHARE
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        candidate = pick(rng, COMBINATIONS)
        is_held_out = candidate in HELD_OUT
        allowed = is_held_out or bool(chosen) if split == "unseen" else not is_held_out
        fits = candidate not in chosen and (not chosen or (candidate[0] == chosen[0][0]) == same_color)
        if allowed and fits:
            chosen.append(candidate)
    return chosen


def _arrange_single(
    rng: np.random.Generator, combinations: list[tuple[str, str]]
) -> tuple[tuple[Item, ...], str, None]:
    place = pick(rng, tuple(PLACES))
    right, down = PLACES[place]
    x = 0.5 + right * _PLACE_STEP + rng.uniform(-_PLACE_JITTER, _PLACE_JITTER)
    y = 0.5 + down * _PLACE_STEP + rng.uniform(-_PLACE_JITTER, _PLACE_JITTER)
    return (_draw_item(rng, combinations[0], (x, y), 1),), place, None


def _arrange_pair(rng: np.random.Generator, combinations: list[tuple[str, str]]) -> tuple[tuple[Item, ...], None, str]:
    relation = pick(rng, tuple(RELATIONS))
    right, down = RELATIONS[relation]
    items = []
    for combination, side in zip(combinations, (1, -1), strict=True):
        along = side * _PAIR_STEP + rng.uniform(-_PAIR_JITTER, _PAIR_JITTER)
        across = rng.uniform(-_PAIR_SIDESTEP, _PAIR_SIDESTEP)
        center = (0.5 + right * along + abs(down) * across, 0.5 + down * along + abs(right) * across)
        items.append(_draw_item(rng, combination, center, 2))
    return tuple(items), None, relation


def _draw_item(rng: np.random.Generator, combination: tuple[str, str], center: tuple[float, float], count: int) -> Item:
    size = pick(rng, SIZES)
    return Item(
        color=combination[0],
        shape=combination[1],
        texture=pick(rng, _TEXTURE_DRAWS),
        size=size,
        x=center[0],
        y=center[1],
        radius=rng.uniform(*_RADIUS[count][size]),
        angle=rng.uniform(-_LARGEST_ANGLE, _LARGEST_ANGLE),
        tint=_draw_tint(rng),
    )


def _draw_tint(rng: np.random.Generator) -> tuple[float, float, float]:
    return (rng.uniform(-6, 6), rng.uniform(-6, 6), rng.uniform(-6, 6))
