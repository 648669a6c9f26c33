"""Class names and templates of the paper's datasets: their numbers, and digests of the lists that openai/CLIP has."""

import hashlib
import json
from collections import Counter

import pytest

from clipjax.evals import datasets
from clipjax.evals.prompts import check_templates, load_classes, load_templates

PUBLISHED = {
    "birdsnap": (500, 1, "d29493adbaa699a1"),
    "caltech101": (102, 34, "92e4cd629fa3a58a"),
    "cifar10": (10, 18, "8fd45ee96f833ca3"),
    "cifar100": (100, 18, "1b20750b5a765c22"),
    "clevr_counts": (8, 1, "8dde3c091b088631"),
    "country211": (211, 5, "80194606adfcb78b"),
    "dtd": (47, 8, "e9ba80ec3b0c8487"),
    "eurosat": (10, 3, "ecf92590421cb307"),
    "fer2013": (7, 6, "6077dbfe93623a4f"),
    "fgvc_aircraft": (100, 2, "6fc2a82ea7dd842b"),
    "flowers102": (102, 1, "69828d101c2acfd0"),
    "food101": (101, 1, "7e638cafebbb67a0"),
    "gtsrb": (43, 3, "b90ab45ae0001545"),
    "hateful_memes": (2, 1, "3bebe22d6c620f31"),
    "imagenet": (1000, 80, "013c913e922205eb"),
    "kinetics700": (700, 28, "9f1289b463ecfe4f"),
    "kitti": (4, 1, "50587de443fbe1cf"),
    "mnist": (10, 1, "2886561c388e6dec"),
    "oxford_pets": (37, 1, "f6833cbb32a840f7"),
    "pcam": (2, 1, "39c58d87bca4ed8a"),
    "rendered_sst2": (2, 1, "a6c32e68a3b269e9"),
    "resisc45": (45, 18, "3642784ea2c9f73d"),
    "stanford_cars": (196, 8, "0d22bd2df28f7217"),
    "stl10": (10, 2, "46a16cf8f0dd4315"),
    "sun397": (397, 2, "19b4780d8a388009"),
    "ucf101": (101, 48, "73dd21662f03d842"),
    "voc2007": (20, 1, "f4bd28f8bcb4351e"),
}
"""Class names, templates and a digest of both lists, at commit d05afc4 of openai/CLIP."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_lists_are_those_that_were_published(name):
    classes, templates = load_classes(name), load_templates(name)
    digest = hashlib.sha256(json.dumps([classes, templates], ensure_ascii=False).encode()).hexdigest()[:16]
    assert (len(classes), len(templates), digest) == PUBLISHED[name]
    check_templates(templates)
    assert all(each.strip() for each in classes)
    found = datasets.prompts_of(name)
    assert found.licence == "MIT" and found.source.startswith("https://github.com/openai/CLIP/blob/")


PARTS = {"imagenet_a": ("n01498041", "stingray"), "imagenet_r": ("n01443537", "goldfish")}
"""The first class of each part of ImageNet."""

OTHERS = {"clevr_distance": (6, 1), "svhn": (10, 6)}
"""Class names and templates of CLIP_benchmark."""


def test_all_27_datasets_of_the_paper_are_there():
    assert datasets.names() == tuple(sorted([*PUBLISHED, *OTHERS, *PARTS])) and len(PUBLISHED) == 27


@pytest.mark.parametrize("name", OTHERS)
def test_other_lists_name_clip_benchmark(name):
    found = datasets.prompts_of(name)
    assert (len(found.classes), len(found.templates)) == OTHERS[name]
    assert found.source.startswith("https://github.com/LAION-AI/CLIP_benchmark/blob/")
    check_templates(found.templates)


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_imagenet_have_its_names(name):
    found, imagenet = datasets.prompts_of(name), datasets.prompts_of("imagenet")
    assert len(found.ids) == len(found.classes) == 200 and list(found.ids) == sorted(set(found.ids))
    assert (found.ids[0], found.classes[0]) == PARTS[name]
    places = [imagenet.classes.index(each) for each in found.classes]
    assert places == sorted(places) and found.templates == imagenet.templates


def test_of_several_words_for_one_class_the_first_is_taken():
    classes = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")
    assert datasets.prompts_of("fer2013").classes == classes


def test_the_seven_templates_are_among_imagenets_eighty():
    seven = load_templates("imagenet_7")
    assert len(seven) == 7 and set(seven) < set(load_templates("imagenet"))


def test_lists_of_lines_are_read_as_clip_benchmark_writes_them(tmp_path):
    (tmp_path / "classnames.txt").write_text("\ufeffroyal blue\r\n  crème\n", encoding="utf-8")
    (tmp_path / "templates.txt").write_text("a {c} thing.\n{}\n")
    assert load_classes(str(tmp_path / "classnames.txt")) == ("royal blue", "crème")
    assert load_templates(str(tmp_path / "templates.txt")) == ("a {} thing.", "{}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "number 1 is '', a blank text"),
        (b"", "must be a list of strings, with at least one"),
        (b"a\nb\na\n", "labels 0, 2 all have the name 'a'"),
        (b"\xff\xfea", "is no text in UTF-8"),
    ],
)
def test_bad_lists_of_lines_are_refused(tmp_path, content, message):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_classes(str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match="must be one of scenes, .* or a .txt file with one a line"):
        load_classes(str(tmp_path / "absent.txt"))


def test_names_that_stand_twice_are_imagenets_two_alone():
    twice = {
        name: sorted(each for each, count in Counter(datasets.prompts_of(name).classes).items() if count > 1)
        for name in datasets.names()
    }
    assert {name: each for name, each in twice.items() if each} == {"imagenet": ["missile", "sunglasses"]}


def test_an_unknown_name_is_told_those_that_there_are():
    with pytest.raises(
        ValueError, match="classes='imagenett' must be one of scenes, birdsnap, .*imagenet.*a JSON file"
    ):
        load_classes("imagenett")
