"""Files: whole or absent, bounded, and checked before the work."""

import errno
import os

import pytest

from clipjax.runtime.files import read_bounded, require_file_writable, require_writable, write_atomic


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    write_atomic(path, "n\u00e9w", sync=True)
    assert path.read_bytes() == "n\u00e9w".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    (tmp_path / "a.json.tmp").mkdir()
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_full_disk_keeps_no_half_of_the_new_file(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new", sync=True)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(ValueError, match="a' is larger than 4 bytes"):
        read_bounded(path, 4)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "b", 4)


def test_places_are_checked_before_the_work(tmp_path):
    require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("content")
    with pytest.raises(ValueError, match=r"--output=.*file/x: cannot be written to"):
        require_writable(tmp_path / "file" / "x", "--output")
    require_file_writable(tmp_path / "new", "--output")
    require_file_writable(tmp_path / "file", "--output")
    assert (tmp_path / "file").read_text() == "content" and not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="there is no folder"):
        require_file_writable(tmp_path / "no" / "x", "--output")
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        require_file_writable(tmp_path / "a", "--output")
