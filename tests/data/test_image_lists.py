"""Pictures that a person names: files, globs and folders."""

import re

import pytest

from clipjax.data.image_lists import ImageListSource, find_images
from clipjax.data.sample import BadSample


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with pictures at two depths, a caption, and a file that is no picture."""
    (tmp_path / "photos" / "old").mkdir(parents=True)
    for name in ("photos/b.png", "photos/a.jpg", "photos/old/c.gif", "photos/a.txt", "notes", "x[1].png"):
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_globs_and_folders_each_once_in_their_order(folder):
    assert find_images(["photos"]) == ["photos/a.jpg", "photos/b.png", "photos/old/c.gif"]
    assert find_images(["notes", "photos/b.png", "folder:photos/"]) == [
        "notes", "photos/b.png", "photos/a.jpg", "photos/old/c.gif",
    ]  # fmt: skip
    assert find_images(["photos/*"]) == ["photos/a.jpg", "photos/a.txt", "photos/b.png"]
    assert find_images(["photos/**/*.gif"]) == ["photos/old/c.gif"]
    assert find_images(["x[1].png"]) == ["x[1].png"]  # the file, no pattern


def test_all_names_without_a_picture_are_told(folder):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError) as told:
        find_images(["notes", "none.png", "empty", "photos/*.webp", "", "a\0b", "hdfs://a/b.png"])
    lines = str(told.value).splitlines()
    for line, message in zip(
        lines,
        [
            "IMAGE=none.png: there is no such file or folder",
            "IMAGE=empty: no picture in this folder; expected files such as a.jpg",
            "IMAGE=photos/*.webp: no file matches",
            "IMAGE=: there is no such file",
            "IMAGE=a\0b: there is no such file",
            "IMAGE=hdfs://a/b.png: nothing here opens an address of hdfs://",
        ],
        strict=True,
    ):
        assert line.startswith(message)


def test_a_sample_is_the_file_and_links_lead_where_they_may(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "d.png"
    outside.write_bytes(b"outside")
    (folder / "link.png").symlink_to(outside)
    source = ImageListSource(["photos/b.png", "link.png", "gone.png", "photos/big.png"], max_image_pixels=100)
    assert len(source) == 4 and source.files()[1] == "link.png"
    assert (source[0].image, source[0].key, source[0].captions) == (b"photos/b.png", "photos/b.png", ())
    assert source[1].image == b"outside"
    with pytest.raises(BadSample, match="missing_image"):
        source[2]
    with (folder / "photos" / "big.png").open("wb") as file:
        file.truncate(2**20 + 801)
    with pytest.raises(BadSample, match="image_too_large"):
        source[3]
    assert source.location(0) == "photos/b.png"
    assert re.fullmatch("[0-9a-f]{32}", source.digests()[0].digest) and source.digests()[0].size == 4
