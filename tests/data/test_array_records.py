"""Plain ArrayRecord: what is written is read again, and what else may be in a record is refused."""

import io
import json
import pickle
import threading

import numpy as np
import pytest
from PIL import Image

from clipjax.config import DataConfig
from clipjax.data.array_records import (
    MARK,
    WRITER_OPTIONS,
    ArrayRecordSource,
    decode_record,
    encode_record,
    write_array_records,
)
from clipjax.data.sample import BadSample, Sample
from clipjax.data.sources import build_source

pytestmark = pytest.mark.newest


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (value % 256,) * 3).save(stream, "JPEG")
    return stream.getvalue()


def samples(count: int, first: int = 0) -> list[Sample]:
    return [
        Sample(jpeg(i), (f"number {i}", "caf\u00e9")[: 1 + i % 2], label=i % 5 - 1, key=f"{i:06d}")
        for i in range(first, first + count)
    ]


def read(record: bytes) -> Sample:
    return decode_record(record, max_caption_bytes=100, max_image_pixels=1000)


def test_what_is_written_is_read(tmp_path):
    assert write_array_records(tmp_path / "0.array_record", samples(70)) == 70
    assert write_array_records(tmp_path / "1.array_record", samples(30, 70)) == 30
    source = build_source(f"{tmp_path}/*.array_record", data=DataConfig())
    assert isinstance(source, ArrayRecordSource)
    assert [source[i] for i in range(len(source))] == samples(100)
    assert source.location(75) == f"{tmp_path}/1.array_record, record 5"
    assert source.files() == [f"{tmp_path}/{i}.array_record" for i in range(2)]
    for beyond in (100, -1):
        with pytest.raises(IndexError):
            source[beyond]


def test_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    found = read(encode_record(Sample(pixels, ())))
    np.testing.assert_array_equal(found.image, pixels)
    assert (found.captions, found.label, found.key) == ((), -1, "")


def test_the_format_is_the_one_that_is_written_down():
    about = {"key": "k", "captions": ["a"], "label": 3, "more": [1]}
    text = json.dumps(about).encode()
    assert read(b"CLIPJAX1" + len(text).to_bytes(4, "little") + text + b"image") == Sample(b"image", ("a",), 3, "k")


def record(about, image: bytes = b"image") -> bytes:
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    return MARK + len(text).to_bytes(4, "little") + text + image


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt_record"),
        (b"CLIPJAX", "corrupt_record"),
        (MARK, "missing_image"),
        (b"CLIPJAX2" + record({})[8:], "corrupt_record"),
        (MARK + b"\xff\xff\xff\xff{}", "corrupt_record"),
        (record(b"x" * 2_000_000), "bad_metadata"),
        (record(b"{"), "bad_metadata"),
        (record(b"[" * 100_000), "bad_metadata"),
        (record(b"\xff"), "bad_metadata"),
        (record([]), "bad_metadata"),
        (record({"key": 3}), "bad_metadata"),
        (record({"label": "x"}), "bad_metadata"),
        (record({"label": -2}), "bad_metadata"),
        (record({"label": 2**40}), "bad_metadata"),
        (record({"captions": [3]}), "bad_metadata"),
        (record({"captions": {"a": 1}}), "bad_metadata"),
        (record({"captions": ["x" * 101]}), "caption_too_long"),
        (record({"captions": [" "]}), "empty_caption"),
        (record({"captions": ["\ud800"]}), "caption_not_utf8"),
        (record({}, b""), "missing_image"),
        (record({}, bytes(1_100_000)), "image_too_large"),
        (record({"shape": [5, 1, 3]}, bytes(14)), "bad_metadata"),
        (record({"shape": [5, 3]}, bytes(15)), "bad_metadata"),
        (record({"shape": [-5, -1, 3]}, bytes(15)), "bad_metadata"),
        (record({"shape": [1.0, 5, 3]}, bytes(15)), "bad_metadata"),
        (record({"shape": "x"}, bytes(15)), "bad_metadata"),
        (record({"shape": [3, 5, 1]}, bytes(15)), "bad_metadata"),
    ],
)
def test_hostile_records(data, reason):
    if data == MARK:
        data = MARK + bytes(4)
        reason = "bad_metadata"  # no JSON at all
    with pytest.raises(BadSample) as caught:
        read(data)
    assert caught.value.reason == reason


def write_raw(path, records: list[bytes], options: str = WRITER_OPTIONS) -> str:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), options)
    for each in records:
        writer.write(each)
    writer.close()
    return str(path)


def test_files_that_are_refused(tmp_path):
    (tmp_path / "text.array_record").write_bytes(b"no records" * 1000)
    (tmp_path / "nothing.arrayrecord").write_bytes(b"")
    write_array_records(tmp_path / "cut.array_record", samples(50))
    (tmp_path / "cut.array_record").write_bytes((tmp_path / "cut.array_record").read_bytes()[:-70_000])
    for name in ("text.array_record", "nothing.arrayrecord", "cut.array_record"):
        with pytest.raises(ValueError, match=f"{name} is no ArrayRecord file, or is"):
            build_source(str(tmp_path / name), data=DataConfig())
    other = write_raw(tmp_path / "other.array_record", [b"tf.Example"])
    with pytest.raises(ValueError, match=r"holds records of another program; .*tfds:NAME/SPLIT"):
        build_source(other, data=DataConfig())
    empty = write_raw(tmp_path / "empty.array_record-00000-of-00001", [])
    with pytest.raises(ValueError, match="no record in"):
        build_source(empty, data=DataConfig())
    with pytest.raises(ValueError, match=r"there is no folder"):
        write_array_records(tmp_path / "none" / "a.array_record", samples(1))


def test_a_damaged_record_leaves_the_others(tmp_path):
    path = tmp_path / "a.array_record"
    write_array_records(path, samples(40))
    content = bytearray(path.read_bytes())
    at = content.index(jpeg(20))
    content[at + 100 : at + 130] = bytes(30)
    path.write_bytes(content)
    source = build_source(str(path), data=DataConfig())
    outcomes = []
    for i in range(40):
        try:
            outcomes.append(source[i] == samples(40)[i])
        except BadSample as bad:
            outcomes.append(bad.reason)
    assert outcomes.count(True) >= 35 and "corrupt_record" in outcomes and False not in outcomes


def test_travels_to_workers_and_threads(tmp_path):
    write_array_records(tmp_path / "a.array_record", samples(60))
    source = build_source(str(tmp_path / "a.array_record"), data=DataConfig())
    source[0]
    assert len(pickle.dumps(source)) < 2000
    copy, wrong = pickle.loads(pickle.dumps(source)), []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 60, 100).tolist():
            if copy[i].key != f"{i:06d}":
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_digests(tmp_path):
    for name, count in (("a", 40), ("b", 40), ("c", 41)):
        write_array_records(tmp_path / f"{name}.array_record", samples(count))
    digests = [build_source(f"{tmp_path}/{name}.array_record", data=DataConfig()).digests()[0] for name in "abc"]
    assert digests[0].digest == digests[1].digest != digests[2].digest and digests[0].size == 40
    content = bytearray((tmp_path / "b.array_record").read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "b.array_record").write_bytes(content)
    assert build_source(f"{tmp_path}/b.array_record", data=DataConfig()).digests()[0].digest != digests[0].digest
