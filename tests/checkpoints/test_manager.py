"""Checkpoints: what is saved comes back bit for bit, on any mesh, or is refused aloud."""

import dataclasses
import gc
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clipjax.checkpoints import manifest
from clipjax.checkpoints.folder import is_step_name
from clipjax.checkpoints.manager import Checkpoints, DamagedCheckpoint
from clipjax.checkpoints.records import make_records, pack_tokenizer, unpack_tokenizer
from clipjax.checkpoints.saved import SavedCheckpoint, find_checkpoint, newest_checkpoint
from clipjax.config import CheckpointConfig, Config, MeshConfig, TaskConfig
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.runtime import sharding
from clipjax.training.resume import check_resumable

TOKENIZER = build_tokenizer("bytes")

# A restore that Orbax refuses leaves reads behind, which complain of their closed event loop when they are collected:
# in any later test, hence the whole module, and `collected` so that none is left to others.
pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


def config(**fields) -> Config:
    return Config(seed=5, **fields)


def groups() -> dict:
    """Arrays as a training state has them: odd bits, several dtypes, a scalar, a typed key, a tuple."""
    odd = np.asarray([[0.1, -0.0, 1e-45, np.inf], [np.nan, 1 / 3, -1e38, 2.0]], np.float32)
    kernel = jax.random.normal(jax.random.key(1), (8, 16))
    return {
        "params": {"image": {"kernel": kernel, "odd": jnp.asarray(odd)}, "log_logit_scale": jnp.float32(2.66)},
        "train": {
            "step": jnp.int32(3),
            "opt_state": ({"mu": kernel.astype(jnp.bfloat16)}, (), jnp.int32(3)),
            "key": jax.random.fold_in(jax.random.key(9), 4),
        },
    }


def abstract(arrays, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def bits(x: jax.Array) -> bytes:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def assert_same(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert bits(a) == bits(b)


def save(workdir: pathlib.Path, *steps: int, arrays=None, best=None, **fields) -> None:
    """Save the same arrays at several steps, as a run would whose states are all good."""
    checkpoints = Checkpoints(workdir, CheckpointConfig(**fields))
    for step in steps:
        records = make_records(config(), TOKENIZER, {"step": step})
        checkpoints.save(step, arrays or groups(), records, (best or {}).get(step))
        checkpoints.wait()
        checkpoints.mark_good(step)
    checkpoints.close()


def make_older(step: pathlib.Path) -> None:
    """Make a step directory look like one of the format before manifests."""
    (step / "manifest.json").unlink()
    data = json.loads((step / "data" / "metadata").read_text())
    del data["format"]
    (step / "data" / "metadata").write_text(json.dumps(data))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A workdir with steps 3 and 12."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 3, 12)
    return workdir


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
    """The same, to be damaged."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_arrays_and_records_come_back_bit_for_bit(saved):
    checkpoints = Checkpoints(saved, CheckpointConfig())
    assert checkpoints.latest_step() == 12
    assert checkpoints.path(12).is_dir()
    arrays, records = checkpoints.restore(3, abstract(groups()))
    checkpoints.close()
    assert_same(arrays, groups())
    assert jnp.issubdtype(arrays["train"]["key"].dtype, jax.dtypes.prng_key)
    assert records == make_records(config(), TOKENIZER, {"step": 3})


def test_restores_onto_another_mesh(tmp_path):
    whole = groups()["params"]
    first = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = {
        "params": {
            "image": {
                "kernel": jax.device_put(
                    whole["image"]["kernel"], NamedSharding(first, PartitionSpec("fsdp", "tensor"))
                )
            }
        }
    }
    save(tmp_path, 1, arrays=split)
    second = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    wanted = NamedSharding(second, PartitionSpec("fsdp"))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    arrays, _ = checkpoints.restore(1, abstract(split, wanted))
    checkpoints.close()
    kernel = arrays["params"]["image"]["kernel"]
    assert kernel.sharding == wanted
    assert kernel.addressable_shards[0].data.shape == (1, 16)
    np.testing.assert_array_equal(kernel, whole["image"]["kernel"])


def test_the_last_few_and_the_best_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, 6, best={2: 0.9, 4: 0.5}, keep_last=2, best_metric="val:top1")
    assert steps(tmp_path) == [2, 5, 6]
    assert find_checkpoint(tmp_path)[1] == 6  # the newest, not the best


def test_a_step_judged_by_another_metric_is_not_the_best(tmp_path):
    save(tmp_path, 1, 2, best={1: 0.9}, keep_last=1, best_metric="val:top1")
    save(tmp_path, 3, 4, best={3: 0.1}, keep_last=1, best_metric="val:top5")
    assert steps(tmp_path) == [3, 4]


def test_only_the_last_few_are_kept_without_a_best_metric(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep_last=3)
    assert steps(tmp_path) == [2, 3, 4]


def steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def without(tree, *path):
    tree = dict(tree)
    if len(path) == 1:
        del tree[path[0]]
    else:
        tree[path[0]] = without(tree[path[0]], *path[1:])
    return tree


def resized():
    arrays = groups()
    arrays["params"]["image"]["kernel"] = jnp.zeros((8, 12))
    return arrays


def grown():
    arrays = groups()
    arrays["params"]["image"]["novel"] = jnp.zeros(3)
    return arrays


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (lambda: {**groups(), "ema": groups()["params"]}, "ema"),
        (resized, r"\(8, 12\)"),
        (grown, "novel"),
        (lambda: without(groups(), "params", "image", "odd"), "odd"),
    ],
    ids=["missing group", "another shape", "missing array", "array too many"],
)
def test_what_does_not_fit_is_refused(saved, wanted, message):
    checkpoints = Checkpoints(saved, CheckpointConfig())
    with pytest.raises(ValueError, match=rf"checkpoints/12 cannot be restored into this config: [\s\S]*{message}"):
        checkpoints.restore(12, abstract(wanted()))
    checkpoints.close()
    gc.collect()


def test_damaged_arrays_of_an_older_format_are_refused(tmp_path, capsys):
    arrays = {"params": {"kernel": groups()["params"]["image"]["kernel"]}}
    save(tmp_path, 12, arrays=arrays)
    make_older(tmp_path / "checkpoints" / "12")
    data = [path for path in (tmp_path / "checkpoints" / "12" / "params").rglob("d/*") if path.is_file()]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(DamagedCheckpoint, match="checkpoints/12 cannot be restored"):
        checkpoints.restore(12, abstract(arrays))
    checkpoints.close()
    assert "checkpoints/12 is of an older format, without checksums" in capsys.readouterr().err
    gc.collect()


def test_find_checkpoint(saved, tmp_path):
    folder = saved / "checkpoints"
    assert find_checkpoint(saved) == (folder, 12)  # 12 > 3 as numbers
    assert find_checkpoint(folder) == (folder, 12)
    assert find_checkpoint(folder / "3") == (folder, 3)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "7").write_text("a file is no step")
    for nothing in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "4", tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match=r"no checkpoint at '.*': give a workdir .* checkpoints/STEP directories"):
            find_checkpoint(nothing)
    assert newest_checkpoint(tmp_path) is None


def test_a_half_written_step_is_ignored_and_cleaned_up(copy):
    folder = copy / "checkpoints"
    half = folder / "15.orbax-checkpoint-tmp"
    shutil.copytree(folder / "12", half)
    assert find_checkpoint(copy) == (folder, 12)
    assert SavedCheckpoint(copy).step == 12
    assert half.exists()  # reading changes nothing
    (half / "rubbish").write_text("")
    save(copy, 15)  # the run goes on and comes to that step again
    assert not half.exists()
    assert find_checkpoint(copy) == (folder, 15)
    assert not (folder / "15" / "rubbish").exists()


def test_a_saved_checkpoint_is_opened_from_any_path(saved):
    for path, step in ((saved, 12), (str(saved / "checkpoints"), 12), (saved / "checkpoints" / "3", 3)):
        opened = SavedCheckpoint(path)
        assert opened.step == step
        assert opened.path == saved / "checkpoints" / str(step)
        assert opened.config == config()
        assert opened.tokenizer().encode("ab") == TOKENIZER.encode("ab")
    newest = newest_checkpoint(saved)
    assert newest is not None
    assert newest.step == 12


@pytest.mark.parametrize("name", ["best-model", "2024", "12.old", "a"])
def test_a_renamed_step_is_opened_with_the_step_that_it_has(saved, tmp_path, name):
    shutil.copytree(saved / "checkpoints" / "12", tmp_path / name)
    opened = SavedCheckpoint(tmp_path / name)
    assert (opened.step, opened.path, opened.config) == (12, tmp_path / name, config())
    params = groups()["params"]
    assert_same(opened.params(abstract(params)), SavedCheckpoint(saved).params(abstract(params)))
    assert SavedCheckpoint(tmp_path / name, step=12).step == 12
    with pytest.raises(ValueError, match="is that of step 12, but step 3 is needed"):
        SavedCheckpoint(tmp_path / name, step=3)
    with pytest.raises(ValueError, match="is the directory of one checkpoint; name the workdir above it"):
        newest_checkpoint(tmp_path / name)


@pytest.mark.parametrize(("name", "is_one"), [("0", True), ("7", True), ("007", False), ("٧", False), ("7a", False)])
def test_names_of_steps(name, is_one):
    """A folder 007 beside the steps is no step 7, which would not be found."""
    assert is_step_name(name) is is_one


def test_a_home_directory_is_expanded_and_an_address_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(saved))
    assert SavedCheckpoint("~/checkpoints").step == 12
    with pytest.raises(ValueError, match="checkpoint=http://host/run: nothing here opens an address of http://"):
        SavedCheckpoint("http://host/run")


def test_copies_of_a_workdir_open_without_its_folder_of_checkpoints(saved, tmp_path):
    shutil.copytree(saved / "checkpoints", tmp_path / "all-of-them")
    assert SavedCheckpoint(tmp_path / "all-of-them").step == 12
    assert SavedCheckpoint(tmp_path / "all-of-them", step=3).path == tmp_path / "all-of-them" / "3"
    assert SavedCheckpoint(saved / "checkpoints" / "3", step=12).step == 12


@pytest.mark.parametrize("group", ["params", "ema"])
def test_the_average_is_evaluated_where_there_is_one(tmp_path, group):
    params = groups()["params"]
    doubled = jax.tree.map(lambda x: 2 * x, params)
    save(tmp_path, 1, arrays={"params": params} if group == "params" else {"params": params, "ema": doubled})
    opened = SavedCheckpoint(tmp_path)
    assert opened.params_group == group
    assert_same(opened.params(abstract(params)), params if group == "params" else doubled)


@pytest.mark.parametrize("name", ["config", "data", "tokenizer", "preprocessing"])
def test_a_missing_or_cut_record_is_refused_and_the_step_before_taken(copy, name):
    step = copy / "checkpoints" / "12"
    record = step / name / "metadata"
    record.write_text(record.read_text()[:-5])
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoints/12 is damaged: {name}/metadata: \d+ bytes instead of"):
        SavedCheckpoint(step)
    newest = newest_checkpoint(copy)
    assert newest is not None
    assert newest.step == 3
    shutil.rmtree(step / name)
    shutil.rmtree(copy / "checkpoints" / "3")
    with pytest.raises(DamagedCheckpoint, match=rf"12 \(damaged: {name}/metadata: missing\)"):
        newest_checkpoint(copy)
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoints/12 is damaged: {name}/metadata: missing"):
        SavedCheckpoint(copy)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"surprise": 1}, "unknown \\['surprise'\\]"),
        ({"seed": "many"}, "seed='many' must be of type int"),
        ([], "unknown \\[\\]"),
    ],
)
def test_a_config_record_of_another_kind_is_refused(copy, record, message):
    make_older(copy / "checkpoints" / "12")
    (copy / "checkpoints" / "12" / "config" / "metadata").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"is damaged or not clipjax's: .*{message}"):
        SavedCheckpoint(copy)


def test_a_data_record_that_is_no_object_is_refused(copy):
    write_record(copy / "checkpoints" / "12", [7])
    with pytest.raises(ValueError, match="is damaged or not clipjax's: data=.7. must be an object"):
        SavedCheckpoint(copy)
    assert Checkpoints(copy, CheckpointConfig()).read_data("decisions", []) == {3: []}


def write_record(step: pathlib.Path, data) -> None:
    """Write another `data` record, and its checksum."""
    (step / "data" / "metadata").write_text(json.dumps(data))
    old = manifest.read(step)
    manifest.write(step, dataclasses.replace(old, files=old.files | manifest.hash_files(step, ["data/metadata"])))


def test_the_tokenizer_record_goes_through_json():
    again = unpack_tokenizer(json.loads(json.dumps(pack_tokenizer(TOKENIZER))))
    assert (again.name, again.vocab_size, again.end_id) == ("bytes", TOKENIZER.vocab_size, TOKENIZER.end_id)
    assert again.encode("a red circle") == TOKENIZER.encode("a red circle")


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"name": "bytes"},
        {"files": {}},
        None,
        [],
        {"name": "bytes", "files": []},
        {"name": "pickle", "files": {}},
        {"name": "sentencepiece", "files": {}},
        {"name": "sentencepiece", "files": {"sentencepiece.model": "no base64!"}},
        {"name": "sentencepiece", "files": {"sentencepiece.model": 5}},
        {"name": "sentencepiece", "files": {"sentencepiece.model": "AAAA"}},
    ],
)
def test_a_damaged_tokenizer_record_is_refused(record):
    with pytest.raises(ValueError):
        unpack_tokenizer(record)


def test_records_say_how_a_picture_becomes_the_input():
    record = make_records(config(), TOKENIZER, {"step": 1})["preprocessing"]
    assert record["image_size"] == 224
    assert (record["resize"], record["interpolation"]) == ("shorter_side", "bicubic, antialiased")
    assert record["mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)


def test_going_on_with_another_config_lists_all_that_differs():
    changed = config()
    changed.optim.learning_rate = 0.25
    changed.model.text.width = 640
    changed.seed = 9
    with pytest.raises(ValueError) as error:
        check_resumable(7, config(), changed)
    message = str(error.value)
    assert message.startswith("the workdir holds a run at step 7 with another config: ")
    for difference in (
        "optim.learning_rate=0.25 (checkpoint: 0.0005)",
        "model.text.width=640 (checkpoint: 512)",
        "seed=9 (checkpoint: 5)",
    ):
        assert difference in message
    assert message.count("(checkpoint: ") == 3
    assert message.endswith("use the old values to go on with it, or another workdir to start anew")


def test_what_touches_neither_state_nor_order_may_change():
    changed = config()
    changed.mesh = MeshConfig(data=2, fsdp=4)
    changed.log.every_examples, changed.log.tensorboard = 7, False
    changed.eval.tasks["new"] = TaskConfig(source="x.tar", classes="scenes", templates="plain")
    changed.checkpoint.keep_last = 9
    changed.init_from = "elsewhere"
    changed.data.tfds_dir, changed.data.num_workers, changed.data.num_threads = "/moved", 4, 8
    changed.data.prefetch_batches, changed.data.max_bad_fraction = 5, 0.5
    check_resumable(7, config(), changed)


@pytest.mark.parametrize("field", ["seed", "total_examples", "warmup_examples", "global_batch_size"])
def test_what_decides_the_run_may_not_change(field):
    changed = config()
    setattr(changed, field, 64)
    with pytest.raises(ValueError, match=f"{field}=64"):
        check_resumable(7, config(), changed)
