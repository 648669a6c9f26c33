"""Packing: every kind of source as shards, the same bytes each time, and what stays after a kill or a full disk."""

import errno
import gzip
import json
import pathlib
import resource
import tarfile
import zlib

import numpy as np
import pytest

from clipjax.cli.data import main
from clipjax.config import DataConfig
from clipjax.data import packing
from clipjax.data.pack_manifest import MANIFEST
from clipjax.data.packed_samples import PackedSample, clean_key, from_sample, with_unique_keys
from clipjax.data.packing import pack
from clipjax.data.sample import Sample
from clipjax.data.sources import build_source
from tests.commands import exit_code
from tests.data.test_filters import add, rows, write_tar
from tests.data.test_kinds_of_sources import BAD, COUNT, samples, write_all

pytestmark = pytest.mark.newest


def read(folder: pathlib.Path, ending: str = "tar") -> list[Sample]:
    source = build_source(f"{folder}/*.{ending}", data=DataConfig())
    return [source[i] for i in range(len(source))]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("form", ["tar", "array_record"])
def test_every_kind_of_source_gives_the_same_shards(tmp_path, form):
    specs = write_all(tmp_path)
    found = {}
    for number, (name, spec) in enumerate(specs.items()):
        folder = tmp_path / f"out{number}"
        shards, old = pack(spec, folder, data=DataConfig(), form=form, samples_per_shard=16)
        assert [shard.samples for shard in shards] == [16, 16, 8] and old == 0, name
        packed = read(folder, form)
        expected = samples()
        assert [each.image for each in packed] == [each.image for each in expected], name
        assert [each.captions for each in packed] == [each.captions for each in expected], name
        found[name] = contents(folder)
        again = tmp_path / f"again{number}"
        pack(spec, again, data=DataConfig(), form=form, samples_per_shard=16)
        assert form != "tar" or contents(again) == found[name], name
    assert [each.key for each in read(tmp_path / "out0", form)] == [f"{i:04d}" for i in range(COUNT)]


def test_a_tar_has_plain_headers(tmp_path):
    spec = write_tar(tmp_path / "a.tar", rows())
    pack(spec, tmp_path / "out", data=DataConfig())
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:4]] == ["0000.jpg", "0000.txt", "0000.json", "0001.jpg"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
            (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
        }
        assert json.load(tar.extractfile("0007.json")) == rows()[7]


def test_captions_labels_pixels_and_keys():
    sample = Sample(np.arange(12, dtype=np.uint8).reshape(2, 2, 3), ("a", "b"), label=3)
    packed = from_sample(sample, 5, {"caption": "old", "width": 7})
    assert dict(packed.members()).keys() == {"png", "json", "cls"}
    assert packed.key == "000000005" and packed.label == b"3"
    assert json.loads(packed.metadata) == {"width": 7, "captions": ["a", "b"]}
    one = from_sample(Sample(b"\xff\xd8x", ("é",), key="k"), 0, {"x": "\ud800"})
    assert dict(one.members()) == {"jpg": b"\xff\xd8x", "txt": "é".encode(), "json": b'{"x": "\\ud800"}'}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a/b/0001", "a/b/0001"),
        ("pairs/0001.png", "pairs/0001"),
        ("photo.2019-05", "photo_2019-05"),
        ("../../etc/passwd", "__/__/etc/passwd"),
        ("/./a//b", "a/b"),
        ("a\nb\x1b\ud800", "a_b__"),
        ("", "_"),
        ("ключ", "ключ"),
    ],
)
def test_clean_keys(key, expected):
    assert clean_key(key) == expected


def test_long_and_equal_keys_stay_apart():
    first, second = (clean_key("x" * 300 + end) for end in "ab")
    assert first != second and len(first) <= 80
    given = [PackedSample(key, b"", None, None, None) for key in ("a", "a", "a.b", "a_b", "a-2", "a")]
    assert [each.key for each in with_unique_keys(given)] == ["a", "a-2", "a_b", "a_b-2", "a-2-2", "a-3"]


def write_archive(path: pathlib.Path, tar: pathlib.Path) -> str:
    path.write_bytes(gzip.compress(tar.read_bytes(), mtime=0))
    return str(path)


def test_a_compressed_tar_keeps_all_members_as_they_were(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(5):
            add(tar, f"./d/{i}.jpg", b"\xff\xd8%d" % i)
            add(tar, f"./d/{i}.txt", b" text \xff" if i == 1 else b"text")
            add(tar, f"./d/{i}.json", b"{ broken" if i == 2 else b'{"width":  3}')
            add(tar, f"./d/{i}.npy", b"unused")
        add(tar, "n.txt", b"no image")
        add(tar, "m.jpg", b"image alone")
        for name in ("t.jpg", "t.txt", "t.png"):
            add(tar, name, b"twice")
        add(tar, "l.jpg", b"x")
        add(tar, "l.txt", b"y" * 70_000)
        for name in ("r.tif", "r.jpg", "r.txt", "v.2.jpg", "v.2.txt"):
            add(tar, name, name.encode())
    spec = write_archive(tmp_path / "a.tar.gz", tmp_path / "a.tar")
    shards, _ = pack(spec, tmp_path / "out", data=DataConfig(), samples_per_shard=4)
    assert sum(shard.samples for shard in shards) == 8
    unusable = {reason: count for shard in shards for reason, count in shard.unusable.items()}
    assert unusable == {"missing_image": 1, "duplicate_key": 1, "caption_too_long": 1}
    found = {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    assert found["d/1.txt"] == b" text \xff" and found["d/2.json"] == b"{ broken" and found["d/3.jpg"] == b"\xff\xd83"
    assert found["r.jpg"] == b"r.jpg" and "r.tif" not in found and found["v_2.jpg"] == b"v.2.jpg"
    assert len(found) == 5 * 3 + 2 + 2 + 1
    # As records, what training would find bad is left out: the text that is no UTF-8.
    shards, _ = pack(spec, tmp_path / "records", data=DataConfig(), form="array_record", samples_per_shard=100)
    assert shards[0].samples == 7 and shards[0].unusable["caption_not_utf8"] == 1
    assert read(tmp_path / "records", "array_record")[1].key == "d/2"


@pytest.mark.parametrize("damage", ["cut", "flip", "no end", "trailing"])
def test_a_damaged_archive_gives_what_lies_before(tmp_path, damage, caplog):
    content = pathlib.Path(write_tar(tmp_path / "a.tar", rows())).read_bytes()
    compressed = gzip.compress(content, mtime=0)
    if damage == "no end":
        compressed = gzip.compress(content[: 30 * 6 * 512], mtime=0)
    elif damage == "cut":
        compressed = compressed[: len(compressed) // 2]
    elif damage == "flip":
        compressed = compressed[:-8] + bytes(8)
    else:
        compressed += bytes(100)
    (tmp_path / "a.tgz").write_bytes(compressed)
    shards, _ = pack(str(tmp_path / "a.tgz"), tmp_path / "out", data=DataConfig())
    expected = {"no end": 29, "flip": 60, "trailing": 60}
    assert shards[0].samples == expected.get(damage, shards[0].samples) and 1 < shards[0].samples <= 60
    assert bool(caplog.records) == (damage != "trailing")


def test_a_bomb_takes_no_memory_and_no_disk(tmp_path):
    header = tarfile.TarInfo("bomb.jpg")
    header.size = 2**33
    compressor = zlib.compressobj(9, wbits=31)
    with (tmp_path / "a.tar.gz").open("wb") as file:
        file.write(compressor.compress(header.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(64):
            file.write(compressor.compress(bytes(2**20)))
        file.write(compressor.flush())
    with pytest.raises(ValueError, match="has no usable sample: .*"):
        pack(str(tmp_path / "a.tar.gz"), tmp_path / "out", data=DataConfig())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_the_same_command_goes_on_behind_the_last_whole_shard(tmp_path, monkeypatch, kind, error):
    write_tar(tmp_path / "a.tar", rows())
    write_archive(tmp_path / "a.tar.gz", tmp_path / "a.tar")
    spec, options = str(tmp_path / kind), {"data": DataConfig(), "samples_per_shard": 13}
    pack(spec, tmp_path / "whole", **options)
    write, left = packing.write_tar, [2]

    def stop(path: pathlib.Path, found) -> None:
        if not left[0]:
            path.write_bytes(b"half")
            raise error
        left[0] -= 1
        write(path, found)

    monkeypatch.setattr(packing, "write_tar", stop)
    with pytest.raises(Killed if isinstance(error, Killed) else ValueError) as caught:
        pack(spec, tmp_path / "out", **options)
    if isinstance(error, OSError):
        assert "(No space left on device); 2 shards are finished and stay: free some space" in str(caught.value)
    assert sorted(contents(tmp_path / "out")) == ["00000.tar", "00001.tar", MANIFEST]
    monkeypatch.setattr(packing, "write_tar", write)
    (tmp_path / "out" / ".partial-00002.tar").write_bytes(b"half")  # as a kill by the kernel leaves it
    with (tmp_path / "out" / MANIFEST).open("a") as file:
        file.write('{"shard": "000')
    _, old = pack(spec, tmp_path / "out", **options)
    assert old == 2 and contents(tmp_path / "out") == contents(tmp_path / "whole")
    (tmp_path / "out" / "00003.tar").write_bytes(b"cut")
    _, old = pack(spec, tmp_path / "out", **options)
    assert old == 3 and contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("form", ["tar", "array_record"])
def test_a_file_that_may_not_grow_leaves_whole_shards(tmp_path, form):
    spec = write_tar(tmp_path / "a.tar", rows())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"nothing more can be written there .File too large.; 0 shards are"):
            pack(spec, tmp_path / "out", data=DataConfig(), form=form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(contents(tmp_path / "out")) == [MANIFEST]
    pack(spec, tmp_path / "out", data=DataConfig(), form=form)
    assert len(read(tmp_path / "out", form)) == 60


def test_other_places_and_sources_are_refused(tmp_path):
    spec, data = write_tar(tmp_path / "a.tar", rows()), DataConfig()
    with pytest.raises(ValueError, match=r"--output=.* holds .*a\.tar of the source .*; write into another folder"):
        pack(spec, tmp_path, data=data)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds 'thesis.txt', which is of something else; name an empty folder"):
        pack(spec, tmp_path / "other", data=data)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "00000.tar").write_text("")
    with pytest.raises(ValueError, match=r"holds '00000.tar', which is of something else"):
        pack(spec, tmp_path / "tars", data=data)
    pack(spec, tmp_path / "out", data=data)
    with pytest.raises(ValueError, match=r"holds shards of another source, another --format or --samples_per_shard"):
        pack(spec, tmp_path / "out", data=data, samples_per_shard=7)
    write_tar(tmp_path / "a.tar", rows(5, 20))
    with pytest.raises(ValueError, match=r"holds shards of another source"):
        pack(spec, tmp_path / "out", data=data)
    (tmp_path / "b.tar.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"b\.tar\.gz is no tar that gzip has compressed"):
        pack(str(tmp_path / "b.tar.gz"), tmp_path / "gz", data=data)
    with pytest.raises(ValueError, match=r"a\.tar is no \.tar\.gz or \.tgz, as others are"):
        pack(f"{tmp_path}/{{b.tar.gz,a.tar}}", tmp_path / "gz", data=data)


def test_the_command(tmp_path, capsys):
    spec = write_all(tmp_path)["a.csv"]
    arguments = ["pack", spec, f"--output={tmp_path}/out", "--samples_per_shard=30"]
    assert main(arguments) == 0 and main(arguments) == 0
    first, renamed, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}/out: 2 shards, {COUNT} samples, ") and "2 shards (2 were there)" in second
    assert renamed.startswith(f"{COUNT} keys were changed")
    assert isinstance(samples()[BAD].image, bytes)
    for wrong, message in (
        ([], "--output=DIR is missing"),
        ([f"--output={tmp_path}/o", "--format=zip"], "--format=zip must be one of tar, array_record"),
        ([f"--output={tmp_path}/o", "--samples_per_shard=0"], "must be a whole number of at least 1"),
        (["--output=http://h/o"], "nothing here opens an address of http:// for this, which takes gs://, s3://, az://"),
    ):
        assert exit_code(main, ["pack", spec, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_unusable_samples_are_counted(tmp_path):
    rows_ = rows(0, 6)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row in rows_:
            add(tar, f"{row['key']}.jpg", b"jpg")
            if row["key"] != "0003":
                add(tar, f"{row['key']}.txt", b"" if row["key"] == "0001" else b"text")
    shards, _ = pack(str(tmp_path / "a.tar"), tmp_path / "out", data=DataConfig(), samples_per_shard=4)
    assert [(shard.read, shard.samples) for shard in shards] == [(4, 3), (2, 2)]
    assert shards[0].unusable == {"empty_caption": 1}
    assert [each.captions for each in read(tmp_path / "out")] == [("text",), ("text",), (), ("text",), ("text",)]
