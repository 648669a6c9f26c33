"""A tiny checkpoint and pictures for the commands that use a model."""

import os
import pathlib
import shutil
import struct
import zlib

import pytest
from PIL import Image

from tests.data.picture_files import chunk
from tests.golden.test_checkpoint import FOLDER, make_pairs, write_inputs


@pytest.fixture
def place(tmp_path, monkeypatch) -> pathlib.Path:
    """A working directory with the checkpoint `run`, the source `val.tar`, and eight of its pictures in `photos`."""
    write_inputs(tmp_path)
    shutil.copytree(FOLDER / "checkpoint_format_2", tmp_path / "run")
    (tmp_path / "photos").mkdir()
    for name, pixels, _, _ in make_pairs("val", 8):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    return tmp_path


def huge_png() -> bytes:
    """Return a picture whose header tells of more pixels than any limit allows."""
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    pieces = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in pieces)
