"""Tar shards: layouts, odd and hostile members, truncation; every sample is either right or bad for a named reason."""

import errno
import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import tarfile
import threading

import pytest

from clipjax.data.sample import BadSample, Sample, UnreadableData
from clipjax.data.webdataset import TarSource

IMAGE = b"\xff\xd8 not decoded here"


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def pair(key: str, caption: str | None = None) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [entry(f"{key}.jpg", IMAGE + key.encode()), entry(f"{key}.txt", (caption or f"about {key}").encode())]


def write(path: pathlib.Path, members, tar_format: int = tarfile.USTAR_FORMAT) -> TarSource:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    set_time(path)
    return open_source(path)


SECONDS = itertools.count(1_000_000_000)


def set_time(path: pathlib.Path) -> None:
    """Give a file a time of its own: files that are written within a tick of the clock have the same one."""
    os.utime(path, (next(SECONDS),) * 2)


def open_source(*paths: pathlib.Path, max_caption_bytes: int = 1000, max_image_pixels: int = 1000) -> TarSource:
    return TarSource(
        [str(path) for path in paths], max_caption_bytes=max_caption_bytes, max_image_pixels=max_image_pixels
    )


def outcome(source: TarSource, index: int) -> Sample | str:
    try:
        return source[index]
    except BadSample as bad:
        return bad.reason


def outcomes(source: TarSource) -> dict[str, Sample | str]:
    """What becomes of each key."""
    return {source.location(i).partition(", key ")[2]: outcome(source, i) for i in range(len(source))}


def good(key: str, caption: str | None = None, label: int = -1) -> Sample:
    return Sample(image=IMAGE + key.encode(), captions=(caption or f"about {key}",), label=label, key=key)


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "shard-00000.tar"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(path, tar_format):
    long = "d" * 90 + "/" + "n" * 90  # ustar splits this into prefix and name
    longer = "d" * 120 + "/" + "n" * 130
    uncommon = "d\u00e9j\u00e0 vu"
    keys = ["a", long] + ([] if tar_format == tarfile.USTAR_FORMAT else [longer, uncommon]) + ["z"]
    source = write(path, [member for key in keys for member in pair(key)], tar_format)
    # Error messages show no more than 200 characters of a key.
    assert outcomes(source) == {key[:200]: good(key) for key in keys}
    assert source.location(0) == f"shard {path}, key a"


def test_layouts(path):
    members = [
        *pair("txt"),
        entry("UPPER.JPG", IMAGE + b"UPPER"),
        entry("UPPER.TXT", b"about UPPER"),
        entry("./dot.png", IMAGE + b"dot"),
        entry("./dot.txt", b"about dot"),
        entry("json.webp", IMAGE + b"json"),
        entry("json.json", json.dumps({"caption": "from json", "label": 4}).encode()),
        entry("several.jpeg", IMAGE + b"several"),
        entry("several.json", json.dumps({"captions": [" one ", "two"], "label": "a word"}).encode()),
        *pair("both"),
        entry("both.json", b'{"caption": "not this one", "label": 5}'),
        *pair("class"),
        entry("class.cls", b"17\n"),
        entry("class.json", b"not read, because nothing is needed from it"),
        entry("only-label.jpg", IMAGE + b"only-label"),
        entry("only-label.cls", b"0"),
        entry("no-caption.jpg", IMAGE + b"no-caption"),
        *pair("dir/sub.dir/nested"),
        entry("x.seg.png", b"another image of x, not its main one"),
        *pair("x"),
    ]
    expected = {
        "txt": good("txt"),
        "UPPER": good("UPPER"),
        "dot": good("dot"),
        "json": good("json", "from json", 4),
        "several": Sample(IMAGE + b"several", ("one", "two"), -1, "several"),
        "both": good("both", label=5),
        "class": good("class", label=17),
        "only-label": Sample(IMAGE + b"only-label", (), 0, "only-label"),
        "no-caption": Sample(IMAGE + b"no-caption", (), -1, "no-caption"),
        "dir/sub.dir/nested": good("dir/sub.dir/nested"),
        "x": good("x"),
    }
    assert outcomes(write(path, members)) == expected


def test_members_of_a_sample_may_lie_apart(path):
    a, b = pair("a"), pair("b")
    filler = [entry("filler.bin", bytes(200_000))]
    source = write(path, [a[0], *filler, b[1], a[1], *filler, b[0]])
    assert outcomes(source) == {"a": good("a"), "b": good("b")}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([entry("k.txt", b"x")], "missing_image"),
        ([entry("k.json", b"{}")], "missing_image"),
        ([entry("k.jpg", IMAGE), entry("k.txt", b"")], "empty_caption"),
        ([entry("k.jpg", IMAGE), entry("k.txt", b" \n")], "empty_caption"),
        ([entry("k.jpg", IMAGE), entry("k.txt", b"caf\xe9")], "caption_not_utf8"),
        ([entry("k.jpg", IMAGE), entry("k.txt", b"x" * 10_000_000)], "caption_too_long"),
        ([entry("k.jpg", bytes(2**20 + 4001)), entry("k.txt", b"x")], "image_too_large"),
        ([*pair("k"), entry("k.jpg", IMAGE)], "duplicate_key"),
        ([*pair("k"), entry("k.png", IMAGE)], "duplicate_key"),
        ([*pair("k"), entry("k.txt", b"x")], "duplicate_key"),
        *[
            ([entry("k.jpg", IMAGE), entry("k.json", content)], "bad_metadata")
            for content in (
                b"{",
                b"\xff\xff{}",
                b"[]",
                b"3",
                b"[" * 200_000,
                b'{"caption": "a", "n": ' + b"1" * 5000 + b"}",
            )
        ],
        ([entry("k.jpg", IMAGE), entry("k.json", b'{"caption": "a", "b": "' + b"x" * 2**20 + b'"}')], "bad_metadata"),
        ([entry("k.jpg", IMAGE), entry("k.json", b'{"caption": 3}')], "bad_metadata"),
        ([entry("k.jpg", IMAGE), entry("k.json", b'{"captions": ["a", 3]}')], "bad_metadata"),
        ([entry("k.jpg", IMAGE), entry("k.json", b'{"captions": "\\ud800"}')], "caption_not_utf8"),
        ([entry("k.jpg", IMAGE), entry("k.json", b'{"caption": ""}')], "empty_caption"),
        ([entry("k.jpg", IMAGE), entry("k.json", b'{"captions": ["", " ", null]}')], "empty_caption"),
    ],
)
def test_bad_samples(path, members, reason):
    source = write(path, [*pair("a"), *members, *pair("z")])
    assert outcomes(source) == {"a": good("a"), "k": reason, "z": good("z")}


@pytest.mark.parametrize(
    "member",
    [
        entry("k.cls", b"cat"),
        entry("k.cls", b"-1"),
        entry("k.cls", b"4" * 65),
        entry("k.cls", b"\xff"),
        entry("k.cls", str(2**31).encode()),
        entry("k.json", b"{"),
        entry("k.json", b"\xff\xff{}"),
        entry("k.json", b"[1]"),
        entry("k.json", b"[" * 200_000),
        entry("k.json", b'{"label": ' + b"1" * 5000 + b"}"),
        entry("k.json", b'{"label": 3, "a": "' + b"x" * 2**20 + b'"}'),
        entry("k.json", b'{"label": "tree frog", "caption": 3, "captions": {}}'),
    ],
)
@pytest.mark.parametrize("layout", ["together", "apart"])
def test_what_is_not_needed_costs_no_pair(path, member, layout):
    members = [*pair("k"), member, *pair("z")]
    source = write(path, members if layout == "together" else [*members[:2], *members[3:], member])
    assert outcomes(source) == {"k": good("k"), "z": good("z")}


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b'{"label": 3}', 3),
        (b'{ "url": "x", "label":3}', 3),
        (b'{"\\u006cabel": 3}', 3),
        (b'\xef\xbb\xbf{"label": 3}', 3),
        ('{"label": 3}'.encode("utf-16"), 3),
        ('{"label": 3}'.encode("utf-32-be"), 3),
        (b'{"url": "x"}', -1),
        (b'{"a": {"label": 3}}', -1),
    ],
)
def test_labels_beside_a_caption(path, content, label):
    assert outcomes(write(path, [*pair("k"), entry("k.json", content)])) == {"k": good("k", label=label)}


def test_blank_captions_in_a_list_are_left_out(path):
    members = [entry("k.jpg", IMAGE + b"k"), entry("k.json", b'{"caption": null, "captions": ["a", "", null, " b "]}')]
    assert outcomes(write(path, members)) == {"k": Sample(IMAGE + b"k", ("a", "b"), -1, "k")}


def unused(source: TarSource, caplog) -> str:
    """The warnings about members."""
    return "\n".join(record.getMessage() for record in caplog.records if "look like parts" in record.getMessage())


def test_keys_with_dots_are_samples_where_they_make_pairs(path, caplog):
    dotted = [f"dir.d/photo.2019-05.{i}" for i in range(3)]
    members = [member for key in ("a", *dotted, "z") for member in pair(key)]
    source = write(path, members)
    assert outcomes(source) == {key: good(key) for key in ("a", *dotted, "z")}
    assert not caplog.records
    with_json = [entry("v1.0.JPG", IMAGE + b"v1.0"), entry("v1.0.json", b'{"caption": "about v1.0"}')]
    rare = [entry("w.1.gif", IMAGE + b"w.1"), entry("w.1.txt", b"about w.1")]
    twice = [*pair("t.1"), entry("t.1.png", IMAGE)]
    assert outcomes(write(path, [*with_json, *rare, *twice])) == {
        "v1.0": good("v1.0"),
        "w.1": good("w.1"),
        "t.1": "duplicate_key",
    }


def test_further_fields_of_a_sample_stay_no_samples(path, caplog):
    """Samples that were there before dots could be in keys are the same."""
    members = [
        *pair("x"),
        entry("x.seg.png", b"map"),
        entry("x.1.jpg", b"no pair"),
        *pair("y"),
        entry("y.jpg.txt", b"t"),
    ]
    assert outcomes(write(path, members)) == {"x": good("x"), "y": good("y")}
    assert not caplog.records
    source = write(path, [*pair("v1"), *pair("v1.2")])  # these may be a pair of their own
    assert outcomes(source) == {"v1": good("v1")}
    assert "1 like v1.2.jpg, 1 like v1.2.txt" in unused(source, caplog)


def test_members_that_are_not_used_are_named(path, caplog):
    second = [entry(f"{i:04d}.{kind}", b"x") for i in range(3) for kind in ("input.jpg", "outputs.txt", "meta.npy")]
    with pytest.raises(
        ValueError, match=r"no sample in .*: there are members like 0000\.input\.jpg, 0000\.outputs\.txt, "
    ):
        write(path, second)
    source = write(path, [*pair("a"), *second, entry("link.jpg", kind=tarfile.SYMTYPE, linkname="a.jpg")])
    assert outcomes(source) == {"a": good("a")}
    told = unused(source, caplog)
    assert f"3 like 0000.input.jpg, 3 like 0000.outputs.txt, 1 like link.jpg (a link) (first in {path})" in told
    for name in ("k.jpg.txt", "k.caption", "k.text"):  # of a sample without a caption, and of one that has one
        source = write(path, [*pair("a"), entry(name.replace("k", "a")), entry("k.jpg", IMAGE + b"k"), entry(name)])
        assert outcomes(source) == {"a": good("a"), "k": Sample(IMAGE + b"k", (), -1, "k")}
        assert f"not used: 1 like {name} (first" in caplog.records[-1].getMessage()
    caplog.clear()
    source = write(path, [*pair("a"), entry("a.npy"), entry("._a.jpg"), *(entry(f"a.{i}") for i in range(99))])
    assert outcomes(source) == {"a": good("a")} and not unused(source, caplog)


def test_names_of_unused_members_are_shown_escaped(path, caplog):
    source = write(path, [*pair("a"), entry("\x1b[2J.in.jpg", b"x")], tarfile.PAX_FORMAT)
    assert "1 like \\x1b[2J.in.jpg" in unused(source, caplog) and "\x1b" not in caplog.text


@pytest.mark.parametrize("extension", ["tif", "tiff", "gif", "bmp", "avif", "jfif", "TIF", "heic", "svg", "pdf", "PSD"])
def test_images_in_rare_formats_are_images(path, extension):
    rare = [entry(f"k.{extension}", IMAGE + b"k"), entry("k.txt", b"about k")]
    assert outcomes(write(path, [*pair("a"), *rare, *pair("z")])) == {key: good(key) for key in "akz"}
    # Where there is another image, it is that one, as it always was, and in the place that it had.
    both = [rare[0], *pair("a"), *pair("k"), entry(f"a.{extension}", b"another")]
    assert list(outcomes(write(path, both)).items()) == [("a", good("a")), ("k", good("k"))]
    assert outcomes(write(path, [*rare, entry("k.gif" if extension != "gif" else "k.bmp")])) == {"k": "duplicate_key"}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_links_stand_for_earlier_members(path, tar_format):
    long = "d" * 120 + "/a" if tar_format != tarfile.USTAR_FORMAT else "d/a"

    def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
        return entry(name, kind=tarfile.LNKTYPE, linkname=target)

    members = [
        *pair(long),
        link("b.jpg", f"{long}.jpg"),
        entry("b.txt", b"about b"),
        link("c.jpg", "b.jpg"),
        link("c.txt", "./b.txt"),
        entry("n.txt", b"about n"),
        link("n.jpg", "later.jpg"),
        link("m.jpg", "/etc/passwd"),
        entry("later.jpg", IMAGE),
    ]
    image = IMAGE + long.encode()
    assert outcomes(write(path, members, tar_format)) == {
        long: good(long),
        "b": Sample(image, ("about b",), -1, "b"),
        "c": Sample(image, ("about b",), -1, "c"),
        "n": "missing_image",
        "later": Sample(IMAGE, (), -1, "later"),
    }


def test_what_is_no_sample_is_ignored(path, tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    trap = pickle.dumps(Trap())
    link = {"linkname": "/etc/passwd"}
    members = [
        entry("folder.jpg", kind=tarfile.DIRTYPE),
        *pair("a"),
        entry("a.pkl", trap),
        entry("a.pyd", trap),
        entry("only.pickle", trap),
        entry("symbolic.jpg", kind=tarfile.SYMTYPE, **link),
        entry("hard.jpg", kind=tarfile.LNKTYPE, **link),
        entry("device.jpg", kind=tarfile.CHRTYPE),
        entry("block.jpg", kind=tarfile.BLKTYPE),
        entry("pipe.jpg", kind=tarfile.FIFOTYPE),
        entry("vendor.jpg", b"vendor's own type", kind=b"V"),
        entry("._a.jpg", b"what macOS adds"),
        entry(".hidden.txt", b"x"),
        entry("no-extension", b"x"),
        entry("README.md", b"x"),
        *pair("z"),
    ]
    monkeypatch.chdir(tmp_path)
    source = write(path, members, tarfile.GNU_FORMAT)
    assert outcomes(source) == {"a": good("a"), "z": good("z")}
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".clipjax-index", path]


@pytest.mark.parametrize("key", ["../escape", "/absolute/escape", "a/../../b", "semi;colon", "wild*"])
def test_names_are_labels_and_no_paths(path, tmp_path, key, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert outcomes(write(path, pair(key))) == {key: good(key)}
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".clipjax-index", path]


def test_control_characters_are_not_printed(path):
    source = write(path, pair("\x1b[31mred\nline"), tarfile.PAX_FORMAT)
    assert source.location(0).endswith(r"key '\x1b[31mred\nline'")
    assert source[0].key == "\x1b[31mred\nline"


def test_pax_size_and_global_headers(path):
    member, content = entry("big.jpg", IMAGE + b"big", pax_headers={"size": str(len(IMAGE) + 3), "comment": "x" * 600})
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all", "path": "never"}) as tar:
        for info, data in ((member, content), entry("big.txt", b"about big")):
            tar.addfile(info, io.BytesIO(data))
    assert outcomes(open_source(path)) == {"big": good("big")}


def test_binary_sizes(path):
    write(path, pair("a"))
    content = bytearray(path.read_bytes())
    content[124:136] = b"\x80" + (len(IMAGE) + 1).to_bytes(11, "big")
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + sum(content[156:512]) + 8 * 32)
    path.write_bytes(content)
    assert outcomes(open_source(path)) == {"a": good("a")}


def sections(path: pathlib.Path) -> list[int]:
    """Where headers and contents start, and the end."""
    with tarfile.open(path) as tar:
        starts = [start for member in tar for start in (member.offset, member.offset_data)]
    return [*starts, path.stat().st_size]


def test_every_truncation(path):
    """Whatever the length, whole samples survive, the cut one is bad, and nothing else appears."""
    write(path, [*pair("a"), *pair("b"), *pair("c")])
    content = path.read_bytes()
    a_image, a_text, b_image, b_text = (sections(path)[i] for i in (0, 2, 4, 6))
    b_end = sections(path)[8]
    cut = path.with_name("cut.tar")
    cases = {
        a_image + 513: {"a": "truncated_tar"},
        a_image + 512: {"a": "truncated_tar"},
        a_text: {"a": "truncated_tar"},
        a_text + 300: {"a": "truncated_tar"},
        a_text + 515: {"a": "truncated_tar"},
        a_text + 512 + len(b"about a"): {"a": good("a")},
        b_image: {"a": good("a")},
        b_image + 100: {"a": good("a")},
        b_image + 512 + 3: {"a": good("a"), "b": "truncated_tar"},
        b_text: {"a": good("a"), "b": "truncated_tar"},
        b_text + 512: {"a": good("a"), "b": "truncated_tar"},
        b_end: {"a": good("a"), "b": good("b")},
    }
    for length, expected in cases.items():
        cut.write_bytes(content[:length])
        assert outcomes(open_source(cut)) == expected, length


def test_damage_in_the_middle_keeps_what_is_before(path, caplog):
    write(path, [*pair("a"), *pair("b"), *pair("c")])
    content = bytearray(path.read_bytes())
    header = sections(path)[6]  # of b's text
    content[header + 10] ^= 1
    path.write_bytes(content)
    assert outcomes(open_source(path)) == {"a": good("a"), "b": "truncated_tar"}
    assert "checksum is wrong; using the 2 keys before" in caplog.text


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "not yet open"])
@pytest.mark.parametrize("layout", ["together", "apart"])
def test_a_shard_that_changes_after_it_was_opened_stops_the_run(path, is_open, layout):
    """In place or by another file: no bytes of another place become a caption."""
    members = [*pair("a"), *pair("b")]
    members = members if layout == "together" else [*members[::2], *members[1::2]]

    def rewrite() -> None:
        write(path, [entry("marker"), *members])

    for change in (lambda: os.truncate(path, sections(path)[4] + 600), rewrite, path.unlink):
        source = write(path, members)
        if is_open:
            assert source[0] == good("a")
        change()
        if is_open and not path.exists():
            assert source[1] == good("b")  # what is open stays
            continue
        for index in (1, 1):
            with pytest.raises(
                UnreadableData, match=rf"shard {path} cannot be read as it was opened: .*; let what"
            ) as caught:
                source[index]
            assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
        if not is_open:
            assert source.location(1) == f"shard {path}, sample 1"


def test_storage_that_fails_stops_the_run(path, monkeypatch):
    source, read = write(path, pair("a")), os.pread

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        if size > 64:  # of the shard; the index is read number by number
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, size, offset)

    assert source[0] == good("a")
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UnreadableData, match="cannot be read as it was opened: Input/output error; let what"):
        source[0]
    monkeypatch.setattr(os, "pread", lambda *where: read(*where)[:64])
    with pytest.raises(UnreadableData, match="it ends after 64 bytes instead of"):
        source[0]
    monkeypatch.undo()
    assert source[0] == good("a")


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 100, b"<html>" * 1000, gzip.compress(bytes(10240)), os.urandom(2048)],
    ids=["empty", "short", "html", "gzip", "random"],
)
def test_no_tar_is_refused_by_name(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00000\.tar is not a tar file.*decompressed"):
        open_source(path)


def test_shards_without_samples(path, tmp_path):
    with pytest.raises(ValueError, match=r"shard-00000\.tar: there are members like README; expected members KEY\.jpg"):
        write(path, [entry("README", b"x")])
    empty = tmp_path / "empty.tar"
    tarfile.open(empty, "w").close()
    with pytest.raises(ValueError, match="no sample in"):
        open_source(empty)
    full = tmp_path / "full.tar"
    write(full, pair("a"))
    source = open_source(empty, full, path, full)
    assert [source.location(i) for i in range(len(source))] == [f"shard {full}, key a"] * 2


@pytest.mark.parametrize(
    "tamper",
    [
        lambda block: block.__setitem__(slice(124, 136), b"-0000000001\0"),
        lambda block: block.__setitem__(slice(124, 136), b"9999999999 \0"),
        lambda block: block.__setitem__(slice(124, 136), b"\xff" * 12),
        lambda block: block.__setitem__(slice(124, 136), b"\x80" + b"\xff" * 11),
    ],
    ids=["negative", "no-octal", "negative-binary", "2**88"],
)
def test_hostile_sizes(path, tamper):
    write(path, [*pair("a"), *pair("b")])
    content = bytearray(path.read_bytes())
    start = sections(path)[4]
    block = content[start : start + 512]
    tamper(block)
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    content[start : start + 512] = block
    path.write_bytes(content)
    assert outcomes(open_source(path))["a"] == good("a")
    assert outcomes(open_source(path)).get("b", "truncated_tar") == "truncated_tar"


@pytest.mark.parametrize(
    "content",
    [b"30 path=x\n", b"0 path=x\n", b"path=x\n", b"-5 path=x\n", b"12 size=-10\n", b"12 size=abc\n", b"9" * 40],
)
def test_hostile_pax_headers(path, content):
    source = write(path, [*pair("a"), entry("pax", content, kind=b"x"), *pair("b")])
    assert outcomes(source) == {"a": good("a")}


def test_huge_extended_header(path):
    source = write(path, [*pair("a"), entry("long", b"x" * (2**20 + 1), kind=b"L"), *pair("b")])
    assert outcomes(source) == {"a": good("a")}


def test_order_pickle_threads_and_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("clipjax.data.webdataset._MAX_OPEN_SHARDS", 2)
    paths = [tmp_path / f"{i}.tar" for i in range(5)]
    for i, path in enumerate(paths):
        write(path, [member for j in range(4) for member in pair(f"{i}-{j}")])
    source = open_source(*paths)
    expected = [good(f"{i}-{j}") for i in range(5) for j in range(4)]
    source[3]
    copy = pickle.loads(pickle.dumps(source))
    for each in (source, copy):
        assert [each[i] for i in range(len(each))] == expected
    assert len(pickle.dumps(source)) < 4000

    wrong: list[int] = []

    def read(start: int) -> None:
        for i in range(400):
            index = (start + 7 * i) % len(copy)
            if copy[index] != expected[index]:
                wrong.append(index)

    descriptors = pathlib.Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else None
    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    if before is not None:  # the cache closes what it drops
        assert len(list(descriptors.iterdir())) <= before + 2
