"""Paths: `~` is expanded, addresses with a scheme are refused, and what is no path stays as it is."""

import pathlib
import re

import pytest

from clipjax.config import Config, DataConfig, MixtureSource, TaskConfig
from clipjax.config.paths import PATH_FIELDS, TASK_PATH_FIELDS, expand, expand_paths
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


STORES = ("gs", "s3", "az", "http", "https")


@pytest.mark.parametrize(
    "text", ["gs://b/x", "s3://b/{000..010}.tar", "az://c/*.tar", "https://h/x", "{gs://a/1,/b/2}"]
)
def test_an_address_is_taken_where_it_can_be_used(text):
    assert expand(text, "data.train", schemes=STORES) == text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("gs:/bucket/x", "write gs://NAME"),
        ("gs:bucket/x", "write gs://NAME"),
        ("gs:///x", "write gs://NAME"),
        ("gs://", "write gs://NAME"),
        ("GS://b/x", "write gs://NAME"),
        (" gs://b/x", "write gs://NAME"),
        ("gcs://b/x", "write gs://NAME"),
        ("s3a://b/x", "write s3://NAME"),
        ("S3N:b/x", "write s3://NAME"),
        ("abfss://c/x", "write az://NAME"),
        ("{/a/1,Gs://b/2}", "write gs://NAME"),
        ("{gs://a/1, s3://b/2}", "write s3://NAME"),
        ("file:///x", "give the path alone"),
        ("file:x", "give the path alone"),
        ("pipe:cat x", "no commands are run"),
        ("hdfs://h/x", "takes gs://, s3://"),
        ("ftp://h/x", "takes gs://, s3://"),
    ],
)
def test_an_address_that_is_not_quite_one_is_refused(text, remedy):
    with pytest.raises(ValueError, match=f"data.train={re.escape(text)}: .*{remedy}"):
        expand(text, "data.train", schemes=STORES)


def test_fields_that_take_addresses():
    config = Config(init_from="gs://a")
    config.loss.distill_from, config.data.train = "s3://b", "https://h/x.tar"
    config.eval.tasks = {"t": TaskConfig(source="az://c/x", gallery="gs://d")}
    expand_paths(config)
    config.init_from = "http://h/x"  # nothing there can be listed
    with pytest.raises(ValueError, match="init_from=http://h/x: nothing here opens .* takes gs://, s3://, az://;"):
        expand_paths(config)


def test_an_unknown_user_is_refused():
    with pytest.raises(ValueError, match=r"there is no user 'no-such-user'; .* write ./~no-such-user"):
        expand("~no-such-user/x", "data.train")


def test_all_fields_of_a_config():
    config = Config()
    config.init_from = config.compile_cache = config.loss.distill_from = config.data.tfds_dir = "~/x"
    config.data.train, config.data.tokenizer, config.data.image_root = "~/x", "clip:~/x", "~/x"
    config.data.cache_dir, config.data.mixture = "~/x", {"a": MixtureSource(source="~/x")}
    config.data.keep_keys = config.data.drop_keys = "~/x"
    config.eval.tasks = {
        "t": TaskConfig(
            source="~/x",
            gallery="~/x",
            train_source="~/x",
            classes="~/x",
            templates="~/x",
            paraphrases="~/x",
            overlap="~/x",
            shift_points="~/x",
            tfds_dir="~/x",
        )
    }
    expand_paths(config)
    task = config.eval.tasks["t"]
    values = [field_value(config, path) for path in PATH_FIELDS]
    of_task = [getattr(task, name) for name in TASK_PATH_FIELDS]
    assert {*values, config.data.mixture["a"].source, *of_task} == {
        "/homes/me/x",
        "clip:/homes/me/x",
    }


def test_everything_wrong_is_one_error_and_skipped_fields_stay():
    config = Config(init_from="hdfs://a")
    config.eval.tasks = {"t": TaskConfig(source="s3:/b")}
    with pytest.raises(ValueError) as refused:
        expand_paths(config)
    assert "init_from=hdfs://a" in str(refused.value) and "eval.tasks['t'].source=s3:/b" in str(refused.value)
    config.eval.tasks = {}
    expand_paths(config, skip=("init_from",))
    assert config.init_from == "hdfs://a"
    config.data.train = pathlib.Path("~/x")  # type: ignore[assignment]  # `validate` refuses it
    expand_paths(config, skip=("init_from",))


@pytest.mark.parametrize(
    "source", ["folder:gs://b/x", "gs://b/a.csv", "https://h/a.jsonl", "tfds:scenes/train", "a.tar"]
)
def test_a_cache_of_files_in_stores_needs_one(source):
    data = DataConfig(cache_dir="x")
    [error] = data.cache_errors([source])
    assert (
        "data.cache_dir='x' would be ignored: no source is tars, Parquet, ArrayRecord or TFDS data in a store" in error
    )
    assert ("of which no copies are kept; `clipjax data pack` makes tars" in error) == ("://" in source)
    for other in ("gs://b/a.tar", "gs://b/{0..9}.parquet", "https://h/a.array_record"):
        assert data.cache_errors([source, other]) == []


def test_a_cache_of_prepared_data_in_a_store():
    data = DataConfig(cache_dir="x", tfds_dir="gs://b/tfds")
    assert data.cache_errors(["tfds:scenes/train"]) == [] and len(data.cache_errors(["a.tar"])) == 1
    [error] = DataConfig(cache_gib=7.0).cache_errors(["gs://b/a.tar"], "--")
    assert error.startswith("--cache_gib=7.0 would be ignored without --cache_dir")
