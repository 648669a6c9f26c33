"""A scene as captions: a small grammar with synonyms that says more or less, in many wordings, and nothing false.

Every caption names the colour and the shape of every item. Beyond that it tells nothing, about half, or all of size,
texture and place (or relation), because captions that tell more make better negatives in a contrastive batch, and
bare ones look like the prompts of zero-shot evaluation.
"""

import numpy as np

from clipjax.data.scenes.world import COMBINATIONS, Item, Scene, pick

CAPTIONS_PER_SCENE = 5
MAX_CAPTION_BYTES = 75  # so that even the byte tokenizer, with its start and end, stays within CLIP's 77 tokens

CLASS_NAMES = [f"{color} {shape}" for color, shape in COMBINATIONS]
"""Class names in the order of `label`."""

TEMPLATES = [
    "{}",
    "the {}",
    "one {}",
    "there is one {}",
    "a picture of one {}",
    "an image of one {}",
    "a drawing of one {}",
]
"""Zero-shot prompts; none needs to know whether the class name begins with a vowel."""

# The first word is the usual one: see `_usually_first`.
_WORDS = {
    "red": ("red", "scarlet", "crimson"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "lemon yellow"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "cobalt blue"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose pink"),
    "brown": ("brown", "chestnut"),
    "black": ("black", "jet black"),
    "circle": ("circle", "disc"),
    "square": ("square", "square shape"),
    "triangle": ("triangle", "three-sided shape"),
    "star": ("star", "five-pointed star"),
    "heart": ("heart", "heart shape"),
    "cross": ("cross", "cross shape"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "crescent moon"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "solid": ("solid", "plain"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}
_TEXTURE_PHRASES = {
    "solid": ("in one colour",),
    "striped": ("with stripes",),
    "dotted": ("with dots", "with spots"),
    "checkered": ("with checks",),
}
_PLACE_PHRASES = {
    "top left": ("in the top left corner", "at the top left"),
    "top": ("at the top", "near the top edge"),
    "top right": ("in the top right corner", "at the top right"),
    "left": ("on the left", "near the left edge"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "near the right edge"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom": ("at the bottom", "near the bottom edge"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
_RELATION_PHRASES = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_OPENERS = ("", "", "", "there is ", "a picture of ", "an image of ", "a drawing of ")
_DETAIL = (0.0, 0.0, 0.5, 0.5, 1.0)  # chance that an attribute beyond colour and shape is told, drawn per caption
_BACKGROUND_CHANCE = 0.25  # of a detailed caption of one item
_DETERMINERS = ("a", "a", "a", "one", "the")


def write_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return `CAPTIONS_PER_SCENE` different captions of at most `MAX_CAPTION_BYTES` ASCII characters, all true."""
    captions: list[str] = []
    while len(captions) < CAPTIONS_PER_SCENE:
        detail = pick(rng, _DETAIL)
        write = _write_single if len(scene.items) == 1 else _write_pair
        caption = pick(rng, _OPENERS) + write(scene, rng, detail)
        if len(caption) <= MAX_CAPTION_BYTES and caption not in captions:
            captions.append(caption)
    return captions


def _write_single(scene: Scene, rng: np.random.Generator, detail: float) -> str:
    assert scene.place is not None
    caption = _write_item(scene.items[0], rng, detail)
    if rng.random() < detail:
        caption += " " + pick(rng, _PLACE_PHRASES[scene.place])
    if rng.random() < detail * _BACKGROUND_CHANCE:
        caption += f" on {_with_article(scene.background)} background"
    return caption


def _write_pair(scene: Scene, rng: np.random.Generator, detail: float) -> str:
    """Name the two items in either order, joined by their relation or, in a less detailed caption, by "and"."""
    assert scene.relation is not None
    items, relation = scene.items, scene.relation
    if rng.random() < 0.5:
        items, relation = items[::-1], _OPPOSITE[relation]
    first, second = (_write_item(item, rng, detail) for item in items)
    # The relation is told more often than other details: nothing else says which item is where.
    link = pick(rng, _RELATION_PHRASES[relation]) if rng.random() < 0.4 + 0.6 * detail else "and"
    return f"{first} {link} {second}"


def _write_item(item: Item, rng: np.random.Generator, detail: float) -> str:
    """Return a noun phrase such as "a small red circle with dots"."""
    words = [_usually_first(rng, _WORDS[item.color]), _usually_first(rng, _WORDS[item.shape])]
    if rng.random() < detail:
        if rng.random() < 0.75:
            words.insert(0, _usually_first(rng, _WORDS[item.texture]))
        else:
            words.append(pick(rng, _TEXTURE_PHRASES[item.texture]))
    if rng.random() < detail:
        words.insert(0, _usually_first(rng, _WORDS[item.size]))
    determiner = pick(rng, _DETERMINERS)
    phrase = " ".join(words)
    return _with_article(phrase) if determiner == "a" else f"{determiner} {phrase}"


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _usually_first(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """Return the first word three times out of four, else one of the others."""
    return words[0] if rng.random() < 0.75 else pick(rng, words[1:])
