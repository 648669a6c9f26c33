"""Every damage to a checkpoint is noticed, whatever byte it hits, before an array of it is handed out."""

import errno
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.checkpoints import manifest
from clipjax.checkpoints.manager import Checkpoints, DamagedCheckpoint
from clipjax.checkpoints.manifest import State, UndecidedCheckpoint, examine
from clipjax.checkpoints.records import FORMAT, make_records
from clipjax.checkpoints.saved import SavedCheckpoint, newest_checkpoint
from clipjax.cli.errors import refusals
from clipjax.config import CheckpointConfig, Config
from clipjax.data.tokenizers.build import build_tokenizer
from tests.faults.checkpoint_damage import FAULTS, damage_run

pytestmark = pytest.mark.newest
ARRAYS = {"params": {"kernel": jax.random.normal(jax.random.key(1), (8, 16))}, "train": {"step": jnp.int32(3)}}
DIRECT = jax.sharding.SingleDeviceSharding(jax.devices()[0])
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DIRECT), ARRAYS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A workdir with the steps 10, 20 and 30."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, CheckpointConfig(best_metric="val:top1"))
    for step in (10, 20, 30):
        records = make_records(Config(), build_tokenizer("bytes"), {"step": step})
        checkpoints.save(step, ARRAYS, records, best_value=step / 100)
    checkpoints.wait()
    return workdir


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
    """The same, to be damaged."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def flip(step: pathlib.Path, pattern: str = "params/d/*") -> str:
    """Flip a bit in the middle of a file, and return its path in the step directory."""
    path = next(iter(sorted(step.glob(pattern))))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return path.relative_to(step).as_posix()


def test_each_of_200_damages_is_noticed(saved, tmp_path):
    found = damage_run(saved / "checkpoints" / "30", tmp_path, first=0, count=200)
    assert found.wrong == []
    assert found.faults.keys() == FAULTS.keys()


def test_what_was_written_is_verified_and_nothing_is_left_out(saved):
    step = saved / "checkpoints" / "30"
    assert examine(step).state is State.VERIFIED
    covered = manifest.read(step)
    assert set(manifest.list_files(step)) == {*covered.files, manifest.FILE}
    assert (covered.step, covered.best) == (30, ("val:top1", 0.3))


def test_the_marker_of_a_good_step_is_no_damage(copy):
    checkpoints = Checkpoints(copy, CheckpointConfig())
    checkpoints.mark_good(20)
    assert checkpoints.good_steps() == [10, 20]
    assert Checkpoints(copy, CheckpointConfig()).good_steps() == [10, 20]
    assert examine(copy / "checkpoints" / "20").state is State.VERIFIED


def test_a_step_under_the_name_of_another_is_damaged(copy):
    folder = copy / "checkpoints"
    shutil.rmtree(folder / "30")
    (folder / "20").rename(folder / "30")
    assert examine(folder / "30", step=30).fault == "manifest.json: it is that of step 20"


def test_a_path_out_of_the_checkpoint_is_refused(copy):
    path = copy / "checkpoints" / "30" / manifest.FILE
    record = json.loads(path.read_text())
    record["files"]["../20/manifest.json"] = [1, "00"]
    path.write_text(json.dumps(record))
    assert "leads out of the checkpoint" in examine(path.parent).fault


def craft(step: pathlib.Path, changes: dict) -> None:
    """Change a manifest, and give it the digest of its new content."""
    record = json.loads((step / manifest.FILE).read_text())
    (step / manifest.FILE).write_bytes(manifest._encode(record | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"a\0b": [1, "00"]}},
        {"files": {"\ud800": [1, "00"]}},
        {"files": {"a": [1]}},
        {"files": {"a": [float("inf"), "00"]}},
        {"files": {"a": [float("nan"), "00"]}},
        {"files": {"a": 5}},
        {"files": 5},
        {"files": {}},
        {"step": float("inf")},
        {"step": [3]},
        {"best": ["val:top1", 10**400]},
        {"best": {"val:top1": 1}},
        {"best": 5},
    ],
)
def test_a_manifest_of_strange_values_is_damage_and_no_crash(copy, changes):
    """Its digest is right: somebody has made it so."""
    craft(copy / "checkpoints" / "30", changes)
    assert examine(copy / "checkpoints" / "30").state is State.DAMAGED
    assert manifest.best_of(copy / "checkpoints" / "30") is None
    assert Checkpoints(copy, CheckpointConfig()).newest_verified() == 20


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": 1' + "0" * 400 + "}", '{"a": []}', "[]", "{}"])
def test_the_metric_of_an_older_format_may_be_anything(tmp_path, content):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "metrics").write_text(content)
    assert manifest.best_of(tmp_path) is None


def test_a_damaged_step_that_is_named_is_refused_before_an_array_is_read(copy, monkeypatch):
    step = copy / "checkpoints" / "30"
    name = flip(step)
    monkeypatch.setattr("clipjax.checkpoints.manager.restore_arrays", None)
    monkeypatch.setattr("clipjax.checkpoints.saved.restore_arrays", None)
    message = f"checkpoints/30 is damaged: {name}: another content; bring back a good copy, or name another step"
    with pytest.raises(DamagedCheckpoint, match=message):
        SavedCheckpoint(step).params(ABSTRACT["params"])
    with pytest.raises(DamagedCheckpoint, match=message):
        SavedCheckpoint(copy, step=30).params(ABSTRACT["params"])
    with pytest.raises(DamagedCheckpoint, match=message):
        Checkpoints(copy, CheckpointConfig()).restore(30, ABSTRACT)


def test_a_reader_of_a_workdir_takes_the_newest_good_step_and_renames_nothing(copy, capsys):
    name = flip(copy / "checkpoints" / "30")
    opened = SavedCheckpoint(copy)
    assert opened.step == 20
    assert opened.params(ABSTRACT["params"]).keys() == {"kernel"}
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"clipjax: warning: checkpoint {copy}/checkpoints/30 is damaged ({name}: another content); "
        f"going on from {copy}/checkpoints/20"
    ]
    assert (copy / "checkpoints" / "30").is_dir()
    assert newest_checkpoint(copy) is not None  # flips in arrays are for `newest_verified` to find


@pytest.mark.parametrize("place", ["", "checkpoints/30"])
def test_a_reader_of_parameters_examines_no_array_that_it_does_not_read(copy, monkeypatch, place):
    """The optimizer's state is twice as large."""
    flip(copy / "checkpoints" / "30", "train/_METADATA")
    hashed: list[str] = []
    real = manifest._hash_file

    def hash_file(path: pathlib.Path, *, sync: bool) -> tuple[int, str]:
        hashed.append(path.relative_to(copy / "checkpoints" / "30").parts[0])
        return real(path, sync=sync)

    monkeypatch.setattr(manifest, "_hash_file", hash_file)
    opened = SavedCheckpoint(copy / place)
    opened.params(ABSTRACT["params"])
    opened.params(ABSTRACT["params"])
    assert opened.step == 30 and "params" in hashed and "train" not in hashed
    arrays = [path for path in manifest.list_files(copy / "checkpoints" / "30") if path.startswith("params/")]
    assert hashed.count("params") == len(arrays), "once, however often it is read"


def test_a_run_sets_what_is_damaged_or_incomplete_aside(copy, capsys):
    folder = copy / "checkpoints"
    (folder / "30" / manifest.FILE).unlink()
    name = flip(folder / "20", "train/_METADATA")
    checkpoints = Checkpoints(copy, CheckpointConfig())
    assert checkpoints.steps() == [10, 20]  # 30 has no manifest
    assert checkpoints.newest_verified() == 10
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20.damaged", "30.incomplete"]
    assert checkpoints.steps() == [10]
    arrays, _ = checkpoints.restore(10, ABSTRACT)
    assert arrays["train"]["step"] == 3
    err = capsys.readouterr().err
    assert f"checkpoints/30 is incomplete (manifest.json: missing); going on from {folder}/10" in err
    assert f"checkpoints/20 is damaged ({name}: another content); going on from {folder}/10" in err


def test_where_all_are_damaged_each_is_named_and_none_is_touched(copy):
    folder = copy / "checkpoints"
    names = {step: flip(folder / str(step)) for step in (10, 20, 30)}
    for choose in (Checkpoints(copy, CheckpointConfig()).newest_verified, lambda: SavedCheckpoint(copy)):
        with pytest.raises(DamagedCheckpoint) as error:
            choose()
        for step, name in names.items():
            assert f"{step} (damaged: {name}: another content)" in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]


def test_a_rollback_chooses_among_the_steps_that_it_names(copy):
    checkpoints = Checkpoints(copy, CheckpointConfig())
    checkpoints.set_aside(30, "rejected")
    assert checkpoints.newest_verified([10, 20]) == 20
    assert checkpoints.latest_step() == 20
    assert (copy / "checkpoints" / "30.rejected").is_dir()
    assert Checkpoints(copy, CheckpointConfig()).steps() == [10, 20]


def test_nothing_is_no_step(tmp_path):
    assert Checkpoints(tmp_path, CheckpointConfig()).newest_verified() is None


def break_reads(monkeypatch, number: int, *, times: int, name: str = "_METADATA") -> list[str]:
    """Let the storage give an error for the next reads of the files of a name; return a list of them that grows."""
    broken: list[str] = []
    real = pathlib.Path.open

    def open_file(path: pathlib.Path, *arguments, **options):
        if path.name == name and len(broken) < times:
            broken.append(str(path))
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", open_file)
    monkeypatch.setattr(manifest, "RETRY_SECONDS", (0.01,) * 3)
    return broken


@pytest.mark.parametrize("name", ["_METADATA", manifest.FILE])
def test_an_error_of_the_storage_that_passes_is_nothing(copy, monkeypatch, name):
    broken = break_reads(monkeypatch, errno.EIO, times=3, name=name)
    assert examine(copy / "checkpoints" / "30").state is State.VERIFIED
    assert len(broken) == 3


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("_METADATA", errno.EIO),
        ("_METADATA", errno.EACCES),
        (manifest.FILE, errno.ESTALE),
        (manifest.FILE, errno.EMFILE),
    ],
)
def test_a_checkpoint_that_the_storage_does_not_give_is_neither_damaged_nor_renamed(copy, monkeypatch, name, number):
    folder = copy / "checkpoints"
    (folder / "30" / "params" / "_sharding").unlink()  # what is damaged stays, too, as long as another may be good
    checkpoints = Checkpoints(copy, CheckpointConfig())
    break_reads(monkeypatch, number, times=10_000, name=name)
    message = (
        rf"checkpoints/[23]0 cannot be read: \S*{name}: {os.strerror(number)}; it may be whole: see to the storage"
    )
    for choose in (checkpoints.newest_verified, lambda: SavedCheckpoint(copy)):
        with pytest.raises(UndecidedCheckpoint, match=message):
            choose()
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]
    with pytest.raises(SystemExit) as left, refusals("clipjax test"):
        SavedCheckpoint(copy)
    assert left.value.code == 3


@pytest.mark.parametrize("of_record", [False, True])
def test_a_checkpoint_of_a_newer_format_is_refused_by_name_and_never_set_aside(copy, of_record):
    step = copy / "checkpoints" / "30"
    if of_record:
        (step / manifest.FILE).unlink()
        (step / "data" / "metadata").write_text(f'{{"format": {FORMAT + 1}}}')
    else:
        (step / manifest.FILE).write_bytes(manifest._encode({"format": FORMAT + 1, "other": ["fields"]}))
    message = f"format {FORMAT + 1}, .* knows up to {FORMAT}; install the version that wrote it"
    for choose in (
        Checkpoints(copy, CheckpointConfig()).newest_verified,
        lambda: SavedCheckpoint(copy),
        lambda: SavedCheckpoint(step),
        lambda: newest_checkpoint(copy),
    ):
        with pytest.raises(UndecidedCheckpoint, match=message):
            choose()
    assert step.is_dir()


def test_a_format_below_the_newest_stays_readable_and_a_flipped_one_is_damage(copy, monkeypatch):
    step = copy / "checkpoints" / "30"
    monkeypatch.setattr(manifest, "FORMAT", FORMAT + 1)
    assert examine(step).state is State.VERIFIED
    monkeypatch.undo()
    path = step / manifest.FILE
    path.write_bytes(path.read_bytes().replace(b'"format":%d' % FORMAT, b'"format":%d' % (FORMAT ^ 1)))  # one bit
    assert examine(step).state is State.DAMAGED


def test_a_run_that_goes_on_from_an_older_format_is_warned_once(tmp_path, capsys):
    golden = pathlib.Path(__file__).parents[1] / "golden" / "checkpoint_before_layout"
    shutil.copytree(golden, tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run") is not None  # as preflight looks at it
    assert Checkpoints(tmp_path / "run", CheckpointConfig()).newest_verified() == 9
    err = capsys.readouterr().err
    assert err.count("is of an older format, without checksums: its content is not verified") == 1


def test_an_average_that_the_manifest_does_not_list_is_not_read(saved, tmp_path):
    """Nobody has verified it."""
    step = tmp_path / "30"
    shutil.copytree(saved / "checkpoints" / "30", step)
    shutil.copytree(step / "params", step / "ema")
    opened = SavedCheckpoint(step)
    assert opened.params_group == "params"
    jax.tree.map(np.testing.assert_array_equal, opened.params(ABSTRACT["params"]), ARRAYS["params"])
