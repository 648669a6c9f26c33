"""Parquet in the layouts of img2dataset and Hugging Face, and what is wrong with files."""

import io
import pickle
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipjax.config import DataConfig
from clipjax.data import parquet
from clipjax.data.parquet import ParquetSource
from clipjax.data.sample import BadSample, UnreadableData
from clipjax.data.sources import build_source

pytestmark = pytest.mark.newest


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (value % 256,) * 3).save(stream, "JPEG")
    return stream.getvalue()


def reason_of(source, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        source[index]
    return caught.value.reason


def write(path, columns: dict, **options) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def img2dataset(path, first: int, count: int, **options) -> str:
    numbers = range(first, first + count)
    columns = {
        "url": [f"http://x/{i}" for i in numbers],
        "key": [f"{i:09d}" for i in numbers],
        "caption": [f"number {i}" for i in numbers],
        "status": ["success"] * count,
        "width": [8] * count,
        "jpg": [jpeg(i) for i in numbers],
    }
    return write(path, columns, **options)


def test_img2dataset(tmp_path):
    img2dataset(tmp_path / "00000.parquet", 0, 70, row_group_size=32)
    img2dataset(tmp_path / "00001.parquet", 70, 33, row_group_size=20)
    source = build_source(str(tmp_path / "{00000..00001}.parquet"), data=DataConfig())
    assert isinstance(source, ParquetSource) and len(source) == 103
    for i in (0, 15, 16, 31, 32, 69, 70, 89, 90, 102):
        sample = source[i]
        assert (sample.key, sample.captions, sample.label) == (f"{i:09d}", (f"number {i}",), -1)
        assert sample.image == jpeg(i)
    assert source.location(0) == f"{tmp_path}/00000.parquet, row 0"
    assert source.location(102) == f"{tmp_path}/00001.parquet, row 32"
    assert source.files() == [str(tmp_path / f"0000{i}.parquet") for i in range(2)]
    for beyond in (103, -1):
        with pytest.raises(IndexError):
            source[beyond]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_hugging_face(tmp_path, compression):
    pictures = [
        {"bytes": jpeg(1), "path": "a.jpg"},
        {"bytes": None, "path": "b.jpg"},
        None,
        {"bytes": b"", "path": None},
    ]
    columns = {"image": pictures, "text": [["one", "eins"], ["two"], ["three"], []], "label": [3, 1, 2, None]}
    path = write(tmp_path / "train-00000-of-00001.parquet", columns, compression=compression)
    source = build_source(path, data=DataConfig())
    assert source[0].image == jpeg(1) and source[0].captions == ("one", "eins") and source[0].label == 3
    assert source[0].key == "0"
    assert [reason_of(source, i) for i in (1, 2, 3)] == ["missing_image"] * 3


def test_columns_by_config(tmp_path):
    columns = {"jpg": [jpeg(1)], "preview": [jpeg(2)], "caption": ["a"], "alt": ["b"], "cls": [7]}
    path = write(tmp_path / "a.parquet", columns)
    assert build_source(path, data=DataConfig(), label_key="cls")[0].label == 7
    sample = build_source(path, data=DataConfig(image_field="preview", caption_field="alt"))[0]
    assert (sample.image, sample.captions, sample.label) == (jpeg(2), ("b",), -1)


def test_a_text_column_called_image_is_passed_over(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": ["a.jpg"], "WEBP": [jpeg(2)], "TEXT": ["a"]})
    assert build_source(path, data=DataConfig())[0].image == jpeg(2)


def test_classes_need_no_caption(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [jpeg(1)], "label": [4]})
    sample = build_source(path, data=DataConfig())[0]
    assert (sample.captions, sample.label) == ((), 4)


@pytest.mark.parametrize(
    ("columns", "fields", "message"),
    [
        (
            {"url": ["x"], "caption": ["a"]},
            {},
            r"columns are 'url', 'caption'; none is called jpg, .*set data.image_field",
        ),
        (
            {"jpg": [b"x"], "url": ["a"]},
            {},
            r"columns are 'jpg', 'url'; none is called caption, .*set data.caption_field",
        ),
        ({"jpg": [b"x"], "caption": ["a"]}, {"image_field": "png"}, r"none is 'png': set data.image_field"),
        ({"jpg": [b"x"], "label": [1]}, {"caption_field": "alt"}, r"none is 'alt': set data.caption_field"),
        (
            {"url": ["x"], "caption": ["a"]},
            {"image_field": "url"},
            r"column 'url' holds string, and no encoded",
        ),
        ({"jpg": [b"x"], "caption": [1]}, {}, r"column 'caption' holds int64, and no text"),
        ({"jpg": [b"x"], "caption": [b"x"]}, {"caption_field": "jpg"}, r"none is 'jpg': set data.caption_field"),
    ],
)
def test_columns_that_are_refused(tmp_path, columns, fields, message):
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message):
        build_source(path, data=DataConfig(**fields))


def test_files_that_are_refused(tmp_path):
    whole = img2dataset(tmp_path / "whole.parquet", 0, 5)
    content = (tmp_path / "whole.parquet").read_bytes()
    broken = {
        "text": b"PAR1 but no more",
        "cut": content[:-20],
        "nothing": b"",
        "footer": content[:-300] + bytes(292) + content[-8:],
    }
    for name, data in broken.items():
        (tmp_path / f"{name}.parquet").write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.parquet is no Parquet file, or is cut off"):
            build_source(str(tmp_path / f"{name}.parquet"), data=DataConfig())
    pq.write_table(pq.read_table(whole)[:0], tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"no row in .*empty.parquet"):
        build_source(str(tmp_path / "empty.parquet"), data=DataConfig())
    write(tmp_path / "other.parquet", {"jpg": [b"x"]})
    with pytest.raises(ValueError, match=r"other.parquet: the columns are 'jpg'"):
        build_source(f"{tmp_path}/{{whole,other}}.parquet", data=DataConfig())
    assert len(build_source(whole, data=DataConfig())) == 5


def test_a_damaged_row_group_leaves_the_others(tmp_path):
    path = tmp_path / "a.parquet"
    img2dataset(path, 0, 40, row_group_size=20, compression="none", use_dictionary=False)
    metadata = pq.read_metadata(path)
    chunk = metadata.row_group(1).column(5)
    content = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    source = build_source(str(path), data=DataConfig())
    assert source[19].image == jpeg(19)
    assert [reason_of(source, i) for i in (20, 39)] == ["corrupt_record"] * 2


def test_cells_are_held_to_the_limits(tmp_path):
    captions = ["x" * 100, "\u00e9" * 60, " ", None, "ok"]
    path = write(tmp_path / "a.parquet", {"jpg": [jpeg(1)] * 4 + [bytes(1_100_000)], "caption": captions})
    source = build_source(path, data=DataConfig(max_caption_bytes=100, max_image_pixels=1000))
    assert source[0].captions == ("x" * 100,)
    assert [reason_of(source, i) for i in (1, 2, 4)] == ["caption_too_long", "empty_caption", "image_too_large"]
    assert source[3].captions == ()


def test_bytes_that_are_no_utf8(tmp_path):
    texts = pa.array([b"caf\xe9", b"good"]).cast(pa.binary()).view(pa.string())
    path = write(tmp_path / "a.parquet", {"jpg": [jpeg(1)] * 2, "caption": texts, "key": texts})
    source = build_source(path, data=DataConfig())
    assert reason_of(source, 0) == "caption_not_utf8"
    assert (source[1].captions, source[1].key) == (("good",), "good")


def test_labels_that_are_none(tmp_path):
    path = write(tmp_path / "a.parquet", {"jpg": [jpeg(1)] * 3, "label": [5, -7, 2**40]})
    source = build_source(path, data=DataConfig())
    assert source[0].label == 5
    assert [reason_of(source, i) for i in (1, 2)] == ["bad_metadata"] * 2


def test_a_dictionary_that_unpacks_to_too_much(tmp_path, monkeypatch):
    """One image 60 times: a dictionary of 1 MB in the file, 60 MB in memory."""
    monkeypatch.setattr(parquet, "_MAX_GROUP_BYTES", 20_000_000)
    columns = {"jpg": [jpeg(1) + bytes(1_000_000)] * 60, "label": [1] * 60}
    path = write(tmp_path / "a.parquet", columns, compression="none")
    assert (tmp_path / "a.parquet").stat().st_size < 3_000_000
    before = pa.total_allocated_bytes()
    source = build_source(path, data=DataConfig())
    assert reason_of(source, 0) == "corrupt_record"
    assert pa.total_allocated_bytes() - before < 1_000_000  # nothing of it is kept


def test_a_row_group_that_is_too_large(tmp_path, monkeypatch):
    path = img2dataset(tmp_path / "a.parquet", 0, 10)
    monkeypatch.setattr(parquet, "_MAX_GROUP_BYTES", 1000)
    with pytest.raises(ValueError, match=r"row group 0 has \d+ bytes, more than 1000; write the file with smaller"):
        build_source(path, data=DataConfig())


def test_row_groups_in_memory_are_bounded(tmp_path, monkeypatch):
    path = img2dataset(tmp_path / "a.parquet", 0, 320, row_group_size=16)
    source = build_source(path, data=DataConfig())
    source[0]
    one = source._groups[0].num_bytes
    monkeypatch.setattr(parquet, "_MAX_CACHE_BYTES", 3 * one + one // 2)
    for i in np.random.default_rng(0).permutation(320).tolist():
        assert source[i].image == jpeg(i)
        assert len(source._groups) <= 3
    monkeypatch.setattr(parquet, "_MAX_CACHE_BYTES", 1)
    source[5]
    assert len(source._groups) == 1


def test_neighbours_are_read_once(tmp_path, monkeypatch):
    path = img2dataset(tmp_path / "a.parquet", 0, 64, row_group_size=32)
    source = build_source(path, data=DataConfig())
    reads = []
    original = parquet._ParquetFile.read
    monkeypatch.setattr(parquet._ParquetFile, "read", lambda file, group: reads.append(group) or original(file, group))
    for i in range(64):
        source[i]
    assert reads == [0, 1]


def test_travels_to_workers_without_what_is_open(tmp_path):
    source = build_source(img2dataset(tmp_path / "a.parquet", 0, 40, row_group_size=8), data=DataConfig())
    source[0]
    data = pickle.dumps(source)
    assert len(data) < 2000
    assert pickle.loads(data)[39] == source[39]


def test_threads_share_it(tmp_path):
    source = build_source(img2dataset(tmp_path / "a.parquet", 0, 100, row_group_size=16), data=DataConfig())
    wrong = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 100, 60).tolist():
            if source[i].image != jpeg(i):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_digests(tmp_path):
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for path in (first, second):
        img2dataset(path, 0, 40, row_group_size=8)
    digests = [build_source(str(path), data=DataConfig()).digests()[0] for path in (first, second)]
    assert digests[0].digest == digests[1].digest and digests[0].size == 40
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    assert build_source(str(second), data=DataConfig()).digests()[0].digest != digests[0].digest
    img2dataset(second, 0, 41, row_group_size=8)
    assert build_source(str(second), data=DataConfig()).digests()[0].digest != digests[0].digest


def test_a_broken_disk_is_no_bad_sample(tmp_path, monkeypatch):
    source = build_source(img2dataset(tmp_path / "a.parquet", 0, 10), data=DataConfig())
    source[0]

    def fail(reader, size=-1):
        reader._failure = OSError(5, "Input/output error")
        raise reader._failure

    monkeypatch.setattr(parquet.PositionedFile, "read", fail)
    source._groups.clear()
    with pytest.raises(UnreadableData, match=r"a\.parquet cannot be read as it was opened: Input/output error"):
        source[0]
