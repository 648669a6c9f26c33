"""Preflight: what is refused before a device is touched."""

import copy
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import shutil
import tarfile
import threading
import types
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from clipjax.checkpoints.records import pack_tokenizer
from clipjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MixtureSource,
    ModelConfig,
    SamePair,
    TaskConfig,
    TaskKind,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.data.training_order import DISK_ORDER, MixtureFormat, OrderFormat
from clipjax.evals.runner import build_tasks, check_metric
from clipjax.monitoring import run_record
from clipjax.runtime import owner, process_log
from clipjax.runtime.watchdog import Watchdog
from clipjax.training import preflight
from clipjax.training.decisions import Decisions, Rollback
from clipjax.training.inputs import open_inputs, warn_of_single_reads
from clipjax.training.resume import check_resumable, check_same_run
from tests.data.test_webdataset import pair, write
from tests.runtime.test_owner import holder


def make_config(folder: pathlib.Path, num_classes: int = 5) -> Config:
    """A run on eight pictures, with one task of each kind."""
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for number in range(8):
            picture = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(picture, "PNG")
            for ending, content in (("png", picture.getvalue()), ("txt", f"no {number}".encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "classes.json").write_text(json.dumps([f"class {i}" for i in range(num_classes)]))
    pairs = str(folder / "pairs.tar")
    zero_shot = TaskConfig(source=pairs, classes=str(folder / "classes.json"), templates="plain")
    return Config(
        total_examples=8,
        global_batch_size=8,
        model=ModelConfig(
            embed_dim=16,
            image=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
            text=TextTransformerConfig(context_length=8, vocab_size=260, width=16, depth=1, num_heads=2),
        ),
        data=DataConfig(train=pairs),
        eval=EvalConfig(
            every_examples=8,
            batch_size=8,
            tasks={
                "val": zero_shot,
                "pairs": TaskConfig(kind=TaskKind.RETRIEVAL, source=pairs),
                "same": TaskConfig(kind=TaskKind.IMAGE_RETRIEVAL, source=pairs, gallery=pairs),
            },
        ),
    )


@pytest.mark.parametrize("best", ["val:top5", "val:accuracy", "test:top1", "top1", "val:num_examples"])
def test_a_best_metric_that_no_task_gives_is_refused(tmp_path, best):
    """Five classes have no top5: the run would end with a KeyError at its first evaluation."""
    config = make_config(tmp_path)
    config.checkpoint = CheckpointConfig(best_metric=best)
    message = f"checkpoint.best_metric={best!r} must be TASK:METRIC, one of val:top1, val:per_class, "
    with process_log.session(), pytest.raises(ValueError, match=re.escape(message)):
        preflight.check(lambda: (config, tmp_path / "run"))


@pytest.mark.parametrize(
    ("num_classes", "best"),
    [(5, "val:top1"), (6, "val:top5"), (5, "pairs:text_to_image_r10"), (5, "same:gallery_to_source_r5")],
)
def test_a_best_metric_that_a_task_gives_is_accepted(tmp_path, num_classes, best):
    check_metric(best, build_tasks(make_config(tmp_path, num_classes)))


def test_without_tasks_there_is_no_best_metric(tmp_path):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    with pytest.raises(ValueError, match="one of none: no tasks"):
        check_metric("val:top1", build_tasks(config))


def files_in(folder: pathlib.Path) -> dict[str, bytes]:
    """All files but the indexes of shards, which any reader of the data leaves beside them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != ".clipjax-index")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check(config: Config, workdir: pathlib.Path) -> None:
    try:
        with process_log.session():
            preflight.check(lambda: (config, workdir))
    finally:
        owner.release(workdir)


@pytest.mark.parametrize("cause", ["config", "data", "samples"])
def test_a_refused_start_leaves_nothing(tmp_path, cause):
    config = make_config(tmp_path)
    match cause:
        case "config":
            config.total_examples = 0
        case "data":
            config.data.train = str(tmp_path / "gone.tar")
        case "samples":  # no sample of the zero-shot task has a label
            pass
    before = files_in(tmp_path)
    message = {"config": "total_examples", "data": "gone.tar", "samples": "eval.tasks.val: no sample has a label"}[
        cause
    ]
    with pytest.raises(ValueError, match=message):
        check(config, tmp_path / "new" / "run")
    assert files_in(tmp_path) == before and not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=message):
        check(config, tmp_path / "mine")
    assert (tmp_path / "mine").is_dir() and files_in(tmp_path) == before


@pytest.mark.parametrize("place", ["train", "link", "source", "gallery", "relative"])
def test_a_compile_cache_in_a_folder_of_data_is_refused(tmp_path, monkeypatch, place):
    data, others = tmp_path / "data", tmp_path / "others"
    data.mkdir()
    others.mkdir()
    (others / "link.tar").symlink_to(data / "pairs.tar")
    write(others / "other.tar", [member for i in range(8) for member in pair(f"other{i}")])
    config = dataclasses.replace(make_config(data), eval=EvalConfig(), compile_cache=str(data / "xla"))
    config.data.train = other = str(others / "other.tar")
    match place:
        case "train":
            config.data.train = f"{tmp_path}/{{others/o*,data/pairs}}.tar"
        case "link":
            config.data.train = f"{others}/l*.tar"
        case "relative":
            monkeypatch.chdir(data)
            config.data.train, config.compile_cache = "pairs.tar", "../data/xla"
        case _:
            task = TaskConfig(kind=TaskKind.IMAGE_RETRIEVAL, source=other, gallery=other)
            task = dataclasses.replace(task, **{place: str(data / "pairs.tar")})
            config.eval = EvalConfig(batch_size=8, tasks={"same": task})
    with pytest.raises(ValueError, match=r"compile_cache='.*xla' lies in .*, a folder of data or checkpoints"):
        check(config, tmp_path / "run")
    assert not (data / "xla").exists() and not (tmp_path / "run").exists()


def test_a_log_of_metrics_that_cannot_be_written_is_refused(tmp_path):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "gone" / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"--workdir=.*run/metrics.jsonl: cannot be written to .No such file"):
        check(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *(
            (name, True)
            for name in ("metrics.jsonl", "events.jsonl", "decisions.jsonl", "run.json", "results.json", ".owner")
        ),
        *((name, False) for name in ("checkpoints", "logs", "left_out", "profile", "tensorboard")),
    ],
)
def test_a_workdir_with_something_else_for_a_file_or_a_folder_is_refused(tmp_path, name, folder):
    """A pipe would keep the run waiting for ever."""
    config = make_config(tmp_path)
    path = tmp_path / "workdir" / name
    for make in (os.mkdir, os.mkfifo) if folder else (pathlib.Path.touch, os.mkfifo):
        path.parent.mkdir()
        make(path)
        with pytest.raises(
            ValueError,
            match=rf"--workdir=.*workdir: {re.escape(name)} in it is no {'file' if folder else 'folder'}, .*; move it",
        ):
            preflight.check(lambda: (config, path.parent))
        assert [each.name for each in path.parent.iterdir()] == [name]
        shutil.rmtree(path.parent)


def test_a_workdir_that_is_held_stays_as_it_is(tmp_path):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    check(config, tmp_path / "run")
    assert set(files_in(tmp_path / "run")) == {".owner", "logs/rank-00000.log", "run.json"}
    with holder(tmp_path / "run") as other:
        before = files_in(tmp_path / "run")
        with pytest.raises(ValueError, match=f"another run holds it: process {other.pid} "):
            check(config, tmp_path / "run")
        assert files_in(tmp_path / "run") == before


def test_a_start_with_fewer_devices_than_the_last_warns_before_the_mesh_is_judged(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    check(config, tmp_path / "run")
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(jax, "local_device_count", lambda: 7)
    monkeypatch.setattr(jax, "device_count", lambda: 7)
    with pytest.raises(ValueError, match="7"):
        check(config, tmp_path / "run")
    assert "warning: 7 devices, 8 at the last start of this run: host " in capsys.readouterr().err


def test_a_hang_of_the_preflight_is_ended_with_the_place_where_it_waits(tmp_path, monkeypatch):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    config.recovery.stuck_seconds = 0.1  # preflight has ten times that
    ended: list[str] = []
    over = threading.Event()

    def hang(*_: object) -> None:
        assert over.wait(60)
        raise ValueError("over")

    def end(self: Watchdog, text: str) -> None:
        ended.append(text)
        over.set()

    monkeypatch.setattr(Watchdog, "_end", end)
    monkeypatch.setattr(preflight, "Watchdog", functools.partial(Watchdog, tick_seconds=0.1))
    monkeypatch.setattr(preflight, "open_inputs", hang)
    with pytest.raises(ValueError, match="over"):
        check(config, tmp_path / "run")
    assert "is stuck after step 0 in preflight: no progress for 1 s" in ended[0]
    assert "it waits in clipjax/training/preflight.py:" in ended[0] and "(_open_here)" in ended[0]


def test_a_workdir_that_has_lost_its_checkpoints_is_refused(tmp_path):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    workdir = tmp_path / "run"
    check(config, workdir)
    check(config, workdir)  # without a committed step it starts anew
    run_record.record_commit(workdir, 8)
    (workdir / "metrics.jsonl").write_text("{}")
    (workdir / "checkpoints" / "8.damaged").mkdir(parents=True)
    lost = (
        r"run.json records a checkpoint at step 8, but .*checkpoints holds no checkpoint that can be used; bring the "
        r"checkpoints back, or start anew, in another workdir or by removing .*run.json knowingly; set aside there: 8"
    )
    with pytest.raises(ValueError, match=lost):
        check(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == "{}" and (workdir / "checkpoints" / "8.damaged").is_dir()
    (workdir / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged: .* whether this workdir once had checkpoints cannot be"):
        check(config, workdir)
    (workdir / "run.json").unlink()
    decision = Rollback(to_step=2, first_step=3, last_step=4, first_batch=2, last_batch=3, reason="not finite")
    Decisions(workdir).take(lambda: decision)
    with pytest.raises(ValueError, match=r"decisions.jsonl holds rollbacks, but .* by removing .*decisions.jsonl know"):
        check(config, workdir)
    (workdir / "decisions.jsonl").write_text("{")
    check(config, workdir)  # half a line has not taken effect
    (workdir / "decisions.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="decisions.jsonl, line 1: .*bring back the file"):
        check(config, workdir)
    (workdir / "decisions.jsonl").unlink()
    (workdir / "run.json").unlink()
    check(config, workdir)
    (workdir / "checkpoints").rename(workdir / "elsewhere")
    (workdir / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match="its folder checkpoints cannot be read .No such file"):
        check(config, workdir)


def make_saved(config: Config, record: dict) -> Any:
    """As much of a checkpoint as the comparison of the data looks at."""
    tokenizer = pack_tokenizer(build_tokenizer("bytes"))
    record = {"step": 3, **record}
    records = {"tokenizer": tokenizer, "data": record}
    return types.SimpleNamespace(path=pathlib.Path("run/checkpoints/3"), config=config, step=3, records=records)


def test_contents_decide_whether_a_run_goes_on(tmp_path, capsys):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    for name in ("b", "c"):
        write(tmp_path / f"{name}.tar", [member for i in range(4) for member in pair(f"{name}{i}")])
    config.data.train = f"{tmp_path}/{{pairs,b,c}}.tar"
    source = open_inputs(config).source
    shards = json.loads(json.dumps([list(shard) for shard in source.digests()]))
    saved = make_saved(copy.deepcopy(config), {"num_samples": 16, "shards": shards})

    def resume(train: str) -> list[str]:
        config.data.train = train
        inputs = open_inputs(config, saved)
        check_same_run(saved, config, inputs)
        return [shard.digest for shard in inputs.source.digests()]

    (tmp_path / "b.tar").rename(tmp_path / "moved.tar")
    # Another place, and another order, which becomes the recorded one.
    assert resume(f"{tmp_path}/{{c,pairs,moved}}.tar") == [digest for _, digest, _ in shards]
    write(tmp_path / "b.tar", [member for i in range(4) for member in pair(f"z{i}")])
    with pytest.raises(ValueError, match=r"^data.train=.* has 16 samples of other contents .*\(changed: .*/b.tar \(4"):
        resume(f"{tmp_path}/{{pairs,b,c}}.tar")
    with pytest.raises(ValueError, match=r"has 12 samples .* than the 16 .*\(missing: .*/b.tar \(4 samples\)\)"):
        resume(f"{tmp_path}/{{c,pairs}}.tar")
    with pytest.raises(ValueError, match=r"\(additional: .*/b.tar \(4 samples\)\)"):
        resume(f"{tmp_path}/{{pairs,moved,c,b}}.tar")
    # Of older versions only path and number are known.
    saved.records["data"] = {"step": 3, "num_samples": 16}
    resume(f"{tmp_path}/{{pairs,b,c}}.tar")
    assert "the checkpoint has no digests of its data, so the contents were not compared" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is another place than that of the run in the workdir"):
        resume(f"{tmp_path}/{{pairs,moved,c}}.tar")


@pytest.mark.newest
def test_another_choice_of_samples_is_another_run(tmp_path, capsys):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    write(tmp_path / "b.tar", [member for i in range(8) for member in pair(f"b{i}")])
    drop = tmp_path / "drop"
    drop.write_text("b0\nb1\n")
    config.data = dataclasses.replace(config.data, train=f"{tmp_path}/{{pairs,b}}.tar", drop_keys=str(drop))
    source = open_inputs(config).source
    assert (
        f"filters: {config.data.train}: 14 of 16 samples are kept, dropped: 2 by data.drop_keys"
        in capsys.readouterr().err
    )
    shards = json.loads(json.dumps([list(shard) for shard in source.digests()]))
    saved = make_saved(copy.deepcopy(config), {"num_samples": 14, "shards": shards})
    config.data.train = f"{tmp_path}/{{b,pairs}}.tar"
    inputs = open_inputs(config, saved)
    check_same_run(saved, config, inputs)
    assert [inputs.source[i].key for i in range(14)] == [source[i].key for i in range(14)]
    drop.write_text("b0\nb2\n")  # as many, but others
    with pytest.raises(ValueError, match=r"has 14 samples of other contents .*\(changed: .*/b.tar \(6 samples"):
        check_same_run(saved, config, open_inputs(config, saved))
    config.data.drop_keys = None
    with pytest.raises(ValueError, match=r"data.drop_keys=None \(checkpoint: "):
        check_same_run(saved, config, open_inputs(config, saved))
    config.data.drop_keys = str(drop)
    drop.write_text("\n".join(f"b{i}" for i in range(8)) + "\npairs/none")
    config.global_batch_size = 16
    with pytest.raises(
        ValueError, match=r"must not exceed the 8 samples of .*; filters: .*8 of 16 .*8 by data.drop_keys"
    ):
        open_inputs(config)


def test_the_order_is_chosen_once_and_then_that_of_the_run(tmp_path):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    assert open_inputs(config).order == DISK_ORDER
    begun = open_inputs(dataclasses.replace(config, data=dataclasses.replace(config.data, order_block=64))).order
    assert begun is not None and begun.block == 64 and config.global_batch_size % begun.lanes == 0
    for record, expected in (
        ({"order": OrderFormat(32, 5, 2).to_record()}, OrderFormat(32, 5, 2)),  # begun elsewhere, on an object store
        ({"order": None}, None),
        ({}, None),
    ):
        assert open_inputs(config, make_saved(config, record)).order == expected
    with pytest.raises(ValueError, match="must be divisible by the 7 lanes of the order that the run was begun with"):
        open_inputs(config, make_saved(config, {"order": OrderFormat(32, 5, 7).to_record()}))


def test_another_block_is_another_run(tmp_path):
    config = make_config(tmp_path)
    saved = make_saved(copy.deepcopy(config), {"num_samples": 8, "order": OrderFormat(64, 4, 1).to_record()})
    check_same_run(saved, config, open_inputs(config, saved))
    config.data.order_block = 16
    with pytest.raises(ValueError, match=r"data.order_block=16 \(checkpoint: None\)"):
        check_same_run(saved, config, open_inputs(config, saved))


@pytest.mark.parametrize(
    ("order", "is_remote", "fields", "is_told"),
    [
        (DISK_ORDER, True, {}, True),
        (None, True, {}, True),
        (DISK_ORDER, False, {}, False),
        (OrderFormat(64, 8, 8), True, {}, False),
        (DISK_ORDER, True, {"order_block": 1}, False),  # was asked for
        (DISK_ORDER, True, {"cache_dir": "/cache"}, False),
    ],
)
def test_a_run_that_left_its_disks_for_a_store_is_told_the_remedy(order, is_remote, fields, is_told):
    config = Config(global_batch_size=4096, data=DataConfig(train="x", **fields))
    warning = warn_of_single_reads(config, order, [10**6], [is_remote])
    assert (warning is not None) == is_told
    assert warning is None or ("data.cache_dir" in warning and "blocks of 64 samples" in warning)


def test_a_new_start_would_read_a_small_source_one_by_one_too():
    config = Config(global_batch_size=4096, data=DataConfig(train="x"))
    assert warn_of_single_reads(config, DISK_ORDER, [16], [True]) is None


def test_the_parts_of_a_mixture_may_move_and_their_weights_stay(tmp_path):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    write(tmp_path / "b.tar", [member for i in range(12) for member in pair(f"b{i}")])
    first = config.data.train
    config.data.train, config.loss.same_pair = "", SamePair.INDEX
    config.data.mixture = {
        "b": MixtureSource(source=f"{tmp_path}/b.tar", weight=2),
        "a": MixtureSource(source=first, weight=1),
    }
    begun = open_inputs(config)
    assert begun.source.location(0).startswith("a: shard ") and sorted(begun.sources) == sorted(
        [first, f"{tmp_path}/b.tar"]
    )
    assert begun.order == MixtureFormat((DISK_ORDER, DISK_ORDER), (1, 1))
    record = {
        "num_samples": len(begun.source),
        "shards": json.loads(json.dumps([list(shard) for shard in begun.source.digests()])),
        "order": begun.order.to_record(),
    }
    saved = make_saved(copy.deepcopy(config), record)
    (tmp_path / "b.tar").rename(tmp_path / "moved.tar")
    config.data.mixture["b"].source = f"{tmp_path}/moved.tar"
    check_same_run(saved, config, open_inputs(config, saved))
    config.data.mixture["b"].weight = 3
    with pytest.raises(ValueError, match=r"data.mixture.b.weight=3 \(checkpoint: 2"):
        check_same_run(saved, config, open_inputs(config, saved))
    config.data.mixture["b"].weight = 2
    saved.config.data.mixture["b"].captions, config.data.mixture["b"].captions = {"source": 1.0}, {"source": 2.0}
    with pytest.raises(ValueError, match=r"data.mixture.b.captions.source=2.0 \(checkpoint: 1.0"):
        check_resumable(1, saved.config, config)
    saved.config.data.mixture["b"].captions, config.data.mixture["b"].captions = {}, {}
    write(tmp_path / "moved.tar", [member for i in range(12) for member in pair(f"c{i}")])
    with pytest.raises(
        ValueError, match=r"^data.mixture={a: .*, b: .*moved.tar} has .* \(missing: .*b.tar.*additional"
    ):
        check_same_run(saved, config, open_inputs(config, saved))
    config.data.mixture["c"] = MixtureSource(source=first)
    with pytest.raises(ValueError, match="begun with 2 sources, and now there are 3"):
        open_inputs(config, saved)
    config.data.mixture["b"].source = f"{tmp_path}/nothing.tar"
    with pytest.raises(ValueError, match=r"^data.mixture.b: .*match no file"):
        open_inputs(config)


def test_shards_stay_with_their_source_of_a_mixture(tmp_path):
    """In any order inside one; but between two, the same shards in the same order would be another mixture."""
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    for name in "xyz":
        write(tmp_path / f"{name}.tar", [member for i in range(12) for member in pair(f"{name}{i}")])
    config.data.train, config.loss.same_pair = "", SamePair.INDEX

    def mixture(first: str, second: str) -> None:
        config.data.mixture = {
            "a": MixtureSource(source=f"{tmp_path}/{first}.tar"),
            "b": MixtureSource(source=f"{tmp_path}/{second}.tar"),
        }

    mixture("x", "{y,z}")
    begun = open_inputs(config)
    assert begun.order is not None
    shards = json.loads(json.dumps([list(shard) for shard in begun.source.digests()]))
    record = {"num_samples": 36, "shards": shards, "order": begun.order.to_record()}
    saved = make_saved(copy.deepcopy(config), record)
    mixture("x", "{z,y}")
    again = open_inputs(config, saved)
    check_same_run(saved, config, again)
    assert [again.source.location(i) for i in range(36)] == [begun.source.location(i) for i in range(36)]
    mixture("{x,y}", "z")
    with pytest.raises(
        ValueError, match="sources have 2, 1 shards, those of the run in the workdir had 1, 2; each source"
    ):
        open_inputs(config, saved)
