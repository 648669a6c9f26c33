"""Command lines: overrides reach their fields, and every mistake gets one clear message."""

import pathlib
import re

import pytest

from clipjax.checkpoints.manager import DamagedCheckpoint
from clipjax.cli import arguments
from clipjax.cli.errors import refusals, stops
from clipjax.config import LossKind
from clipjax.data.training_stream import TooManyBadSamples

CONFIG = """
from clipjax.config import Config, TaskConfig
def get_config(arg="plain"):
    config = Config()
    config.data.train = arg
    config.optim.ema_decay = 0.9
    config.eval.tasks = {"scenes/val": TaskConfig(source="a")}
    return config
"""

pytestmark = pytest.mark.newest


@pytest.fixture
def config_file(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def parse(*argv: str):
    return arguments.parse("clipjax test", argv, options={"workdir": "a folder"})


def test_overrides_reach_their_fields(config_file):
    arguments = parse(
        f"--config={config_file}:here",
        "--workdir=runs/x",
        "--config.optim.learning_rate=1e-3",
        "--config.loss.kind=softmax",
        "--config.mesh.data=2",
        "--config.optim.ema_decay=none",
        "--config.optim.freeze=('image/.*',)",
        "--config.eval.tasks['scenes/val'].source=b",
        "--config.model.scan_layers=false",
    )
    config = arguments.config
    assert arguments.options == {"workdir": "runs/x"}
    assert config.data.train == "here"
    assert config.optim.learning_rate == 1e-3
    assert config.loss.kind is LossKind.SOFTMAX
    assert config.mesh.data == 2
    assert config.optim.ema_decay is None
    assert config.optim.freeze == ("image/.*",)
    assert config.eval.tasks["scenes/val"].source == "b"
    assert config.model.scan_layers is False


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.optim.lerning_rate=1",
            "config.optim.lerning_rate: optim has no field 'lerning_rate'; did you mean 'learning_rate'?",
        ),
        ("--config.sead=1", "config.sead: the config has no field 'sead'; did you mean 'seed'?"),
        ("--config.optim.learning_rate=fast", "--config.optim.learning_rate=fast: could not convert string to float"),
        ("--config.global_batch_size=1.5", "--config.global_batch_size=1.5"),
        ("--config.loss.kind=hinge", "--config.loss.kind=hinge: value should be one of <softmax|sigmoid|global>"),
        ("--config.optim=3", "--config.optim=3"),
        ("--workdr=x", "unknown option --workdr; did you mean --workdir?"),
        ("stray", "argument 'stray' is not understood"),
    ],
)
def test_mistakes_are_named(config_file, argument, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(f"--config={config_file}", argument)


def test_a_missing_or_broken_config_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="--config=FILE.* is missing"):
        parse("--workdir=x")
    with pytest.raises(ValueError, match="No such file or directory: .*nowhere.py"):
        parse(f"--config={tmp_path}/nowhere.py")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def get_config():\n    return {'seed': 1}\n")
    with pytest.raises(ValueError, match=r"must return a clipjax.config.Config, not dict"):
        parse(f"--config={wrong}")


def test_refusals_print_the_message_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as left, refusals("clipjax test"):
        raise ValueError("seed=-1 must not be negative\nmesh: wrong")
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error == "clipjax test: error: seed=-1 must not be negative\nclipjax test: error: mesh: wrong\n"


def test_stops_let_a_defect_through_and_end_with_3_on_unusable_data(capsys):
    with pytest.raises(ValueError, match="a defect"), stops("clipjax test"):
        raise ValueError("a defect")
    for error in (TooManyBadSamples("bad data"), DamagedCheckpoint("bad arrays")):
        with pytest.raises(SystemExit) as left, stops("clipjax test"):
            raise error
        assert left.value.code == 3
        assert capsys.readouterr().err == f"clipjax test: error: {error}\n"


def test_help_lists_every_field():
    lines = "\n".join(arguments.describe_fields())
    assert "--config.optim.learning_rate=0.0005  (float)" in lines
    assert "--config.mesh.fsdp=1  (int)" in lines
    assert "--config.loss.kind=softmax  (LossKind)" in lines
    assert "--config.microbatch_size=None  (int | None)" in lines
