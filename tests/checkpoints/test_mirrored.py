"""Steps on a store, loaded for reading: the newest that is complete and good, verified, each byte once."""

import pathlib
import shutil

import jax.numpy as jnp
import pytest

from clipjax.checkpoints import apart
from clipjax.checkpoints.manager import Checkpoints
from clipjax.checkpoints.manifest import DamagedCheckpoint
from clipjax.checkpoints.mirrored import LAYOUT, fetch, open_mirror
from clipjax.checkpoints.records import make_records
from clipjax.checkpoints.saved import SavedCheckpoint
from clipjax.cli.main import main
from clipjax.config import CheckpointConfig, Config
from clipjax.convert.files import new_directory
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.runtime import objects, staging
from tests.commands import exit_code
from tests.runtime.stores import BUCKET

OLD = pathlib.Path(__file__).parents[1] / "golden" / "checkpoint_before_layout"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workdir")
    checkpoints = Checkpoints(folder, CheckpointConfig())
    for step in (1, 2, 3):
        records = make_records(Config(), build_tokenizer("bytes"), {"step": step, "num_samples": 1})
        checkpoints.save(step, {"params": {"x": jnp.full((300,), step, jnp.float32)}}, records)
        checkpoints.wait()
    return folder


@pytest.fixture(params=["gs", "s3"])
def place(request, workdir, tmp_path, monkeypatch):
    """The address of a workdir whose newest step is still being written."""
    server = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    monkeypatch.setenv(staging.VARIABLE, str(tmp_path / "staging"))
    place = f"{request.param}://{BUCKET}/mirrored/{request.node.originalname}"
    upload(workdir, place)
    objects.delete(f"{place}/checkpoints/3/manifest.json")
    server.reset()
    request.node.server = server
    return place


def upload(folder, place):
    for path in staging.parts_of(folder):
        objects.write_file(f"{place}/{path}", folder / path)


def test_a_refused_start_loses_nothing_that_was_not_sent_yet(place, workdir, tmp_path, monkeypatch):
    """The store is away at the next start; the one after that sends what this machine still had."""
    folder = tmp_path / "here"
    folder.mkdir()
    mirror = open_mirror(place, folder, (), lambda _: None)
    mirror.start(say=lambda _: None, on_lost=lambda _: None)
    mirror.close()
    unsent = folder / "checkpoints" / "9"
    shutil.copytree(workdir / "checkpoints" / "2", unsent)
    fill = staging.fill

    def refuse(*_, **__):
        raise OSError(5, "the store is away", place)

    monkeypatch.setattr(staging, "fill", refuse)
    for _ in range(2):
        with pytest.raises(ValueError, match="the store is away"):
            open_mirror(place, folder, (), lambda _: None)
    monkeypatch.setattr(staging, "fill", fill)
    mirror = open_mirror(place, folder, (), lambda _: None)
    mirror.start(say=lambda _: None, on_lost=lambda _: None)
    assert not mirror.close() and (unsent / "manifest.json").exists()
    assert f"{place}/checkpoints/9/manifest.json" in objects.list_files(f"{place}/checkpoints/9/*")


def test_what_was_not_sent_before_others_used_the_workdir_is_told_and_kept_aside(place, workdir, tmp_path):
    folder, said = tmp_path / "here", []
    folder.mkdir()
    for each in (folder, tmp_path / "there", folder):
        each.mkdir(exist_ok=True)
        mirror = open_mirror(place, each, (), said.append)
        mirror.start(say=said.append, on_lost=said.append)
        assert not mirror.close()
        shutil.copytree(workdir / "checkpoints" / "2", each / "checkpoints" / "9", dirs_exist_ok=True)
    (told,) = [line for line in said if "warning" in line]
    aside = pathlib.Path(told.rpartition(" lie in ")[2])
    assert "was used elsewhere" in told and staging.parts_of(aside / "9") == staging.parts_of(workdir / "checkpoints/2")
    assert not objects.list_folder(f"{place}/checkpoints/9")


def test_a_process_goes_on_with_its_log_of_earlier_starts(place, tmp_path):
    apart._load_log(tmp_path, place)
    assert not staging.parts_of(tmp_path)
    for rank in (0, 1):
        objects.write_bytes(f"{place}/logs/rank-{rank:05d}.log", b"the first start")
    apart._load_log(tmp_path, place)
    assert staging.parts_of(tmp_path) == ["logs/rank-00000.log"]


def test_the_newest_complete_step_is_loaded_once(place, request):
    server = request.node.server
    path, address = fetch(f"{place}/")
    assert address == f"{place}/checkpoints/2" and path.name == "2"
    for given in (f"{place}/checkpoints", f"{place}/checkpoints/2"):
        server.reset()
        assert fetch(given) == (path, address) and server.count(r"^GET /bucket/\S*(/2/|params)\S*$") == 0
    assert fetch(place, 1)[1] == fetch(f"{place}/checkpoints/2", 1)[1] == f"{place}/checkpoints/1"
    saved = SavedCheckpoint(place)
    assert (saved.step, saved.place) == (2, address)
    objects.write_bytes(f"{place}/checkpoints/2/good", b"")
    assert (fetch(place)[0] / "good").exists()
    objects.delete(f"{place}/checkpoints/2/good")
    assert not (fetch(place)[0] / "good").exists()


def test_a_damaged_step_is_passed_over_with_a_warning_and_not_if_it_is_named(place, capfd):
    named = f"{place}/checkpoints/2"
    (file,) = [path for path in objects.list_folder(named) if path.startswith("params/ocdbt.process_0/manifest")]
    content = bytearray(objects.read_bytes(f"{named}/{file}", 10_000))
    content[-1] ^= 1
    objects.write_bytes(f"{named}/{file}", bytes(content))
    assert fetch(place)[1] == f"{place}/checkpoints/1"
    assert "checkpoint 2 is damaged (params/ocdbt.process_0/manifest" in capfd.readouterr().err
    with pytest.raises(DamagedCheckpoint, match=f"no checkpoint in .* is good: 2 .damaged: {file}: another content"):
        fetch(named)


def test_what_is_not_there_is_told(place):
    for given, step in ((f"{place}/nothing", None), (f"{place}/checkpoints/3", None), (place, 3), (place, 7)):
        with pytest.raises(ValueError, match="no complete checkpoint"):
            fetch(given, step)
    bucket = place.replace(f"//{BUCKET}/", "//no-such-bucket/")
    with pytest.raises(ValueError, match=f"checkpoint={bucket}: there is no bucket no-such-bucket"):
        fetch(bucket)


def test_an_older_format_without_manifest_is_complete(place):
    upload(OLD, f"{place}-old")
    path, address = fetch(f"{place}-old")
    assert (path / "config" / "metadata").is_file() and address.startswith(f"{place}-old/checkpoints/")
    listed = objects.list_folder(f"{place}-old")
    found = staging.find(listed, f"{place}-old", LAYOUT)
    assert len(found.complete) == 1 and not found.incomplete  # a run there would load it too


def test_verify(place, capsys):
    assert exit_code(main, ["checkpoint", "verify", place]) == 3
    rows = [" ".join(line.split()[:5]) for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0].startswith("1 complete and verified") and rows[2].startswith("3 incomplete: manifest.json: missing")
    assert exit_code(main, ["checkpoint", "verify", f"{place}/checkpoints/2"]) == 0
    assert exit_code(main, ["checkpoint", "verify", f"{place}/nothing"]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


def test_a_new_directory_on_a_store_is_whole_or_absent(place, request):
    server, target = request.node.server, f"{place}-converted"
    with pytest.raises(RuntimeError), new_directory(target) as folder:
        (folder / "model").write_bytes(b"half")
        raise RuntimeError
    assert not objects.list_folder(target)
    with new_directory(target) as folder:
        for name in ("manifest.json", "a", "z"):
            (folder / name).write_bytes(b"1")
    sent = [request for request in server.requests if request.startswith("PUT")]
    assert len(sent) == 3 and "manifest.json" in sent[-1]
    with pytest.raises(ValueError, match=f"--output={target} is not empty"), new_directory(target):
        pass


def test_what_is_loaded_is_what_was_saved(place, workdir):
    path, _ = fetch(place)
    here, there = workdir / "checkpoints" / "2", path
    assert {name: (here / name).read_bytes() for name in staging.parts_of(here)} == {
        name: (there / name).read_bytes() for name in staging.parts_of(there)
    }
    shutil.rmtree(there)
    assert staging.parts_of(fetch(place)[0]) == staging.parts_of(here)
