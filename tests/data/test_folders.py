"""Folders of images: captions beside them, or a class per folder."""

import os
import pickle

import pytest

from clipjax.config import DataConfig
from clipjax.data.folders import FolderSource
from clipjax.data.images import decode
from clipjax.data.sample import BadSample
from clipjax.data.sources import build_source, data_folders

pytestmark = pytest.mark.newest


def reason_of(source, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        source[index]
    return caught.value.reason


def write(folder, files: dict[str, str | bytes]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def open_folder(folder, **fields):
    return build_source(f"folder:{folder}", data=DataConfig(**fields))


def test_captions_beside_images(tmp_path):
    files = {
        "b.jpg": "B",
        "b.txt": " a bird\n",
        "a.PNG": "A",
        "a.txt": "an apple",
        "deep/er/c.webp": "C",
        "deep/er/c.txt": "see",
    }
    more = {"README.txt": "?", ".hidden.jpg": "H", ".git/x.jpg": "X", "notes.md": "?", "alone.gif": "L", "b.json": "{}"}
    source = open_folder(write(tmp_path, files | more))
    assert isinstance(source, FolderSource)
    assert [source._name(i) for i in range(len(source))] == ["a.PNG", "alone.gif", "b.jpg", "deep/er/c.webp"]
    assert (source[0].image, source[0].captions, source[0].label, source[0].key) == (b"A", ("an apple",), -1, "a.PNG")
    assert source[2].captions == ("a bird",) and source[3].captions == ("see",)
    assert reason_of(source, 1) == "missing_caption"
    assert source.location(3) == str(tmp_path / "deep/er/c.webp")
    names = ["a.PNG", "alone.gif", "b.jpg", "deep/er/c.webp", "a.txt", "b.txt", "deep/er/c.txt"]
    assert source.files() == [str(tmp_path / name) for name in names]
    assert data_folders({"x": source}, [None]) == [tmp_path]
    for beyond in (4, -1):
        with pytest.raises(IndexError):
            source[beyond]


def test_what_cannot_be_decoded_is_counted_where_a_caption_waits_for_it(tmp_path):
    files = {"a.svg": "<svg/>", "a.txt": "A", "b.jpg": "B", "b.psd": "?", "b.txt": "B", "paper.pdf": "%PDF-1.7"}
    source = open_folder(write(tmp_path, files))
    assert [source._name(i) for i in range(len(source))] == ["a.svg", "b.jpg"]
    with pytest.raises(BadSample, match="unsupported_format"):
        decode(source[0].image, max_pixels=100)


def test_classes_are_numbered_by_name(tmp_path):
    files = {"zebra/1.jpg": "z", "Ant/x/2.jpg": "a", "Ant/1.jpg": "b", "bee/1.jpeg": "c", "readme.md": "?"}
    (tmp_path / "cat").mkdir()  # without an image, but torchvision counts it too
    (tmp_path / ".cache").mkdir()
    source = open_folder(write(tmp_path, files))
    found = [(source[i].key, source[i].label, source[i].captions) for i in range(len(source))]
    assert found == [("Ant/1.jpg", 0, ()), ("Ant/x/2.jpg", 0, ()), ("bee/1.jpeg", 1, ()), ("zebra/1.jpg", 3, ())]


def test_the_path_of_a_folder_is_enough(tmp_path):
    write(tmp_path, {"one/1.jpg": "a"})
    assert isinstance(build_source(str(tmp_path), data=DataConfig()), FolderSource)
    write(tmp_path, {"a.tar": ""})
    with pytest.raises(ValueError, match=r"is a directory; write .*/\*\.tar"):
        build_source(str(tmp_path), data=DataConfig())


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none is no folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no image in .*expected files such as a.jpg"):
        open_folder(write(tmp_path, {"a.txt": "x", "b.pdf": "x"}))
    with pytest.raises(
        ValueError, match=r"no image has a caption beside it \(c.jpg would have c.txt\), and 1 lie in no"
    ):
        open_folder(write(tmp_path, {"c.jpg": "x", "class/d.jpg": "x"}))


def test_captions_are_held_to_the_limits(tmp_path):
    files = {f"{i}.jpg": "x" for i in range(5)}
    texts = {"0.txt": "x" * 100, "1.txt": "x" * 101, "2.txt": " \n", "3.txt": b"caf\xe9", "4.txt": "\ufeffok"}
    source = open_folder(write(tmp_path, files | texts), max_caption_bytes=100)
    assert source[0].captions == ("x" * 100,) and source[4].captions == ("ok",)
    assert [reason_of(source, i) for i in (1, 2, 3)] == ["caption_too_long", "empty_caption", "caption_not_utf8"]


def test_links_lead_nowhere_else(tmp_path):
    secret = write(tmp_path / "secret", {"s.jpg": "secret", "s.txt": "secret"})
    inside = write(tmp_path / "data", {"a.jpg": "a", "b.jpg": "b", "b.txt": "bee"})
    (inside / "a.txt").symlink_to(secret / "s.txt")
    (inside / "c.jpg").symlink_to(secret / "s.jpg")
    (inside / "c.txt").symlink_to(inside / "b.txt")
    (inside / "d").symlink_to(secret)
    (inside / "e").symlink_to(inside)
    os.mkfifo(inside / "f.jpg")
    (inside / "g.jpg").mkdir()
    source = open_folder(inside)
    assert [source._name(i) for i in range(len(source))] == ["a.jpg", "b.jpg", "c.jpg", "f.jpg"]
    assert [reason_of(source, i) for i in (0, 2, 3)] == ["missing_caption", "missing_image", "missing_image"]
    linked = open_folder(inside, image_root=str(secret))
    assert (linked[0].captions, linked[2].image, linked[2].captions) == (("secret",), b"secret", ("bee",))


def test_a_file_that_is_gone_or_large(tmp_path):
    source = open_folder(write(tmp_path, {"a/1.jpg": "x", "a/2.jpg": "y", "b/3.jpg": ""}))
    (tmp_path / "a/1.jpg").unlink()
    os.truncate(tmp_path / "b/3.jpg", 10**12)
    assert [reason_of(source, i) for i in (0, 2)] == ["missing_image", "image_too_large"]
    assert source[1].image == b"y"


def test_names_that_are_no_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/class"
    os.mkdir(name)  # noqa: PTH102
    with open(name + b"/caf\xe9\x1b.jpg", "wb") as file:  # noqa: PTH123
        file.write(b"x")
    source = open_folder(tmp_path)
    assert source[0].image == b"x"
    assert source.location(0).isascii() and source.location(0).isprintable()


def test_travels_to_workers(tmp_path):
    source = open_folder(write(tmp_path, {f"{i % 3}/{i}.jpg": str(i) for i in range(30)}))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(30)] == [source[i] for i in range(30)]


def test_digests(tmp_path):
    files = {f"{i % 3}/{i}.jpg": str(i) for i in range(30)}
    first = open_folder(write(tmp_path / "a", files)).digests()[0]
    assert open_folder(write(tmp_path / "b", files)).digests()[0].digest == first.digest and first.size == 30
    for change in ({"0/0.jpg": "?"}, {"1/new.jpg": "x"}, {"9/new.jpg": "x"}):
        assert open_folder(write(tmp_path / "b", files | change)).digests()[0].digest != first.digest
