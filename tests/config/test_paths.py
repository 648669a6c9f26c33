"""Paths: `~` is expanded, addresses with a scheme are refused, and what is no path stays as it is."""

import pathlib

import pytest

from clipjax.config import Config, TaskConfig
from clipjax.config.paths import PATH_FIELDS, expand, expand_paths
from clipjax.config.serialization import field_value


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/me")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~", "/homes/me"),
        ("~/a.tar", "/homes/me/a.tar"),
        ("clip:~/bpe.txt.gz", "clip:/homes/me/bpe.txt.gz"),
        ("siglip2:~/t.json", "siglip2:/homes/me/t.json"),
        ("{~/a.tar,~/b.tar}", "{/homes/me/a.tar,/homes/me/b.tar}"),
        ("~/{a,b}.tar", "/homes/me/{a,b}.tar"),
        ("tfds:scenes/train", "tfds:scenes/train"),
        ("bytes", "bytes"),
        ("auto", "auto"),
        ("a~b/c", "a~b/c"),
        ("./~/x", "./~/x"),
        ("runs/a:b", "runs/a:b"),
        ("C:/data", "C:/data"),
        ("configs/clip.py:vit_b32", "configs/clip.py:vit_b32"),
    ],
)
def test_expand(text, expected):
    assert expand(text, "--workdir") == expected


@pytest.mark.parametrize(
    "text",
    [
        "gs://b/x",
        "s3://b",
        "http://h/x",
        "https://h/x",
        "file:///x",
        "hdfs://h/x",
        "gs:/b",
        "clip:gs://b/x",
        "{gs://a,b}",
    ],
)
def test_an_address_is_refused(text):
    with pytest.raises(ValueError, match=r"--workdir=.*: nothing here opens an address of \w+://"):
        expand(text, "--workdir")


def test_an_unknown_user_is_refused():
    with pytest.raises(ValueError, match=r"there is no user 'no-such-user'; .* write ./~no-such-user"):
        expand("~no-such-user/x", "data.train")


def test_all_fields_of_a_config():
    config = Config()
    config.init_from = config.compile_cache = config.loss.distill_from = config.data.tfds_dir = "~/x"
    config.data.train, config.data.tokenizer, config.data.image_root = "~/x", "clip:~/x", "~/x"
    config.eval.tasks = {"t": TaskConfig(source="~/x", gallery="~/x", classes="~/x", templates="~/x")}
    expand_paths(config)
    task = config.eval.tasks["t"]
    values = [field_value(config, path) for path in PATH_FIELDS]
    assert {*values, task.source, task.gallery, task.classes, task.templates} == {"/homes/me/x", "clip:/homes/me/x"}


def test_everything_wrong_is_one_error_and_skipped_fields_stay():
    config = Config(init_from="gs://a")
    config.eval.tasks = {"t": TaskConfig(source="s3://b")}
    with pytest.raises(ValueError) as refused:
        expand_paths(config)
    assert "init_from=gs://a" in str(refused.value) and "eval.tasks['t'].source=s3://b" in str(refused.value)
    config.eval.tasks = {}
    expand_paths(config, skip=("init_from",))
    assert config.init_from == "gs://a"
    config.data.train = pathlib.Path("~/x")  # type: ignore[assignment]  # `validate` refuses it
    expand_paths(config, skip=("init_from",))
