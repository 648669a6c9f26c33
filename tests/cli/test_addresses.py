"""Places by address: each flag and field that names one refuses what nothing opens, and makes no folder of its name."""

import argparse
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipjax.cli import arguments, checkpoint, convert, data, eval, plan, sweep, train
from clipjax.cli.main import main
from clipjax.cli.overrides import describe_fields
from clipjax.config.paths import PATH_FIELDS, TASK_PATH_FIELDS
from clipjax.runtime import objects
from tests.runtime.stores import BUCKET

PLACE_TYPES = (
    arguments.path,
    arguments.place,
    arguments.places,
    arguments.source,
    arguments.data_source,
    arguments.file_with_argument,
)
PARSERS = {
    "train": train._parser(),
    "eval": eval._parser(),
    "plan": plan._parser(),
    "sweep": sweep._parser(),
    "checkpoint verify": checkpoint._parser(),
    "convert": convert._convert_parser(),
    "export": convert._export_parser(),
} | {f"data {name}": data._parser(name) for name in data.COMMANDS}
CONFIG_FIELDS = (
    *PATH_FIELDS,
    'data.mixture["a"].source',
    *(f'eval.tasks["t"].{name}' for name in TASK_PATH_FIELDS),
)
OTHER_TEXTS = {
    "checkpoint.best_metric",
    "data.tfds_image_key",
    "data.tfds_caption_key",
    "data.image_field",
    "data.caption_field",
    "log.prometheus_host",
}
"""Fields of texts that are no places."""


def flags(*types: Callable[[str], Any]) -> list[tuple[str, str]]:
    def is_place(action: argparse.Action) -> bool:
        return action.type in (types or PLACE_TYPES) and bool(action.option_strings)

    return [
        (command, action.option_strings[0])
        for command, parser in PARSERS.items()
        for action in parser._actions
        if is_place(action)
    ]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(argv, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_the_flags_that_name_places_are_found():
    assert {"--output", "--report", "--workdir", "--input", "--image_root"} <= {name for _, name in flags()}


@pytest.mark.parametrize(("command", "flag"), flags())
def test_a_flag_refuses_an_address_that_nothing_opens(command, flag, here, capsys):
    told = refusal([*command.split(), f"{flag}=foo://x/y"], capsys)
    assert f"{flag}=foo://x/y: nothing here opens an address of foo://" in told
    assert not any(here.iterdir())


@pytest.mark.parametrize(("command", "flag"), flags(arguments.place))
def test_a_flag_that_takes_stores_refuses_a_web_server(command, flag, here, capsys):
    told = refusal([*command.split(), f"{flag}=https://x/y"], capsys)
    assert f"{flag}=https://x/y: nothing here opens an address of https:// for this, which takes gs://" in told
    assert told.count("\n") == 1 and not any(here.iterdir())


def test_the_workdirs_of_train_and_sweep_take_stores():
    assert {("train", "--workdir"), ("sweep", "--workdir")} <= set(flags(arguments.place))


def test_all_texts_of_a_config_are_places_or_known_not_to_be():
    texts = {
        line.partition("=")[0].strip().removeprefix("--config.")
        for line in describe_fields()
        if line.endswith(("  (str)", "  (str | None)"))
    }
    assert texts - set(PATH_FIELDS) == OTHER_TEXTS


@pytest.fixture
def config(here):
    (here / "config.py").write_text(
        "from clipjax.config import Config, DataConfig, EvalConfig, MixtureSource, TaskConfig\n"
        "def get_config():\n"
        "    return Config(data=DataConfig(mixture={'a': MixtureSource(source='a.tar')}),\n"
        "                  eval=EvalConfig(tasks={'t': TaskConfig(source='a.tar')}))\n"
    )
    return here


@pytest.mark.parametrize("field", CONFIG_FIELDS)
def test_a_field_refuses_an_address_that_nothing_opens(field, config, capsys):
    value = "clip:foo://x/y" if field == "data.tokenizer" else "foo://x/y"
    told = refusal(["train", "--config=config.py", "--workdir=run", f"--config.{field}={value}"], capsys)
    name = field.replace('"', "'") if "tasks" in field else field.replace('["a"]', ".a")
    assert f"{name}={value}: nothing here opens an address of foo://" in told, told
    assert {path.name for path in config.iterdir()} <= {"config.py", "__pycache__"}


@pytest.mark.parametrize(
    "argv",
    [
        "data show {}/a.jsonl",
        "data show folder:{}/a",
        "data show {}/a.array_record --cache_dir=copies",
        "data show tfds:pairs/train --tfds_dir={}/a --cache_dir=copies",
        "data pack tfds:pairs/train --tfds_dir={}/a --cache_dir=copies --output=out",
        "data dedup table.jsonl --against={}/a.array_record --cache_dir=copies",
        "data show table.jsonl --image_root={}/a",
        "data show table.jsonl --sheet={}/a.png",
        "data pack table.jsonl --output={}/a",
        "data pack table.jsonl --output={}",
        "data dedup table.jsonl --output={}/a.txt",
        "data dedup table.jsonl --report={}/a.png",
        "data bench table.jsonl --output={}/a.json",
        "data verify table.jsonl --write={}/a.json",
        "data verify table.jsonl --against={}/a.json",
        "data tokenizer --source=table.jsonl --vocab_size=300 --output={}/a.model",
        "convert --from=open_clip --input={}/a --output=out",
        "convert --from=open_clip --input=table.jsonl --output={}/a",
    ],
)
def test_no_such_bucket_is_told(argv, here, gcs, capsys):
    (here / "table.jsonl").write_text(json.dumps({"path": "a.jpg", "caption": "a"}))
    told = refusal(argv.format("gs://none-such").split(), capsys)
    assert "there is no bucket none-such" in told, told
    assert [path.name for path in here.iterdir()] == ["table.jsonl"]


@pytest.mark.parametrize("place", ["http://h/x", "https://h/x", "gs:/x", "gcs://b/x", "gs://b//x"])
def test_shards_go_to_no_web_server_and_to_nothing_like_an_address(place, here, capsys):
    (here / "table.jsonl").write_text(json.dumps({"path": "a.jpg", "caption": "a"}))
    told = refusal(["data", "pack", "table.jsonl", f"--output={place}"], capsys)
    assert told.startswith(f"clipjax data: error: --output={place}") and len(told.splitlines()) == 1
    assert [path.name for path in here.iterdir()] == ["table.jsonl"]


COPIED = ["{}/a.array_record", "tfds:pairs/train --tfds_dir={}/tfds"]
"""Sources in a bucket that have to be copied to a disk."""


@pytest.mark.parametrize("source", COPIED)
@pytest.mark.parametrize("command", ["show", "verify --write=a.json", "pack --output=out", "dedup", "tokenizer"])
def test_what_has_to_be_copied_is_refused_without_a_place_for_it(command, source, here, gcs, capsys):
    name, *options = command.split()
    options += ["--vocab_size=300", "--output=a.model"] if name == "tokenizer" else []
    told = refusal(["data", name, *source.format(f"gs://{BUCKET}").split(), *options], capsys)
    assert "lies in a store, and its library reads files on a disk alone" in told and "--cache_dir" in told, told
    assert not any(here.iterdir())


RUN = """
from clipjax.config import *
def get_config():
    return Config(
        global_batch_size=2, warmup_examples=0, total_examples=4, loss=LossConfig(same_pair=SamePair.INDEX),
        model=ModelConfig(text=TextTransformerConfig(vocab_size=300)), data=DataConfig({}),
        eval=EvalConfig(tasks={{"t": TaskConfig(kind=TaskKind.RETRIEVAL, source={!r})}}),
    )
"""
STORED, ON_DISK = f"gs://{BUCKET}/a.array_record", "a.jsonl"


@pytest.mark.parametrize(
    ("data", "task"),
    [
        (f"train={STORED!r}", ON_DISK),
        (f"train={ON_DISK!r}", STORED),
        (f"mixture={{'a': MixtureSource(source={STORED!r}), 'b': MixtureSource(source={ON_DISK!r})}}", ON_DISK),
    ],
)
def test_a_run_on_what_has_to_be_copied_is_refused_without_a_place_for_it(data, task, here, gcs, capsys):
    (here / "config.py").write_text(RUN.format(data, task))
    (here / ON_DISK).write_text("".join(json.dumps({"path": f"{i}.png", "caption": "a"}) + "\n" for i in range(4)))
    told = refusal(["train", "--config=config.py", "--workdir=run"], capsys)
    assert f"source {STORED!r} lies in a store" in told and "set data.cache_dir" in told, told
    assert not (here / "run").exists()


def test_a_table_of_a_bucket_is_packed_and_searched_for_duplicates(here, gcs, capsys):
    place, pictures = f"gs://{BUCKET}/packed", [picture(seed) for seed in (0, 0, 1)]
    for number, content in enumerate(pictures):
        objects.write_bytes(f"{place}/{number}.png", content)
    rows = (json.dumps({"path": f"{number}.png", "caption": "a"}) + "\n" for number in range(3))
    objects.write_bytes(f"{place}/a.jsonl", "".join(rows).encode())
    for output in ("shards", f"{place}/shards"):
        assert main(["data", "pack", f"{place}/a.jsonl", f"--output={output}"]) == 0
    with tarfile.open(here / "shards/00000.tar") as tar:
        found = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".png")]
    assert found == pictures
    packed = (here / "shards/00000.tar").read_bytes()
    assert objects.read_bytes(f"{place}/shards/00000.tar", 2**20) == packed
    assert [path.name for path in here.iterdir()] == ["shards"]
    argv = ["data", "dedup", f"{place}/a.jsonl", f"--output={place}/drop.txt", "--num_workers=1"]
    assert main(argv) == 0
    assert objects.read_bytes(f"{place}/drop.txt", 1000).splitlines() == [b"1.png"]


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64)).save(content, "PNG")
    return content.getvalue()


def test_what_a_command_writes_goes_to_a_bucket(here, gcs, capsys):
    (here / "table.jsonl").write_text(json.dumps({"path": "table.jsonl", "caption": "a"}))
    place = f"gs://{BUCKET}/written"
    assert main(["data", "verify", "table.jsonl", f"--write={place}/files.json"]) == 0
    assert main(["data", "verify", "table.jsonl", f"--against={place}/files.json"]) == 0
    assert main(["data", "show", "table.jsonl", f"--sheet={place}/sheet.png"]) == 0
    assert objects.read_bytes(f"{place}/sheet.png", 2**24).startswith(b"\x89PNG")
