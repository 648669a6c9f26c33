"""The main job as a user runs it: train, be killed, go on, evaluate, open as a library."""

import io
import json
import pathlib
import shutil
import signal
import socket
import tarfile
import time
import urllib.request
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

import clipjax
from clipjax.checkpoints.saved import SavedCheckpoint, find_checkpoint
from clipjax.cli.eval import main as main_eval
from clipjax.monitoring import events
from clipjax.monitoring.goodput import History
from tests.commands import exit_code
from tests.e2e.conftest import run, start

TIMINGS = ("examples_per_second", "input_wait_fraction", "seconds_left", "goodput", "wall_seconds")


def train_arguments(config: pathlib.Path, workdir: pathlib.Path, *overrides: str) -> tuple[str, ...]:
    return ("train", f"--config={config}", f"--workdir={workdir}", *overrides)


def log_lines(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, read without clipjax's own code."""
    import orbax.checkpoint as ocp

    found = {}
    for group in ("params", "ema", "batch_stats", "train"):
        if group == "batch_stats" and not (workdir / "checkpoints" / str(step) / group).exists():
            continue
        with ocp.StandardCheckpointer() as reader:
            tree = reader.restore((workdir / "checkpoints" / str(step) / group).absolute())
        import jax

        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            found[group + jax.tree_util.keystr(path)] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return found


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory, cache) -> pathlib.Path:
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    output = run(*train_arguments(tiny_config, workdir), **cache)
    assert "step 12/12" in output
    return workdir


def assert_same_run(workdir: pathlib.Path, finished: pathlib.Path) -> None:
    assert log_lines(workdir) == log_lines(finished)
    ours, theirs = arrays(workdir, 12), arrays(finished, 12)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not different
    assert (
        json.loads((workdir / "results.json").read_text())["tasks"]
        == json.loads((finished / "results.json").read_text())["tasks"]
    )


@pytest.mark.process
def test_a_run_leaves_log_checkpoints_and_results(finished):
    steps = [line for line in log_lines(finished) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["examples_seen"] == 384
    needed = {"loss", "logit_scale", "learning_rate", "grad_norm", "samples_skipped", "image_to_text_accuracy"}
    assert needed <= set(steps[0])
    assert [line["step"] for line in log_lines(finished) if "eval" in line] == [6, 12]
    results = json.loads((finished / "results.json").read_text())
    assert results["checkpoint"] == str(finished / "checkpoints" / "12")
    assert set(results["tasks"]) == {"scenes/val", "scenes/pairs"}
    assert 0 <= results["tasks"]["scenes/val"]["top1"] <= 1
    kept = {int(path.name) for path in (finished / "checkpoints").iterdir() if path.name.isdigit()}
    assert {9, 12} <= kept <= {6, 9, 12}


@pytest.mark.process
def test_every_leaf_of_the_state_was_trained_and_saved(finished):
    """A leaf that were lost on saving would come back as it began."""
    early, late = arrays(finished, 9), arrays(finished, 12)
    same = [name for name in early if np.array_equal(early[name], late[name])]
    skipped = [f"train['health']['{name}']" for name in ("skipped", "skipped_in_a_row")]
    assert sorted(same) == [*skipped, "train['key']", "train['samples_skipped']"]  # nothing in this data is bad


def kill_after_lines(process, workdir: pathlib.Path, seen: int) -> None:
    """`kill -9` once the log has so many lines."""
    deadline, path = time.monotonic() + 120, workdir / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= seen:
            break
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (workdir / "results.json").exists()


@pytest.mark.newest
@pytest.mark.parametrize("seen", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.process
def test_killed_with_sigkill_and_started_again_equals_the_undisturbed_run(tiny_config, finished, tmp_path, cache, seen):
    """The slow ones compile anew what they compile."""
    if seen != 5:
        cache = {}
    began = time.time()
    kill_after_lines(start(*train_arguments(tiny_config, tmp_path), **cache), tmp_path, seen)
    output = run(*train_arguments(tiny_config, tmp_path), **cache)
    assert_same_run(tmp_path, finished)
    assert_time_adds_up(tmp_path, began)
    assert "waiting for data" in output


def assert_time_adds_up(workdir: pathlib.Path, began: float) -> None:
    """The ledger of a run that was killed once holds its wall-clock time, and all causes that there were."""
    found = events.read(workdir)
    assert [event["event"] for event in found if event["event"] != "ledger"] == ["start", "start", "stop"]
    seconds = History.from_events(found).seconds
    assert sum(seconds.values()) == pytest.approx(found[-1]["time"] - began, rel=0.01)
    assert all(
        seconds[cause] > 0 for cause in ("initialisation", "compile", "steps", "saving", "evaluation", "stopped")
    )
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["goodput"] < 1 for line in lines if "loss" in line and line["step"] > 2)


@pytest.mark.process
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(tiny_config, finished, tmp_path, cache):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "results.json").unlink()
    data = max((workdir / "checkpoints" / "12" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 16
    data.write_bytes(content)
    output = run(*train_arguments(tiny_config, workdir), **cache)
    assert f"checkpoint {workdir}/checkpoints/12 is damaged (params/" in output
    assert f": another content); going on from {workdir}/checkpoints/9" in output
    assert (workdir / "checkpoints" / "12.damaged").is_dir()
    assert_same_run(workdir, finished)


@pytest.mark.slow
@pytest.mark.process
def test_memory_of_every_sample_and_a_teacher_survive_kill_and_other_devices(tiny_config, finished, tmp_path, cache):
    teacher = tmp_path / "teacher"
    shutil.copytree(finished, teacher)
    shutil.rmtree(teacher / "checkpoints" / "12")

    def arguments(name: str, *overrides: str) -> tuple[str, ...]:
        return train_arguments(
            tiny_config,
            tmp_path / name,
            "--config.loss.kind=global",
            "--config.loss.gamma_decay_examples=192",
            f"--config.loss.distill_from={teacher}",
            "--config.microbatch_size=16",
            *overrides,
        )

    run(*arguments("undisturbed"), **cache)
    memory = arrays(tmp_path / "undisturbed", 12)["train['memory']"]
    assert np.isfinite(memory).all(axis=1).sum() == 384  # every sample so far was drawn once
    kill_after_lines(start(*arguments("killed"), **cache), tmp_path / "killed", 8)
    shutil.copytree(finished / "checkpoints" / "12", teacher / "checkpoints" / "12")  # the teacher has gone on
    run(*arguments("killed"), **cache)
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "12")
    many = cache | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run(*arguments("killed", "--config.mesh.slice=2", "--config.mesh.fsdp=2"), **many)
    again = arrays(tmp_path / "killed", 12)["train['memory']"]
    np.testing.assert_array_equal(np.isfinite(again), np.isfinite(memory))
    np.testing.assert_allclose(again, memory, atol=0.05)  # three steps of Adam after another rounding
    shutil.rmtree(teacher / "checkpoints" / "9")
    assert "checkpoints/9 is needed, but no longer there" in run(*arguments("killed"), expect=2)


@pytest.fixture
def refusal(tiny_config, monkeypatch, capfd) -> Callable[..., str]:
    """What `clipjax train` says when it refuses, with exit code 2; in this process, since nothing is compiled."""
    from clipjax.cli import train

    monkeypatch.setattr("jax.device_count", lambda: 1)

    def refuse(workdir: pathlib.Path, *overrides: str) -> str:
        assert exit_code(train.main, train_arguments(tiny_config, workdir, *overrides)[1:]) == 2
        return capfd.readouterr().err

    return refuse


@pytest.mark.process
def test_a_teacher_with_other_inputs_is_refused(refusal, finished, tmp_path):
    output = refusal(
        tmp_path,
        f"--config.loss.distill_from={finished}",
        "--config.model.image.image_size=32",
        "--config.model.text.context_length=40",
    )
    assert "model.image.image_size=32 (teacher: 16), model.text.context_length=40 (teacher: 32)" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.process
def test_a_signal_saves_and_leaves_and_the_run_goes_on(tiny_config, finished, tmp_path, cache, number):
    process = start(*train_arguments(tiny_config, tmp_path), **cache)
    path = tmp_path / "metrics.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 1):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    _, step = find_checkpoint(tmp_path)
    assert f"after step {step}" in output
    run(*train_arguments(tiny_config, tmp_path), **cache)
    assert_same_run(tmp_path, finished)


def make_tar(path: pathlib.Path, *, corrupt: int) -> None:
    """64 pairs, the first few of them without a readable picture."""
    with tarfile.open(path, "w") as tar:
        for i in range(64):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (4 * i, 255 - 4 * i, 99)).save(picture, "PNG")
            content = b"<html>gone</html>" if i < corrupt else picture.getvalue()
            for name, data in ((f"{i:03d}.png", content), (f"{i:03d}.txt", f"shade {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.process
def test_a_run_on_bad_data_saves_stops_and_goes_on_once_that_is_allowed(tiny_config, tmp_path, cache):
    make_tar(tmp_path / "pairs.tar", corrupt=8)
    arguments = train_arguments(tiny_config, tmp_path / "run", f"--config.data.train={tmp_path}/pairs.tar")
    output = run(*arguments, expect=3, **cache)
    assert "data.max_bad_fraction=0.05" in output and "(corrupt_image " in output
    assert "pairs.tar, key 00" in output and "Raise data.max_bad_fraction" in output
    assert "Traceback" not in output
    assert 0 < find_checkpoint(tmp_path / "run")[1] < 12
    run(*arguments, "--config.data.max_bad_fraction=0.2", **cache)
    steps = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["samples_skipped"]["corrupt_image"] == 6 * 8  # six epochs


@pytest.mark.process
def test_a_finished_run_is_left_as_it_is(tiny_config, finished, tmp_path, cache):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    run(*train_arguments(tiny_config, workdir), **cache)
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.process
def test_a_port_that_is_taken_is_refused(refusal, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        output = refusal(tmp_path, f"--config.log.prometheus_port={port}")
    assert f"log.prometheus_port={port} cannot be used" in output and "choose a free port" in output
    assert "Traceback" not in output


@pytest.mark.process
def test_a_run_is_seen_from_outside_and_profiled(tiny_config, tmp_path, cache):
    """A scrape and SIGUSR1 before the first step."""
    process = start(*train_arguments(tiny_config, tmp_path, "--config.log.prometheus_port=0"), **cache)
    assert process.stdout is not None
    url = next(line for line in process.stdout if "metrics for Prometheus: " in line).split()[-1]
    process.send_signal(signal.SIGUSR1)
    with urllib.request.urlopen(url, timeout=120) as reply:
        scraped = reply.read().decode()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert 'clipjax_wall_seconds{cause="compile"}' in scraped and 'clipjax_events_total{event="start"} 1.0' in scraped
    assert "Thread 0x" in (tmp_path / "logs" / "rank-00000.log").read_text()
    assert any((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.process
def test_going_on_with_another_config_is_refused(refusal, finished):
    output = refusal(finished, "--config.optim.learning_rate=0.5")
    assert "optim.learning_rate=0.5 (checkpoint: 0.001)" in output
    assert "Traceback" not in output


@pytest.mark.process
def test_eval_needs_only_the_checkpoint_and_gives_what_training_gave(finished, tmp_path, cache, capfd):
    output = run("eval", f"--checkpoint={finished}", f"--output={tmp_path}/results.json", **cache)
    assert "scenes/val" in output
    ours = json.loads((tmp_path / "results.json").read_text())
    assert ours == json.loads((finished / "results.json").read_text())
    one = run("eval", f"--checkpoint={finished}/checkpoints/9", "--tasks=scenes/val", **cache)
    assert "scenes/pairs" not in one
    assert exit_code(main_eval, [f"--checkpoint={finished}", "--tasks=imagenet"]) == 2
    refused = capfd.readouterr().err
    assert "imagenet is not among the tasks of the checkpoint's config (scenes/val, scenes/pairs)" in refused


@pytest.mark.process
def test_mesh_of_simulated_devices_gives_the_same_loss(tiny_config, finished, tmp_path, cache):
    run(
        *train_arguments(tiny_config, tmp_path, "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        **cache,
    )
    ours = [line["loss"] for line in log_lines(tmp_path) if "loss" in line]
    theirs = [line["loss"] for line in log_lines(finished) if "loss" in line]
    # Rounding differs with the split, and Adam's first steps turn a tiny gradient's sign into a full step.
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)


@pytest.mark.slow  # tests/training restores on other meshes, too
@pytest.mark.process
def test_a_checkpoint_goes_on_with_another_mesh(tiny_config, finished, tmp_path, cache):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    run(
        *train_arguments(tiny_config, tmp_path / "run", "--config.mesh.fsdp=4"),
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        **cache,
    )
    ours, theirs = arrays(tmp_path / "run", 12), arrays(finished, 12)
    for name in ours:
        # Three steps of Adam at 1e-3: a rounding error can move a weight by no more than the steps themselves.
        np.testing.assert_allclose(ours[name], theirs[name], atol=6e-3, err_msg=name)


@pytest.mark.process
def test_init_from_starts_with_the_averaged_weights(tiny_config, finished, tmp_path, cache):
    run(
        *train_arguments(
            tiny_config,
            tmp_path,
            f"--config.init_from={finished}",
            "--config.optim.learning_rate=1e-12",
            "--config.total_examples=64",
            "--config.optim.weight_decay=0",
        ),
        **cache,
    )
    ours, theirs = SavedCheckpoint(tmp_path), SavedCheckpoint(finished)
    assert ours.step == 2
    first, source = arrays(tmp_path, 2), arrays(finished, 12)
    for name, value in first.items():
        if name.startswith("params"):
            np.testing.assert_allclose(value, source[name.replace("params", "ema", 1)], atol=1e-6)
    assert theirs.params_group == "ema"


@pytest.fixture(scope="module")
def resnet_config(tiny_config, tmp_path_factory) -> pathlib.Path:
    """The tiny run with a ResNet, six steps and no tasks."""
    path = tmp_path_factory.mktemp("resnet") / "config.py"
    path.write_text(f"""
import runpy
from clipjax.config import CheckpointConfig, EvalConfig, ResNetConfig

def get_config():
    config = runpy.run_path({str(tiny_config)!r})["get_config"]()
    config.model.image = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, num_heads=4)
    config.total_examples, config.eval = 192, EvalConfig()
    config.checkpoint = CheckpointConfig(every_examples=96, keep_last=2)
    return config
""")
    return path


@pytest.mark.slow
@pytest.mark.process
def test_a_resnet_goes_on_bit_for_bit_and_lends_its_tower(resnet_config, tmp_path):
    def arguments(name: str, *overrides: str) -> tuple[str, ...]:
        return train_arguments(resnet_config, tmp_path / name, *overrides)

    run(*arguments("undisturbed"))
    kill_after_lines(start(*arguments("killed")), tmp_path / "killed", 4)
    run(*arguments("killed"))
    ours, theirs = arrays(tmp_path / "killed", 6), arrays(tmp_path / "undisturbed", 6)
    assert ours.keys() == theirs.keys() and any(name.startswith("batch_stats") for name in ours)
    assert not [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    # LiT (arXiv 2111.07991): the image tower is taken and stays, the text tower starts anew and learns.
    locked = ("--config.init_match=('image/.*',)", "--config.optim.freeze=('image/.*',)", "--config.seed=4")
    lit = arguments("lit", f"--config.init_from={tmp_path / 'undisturbed'}", *locked, "--config.total_examples=64")
    run(*lit)
    taken = arrays(tmp_path / "lit", 2)
    for name, value in taken.items():
        if name.startswith("params['image']"):
            np.testing.assert_array_equal(value, theirs[name.replace("params", "ema", 1)], err_msg=name)
        elif name.startswith("batch_stats"):
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)
        elif name == "params['text']['token_embed']":
            assert not np.allclose(value, theirs[name], atol=1e-2), name


@pytest.mark.process
def test_init_from_another_model_is_refused(refusal, finished, tmp_path):
    output = refusal(tmp_path, f"--config.init_from={finished}", "--config.model.embed_dim=8")
    assert "image/proj/kernel (16, 8) (checkpoint: (16, 16))" in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.data.train=tfds:nothing/train"], "nothing"),
        (["--config.data.train=nowhere/*.tar"], "nowhere/*.tar"),
        (["--config.data.tokenizer=clip:nowhere.gz"], "nowhere.gz"),
        (["--config.mesh.data=3"], "global_batch_size=32 must be divisible by 3"),
        (["--config.mesh.fsdp=16", "--config.mesh.data=1"], "make 16 devices, but there are 1"),
        (["--config.model.text.vocab_size=100"], "model.text.vocab_size=100 must be at least 259"),
        (["--config.optim.freeze=('visual',)"], "optim.freeze='visual' matches no parameter"),
        (["--config.init_from=nowhere"], "no checkpoint at 'nowhere'"),
        (["--config.eval.tasks['scenes/val'].classes=birds"], "eval.tasks.scenes/val: classes='birds'"),
        (["--config.optim.lr=1"], "optim has no field 'lr'"),
        (["--config.total_examples=many"], "total_examples=many"),
    ],
)
def test_mistakes_are_refused_in_one_clear_message(refusal, tmp_path, overrides, message):
    error = refusal(tmp_path, *overrides)
    assert message in error
    assert all(line.startswith("clipjax train: error: ") for line in error.splitlines())


def test_an_unwritable_workdir_is_refused(tiny_config, tmp_path, capfd):
    from clipjax.cli import train

    (tmp_path / "file").write_text("")
    assert exit_code(train.main, [f"--config={tiny_config}", f"--workdir={tmp_path}/file/run"]) == 2
    assert "cannot be written to" in capfd.readouterr().err


@pytest.mark.process
def test_load_opens_the_model_as_a_library(finished):
    model = clipjax.load(finished)
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    embed = model.encode_image([array, Image.fromarray(array), Image.new("L", (5, 90))])
    assert embed.shape == (3, 16)
    assert embed.dtype == np.float32
    np.testing.assert_array_equal(embed[0], embed[1])
    np.testing.assert_allclose(np.linalg.norm(embed, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(model.encode_image(array), embed[:1], atol=1e-6)  # another batch size, another rounding
    text = model.encode_text(["a red circle", "a blue star " * 50])
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-6)
    classifier = model.zero_shot_classifier(["cat", "dog"], ["a {}", "the {}"])
    assert classifier.shape == (2, 16)
    assert model.logit_scale == pytest.approx(1 / 0.07, rel=0.1)
    assert model.encode_image([]).shape == (0, 16)
    with pytest.raises(ValueError, match="give PIL images or uint8 arrays"):
        model.encode_image(array.astype(np.float32))
    with pytest.raises(ValueError, match=r"the model takes \[n, 16, 16, 3\]"):
        model.embed_pixels(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="the model knows 0 to 259"):
        model.embed_tokens(np.full((1, 32), 260))


def test_load_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        clipjax.load(tmp_path)


@pytest.mark.process
def test_a_damaged_checkpoint_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    config = tmp_path / "run" / "checkpoints" / "12" / "config" / "metadata"
    config.write_text(config.read_text()[:40])
    with pytest.raises(ValueError, match="12 is damaged: config/metadata: 40 bytes instead of"):
        clipjax.load(tmp_path / "run" / "checkpoints" / "12")
