"""Tables of paths and captions, also those that name what they must not."""

import csv
import io
import json
import os
import pickle

import numpy as np
import pytest

from clipjax.config import Config, DataConfig
from clipjax.config.validation import validate
from clipjax.data import table_files
from clipjax.data.sample import BadSample
from clipjax.data.sources import build_source, data_folders
from clipjax.data.tables import TableSource

pytestmark = pytest.mark.newest


def reason_of(source, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        source[index]
    return caught.value.reason


@pytest.fixture
def folder(tmp_path):
    """A folder with images/0.jpg to images/199.jpg beside a secret of somebody else's."""
    inside = tmp_path / "data"
    (inside / "images").mkdir(parents=True)
    for i in range(200):
        (inside / "images" / f"{i}.jpg").write_bytes(b"image %d" % i)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return inside


def write_csv(path, header, rows, **options) -> str:
    with open(path, "w", newline="") as file:  # noqa: PTH123
        csv.writer(file, **options).writerows([header, *rows])
    return str(path)


def open_table(path, **fields):
    return build_source(str(path), data=DataConfig(**fields))


CAPTIONS = [
    f'"{i}", a number,\nin {i % 7} lines' + "\n" * (i % 3) + "." if i % 5 == 0 else f"caf\u00e9 {i}" for i in range(200)
]


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_csv(folder, delimiter, ending):
    rows = [(f"images/{i}.jpg", CAPTIONS[i]) for i in range(200)]
    path = write_csv(folder / "a.csv", ("filepath", "title"), rows, delimiter=delimiter, lineterminator=ending)
    source = open_table(path)
    assert isinstance(source, TableSource) and len(source) == 200
    for i in np.random.default_rng(0).permutation(200).tolist():
        assert source[i].image == b"image %d" % i
        assert source[i].captions == (CAPTIONS[i],)
    assert source[7].key == "images/7.jpg" and source[7].label == -1
    assert source.location(7) == f"{folder}/a.csv, row 8, image images/7.jpg"
    for beyond in (200, -1):
        with pytest.raises(IndexError):
            source[beyond]


def test_tsv_with_classes_and_a_mark(folder):
    text = "\ufeffLabel\tImage\tid\n3\timages/1.jpg\tfirst\n\n\timages/2.jpg\t\nx\timages/3.jpg\tz\n"
    (folder / "a.tsv").write_text(text, encoding="utf-8")
    source = open_table(folder / "a.tsv")
    assert len(source) == 3
    assert (source[0].label, source[0].captions, source[0].key) == (3, (), "first")
    assert (source[1].label, source[1].key) == (-1, "images/2.jpg")
    assert reason_of(source, 2) == "bad_metadata"


def test_json_lines(folder):
    rows = [
        {"file_name": "images/0.jpg", "text": "zero"},
        {"file_name": "images/1.jpg", "text": ["one", "eins"], "label": 4},
        {"file_name": "images/2.jpg", "text": None},
        {"file_name": "images/3.jpg"},
        {"file_name": None, "text": "a"},
        {"file_name": ["images/3.jpg"], "text": "a"},
        {"text": "a"},
        {"file_name": "images/3.jpg", "text": 5},
        {"file_name": "images/3.jpg", "text": [None]},
        {"file_name": "images/3.jpg", "text": "\ud800"},
    ]
    lines = [json.dumps(row) for row in rows] + ["[]", "{", "[" * 5000, '{"file_name": 1e999}', "9" * 5000]
    (folder / "metadata.jsonl").write_text("\n\n".join(lines))
    source = open_table(folder / "metadata.jsonl")
    assert len(source) == len(lines)
    assert source[0].captions == ("zero",) and source[1].captions == ("one", "eins") and source[1].label == 4
    assert source[2].captions == source[3].captions == ()
    assert [reason_of(source, i) for i in (4, 5, 6)] == ["missing_image"] * 3
    assert [reason_of(source, i) for i in (7, 8, 9)] == ["bad_metadata", "bad_metadata", "caption_not_utf8"]
    assert [reason_of(source, i) for i in range(10, 15)] == ["bad_metadata"] * 3 + ["missing_image", "bad_metadata"]
    assert source.location(10).endswith("row 11, image ?")


def test_many_rows_and_blank_lines_in_blocks(folder):
    lines = [
        json.dumps({"path": f"images/{i % 200}.jpg", "caption": f"c{i}" * (i % 9 + 1)}) + "\n" * (i % 4 + 1)
        for i in range(1000)
    ]
    (folder / "a.jsonl").write_text("\n\n" + "".join(lines))
    source = open_table(folder / "a.jsonl")
    assert len(source) == 1000
    assert [source[i].captions[0] for i in range(1000)] == [f"c{i}" * (i % 9 + 1) for i in range(1000)]
    assert len(pickle.dumps(source)) < 3000


def test_several_tables_in_several_folders(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.jpg").write_bytes(b"x")
    write_csv(folder / "a.csv", ("image", "caption"), [("images/5.jpg", "five")])
    write_csv(other / "a.csv", ("image", "caption"), [("x.jpg", "ex")])
    source = open_table(f"{tmp_path}/{{data,other}}/a.csv")
    assert [source[i].image for i in range(2)] == [b"image 5", b"x"]
    assert set(source.files()) == {
        str(folder / "a.csv"),
        str(other / "a.csv"),
        str(folder / "images/5.jpg"),
        str(other / "x.jpg"),
    }
    assert data_folders({"x": source}, [None]) == [folder, other]


HOSTILE = [
    "../secret.jpg",
    "images/../../secret.jpg",
    "{outside}/secret.jpg",
    "/etc/passwd",
    "link.jpg",
    "linked/secret.jpg",
    "images",
    ".",
    "",
    "images/none.jpg",
    "images/1.jpg/x",
    "pipe",
    "http://example.com/a.jpg",
    "file:///etc/passwd",
    "images/1.jpg\0",
    "x" * 5000,
    "~/secret.jpg",
    "loop",
    "/dev/zero",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_reaches_nothing_outside(folder, tmp_path, name):
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    row = {"path": name.format(outside=tmp_path), "caption": "a"}
    (folder / "a.jsonl").write_text(json.dumps(row))
    source = open_table(folder / "a.jsonl")
    assert reason_of(source, 0) == "missing_image"
    assert source.files() == [str(folder / "a.jsonl")]
    is_outside = any(part in name for part in ("secret", "etc", "dev/", "link.jpg", "://")) and "~" not in name
    assert source.location(0).endswith("image_root)") == (is_outside or "\0" in name)


def test_links_inside_and_absolute_paths_inside_work(folder):
    (folder / "link.jpg").symlink_to(folder / "images/3.jpg")
    write_csv(
        folder / "a.csv",
        ("path", "caption"),
        [("link.jpg", "a"), (str(folder / "images/4.jpg"), "b"), ("images/x/../5.jpg", "c")],
    )
    source = open_table(folder / "a.csv")
    assert [source[i].image for i in range(2)] == [b"image 3", b"image 4"]


def test_images_of_a_folder_that_is_away_are_not_missing(folder, tmp_path):
    """A disk that is away for a moment must not make all of its images bad ones, for which others stand in."""
    write_csv(folder / "a.csv", ("path", "caption"), [("images/3.jpg", "a"), ("images/none.jpg", "b")])
    source = open_table(folder / "a.csv")
    assert source[0].image == b"image 3" and reason_of(source, 1) == "missing_image"
    folder.rename(tmp_path / "away")
    with pytest.raises(OSError, match="the folder is gone, or lies on another disk than at the start") as caught:
        source[0]
    assert not isinstance(caught.value, BadSample)
    (tmp_path / "away").rename(folder)
    assert source[0].image == b"image 3"


def test_image_root(folder, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "near.jpg").write_bytes(b"near")
    rows = [
        ("3.jpg", "a"),
        (str(folder / "images/4.jpg"), "b"),
        (str(tables / "near.jpg"), "c"),
        ("../../secret.jpg", "d"),
    ]
    path = write_csv(tables / "a.csv", ("path", "caption"), rows)
    source = open_table(path, image_root=str(folder / "images"))
    assert [source[i].image for i in range(3)] == [b"image 3", b"image 4", b"near"]
    assert reason_of(source, 3) == "missing_image"
    assert data_folders({"x": source}, [None]) == [folder / "images", tables]


def test_a_large_file_is_not_read(folder):
    (folder / "big.jpg").write_bytes(b"")
    os.truncate(folder / "big.jpg", 10**12)
    path = write_csv(folder / "a.csv", ("path", "caption"), [("big.jpg", "a")])
    assert reason_of(open_table(path), 0) == "image_too_large"


def test_rows_of_another_length_are_damaged(folder):
    text = "path,caption\nimages/1.jpg,a\nimages/1.jpg\nimages/1.jpg,a,b\nimages/2.jpg,ok\n"
    (folder / "a.csv").write_text(text)
    source = open_table(folder / "a.csv")
    assert [reason_of(source, i) for i in (1, 2)] == ["corrupt_record"] * 2
    assert source[3].captions == ("ok",)


def test_bytes_that_are_no_utf8(folder):
    (folder / "images" / "caf\u00e9.jpg").write_bytes(b"coffee")
    (folder / "a.csv").write_bytes("path,caption\nimages/café.jpg,café\nimages/1.jpg,".encode() + b"caf\xe9\n")
    source = open_table(folder / "a.csv")
    assert source[0].image == b"coffee" and source[0].captions == ("caf\u00e9",)
    assert reason_of(source, 1) == "caption_not_utf8"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "a.csv is empty; a table has a row for each image"),
        ("a.csv", "\n\n", "a.csv is empty"),
        ("a.csv", "path,caption\n", "no row in .*a.csv"),
        (
            "a.csv",
            "url,caption\nx,y\n",
            r"columns are 'url', 'caption'; none is called filepath, image, .*data.image_field",
        ),
        ("a.csv", "path,alt\nx,y\n", r"columns are 'path', 'alt'; none is called caption, .*data.caption_field"),
        ("a.tsv", "path,caption\nx,y\n", r"columns are 'path,caption'; none is called"),
        ("a.csv", "images/1.jpg,a cat\n", r"columns are 'images/1.jpg', 'a cat'; none"),
        (
            "a.csv",
            'path,caption\n"images/1.jpg,' + "x" * 200_000 + "\n",
            r"row 1: field larger than field limit .*quote",
        ),
        ("a.csv", "path,caption\n" + "x" * 2_000_000, r"line 2 is longer than 1048576 bytes; this is no table"),
        ("a.csv", "path,caption\ra,b\r", r"row 0: new-line character"),
        ("a.jsonl", "[1]\n", "the first line is no JSON object"),
        ("a.jsonl", "path,caption\n", "the first line is no JSON object"),
        ("a.jsonl", '{"url": "x"}', "columns are 'url'; none is called"),
        ("a.jsonl", "x" * 2_000_000, "line 1 is longer"),
    ],
)
def test_tables_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, newline="")
    with pytest.raises(ValueError, match=message):
        open_table(tmp_path / name)


def test_columns_by_config(folder):
    path = write_csv(folder / "a.csv", ("a", "path", "caption", "alt"), [("images/1.jpg", "images/2.jpg", "x", "y")])
    assert open_table(path)[0].image == b"image 2"
    sample = open_table(path, image_field="a", caption_field="alt")[0]
    assert (sample.image, sample.captions) == (b"image 1", ("y",))
    with pytest.raises(ValueError, match="none is 'b': set data.image_field"):
        open_table(path, image_field="b")


def test_the_index_is_small(folder, monkeypatch):
    """Memory is for the places of blocks alone, and a row is found by reading one block."""
    rows = [(f"images/{i % 200}.jpg", f"c{i}") for i in range(20_000)]
    source = open_table(write_csv(folder / "a.csv", ("path", "caption"), rows))
    assert len(pickle.dumps(source)) < 20_000 // 64 * 8 + 3000
    seen = []
    original = table_files._read_records
    monkeypatch.setattr(table_files, "_read_records", lambda *args: seen.append(1) or original(*args))
    assert source[12_345].captions == ("c12345",)
    assert source[12_346].captions == ("c12346",) and len(seen) == 1


def test_travels_to_workers(folder):
    source = open_table(
        write_csv(folder / "a.csv", ("path", "caption"), [(f"images/{i}.jpg", f"c{i}") for i in range(200)])
    )
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in (0, 64, 199)] == [source[i] for i in (0, 64, 199)]


def test_digests(folder):
    rows = [(f"images/{i}.jpg", f"c{i}") for i in range(200)]
    path = write_csv(folder / "a.csv", ("path", "caption"), rows)
    first = open_table(path).digests()[0]
    assert first == open_table(path).digests()[0] and first.size == 200
    rows[77] = (rows[77][0], "c7X")  # of the same size
    assert open_table(write_csv(folder / "a.csv", ("path", "caption"), rows)).digests()[0].digest != first.digest
    rows[77] = (rows[77][0], "c77")
    assert open_table(write_csv(folder / "a.csv", ("path", "caption"), rows)).digests()[0].digest == first.digest
    (folder / "images/0.jpg").write_bytes(b"another")
    assert open_table(path).digests()[0].digest != first.digest


def test_a_table_that_changes_stops_the_run(folder):
    path = write_csv(folder / "a.csv", ("path", "caption"), [(f"images/{i}.jpg", f"c{i}") for i in range(200)])
    source = open_table(path)
    source[0]
    with open(path, "a") as file:  # noqa: PTH123
        file.write("images/1.jpg,more\n")
    with pytest.raises(OSError, match="written the file anew"):
        source[199]


@pytest.mark.parametrize(
    ("train", "fields", "is_used"),
    [
        ("a.csv", {"image_field": "x", "caption_field": "y", "image_root": "/z"}, True),
        ("{a,b}.parquet", {"image_field": "x", "caption_field": "y"}, True),
        ("folder:x", {"image_root": "/z"}, True),
        ("folder:x", {"image_root": "gs://b/z"}, False),
        ("folder:gs://b/x", {"image_root": "/z"}, False),
        ("gs://b/a.csv", {"image_root": "gs://b/z"}, True),
        ("a.tar", {"image_field": "x"}, False),
        ("tfds:scenes/train", {"caption_field": "x"}, False),
        ("a.parquet", {"image_root": "/z"}, False),
        ("a.tar", {"image_root": "/z"}, False),
    ],
)
def test_choices_that_nothing_reads_are_refused(train, fields, is_used):
    config = Config(data=DataConfig(train=train, **fields))
    try:
        validate(config)
        message = ""
    except ValueError as error:
        message = str(error)
    assert ("would be ignored: no source is" in message) == (not is_used)


def test_a_row_is_parsed_as_pandas_and_open_clip_do():
    """A quote inside of a text that does not begin with one stands for itself."""
    records = table_files._read_records(iter(io.BytesIO(b'a\t5" pipe\n"x\ty"\t"say ""hi"""\n')), "\t", "t")
    assert [cells for _, _, cells in records] == [["a", '5" pipe'], ["x\ty", 'say "hi"']]
