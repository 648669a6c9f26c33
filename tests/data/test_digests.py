"""Digests of shards: contents decide, and not paths, times or the order of a command line."""

import json
import os
import pathlib

import numpy as np
import pytest

from clipjax.cli.data import main
from clipjax.data import digests
from clipjax.data.digests import ShardDigest, find_differences, find_order
from clipjax.data.sources import ArraySource
from tests.data.test_sources import config, prepared  # noqa: F401
from tests.data.test_webdataset import open_source, pair, write
from tests.data.test_webdataset import outcomes as outcomes_of


def test_a_tar_at_another_path_and_time_has_the_same_digest(tmp_path):
    keys = [f"{i:03d}" for i in range(40)]
    members = [member for key in keys for member in pair(key)]
    (ours,) = write(tmp_path / "a.tar", members).digests()
    (tmp_path / "other").mkdir()
    for member, _ in members:
        member.mtime, member.uname = 1_000_000, "someone"
    moved = write(tmp_path / "other" / "b.tar", members).digests()
    assert (moved[0].digest, moved[0].size) == (ours.digest, 40)
    for changed in (
        [*members[:-1], pair("039", "other text")[1]],  # a content, in the last sample
        [*members[:-2], *pair("040")],  # a key
        members[2:],
    ):
        assert write(tmp_path / "c.tar", changed).digests()[0].digest != ours.digest


def test_reordered_shards_give_the_samples_in_that_order(tmp_path):
    names = {"a": ["1", "22", "333"], "b": ["4"], "c": ["55", "6"]}
    for name, keys in names.items():
        write(tmp_path / f"{name}.tar", [member for key in keys for member in pair(key)])
    source = open_source(*(tmp_path / f"{name}.tar" for name in "cab"))
    recorded = open_source(*(tmp_path / f"{name}.tar" for name in "abc"))
    order = find_order(recorded.digests(), source.digests())
    again = source.reordered(order)
    assert order == [1, 2, 0] and again.digests() == recorded.digests()
    assert list(outcomes_of(again).items()) == list(outcomes_of(recorded).items())
    assert [again.location(i) for i in range(6)] == [recorded.location(i) for i in range(6)]


def test_orders_and_differences():
    a, b, c = (ShardDigest(f"d/{name}.tar", name * 32, 5) for name in "abc")
    changed = ShardDigest("e/b.tar", "f" * 32, 5)
    assert find_order([a, b, a], [b, a, a]) == [1, 0, 2]
    assert find_order([a, b], [a, b, c]) is find_order([a, a, b], [a, b, b]) is None
    assert find_differences([a, b, c], [changed, a]) == {"changed": [changed], "missing": [c], "additional": []}
    text = digests.describe_differences([a, b], [a, changed, c])
    assert text == "changed: e/b.tar (5 samples); additional: d/c.tar (5 samples)"
    assert digests.describe_differences([a, b], [b, a]) == "the same shards in another order"


def test_arrays_and_tfds_have_digests_too(prepared):  # noqa: F811
    from clipjax.data.sources import build_source

    images = np.arange(20 * 48, dtype=np.uint8).reshape(20, 4, 4, 3)
    one, same = (ArraySource(images.copy(), ["a"] * 20).digests() for _ in range(2))
    assert one == same and one != ArraySource(images + 1, ["a"] * 20).digests()
    source = build_source("tfds:pairs/train", data=config(prepared))
    found = source.digests()
    assert sum(shard.size for shard in found) == len(source) and len(found) == len(source.files())
    assert all(pathlib.Path(file).is_file() for file in source.files())
    half = build_source("tfds:pairs/train[:50%]", data=config(prepared))
    assert sum(shard.size for shard in half.digests()) == len(half) < len(source)


def test_verify_finds_an_edit_of_the_same_size_that_the_digests_do_not(tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.tar", [member for i in range(100) for member in pair(f"{name}{i:03d}")])
    source, manifest = f"--source={tmp_path}/*.tar", f"{tmp_path}/manifest.json"
    assert main(["verify", source, f"--write={manifest}"]) == 0
    assert main(["verify", f"--source={tmp_path}/{{b,a}}.tar", f"--against={manifest}"]) == 0
    before = open_source(tmp_path / "b.tar").digests()
    content = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(content.replace(b"about b001", b"about bxxx"))
    os.rename(tmp_path / "a.tar", tmp_path / "moved.tar")  # noqa: PTH104
    assert open_source(tmp_path / "b.tar").digests() == before
    capsys.readouterr()
    assert main(["verify", source, f"--against={manifest}"]) == 3
    assert capsys.readouterr().out.splitlines()[0] == f"changed: {tmp_path}/b.tar"
    for content, message in (("[1", "is no manifest"), (json.dumps({"files": [1]}), "is no manifest")):
        pathlib.Path(manifest).write_text(content)
        with pytest.raises(SystemExit):
            main(["verify", source, f"--against={manifest}"])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["verify", source])
    assert "give one of --write=FILE" in capsys.readouterr().err
