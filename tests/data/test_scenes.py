"""SCENES: what is drawn and said is true, held out where it should be, and the same on every run."""

import collections
import dataclasses
import hashlib
import io
import itertools
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from clipjax.data.scenes import language, world
from clipjax.data.scenes.drawing import CONTOURS, MARKS, draw, encode

# Words that tell an attribute of an item, longest first so that "cobalt blue" is found before "blue".
_MEANING = {word: name for name, words in language._WORDS.items() for word in words}
_MEANING |= {word: name for name, words in language._TEXTURE_PHRASES.items() for word in words}
_WORD = re.compile(r"\b(" + "|".join(sorted(_MEANING, key=len, reverse=True)) + r")\b")
_PLACE = {phrase: place for place, phrases in language._PLACE_PHRASES.items() for phrase in phrases}
_RELATION = {phrase: name for name, phrases in language._RELATION_PHRASES.items() for phrase in phrases}
_LINK = re.compile(r" (" + "|".join(sorted([*_RELATION, "and"], key=len, reverse=True)) + r") (?=an? |one |the )")


def _sample(split: str, index: int, seed: int = 0) -> tuple[world.Scene, list[str]]:
    rng = world.sample_stream(seed, split, index)
    scene = world.sample_scene(rng, split)
    return scene, language.write_captions(scene, rng)


def _samples(split: str, count: int) -> list[tuple[world.Scene, list[str]]]:
    return [_sample(split, index) for index in range(count)]


def _attributes(item: world.Item) -> set[str]:
    return {item.color, item.shape, item.texture, item.size}


def test_combinations_and_class_names_agree():
    assert len(world.COMBINATIONS) == len(set(world.COMBINATIONS)) == 80
    assert language.CLASS_NAMES[11] == " ".join(world.COMBINATIONS[11]) == "orange star"
    assert all(template.count("{}") == 1 for template in language.TEMPLATES)


def test_held_out_table_spares_most_of_every_color_and_shape():
    assert len(world.HELD_OUT) == 12
    assert world.HELD_OUT.issubset(world.COMBINATIONS)
    colors = collections.Counter(color for color, _ in world.HELD_OUT)
    shapes = collections.Counter(shape for _, shape in world.HELD_OUT)
    assert set(colors) == set(world.COLORS) and max(colors.values()) == 2
    assert set(shapes) == set(world.SHAPES) and max(shapes.values()) == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_held_out_combinations_never_occur_in_training_splits(split):
    seen = {(item.color, item.shape) for scene, _ in _samples(split, 2000) for item in scene.items}
    assert seen == set(world.COMBINATIONS) - world.HELD_OUT


def test_unseen_shows_a_held_out_item_in_every_picture():
    scenes = [scene for scene, _ in _samples("unseen", 400)]
    singles = [scene.items[0] for scene in scenes if len(scene.items) == 1]
    assert {(item.color, item.shape) for item in singles} == world.HELD_OUT
    assert all(any((item.color, item.shape) in world.HELD_OUT for item in scene.items) for scene in scenes)
    assert 0.15 < 1 - len(singles) / len(scenes) < 0.35


def test_a_third_of_the_training_pictures_show_two_different_items():
    pairs = [scene for scene, _ in _samples("train", 1000) if len(scene.items) == 2]
    assert 300 < len(pairs) < 400
    assert 0.4 < np.mean([scene.items[0].color == scene.items[1].color for scene in pairs]) < 0.6
    assert all((a.color, a.shape) != (b.color, b.shape) for a, b in (scene.items for scene in pairs))


def test_geometry_agrees_with_what_is_told():
    for scene, _ in _samples("train", 500):
        for item in scene.items:
            assert (item.radius < 0.21) == (item.size == "small")
            assert (item.radius > 0.21) == (item.size == "large")
            assert scene.background != "charcoal" or item.color not in world.DARK_COLORS
        if scene.place is not None:
            (right, down), item = world.PLACES[scene.place], scene.items[0]
            assert round((item.x - 0.5) / 0.13) == right and round((item.y - 0.5) / 0.13) == down
        else:
            assert scene.relation is not None
            (right, down), (a, b) = world.RELATIONS[scene.relation], scene.items
            assert right * (a.x - b.x) + down * (a.y - b.y) > 0.45
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_class_id():
    scenes = [scene for scene, _ in _samples("train", 50)]
    for scene in scenes:
        if len(scene.items) == 2:
            assert world.class_id(scene) == -1
        else:
            assert language.CLASS_NAMES[world.class_id(scene)] == f"{scene.items[0].color} {scene.items[0].shape}"
    assert {len(scene.items) for scene in scenes} == {1, 2}


@pytest.mark.parametrize("split", world.SPLITS)
def test_captions_are_true_distinct_and_short(split):
    for scene, captions in _samples(split, 500):
        assert len(captions) == len(set(captions)) == language.CAPTIONS_PER_SCENE
        for caption in captions:
            assert caption.isascii() and len(caption) <= language.MAX_CAPTION_BYTES
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
            (_check_single if len(scene.items) == 1 else _check_pair)(scene, caption)


def _check_single(scene: world.Scene, caption: str) -> None:
    body, _, background = caption.partition(" on a ")
    assert background in ("", f"{scene.background} background")
    told_place = {place for phrase, place in _PLACE.items() if body.endswith(f" {phrase}")}
    assert told_place <= {scene.place}, caption
    _check_item(scene.items[0], body)


def _check_pair(scene: world.Scene, caption: str) -> None:
    link = _LINK.search(caption)
    assert link is not None, caption
    parts = [caption[: link.start()], caption[link.end() :]]
    order = [
        next(index for index, item in enumerate(scene.items) if {item.color, item.shape} <= _told(part))
        for part in parts
    ]
    assert sorted(order) == [0, 1], caption
    for index, part in zip(order, parts, strict=True):
        _check_item(scene.items[index], part)
    if link[1] != "and":
        right, down = world.RELATIONS[_RELATION[link[1]]]
        first, second = (scene.items[index] for index in order)
        assert right * (first.x - second.x) + down * (first.y - second.y) > 0, caption


def _told(text: str) -> set[str]:
    return {_MEANING[word] for word in _WORD.findall(text)}


def _check_item(item: world.Item, text: str) -> None:
    assert {item.color, item.shape} <= _told(text) <= _attributes(item), text


def test_captions_vary_in_detail():
    texts = [caption for _, captions in _samples("train", 400) for caption in captions]
    assert len(set(texts)) > 0.9 * len(texts)
    assert 40 < np.mean([len(text) for text in texts]) < 60
    bare = [text for text in texts if len(_told(text)) == 2 and not any(phrase in text for phrase in _PLACE)]
    assert 0.2 < len(bare) / len(texts) < 0.4


def test_words_are_unambiguous():
    words = [word for words in language._WORDS.values() for word in words]
    assert len(words) == len(set(words))


def test_drawing_knows_every_name():
    assert set(CONTOURS) == set(world.SHAPES)
    assert set(MARKS) | {"solid"} == set(world.TEXTURES)
    items = itertools.product(world.SHAPES, world.TEXTURES, world.COLORS[:2])
    for index, (shape, texture, color) in enumerate(items):
        item = world.Item(color, shape, texture, "large", 0.5, 0.5, 0.24, 10.0 * index, (0.0, 0.0, 0.0))
        background = world.BACKGROUNDS[index % len(world.BACKGROUNDS)]
        with_item, without = (
            draw(world.Scene(items, "middle", None, background, (0.0, 0.0, 0.0), (5.0, -5.0), 1.0, index), 48)
            for items in ((item,), ())
        )
        assert with_item.shape == (48, 48, 3) and with_item.dtype == np.uint8
        changed = (np.abs(with_item.astype(int) - without.astype(int)).max(-1) > 30).mean()
        assert 0.02 < changed < 0.2, (shape, texture, color, background, changed)


def test_items_stay_inside_the_picture_and_are_of_their_color():
    item = world.Item("red", "circle", "solid", "small", 0.25, 0.75, 0.15, 0.0, (0.0, 0.0, 0.0))
    picture = draw(world.Scene((item,), "bottom left", None, "white", (0.0, 0.0, 0.0), (0.0, 0.0), 0.0, 0), 64)
    assert tuple(picture[48, 16]) == (218, 38, 40)
    rows, columns = np.nonzero(picture[:, :, 1] < 100)
    assert abs(rows.mean() - 47.5) < 0.5 and abs(columns.mean() - 15.5) < 0.5


def test_samples_depend_on_seed_split_and_index_only():
    first = _sample("train", 7)
    _sample("train", 8)
    assert _sample("train", 7) == first
    others = [_sample("train", 8), _sample("val", 7), _sample("train", 7, seed=1)]
    assert all(other != first for other in others)
    scene = first[0]
    assert np.array_equal(draw(scene, 72), draw(scene, 72))
    assert encode(draw(scene, 72)) == encode(draw(scene, 72))


def test_scenes_have_not_changed_since_version_1_0_0():
    """A new digest needs a new VERSION: prepared data on disk would no longer be what the code draws."""
    digest = hashlib.sha256(repr([_sample(split, 3) for split in world.SPLITS]).encode()).hexdigest()
    assert digest[:16] == "cefd8623a10ae532"


def test_unknown_split():
    with pytest.raises(ValueError, match="split='test' must be one of train, val, unseen"):
        world.sample_stream(0, "test", 0)


@pytest.mark.process
def test_importing_the_folder_leaves_tfds_and_pillow_alone():
    code = (
        "import sys, clipjax.data.scenes.world, clipjax.data.scenes.language, clipjax.data.scenes.drawing;"
        "assert not {'tensorflow_datasets', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    builder = pytest.importorskip("clipjax.data.scenes.builder")
    folder = tmp_path_factory.mktemp("tfds")
    return folder, builder.build_scenes(folder, "tiny")


def test_build_uses_no_tensorflow_and_fills_the_splits(built):
    _, builder = built
    assert "tensorflow" not in sys.modules
    sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert sizes == {"train": 512, "val": 128, "unseen": 64}


def test_records_are_samples_in_order(built):
    import tensorflow_datasets as tfds
    from PIL import Image

    folder, _ = built
    decoders = {"image": tfds.decode.SkipDecoding()}
    builder: Any = tfds.builder("scenes/tiny", data_dir=folder)
    source = builder.as_data_source("unseen", decoders=decoders)
    assert len(source) == 64
    for index in (0, 1, 63):
        record, (scene, captions) = source[index], _sample("unseen", index)
        assert record["image"] == encode(draw(scene, 72))
        assert Image.open(io.BytesIO(record["image"])).size == (72, 72)
        assert [caption.decode() for caption in record["captions"]] == captions
        assert record["label"] == world.class_id(scene)
        assert record["id"].decode() == f"unseen-{index:06d}"


def test_building_twice_reads_what_is_there(built, capsys):
    from clipjax.data.scenes.builder import build_scenes

    folder, builder = built
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record*")}
    assert len(before) == 3
    again = build_scenes(str(folder), "tiny")
    assert again.data_dir == builder.data_dir
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record*")} == before
    assert capsys.readouterr().out == ""


def test_unknown_config(tmp_path):
    from clipjax.data.scenes.builder import build_scenes

    with pytest.raises(
        ValueError, match="config='huge' must be one of the configs of SCENES: default, large, tiny, outlines"
    ):
        build_scenes(tmp_path, "huge")


def test_outlines_are_the_same_scenes_without_what_lies_inside():
    for index in range(20):
        scene, _ = _sample("val", index)
        filled, hollow = draw(scene, 72).astype(int), draw(scene, 72, outlines=True).astype(int)
        empty = draw(dataclasses.replace(scene, items=()), 72).astype(int)
        has_paint, has_line = (np.abs(each - empty).sum(axis=2) > 60 for each in (filled, hollow))
        assert 0.2 < has_line.sum() / has_paint.sum() < 0.95
        assert (has_line & ~has_paint).sum() <= 0.05 * has_line.sum(), "nothing is drawn outside of the items"
