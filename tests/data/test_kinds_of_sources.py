"""The same samples in every kind of source: the same batches, also after a resumption and with a planted fault."""

import csv
import io
import json
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipjax.config import Config, DataConfig, ModelConfig, ViTConfig
from clipjax.data.array_records import write_array_records
from clipjax.data.packed_samples import from_sample
from clipjax.data.sample import REASONS, BadSample, Sample, labels_of
from clipjax.data.sources import ArraySource, build_source
from clipjax.data.training_stream import TrainStream

SIZE, COUNT, BAD = 8, 40, 7


def samples() -> list[Sample]:
    """Pictures with a caption each; one picture is cut off."""
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 12, 14, 3), dtype=np.uint8)
    found = []
    for i, picture in enumerate(pixels):
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "PNG")
        content = stream.getvalue()
        found.append(Sample(content[:60] if i == BAD else content, (f"caption {i:02d}",), key=f"{i:04d}"))
    return found


def write_all(folder: pathlib.Path) -> dict[str, str]:
    """Write the samples in every kind; return the strings that name the sources."""
    pairs = samples()
    (folder / "pairs").mkdir()
    for each in pairs:
        (folder / "pairs" / f"{each.key}.png").write_bytes(each.image)
        (folder / "pairs" / f"{each.key}.txt").write_text(each.captions[0])
    rows = [(f"pairs/{each.key}.png", each.captions[0]) for each in pairs]
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows([("filepath", "title"), *rows])
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"path": path, "text": text}) for path, text in rows))
    columns = {"png": [each.image for each in pairs], "caption": [each.captions[0] for each in pairs]}
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=9)
    write_array_records(folder / "a.array_record", pairs)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for each in pairs:
            for extension, content in (("png", each.image), ("txt", each.captions[0].encode())):
                member = tarfile.TarInfo(f"{each.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    names = ("a.tar", "a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.array_record", "pairs")
    return {name: str(folder / name) for name in names} | {"folder:": f"folder:{folder}/pairs"}


def tokenize(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def take(count: int, source, *, start_step: int = 0) -> list[dict[str, np.ndarray]]:
    model = ModelConfig(image=ViTConfig(image_size=SIZE))
    config = Config(global_batch_size=8, model=model, data=DataConfig(train="test", min_crop_area=0.5))
    stream = TrainStream(source, tokenize=tokenize, config=config, start_step=start_step)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


@pytest.mark.newest
def test_every_kind_gives_the_same_batches(tmp_path):
    pairs = samples()
    expected = take(11, ArraySource([each.image for each in pairs], [each.captions for each in pairs]))
    reasons = np.concatenate([batch["skip_reason"] for batch in expected[:10]])
    assert (reasons == REASONS.index("corrupt_image")).sum() == 2  # once in each of two epochs
    for name, spec in write_all(tmp_path).items():
        source = build_source(spec, data=DataConfig())
        for start in (0, 6):
            for left, right in zip(take(11 - start, source, start_step=start), expected[start:], strict=True):
                for field in left:
                    np.testing.assert_array_equal(left[field], right[field], err_msg=f"{name} {field}")


def test_lists_of_labels_are_read_from_every_kind_that_has_them(tmp_path):
    content, labels = samples()[0].image, [[2, 0, 2], [], [5], None]
    rows = [{"label": each, "caption": f"c{i}"} for i, each in enumerate(labels)]
    (tmp_path / "p.png").write_bytes(content)
    table = pa.table({"png": [content] * 4, "caption": ["c0", "c1", "c2", "c3"], "label": labels})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"path": "p.png", **row}) for row in rows))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, row in enumerate(rows):
            for extension, part in (("png", content), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    expected = [(0, 2), (), (5,), None]
    for name in ("a.parquet", "a.jsonl", "a.tar"):
        source = build_source(str(tmp_path / name), data=DataConfig())
        found = [source[i] for i in range(4)]
        assert [(each.label, each.labels) for each in found] == [(-1, each) for each in expected], name
        write_array_records(tmp_path / f"{name}.array_record", found)
        again = build_source(str(tmp_path / f"{name}.array_record"), data=DataConfig())
        assert [(again[i].label, again[i].labels) for i in range(4)] == [(-1, each) for each in expected]
        packed = [from_sample(each, i, {}) for i, each in enumerate(found)]
        assert [json.loads(each.metadata)["label"] if each.metadata else None for each in packed] == [
            None if each is None else list(each) for each in expected
        ]


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (np.asarray([3, 1, 3], np.int64), (1, 3)),
        (np.asarray([], np.int64), ()),
        (np.asarray([1.0]), None),
        (np.asarray([[1]]), None),
        (np.int64(3), None),
        (3, None),
        ("3", None),
    ],
)
def test_a_list_of_labels_is_known(value, labels):
    assert labels_of(value) == labels


@pytest.mark.parametrize("value", [[-1], ["1"], [True], [1.0], [2**31], [0] * 10_001, [[1]]])
def test_a_list_of_something_else_is_bad(value):
    with pytest.raises(BadSample, match="bad_metadata"):
        labels_of(value)
