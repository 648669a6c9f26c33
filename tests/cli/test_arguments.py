"""Command lines: overrides reach their fields, and every mistake gets one clear message."""

import argparse
import pathlib
import re

import pytest

from clipjax.checkpoints.manifest import DamagedCheckpoint, UndecidedCheckpoint
from clipjax.cli import arguments, classify, convert, data, embed, plan, presets, rank, search, sweep, train
from clipjax.cli import eval as evaluate
from clipjax.cli.errors import refusals, stops
from clipjax.cli.overrides import describe_fields
from clipjax.config import LossKind
from clipjax.data.sample import UnreadableData
from clipjax.data.training_batches import NoUsableSample, TooManyBadSamples
from tests.commands import exit_code

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


def make_parser(**options) -> arguments.Parser:
    parser = arguments.Parser("clipjax test", "A test.", **{"config": "file", **options})
    parser.add_argument("--workdir", type=arguments.path, help="a folder")
    parser.add_argument("--jobs", type=arguments.whole_number(1), default=1)
    parser.add_argument("--launcher", type=arguments.choice(("local", "slurm")), default="local")
    parser.add_argument("--search", type=arguments.yes_or_no, nargs="?", const=True, default=False)
    parser.add_argument("--dry-run", nargs=0, default=False)
    return parser


def parse(*argv: str) -> arguments.Arguments:
    return make_parser().read(argv)


def test_overrides_reach_their_fields(config_file):
    parsed = parse(
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
    config = parsed.config()
    assert parsed.options.workdir == pathlib.Path("runs/x")
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
        ("--config.optim.learning_rate=fast", "--config.optim.learning_rate=fast: must be a number"),
        ("--config.global_batch_size=1.5", "--config.global_batch_size=1.5: must be a whole number"),
        ("--config.eval.batch_size=1e9", "--config.eval.batch_size=1e9: must be a whole number"),
        ("--config.loss.kind=hinge", "--config.loss.kind=hinge: value should be one of <softmax|sigmoid|global>"),
        ("--config.optim=3", "config.optim is a group of fields; name one in it: learning_rate"),
        ("--workdr=x", "unknown option --workdr; did you mean --workdir?"),
        ("stray", "argument 'stray' is not understood"),
        ("-workdir=x", "unknown option -workdir; did you mean --workdir?"),
        ("--config.seed", "--config.seed has no value; write --config.seed=VALUE"),
        ("--config.eval.tasks['scenes/vol'].source=b", "there is no 'scenes/vol'; known: 'scenes/val'; did you mean"),
        ("--config.seed:1", "config.seed:1: the config has no field 'seed:1'; did you mean 'seed'?"),
        ("--config.eval.tasks['t]source=b", "is not understood; write --config.FIELD=VALUE"),
        ("--config.init_from=hdfs://b/x", "init_from=hdfs://b/x: nothing here opens an address of hdfs://"),
        ("--workdir=s3://b/x", "--workdir=s3://b/x: nothing here opens an address of s3://"),
        ("--workdir=", "--workdir= must name a file or folder"),
        ("--jobs=0", "--jobs=0 must be a whole number of at least 1"),
        ("--jobs=2.5", "--jobs=2.5 must be a whole number of at least 1"),
        ("--launcher=slurn", "--launcher=slurn must be one of local, slurm; did you mean slurm?"),
        ("--search=maybe", "--search=maybe must be yes or no"),
        ("--workdir", "--workdir expected one argument"),
    ],
)
def test_mistakes_are_named(config_file, argument, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(f"--config={config_file}", argument).config()


def test_a_missing_or_broken_config_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="--config=FILE.* is missing"):
        parse("--workdir=x")
    with pytest.raises(ValueError, match="No such file or directory: .*nowhere.py"):
        parse(f"--config={tmp_path}/nowhere.py").config()
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def get_config():\n    return {'seed': 1}\n")
    with pytest.raises(ValueError, match=r"must return a clipjax.config.Config, not dict"):
        parse(f"--config={wrong}").config()


def test_refusals_print_the_message_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as left, refusals("clipjax test"):
        raise ValueError("seed=-1 must not be negative\nmesh: wrong")
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error == "clipjax test: error: seed=-1 must not be negative\nclipjax test: error: mesh: wrong\n"


def test_stops_let_a_defect_through_and_end_with_3_on_unusable_data(capsys):
    with pytest.raises(ValueError, match="a defect"), stops("clipjax test"):
        raise ValueError("a defect")
    for error in (TooManyBadSamples("bad data"), DamagedCheckpoint("bad arrays"), UndecidedCheckpoint("no arrays")):
        with pytest.raises(SystemExit) as left, stops("clipjax test"):
            raise error
        assert left.value.code == 3
        assert capsys.readouterr().err == f"clipjax test: error: {error}\n"


def test_data_that_one_process_alone_cannot_use_ends_it_at_once(monkeypatch):
    """At an ordinary exit JAX would wait for the others, which wait for this one."""
    codes = []
    monkeypatch.setattr("clipjax.runtime.processes.abort", lambda code: codes.append(code) or code)
    alone = (NoUsableSample("100 in a row"), UnreadableData("shard a.tar cannot be read"))
    for error, aborts in (*((each, [3]) for each in alone), (TooManyBadSamples("above the limit"), [])):
        codes.clear()
        with pytest.raises(SystemExit) as left, stops("clipjax test"):
            raise error
        assert (left.value.code, codes) == (3, aborts)


def test_help_lists_every_field():
    lines = "\n".join(describe_fields())
    assert "--config.optim.learning_rate=0.0005  (float)" in lines
    assert "--config.mesh.fsdp=1  (int)" in lines
    assert "--config.loss.kind=softmax  (LossKind)" in lines
    assert "--config.microbatch_size=None  (int | None)" in lines


def test_options_have_types_and_both_forms(config_file):
    for argv in (["--workdir=x", "--jobs=3"], ["--workdir", "x", "--jobs", "3"]):
        options = parse(f"--config={config_file}", *argv, "--dry-run").options
        assert (options.workdir, options.jobs, options.dry_run) == (pathlib.Path("x"), 3, True)
    for argv, on in ((["--search"], True), (["--search=yes"], True), (["--search", "no"], False), ([], False)):
        assert parse("--config", config_file, *argv).options.search is on


@pytest.mark.parametrize("first", ["--workdir=a", "--jobs=1", "--dry-run", "--search", "--config=x.py"])
def test_an_option_given_twice_is_refused(first):
    name = first.partition("=")[0]
    with pytest.raises(ValueError, match=f"{name} is given twice; give it once"):
        parse(first, first)


COMMANDS = {
    "train": (train.main, ["--workdir"]),
    "eval": (evaluate.main, ["--checkpoint", "--tasks", "--tasks_from", "--output"]),
    "plan": (plan.main, ["--topology", "--output", "--dump_hlo"]),
    "sweep": (sweep.main, ["--workdir", "--sweep"]),
    "data tokenizer": (lambda argv: data.main(["tokenizer", *argv]), ["--source", "--output", "--tfds_dir"]),
    "data scenes": (lambda argv: data.main(["scenes", *argv]), ["--tfds_dir", "--config"]),
    "data show": (lambda argv: data.main(["show", *argv]), ["--source", "--tfds_dir"]),
    "presets": (presets.main, []),
    "convert": (convert.main_convert, ["--input", "--output", "--model", "--tokenizer"]),
    "export": (convert.main_export, ["--checkpoint", "--output"]),
    "classify": (classify.main, ["--checkpoint", "--output"]),
    "embed": (embed.main, ["--source", "--checkpoint", "--output", "--tfds_dir"]),
    "search": (search.main, ["--checkpoint", "--output"]),
    "rank": (rank.main, ["--checkpoint", "--output"]),
}
STORE_PLACES = (
    "--source",
    "--workdir",
    "--checkpoint",
    "--tokenizer",
    "--output",
    "--input",
    "--dump_hlo",
)  # of some commands
NO_PATHS = ("--tasks", "--topology", "--model", "--config")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_alike_and_helps(command, capsys):
    main, options = COMMANDS[command]
    for name in options:
        assert exit_code(main, [f"{name}=a", f"{name}=b"]) == 2
        assert f"{name} is given twice" in capsys.readouterr().err
        if name not in NO_PATHS:
            in_stores = name in STORE_PLACES or (name == "--tfds_dir" and command != "data scenes")
            for scheme in ("hdfs", "file", *(() if in_stores else ("gs", "s3", "http"))):
                assert exit_code(main, [f"{name}={scheme}://bucket/x"]) == 2
                assert f"{name}={scheme}://bucket/x: nothing here opens" in capsys.readouterr().err
    assert exit_code(main, ["--no-such-thing"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"clipjax {command.split()[0]}: error: unknown option --no-such-thing"), told
    assert exit_code(main, ["--help"]) == 0
    told = capsys.readouterr()
    assert told.err == "" and all(name in told.out for name in options)


@pytest.mark.parametrize("command", ["train", "eval", "plan", "sweep"])
def test_commands_with_configs_refuse_a_field_given_twice(command, capsys):
    argv = ["--config.data.train=a", "--config.data.train=b"]
    assert exit_code(COMMANDS[command][0], argv) == 2
    assert "--config.data.train is given twice, 'a' and 'b'; give it once" in capsys.readouterr().err


def test_launch_options_are_found_in_a_command_line_that_is_wrong():
    argv = ["--nonsense", "--coordinator", "a:1", "--num_processes=2", "--num_processes=3", "stray", "--process_id"]
    assert arguments.launch_options(argv) == {"coordinator": "a:1", "num_processes": "3", "process_id": None}


def test_data_needs_a_command(capsys):
    for argv, message in (([], "a command is missing, one of scenes"), (["scene"], "'scene' is none of scenes")):
        assert exit_code(data.main, argv) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("main", "module"), [(train.main, "clipjax.cli.train"), (evaluate.main, "clipjax.cli.eval")])
def test_processes_meet_before_the_rest_is_parsed_and_tell_each_other_what_is_wrong(monkeypatch, capsys, main, module):
    met, told = [], []

    def run_on_all(name, work, **_):
        try:
            return work()
        except ValueError as error:
            told.append(str(error))
            raise

    monkeypatch.setattr(f"{module}.processes.start", met.append)
    monkeypatch.setattr("clipjax.runtime.consistency.run_on_all", run_on_all)
    options = {"coordinator": "a:1", "num_processes": "2", "process_id": "0"}
    assert exit_code(main, ["--nonsense", *(f"--{name}={value}" for name, value in options.items())]) == 2
    assert met == [options]
    assert len(told) == 1 and told[0].startswith("unknown option --nonsense")


def test_a_place_is_a_path_or_an_address():
    assert arguments.place("gs://bucket/run//") == "gs://bucket/run"
    assert arguments.place("a/b") == pathlib.Path("a/b")
    for bad in ("gs://bucket//run", "s3://bucket/a//b"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"={bad} has an empty folder name"):
            arguments.place(bad)


def test_words_are_what_has_no_name():
    argv = ["a.png", "--checkpoint", "run", "b.png", "--top=3", "-", "-h", "--", "-c.png", "--x"]
    words, rest = arguments.split_words(argv)
    assert words == ["a.png", "b.png", "-", "-c.png", "--x"]
    assert rest == ["--checkpoint", "run", "--top=3", "-h"]
    assert arguments.split_words([]) == ([], [])
