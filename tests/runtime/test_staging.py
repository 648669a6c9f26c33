"""The local folder of a workdir on a store: the store wins, and nothing of another run leaks in."""

import pathlib

import pytest

from clipjax.runtime import objects, staging
from clipjax.runtime.staging import Copies, Layout, fill, folder_of
from tests.runtime.stores import BUCKET

PLAIN = ("plain", "sub", "log", "deep", "new")
LAYOUT = Layout("units", "seal", str.isdecimal, lambda *_: False)


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in staging.parts_of(folder) if path != staging.STATE}


@pytest.fixture
def place(gcs, request):
    place = f"gs://{BUCKET}/staging/{request.node.originalname}"
    for path, content in {
        ".owner": b"lease",
        "plain": b"a",
        "sub/plain": b"b",
        "units/1/x": b"1",
        "units/1/deep/y": b"11",
        "units/1/seal": b"s",
        "units/2/x": b"2",
        "units/3.aside/x": b"3",
        "data/shard.tar": b"somebody else's",
    }.items():
        objects.write_bytes(f"{place}/{path}", content)
    gcs.reset()
    return place


WHOLE = {"plain": b"a", "sub/plain": b"b", "units/1/x": b"1", "units/1/deep/y": b"11", "units/1/seal": b"s"}


def test_what_is_complete_is_loaded_once(place, gcs, tmp_path):
    copies, found = fill(tmp_path, place, LAYOUT, plain=PLAIN)
    copies.write("token")
    assert tree(tmp_path) == WHOLE
    assert (found.complete, found.incomplete, found.aside) == ({"1"}, {"2"}, {"3.aside"})
    assert (tmp_path / "units" / "3.aside").is_dir()  # its name is taken
    gcs.reset()
    fill(tmp_path, place, LAYOUT, plain=PLAIN)
    assert tree(tmp_path) == WHOLE and gcs.count("^GET /bucket/") == 0
    objects.write_bytes(f"{place}/units/1/x", b"changed")
    fill(tmp_path, place, LAYOUT, plain=PLAIN)
    assert tree(tmp_path) == WHOLE | {"units/1/x": b"changed"} and gcs.count("^GET /bucket/") == 1


def test_the_store_wins(place, tmp_path):
    copies, _ = fill(tmp_path, place, LAYOUT, plain=PLAIN)
    copies.write("token")
    for path in ("units/9/seal", "units/2.aside/seal", "other/file", "plain", ".pinned/7/x", "units/1/more"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"of another run")
    (tmp_path / "link").symlink_to("/etc/hostname")
    (tmp_path / ".owner").write_bytes(b"lock")
    _, found = fill(tmp_path, place, LAYOUT, plain=PLAIN)
    assert tree(tmp_path) == WHOLE | {".owner": b"lock"} and not found.unsent
    assert not (tmp_path / "other").exists()
    assert tree(found.lost_at) == {"9/seal": b"of another run"}  # it was never sent, and is not lost in silence


def test_what_this_machine_had_not_sent_yet_is_kept_if_nobody_came_between(place, tmp_path):
    copies, _ = fill(tmp_path, place, LAYOUT, plain=PLAIN)
    copies.write("token")
    (tmp_path / "units" / "9").mkdir()
    for path in ("units/9/seal", "units/9/x", "units/10.tmp", "plain", "new"):
        (tmp_path / path).write_bytes(b"not sent yet")
    _, found = fill(tmp_path, place, LAYOUT, plain=PLAIN, continues=True)
    assert found.unsent == {"9"}
    unsent = dict.fromkeys(("plain", "new", "units/9/seal", "units/9/x"), b"not sent yet")
    assert tree(tmp_path) == WHOLE | unsent


def test_what_somebody_has_deleted_on_the_store_does_not_come_back(place, tmp_path):
    copies, _ = fill(tmp_path, place, LAYOUT, plain=PLAIN)
    copies.write("token")
    for path in ("plain", "units/1/x", "units/1/deep/y", "units/1/seal"):
        objects.delete(f"{place}/{path}")
    _, found = fill(tmp_path, place, LAYOUT, plain=PLAIN, continues=True)
    assert tree(tmp_path) == {"sub/plain": b"b"} and not found.unsent and not found.complete


def test_a_record_of_another_place_or_a_damaged_one_says_nothing(place, tmp_path):
    copies, _ = fill(tmp_path, place, LAYOUT, plain=PLAIN)
    copies.write("token")
    assert Copies(tmp_path, place).token == "token" and Copies(tmp_path, f"{place}-2").token == ""
    for content in (b"", b"[]", b'{"place": 1}', b"[" * 100_000, b'{"place": "%s", "token": "t", "files": {"a": 1}}'):
        (tmp_path / staging.STATE).write_bytes(content.replace(b"%s", place.encode()))
        assert not Copies(tmp_path, place).is_unchanged("plain")


def test_an_object_that_is_cut_off_or_away_ends_with_an_error(place, gcs, tmp_path, impatient):
    gcs.plant("^GET .*sub/plain", status=503)
    with pytest.raises(OSError, match="503"):
        fill(tmp_path, place, LAYOUT, plain=PLAIN)
    gcs.reset()
    fill(tmp_path, place, LAYOUT, plain=PLAIN)
    assert tree(tmp_path) == WHOLE


def test_names_that_no_file_can_have_are_refused(place, gcs, tmp_path):
    (tmp_path / "in").mkdir()
    name = place.removeprefix(f"gs://{BUCKET}/")
    listed = gcs.backend.storage.objects[BUCKET]
    for bad in ("../../outside", "bad\x1bname"):
        listed[f"{name}/{bad}"] = listed[f"{name}/plain"]
        with pytest.raises((ValueError, OSError)):
            fill(tmp_path / "in", place, LAYOUT, plain=PLAIN)
        del listed[f"{name}/{bad}"]
    assert not (tmp_path / "outside").exists()
    with pytest.raises(ValueError, match="is no name that a file can have"):
        staging.download(place, {"../../outside": objects.Listed(4, "")}, tmp_path / "in")


def test_the_folder_is_this_users_alone(monkeypatch, tmp_path):
    monkeypatch.delenv(staging.VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = folder_of("gs://bucket/runs/a b/1")
    assert folder == folder_of("gs://bucket/runs/a b/1") != folder_of("s3://bucket/runs/a b/1")
    assert folder.name.startswith("bucket-runs-a-b-1-") and folder.parent.stat().st_mode & 0o077 == 0
    folder.parent.chmod(0o777)
    with pytest.raises(ValueError, match="is not a folder that only you can write to"):
        folder_of("gs://bucket/x")
    folder.parent.rmdir()
    folder.parent.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is not a folder that only you can write to"):
        folder_of("gs://bucket/x")
    monkeypatch.setenv(staging.VARIABLE, str(tmp_path / "own"))
    assert folder_of("gs://bucket/x").parent == tmp_path / "own"
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(staging.VARIABLE, str(tmp_path / "file" / "x"))
    with pytest.raises(ValueError, match="the folder cannot be made"):
        folder_of("gs://bucket/x")
