"""The complete steps of a workdir, on a disk and on a store, and local copies of them."""

import os
import pathlib
import shutil

import pytest

from clipjax.checkpoints.mirrored import fetch
from clipjax.checkpoints.watching import complete_steps, drop_copy, step_place
from clipjax.runtime import objects, staging
from tests.runtime.stores import BUCKET

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NEW, OLD = (GOLDEN / name / "checkpoints" / "9" for name in ("checkpoint_format_2", "checkpoint_before_layout"))


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    """A workdir with steps of both formats, and what is no complete step."""
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"
    for name, source in (("10", NEW), ("9", OLD), ("11", NEW), ("12.damaged", NEW), ("13.orbax-checkpoint-tmp", NEW)):
        shutil.copytree(source, folder / name)
    (folder / "11" / "manifest.json").unlink()
    return workdir


def test_steps_of_a_disk(workdir):
    found = complete_steps(workdir)
    assert list(found) == [9, 10] and found == complete_steps(workdir)
    shutil.copytree(NEW, workdir / "checkpoints" / "new")
    shutil.rmtree(workdir / "checkpoints" / "10")
    (workdir / "checkpoints" / "new").rename(workdir / "checkpoints" / "10")
    os.utime(workdir / "checkpoints" / "10" / "manifest.json", ns=(1, 1))
    assert complete_steps(workdir)[10] != found[10] and complete_steps(workdir)[9] == found[9]
    assert complete_steps(workdir.with_name("gone")) == {}
    assert step_place(workdir, 9) == workdir / "checkpoints" / "9"
    drop_copy(workdir / "checkpoints" / "9")  # a path is no copy
    assert list(complete_steps(workdir)) == [9, 10]


def test_what_is_no_workdir_is_refused(workdir, gcs):
    with pytest.raises(ValueError, match="checkpoints/9 is the directory of one checkpoint; name the workdir above it"):
        complete_steps(workdir / "checkpoints" / "9")
    with pytest.raises(ValueError, match="is a file; name the workdir of a run"):
        complete_steps(workdir / "checkpoints" / "10" / "manifest.json")
    objects.write_bytes(f"gs://{BUCKET}/one/9/manifest.json", b"{}")
    with pytest.raises(ValueError, match="one/9 is the directory of one checkpoint"):
        complete_steps(f"gs://{BUCKET}/one/9")


def test_steps_of_a_store(workdir, gcs, tmp_path, monkeypatch):
    monkeypatch.setenv(staging.VARIABLE, str(tmp_path / "staging"))
    place = f"gs://{BUCKET}/watched"
    assert complete_steps(place) == {}
    for path in staging.parts_of(workdir):
        objects.write_file(f"{place}/{path}", workdir / path)
    found = complete_steps(place)
    assert list(found) == [9, 10] and found == complete_steps(place)
    address = step_place(place, 10)
    assert address == f"{place}/checkpoints/10"
    copy, _ = fetch(str(address))
    assert staging.parts_of(copy) == staging.parts_of(NEW)
    drop_copy(address)
    assert not copy.exists() and complete_steps(place) == found
    assert staging.parts_of(fetch(str(address))[0]) == staging.parts_of(NEW)  # loaded anew
    drop_copy(f"{place}/checkpoints/77")  # of which there is none
    objects.write_bytes(f"{place}/checkpoints/10/manifest.json", b"{ }")
    assert complete_steps(place)[10] != found[10]
    objects.delete(f"{place}/checkpoints/10/manifest.json")
    assert list(complete_steps(place)) == [9]
