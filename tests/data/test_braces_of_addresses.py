"""Braces around whole addresses: files of several stores and of a disk as one source."""

import pathlib

import pytest

from clipjax.cli.main import main
from clipjax.config import DataConfig
from clipjax.data.sources import _expand, build_source
from clipjax.runtime import objects
from tests.data.test_sources import write_tar
from tests.runtime.stores import BUCKET


@pytest.fixture
def shards(tmp_path) -> pathlib.Path:
    for i in (0, 1, 2, 10):
        write_tar(tmp_path / f"train-{i:05d}.tar", [f"{i}a", f"{i}b"])
    return tmp_path


def test_braces_around_whole_addresses(gcs, web, shards):
    folder = f"gs://{BUCKET}/{__name__}-braces"
    for name in ("a-00.tar", "a-01.tar"):
        objects.write_bytes(f"{folder}/{name}", b"")
    plain, numbered = f"{web.url}/1.tar", f"{web.url}/{{2..3}}.tar"
    assert _expand(f"{{{plain},s3://{BUCKET}/x.tar}}") == [plain, f"s3://{BUCKET}/x.tar"]
    found = _expand(f"{{{numbered},{folder}/a-*.tar,{shards}/train-0000?.tar}}")
    assert found[:4] == [f"{web.url}/2.tar", f"{web.url}/3.tar", f"{folder}/a-00.tar", f"{folder}/a-01.tar"]
    assert found[4:] == [f"{shards}/train-0000{i}.tar" for i in range(3)]
    assert _expand(f"{{s3,az}}://{BUCKET}/x.tar") == [f"{scheme}://{BUCKET}/x.tar" for scheme in ("s3", "az")]
    many = [f"{folder}/{'x' * 100}-{i}.tar" for i in range(100)]  # longer than a path can be
    assert _expand(f"{{{','.join(many)}}}") == many
    for spec, message in (
        (f"{{{folder}/c*.tar,{plain}}}", r"1 of the paths or patterns match no file: gs://.*/c\*\.tar"),
        (f"{{foo,gs}}://{BUCKET}/x.tar", f"source=foo://{BUCKET}/x.tar: nothing here opens an address of foo://"),
        (f"{{gs,}}:/{BUCKET}/x.tar", "an address of gs begins with gs://"),
        (f"{{file:///etc/passwd,{plain}}}", "give the path alone"),
        (f"{{{plain},hdfs://h/x.tar}}", "nothing here opens an address of hdfs://"),
        (f"{{{plain},{web.url}/*.tar}}", "a web server lists no files"),
    ):
        with pytest.raises(ValueError, match=message):
            _expand(spec)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a.tar b.csv", r"a\.tar and .*b\.csv are of different kinds; one pattern names files of one"),
        ("a.tar b.tar.gz", "has no random access; pack it first"),
    ],
)
def test_braces_around_addresses_hold_one_kind_of_file(names, message, web):
    with pytest.raises(ValueError, match=message):
        build_source(f"{{{','.join(f'{web.url}/{name}' for name in names.split())}}}", data=DataConfig())


def test_commands_read_braces_around_whole_addresses(gcs, web, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    web.backend.contents["/2.tar"] = (shards / "train-00002.tar").read_bytes()
    objects.write_bytes(f"gs://{BUCKET}/{__name__}/1.tar", (shards / "train-00001.tar").read_bytes())
    spec = f"{{gs://{BUCKET}/{__name__}/1.tar,{web.url}/2.tar,{shards}/train-00010.tar}}"
    for command in ("show", "index", f"verify --write={tmp_path}/m", f"pack --output={tmp_path}/out"):
        name, *options = command.split()
        assert main(["data", name, spec, *options]) == 0
    told = capsys.readouterr().out
    assert f"{spec}: 6 samples" in told and "3 shards" in told and "digests of 3 files" in told
    source = build_source(f"{tmp_path}/out/*.tar", data=DataConfig())
    assert [source[i].key for i in range(6)] == ["1a", "1b", "2a", "2b", "10a", "10b"]
