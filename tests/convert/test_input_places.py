"""`convert --input` by address: a folder or a file of a store, as a copy that does not stay."""

import pathlib

import pytest

from clipjax.convert.files import local_input
from clipjax.runtime import objects
from tests.runtime.stores import BUCKET

PLACE = f"gs://{BUCKET}/peer"


def test_a_folder_and_a_file_of_a_bucket(gcs):
    for name in ("config.json", "model.safetensors", "deeper/other.bin"):
        objects.write_bytes(f"{PLACE}/{name}", name.encode())
    with local_input(PLACE) as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            "config.json": b"config.json",
            "model.safetensors": b"model.safetensors",
        }
    with local_input(f"{PLACE}/model.safetensors") as file:
        assert (file.name, file.read_bytes()) == ("model.safetensors", b"model.safetensors")
    assert not folder.exists() and not file.exists()


def test_an_error_names_the_address(gcs):
    objects.write_bytes(f"{PLACE}/config.json", b"{}")
    with pytest.raises(ValueError, match=rf"^{PLACE}/config.json is bad$"), local_input(PLACE) as folder:
        raise ValueError(f"{folder}/config.json is bad")
    with pytest.raises(ValueError, match=f"--input={PLACE}/none: there is no object"), local_input(f"{PLACE}/none"):
        pass


def test_a_path_stays_where_it_is(tmp_path):
    with local_input(tmp_path) as path:
        assert path == tmp_path
    assert pathlib.Path(tmp_path).is_dir()
