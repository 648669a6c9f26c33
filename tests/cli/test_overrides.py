"""Every override of every command takes effect or is refused: all fields of the config, one at a time."""

import copy
import enum
import pathlib
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from clipjax.checkpoints.manager import DamagedCheckpoint
from clipjax.cli import eval as evaluate
from clipjax.cli import plan, sweep, train
from clipjax.cli.eval_fields import READ, is_within
from clipjax.cli.overrides import override, split_overrides
from clipjax.config import (
    BagOfWordsConfig,
    CbowConfig,
    Config,
    DecoderConfig,
    MixtureSource,
    ResNetConfig,
    SamePair,
    TaskConfig,
)
from clipjax.config.paths import is_path_field
from clipjax.config.serialization import field_value, members, take_apart
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.sweeps import Grid, Sweep
from clipjax.sweeps.folder import Folder
from clipjax.sweeps.plan import plan_trials
from tests.commands import exit_code

TASK = "eval.tasks['t:1/\"x\"']"
PART = "data.mixture['p:1']"
ENTRIES = {TaskConfig: TASK, MixtureSource: PART}
SPECIAL = {"mesh.data": "8", "eval.batch_size": "512", "optim.max_grad_norm": "1.0"}


def make_config() -> Config:
    config = Config()
    config.data.train, config.data.captions = "pairs.tar", {"a/b c": 1.0}
    config.eval.tasks = {'t:1/"x"': TaskConfig(source="a.tar", classes="names", templates="plain")}
    return config


def fields(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths of all fields, those of every tower among them, and their types."""
    for name, annotation in members(kind).items():
        inner, path = take_apart(annotation).of, f"{prefix}{name}"
        if typing.get_origin(inner) is dict:
            entry = typing.get_args(inner)[1]
            if entry is float:
                yield f"{path}['a/b c']", entry
            else:
                yield from fields(entry, f"{ENTRIES[entry]}.")
        elif members(inner) or any(members(each) for each in typing.get_args(inner)):
            parts = [each for each in typing.get_args(inner) or (inner,) if each is not types.NoneType]
            found = {item[0]: item for each in parts for item in fields(each, f"{path}.")}
            yield from found.values()
        else:
            yield path, annotation


FIELDS = dict(fields())


def other_value(path: str, annotation: Any, config: Config) -> str:
    """A text for the field that is not its value."""
    if path in SPECIAL:
        return SPECIAL[path]
    kind, now = take_apart(annotation).of, field_value(config, path)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(member.value for member in kind if member is not now)
    if kind is bool:
        return str(not now).lower()
    if kind in (int, float):
        return str(kind(2 * (now or 1)))
    if path in ("data.mean", "data.std"):
        return "(0.1, 0.2, 0.3)"
    if typing.get_origin(kind) is tuple:
        return "(1, 2, 1, 1)" if path.endswith(".layers") else "('image/.*',)"
    return "other"


def config_with(path: str) -> Config:
    """A config whose towers have the field."""
    config = make_config()
    if path.startswith(PART):
        config.data.train, config.data.mixture = "", {"p:1": MixtureSource(source="a.tar", captions={"a/b c": 1.0})}
        config.loss.same_pair = SamePair.INDEX
    if path.startswith("model.caption."):
        config.model.caption = DecoderConfig()
    for tower, kind in (("image", ResNetConfig), ("text", CbowConfig), ("caption", BagOfWordsConfig)):
        name = path.removeprefix(f"model.{tower}.")
        if name != path and name not in members(type(getattr(config.model, tower))):
            setattr(config.model, tower, kind())
    return config


def test_the_list_of_fields_is_whole():
    assert {"seed", "model.image.layers", "model.text.causal", "model.caption.depth", f"{TASK}.gallery"} <= set(FIELDS)
    assert len(FIELDS) > 100


@pytest.fixture
def given(monkeypatch):
    """Let a command's config file hold any config."""

    def give(config: Config) -> list[str]:
        monkeypatch.setattr("clipjax.cli.arguments.load_config", lambda file: copy.deepcopy(config))
        return ["--config=config.py"]

    return give


@pytest.mark.parametrize("path", FIELDS)
def test_train_plan_and_sweep_take_every_field(given, tmp_path, path):
    config = config_with(path)
    text = other_value(path, FIELDS[path], config)
    argv = [*given(config), f"--config.{path}={text}"]
    trained, workdir = train._parse([*argv, "--workdir=runs/x"])
    assert field_value(trained, path) != field_value(config, path) and workdir == pathlib.Path("runs/x")
    planned = plan._parser().read([*argv, "--topology=v5e:4x4"]).config()
    assert planned == trained
    (tmp_path / "config.py").write_text("")
    file = f"--config={tmp_path}/config.py"
    options, passed = sweep._parse([file, *argv[1:], "--sweep=s.py", f"--workdir={tmp_path}"])
    other_field = "seed" if path != "seed" else "total_examples"
    search = Sweep(search=Grid({other_field: [3]}), metric="loss")
    (trial,) = plan_trials(search, config=options.config, home=Folder(tmp_path), passed=passed)
    given(config)
    again, _ = train._parse(trial.arguments)
    assert field_value(again, path) == field_value(trained, path)


class Saved:
    """A checkpoint, as far as opening an evaluation looks at it."""

    def __init__(self, config: Config) -> None:
        self.config, self.records, self.step = config, {}, 2
        self.path = pathlib.Path("runs/x/checkpoints/2")

    def tokenizer(self) -> BytesTokenizer:
        return BytesTokenizer()


@pytest.fixture
def opened(monkeypatch):
    """Open an evaluation of a config; what tasks and cache are made of is noted."""

    def open_evaluation(config: Config, *argv: str) -> tuple[evaluate.Opened, dict[str, Any]]:
        noted: dict[str, Any] = {}
        monkeypatch.setattr(evaluate, "SavedCheckpoint", lambda path: Saved(copy.deepcopy(config)))
        monkeypatch.setattr(evaluate, "build_tasks", lambda config, _: noted.update(config=copy.deepcopy(config)) or {})
        monkeypatch.setattr(
            evaluate.compilation, "enable", lambda setting, outside: noted.update(cache=setting, outside=outside)
        )
        return evaluate._open(["--checkpoint=runs/x", *argv])[0], noted

    return open_evaluation


@pytest.mark.parametrize("path", FIELDS)
def test_eval_takes_or_refuses_every_field(opened, path):
    config = config_with(path)
    if path.startswith("data.tfds"):
        for task in config.eval.tasks.values():
            task.source = "tfds:pairs/val"
    text = other_value(path, FIELDS[path], config)
    try:
        evaluation, noted = opened(config, f"--config.{path}={text}")
    except ValueError as error:
        assert path.rpartition(".")[2] in str(error) or 'eval.tasks.t:1/"x"' in str(error), "the field is named"
        if not is_within(path, READ):
            assert "only training reads it" in str(error) or "the weights of the checkpoint" in str(error)
        return
    assert is_within(path, READ)
    assert field_value(evaluation.checkpoints[0].config, path) != field_value(config, path)
    assert field_value(noted["config"], path) == field_value(evaluation.checkpoints[0].config, path)
    assert noted["cache"] == evaluation.checkpoints[0].config.compile_cache
    assert any(path in line for line in evaluation.changed)


def test_the_compile_cache_is_the_users_and_never_a_checkpoints(opened):
    config = make_config()
    config.compile_cache = "runs/x/xla"
    evaluation, noted = opened(config)
    assert noted["cache"] == evaluation.checkpoints[0].config.compile_cache == Config().compile_cache
    assert pathlib.Path("runs/x") in noted["outside"]
    assert opened(config, "--config.compile_cache=/mine")[1]["cache"] == "/mine"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.eval.batch_size=0"], "eval.batch_size=0 must be greater than 0"),
        (["--config.seed=3"], "config.seed=3: only training reads it; clipjax eval takes eval.batch_size"),
        (["--config.model.image.image_size=32"], "config.model.image.image_size=32: the weights of the checkpoint"),
        (["--config.model.remat=full"], "only training reads it"),
        ([f"--config.{TASK}.every_examples=9"], "every_examples=9: only training reads it"),
        (["--config.data.tfds_dir=http://b/x"], "data.tfds_dir=http://b/x: nothing here opens an address of http://"),
        (["--config.data.tfds_dir=/d"], "config.data.tfds_dir=/d: no task reads TFDS data; leave it out"),
        (["--config.mesh.tensor=3"], "must be divisible by 3"),
        (["--tasks=other"], "other is not among the tasks"),
        (["--config=config.py"], "unknown option --config"),
        (["--config.eval.tasks['u'].source=x"], "there is no 'u'; known: 't:1/\"x\"', 'u:2'"),
        (["--tasks=u:2", f"--config.{TASK}.source=x"], "is not among --tasks=u:2"),
    ],
)
def test_eval_refuses_what_it_would_ignore(opened, argv, message):
    config = make_config()
    config.eval.tasks["u:2"] = TaskConfig(source="b", classes="names", templates="plain")
    with pytest.raises(ValueError) as refused:
        opened(config, *argv)
    assert message in str(refused.value)


def test_data_that_each_task_names_for_itself_is_not_to_be_named_for_all(opened):
    config = make_config()
    config.eval.tasks = {
        name: TaskConfig(source=f"tfds:{name}/val", classes="names", templates="plain", tfds_dir="mine")
        for name in "ab"
    }
    with pytest.raises(ValueError, match="data.tfds_dir=/d: each task that reads TFDS data has its own tfds_dir"):
        opened(config, "--config.data.tfds_dir=/d")
    config.eval.tasks["b"].tfds_dir = None
    assert opened(config, "--config.data.tfds_dir=/d")[0].checkpoints[0].config.data.tfds_dir == "/d"


def test_overrides_win_over_tasks_from_and_old_training_fields_do_not_matter(opened, tmp_path, monkeypatch):
    config, other = make_config(), make_config()
    config.global_batch_size, config.checkpoint.best_metric = 1, "gone:top1"  # of a run long ago
    config.init_from, config.data.train = "~nobody-here/x", "~nobody-here/y"
    other.eval.tasks = {"new": TaskConfig(source="a", classes="names", templates="plain", max_examples=3)}
    other.eval.tasks["tfds"] = TaskConfig(source="tfds:pairs/val", classes="names", templates="plain")
    other.data.tfds_dir = "there"
    monkeypatch.setattr("clipjax.cli.eval_fields.load_config", lambda file: copy.deepcopy(other))
    config.eval.every_examples = 64
    for task in other.eval.tasks.values():
        task.every_examples = 32
    evaluation, noted = opened(
        config, "--tasks_from=tasks.py", "--config.eval.tasks[new].source=~/b", "--config.data.tfds_image_key=picture"
    )
    task = noted["config"].eval.tasks["new"]
    assert (task.source, task.max_examples) == (str(pathlib.Path.home() / "b"), 3)
    assert (evaluation.checkpoints[0].config.data.tfds_dir, evaluation.checkpoints[0].config.data.tfds_image_key) == (
        "there",
        "picture",
    )


@pytest.mark.parametrize(
    "spelling",
    ["eval.tasks['a=b c'].source", 'eval.tasks["a=b c"].source', "eval.tasks[a=b c].source", "eval.tasks.a=b c.source"],
)
def test_a_task_is_named_in_any_spelling(spelling):
    config = make_config()
    config.eval.tasks = {"a=b c": TaskConfig(), "it's": TaskConfig()}
    if spelling.startswith("eval.tasks.a"):
        with pytest.raises(ValueError):  # the first = ends a name without brackets
            split_overrides([f"--config.{spelling}=x"])
        return
    overrides, rest = split_overrides([f"--config.{spelling}=x=y", '--config.eval.tasks["it\'s"].source', "z", "more"])
    changed = override(config, overrides)
    assert (changed.eval.tasks["a=b c"].source, changed.eval.tasks["it's"].source, rest) == ("x=y", "z", ["more"])


def test_a_field_given_twice_is_refused_in_any_spelling():
    for first, second in (
        ("data.train=a.tar", "data.train=b.tar"),
        ("eval.tasks['t'].source=a", 'eval.tasks["t"].source=a'),
        ("eval.tasks['t'].source=a", "eval.tasks.t.source=b"),
        ("eval.tasks['t'].source=a", "eval.tasks[t].source=b"),
        ("log.tensorboard", "log.tensorboard=false"),
    ):
        with pytest.raises(ValueError, match="is given twice"):
            split_overrides([f"--config.{first}", f"--config.{second}"])
    with pytest.raises(ValueError, match="is given twice, '3' and '4'"):
        split_overrides(["--config.seed", "3", "--config.seed", "4"])


def test_every_field_that_holds_a_path_is_known():
    """A new field of type str is a path or one of these."""
    texts = {path for path, annotation in FIELDS.items() if take_apart(annotation).of is str}
    no_paths = {"data.tfds_image_key", "data.tfds_caption_key", "checkpoint.best_metric", f"{TASK}.tfds_label_key"}
    no_paths |= {"log.prometheus_host", "data.image_field", "data.caption_field", f"{TASK}.shift_of"}
    no_paths |= {f"{place}.{name}" for place in (PART, TASK) for name in ("image_field", "caption_field")}
    no_paths |= {f"{TASK}.shift_of"}
    assert {path for path in texts if not is_path_field(path)} == no_paths


def test_a_group_that_may_be_none_can_be_left_out():
    config = make_config()
    config.model.caption = DecoderConfig()
    overrides, _ = split_overrides(["--config.model.caption=none", "--config.optim.ema_decay=None"])
    assert override(config, overrides).model.caption is None
    with pytest.raises(ValueError, match="model is a group of fields"):
        split_overrides(["--config.model=none"])


def test_a_damaged_checkpoint_ends_an_evaluation_with_one_line(monkeypatch, capsys):
    def damaged(evaluation):
        raise DamagedCheckpoint("checkpoint x cannot be restored")

    monkeypatch.setattr(evaluate, "_open", lambda argv: (evaluate.Opened([], None), {}))
    monkeypatch.setattr(evaluate, "_evaluate", damaged)
    assert exit_code(evaluate.main, ["--checkpoint=x"]) == 3
    assert capsys.readouterr().err == "clipjax eval: error: checkpoint x cannot be restored\n"
