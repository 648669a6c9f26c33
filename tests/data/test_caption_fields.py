"""Captions by weighted fields: what each kind of source reads and refuses, and the draw of one or two."""

import collections
import io
import json
import logging
import math
import pathlib
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipjax.config import Config, DataConfig, MixtureSource, ModelConfig, SamePair, ViTConfig
from clipjax.data import tar_samples
from clipjax.data.array_records import write_array_records
from clipjax.data.caption_fields import draw_captions, find_value, read_captions, tell_absent, to_weights
from clipjax.data.sample import BadSample, FieldCaptions, Sample
from clipjax.data.sources import ArraySource, build_source, build_training_source
from clipjax.data.tokenizers.bytes import BytesTokenizer
from clipjax.data.tokenizers.protocol import TextToTokens
from clipjax.data.training_stream import TrainStream, pair_groups
from clipjax.data.webdataset import TarSource
from tests.data.test_parquet import jpeg

pytestmark = pytest.mark.newest

WEIGHTS = {"txt": 3.0, "recap": 1.0, "about/long": 2.0}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def write_tar(path: pathlib.Path, samples: dict[str, dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in {"jpg": jpeg(1), **members}.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def open_tar(path: pathlib.Path, samples: dict, captions: dict = WEIGHTS, **limits) -> TarSource:
    limits = {"max_caption_bytes": 40, "max_image_pixels": 10_000, **limits}
    return TarSource([write_tar(path, samples)], captions=captions, **limits)


def fields_of(sample: Sample) -> dict[str, tuple[str, ...]]:
    return {field.name: field.captions for field in sample.fields}


def outcome(source, index: int) -> dict | str:
    try:
        return fields_of(source[index])
    except BadSample as bad:
        return bad.reason


def about(**values) -> bytes:
    return json.dumps(values).encode()


TAR_SAMPLES = {
    "all": ({"txt": b" alt ", "json": about(recap="new", about={"long": ["l1", "l2"]})},
            {"about/long": ("l1", "l2"), "recap": ("new",), "txt": ("alt",)}),
    "plain": ({"txt": b"alt"}, {"txt": ("alt",)}),
    "json": ({"json": about(recap=["r", None, " "])}, {"recap": ("r",)}),
    "flat": ({"json": about(**{"about/long": "literal", "about": {"long": "x"}})}, {"about/long": ("literal",)}),
    "others": ({"json": about(caption="usual name", captions=["x"])}, "missing_caption"),
    "nothing": ({"json": about()}, "missing_caption"),
    "image": ({}, "missing_caption"),
    "blank": ({"txt": b" ", "json": about(recap="")}, "empty_caption"),
    "blank beside": ({"txt": b" ", "json": about(recap="new")}, {"recap": ("new",)}),
    "broken beside": ({"txt": b"alt", "json": b"{"}, {"txt": ("alt",)}),
    "broken": ({"json": b"{"}, "bad_metadata"),
    "a list": ({"json": b"[1]"}, "bad_metadata"),
    "number": ({"json": about(recap=3)}, "bad_metadata"),
    "number beside": ({"txt": b"alt", "json": about(recap=3, about="x")}, {"txt": ("alt",)}),
    "not utf8": ({"txt": b"\xff", "json": about(recap="new")}, {"recap": ("new",)}),
    "surrogate": ({"json": about(recap="\ud800")}, "caption_not_utf8"),
    "long": ({"txt": b"x" * 41}, "caption_too_long"),
    "long beside": ({"txt": b"x" * 41, "json": about(recap="new")}, {"recap": ("new",)}),
    "both long": ({"txt": b"x" * 41, "json": about(recap="x" * 41)}, "caption_too_long"),
    "huge json": ({"json": b" " * (tar_samples.MAX_JSON_BYTES + 1)}, "bad_metadata"),
    "huge beside": ({"txt": b"alt", "json": b" " * (tar_samples.MAX_JSON_BYTES + 1)}, {"txt": ("alt",)}),
    "both huge": ({"txt": b"x" * 41, "json": b" " * (tar_samples.MAX_JSON_BYTES + 1)}, "caption_too_long"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAR_SAMPLES)
def test_fields_of_a_tar(tmp_path, name):
    members, expected = TAR_SAMPLES[name]
    source = open_tar(tmp_path / "a.tar", {"k": members, "other": {"txt": b"alt"}})
    assert outcome(source, 0) == expected
    assert outcome(pickle.loads(pickle.dumps(source)), 0) == expected
    assert source[1].captions == ("alt",)
    [found, _] = source.read_block(0, 2)
    assert (found.reason if isinstance(found, BadSample) else fields_of(found)) == expected


def test_captions_of_a_sample_are_those_of_all_fields(tmp_path):
    sample = open_tar(tmp_path / "a.tar", {"k": TAR_SAMPLES["all"][0] | {"cls": b"7"}})[0]
    assert sample.captions == ("l1", "l2", "new", "alt") and sample.label == 7
    assert [field.weight for field in sample.fields] == [2.0, 1.0, 3.0]


def test_json_and_text_are_read_only_if_a_field_of_them_is_asked_for(tmp_path, monkeypatch):
    members = {"txt": b"alt", "json": about(recap="new", label=3)}
    read = collections.Counter()
    slices = tar_samples.slices

    def spy(block, offsets, sizes, first):
        found = slices(block, offsets, sizes, first)
        read.update(name for name, content in zip(("image", "text", "json", "class"), found, strict=True) if content)
        return found

    monkeypatch.setattr("clipjax.data.webdataset.slices", spy)
    for captions, expected in (({"txt": 1.0}, {"image", "text"}), ({"recap": 1.0}, {"image", "json"})):
        read.clear()
        open_tar(tmp_path / "a.tar", {"k": members}, captions)[0]
        assert set(read) == expected


def test_plain_captions_of_a_tar_are_as_before(tmp_path):
    source = open_tar(tmp_path / "a.tar", {"k": TAR_SAMPLES["all"][0], "j": {"json": about(caption="c")}}, {})
    assert source[0] == Sample(jpeg(1), ("alt",), -1, "k") and source[1].captions == ("c",)


def test_fields_that_no_sample_has_are_told_of(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", {f"k{i}": {"txt": b"alt", "json": about(recap="x")} for i in range(40)})
    data = DataConfig(train=path, captions={"txt": 1.0, "recap": 1.0, "typo\x1b": 1.0})
    with caplog.at_level(logging.WARNING):
        build_training_source(data)
    assert f"data.captions: none of 32 samples of {path} has 'typo\\x1b'" in caplog.text
    caplog.clear()
    del data.captions["typo\x1b"]
    build_training_source(data)
    assert caplog.text == ""
    assert tell_absent((), build_source(path, data=data), "x") is None


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"a": {"b": "x"}}, "a/b", "x"),
        ({"a/b": "y", "a": {"b": "x"}}, "a/b", "y"),
        ({"a": "x"}, "a/b", None),
        ({"a": ["x"]}, "a/0", None),
        ([], "a", None),
        ({"a": None}, "a/b/c", None),
    ],
)
def test_nested_names(values, name, expected):
    assert find_value(values, name) == expected


def hostile_value(random: np.random.Generator, depth: int = 0):
    """Any JSON value."""
    kind = int(random.integers(9 if depth < 3 else 7))
    if kind == 7:
        return [hostile_value(random, depth + 1) for _ in range(random.integers(4))]
    if kind == 8:
        return {str(random.choice(["a", "b", "a/b", ""])): hostile_value(random, depth + 1) for _ in range(3)}
    return [None, "", " ", "text", "\ud800", "x" * 100, 3][kind]


def test_any_json_gives_captions_or_a_reason(tmp_path):
    random = rng(1)
    names = {"a": 1.0, "a/b": 1.0, "b/a/b": 1.0, "txt": 1.0}
    samples = {f"k{i}": {"json": json.dumps(hostile_value(random)).encode()} for i in range(600)}
    for key in list(samples)[::3]:
        samples[key]["txt"] = [b"alt", b"\xff", b" "][int(random.integers(3))]
    source = open_tar(tmp_path / "a.tar", samples, names)
    found = collections.Counter(
        each if isinstance(each, str) else "good" for each in (outcome(source, i) for i in range(len(source)))
    )
    assert len(source) == 600 and found["good"] > 50
    assert {"missing_caption", "empty_caption", "bad_metadata", "caption_not_utf8", "caption_too_long"} <= set(found)
    for i in range(600):
        parsed = json.loads(samples[f"k{i}"]["json"])
        for name, captions in (outcome(source, i) if isinstance(outcome(source, i), dict) else {}).items():
            assert all(caption.strip() == caption != "" and len(caption) <= 40 for caption in captions)
            if name != "txt":
                value = find_value(parsed, name)
                texts = [value] if isinstance(value, str) else value
                assert [each.strip() for each in texts if each and each.strip()] == list(captions)


def parquet(path: pathlib.Path) -> str:
    columns = {
        "jpg": [jpeg(1), jpeg(2), jpeg(3)],
        "caption": ["alt", None, " "],
        "long": [["l1", "l2"], ["l"], None],
        "width": [1, 2, 3],
    }
    pq.write_table(pa.table(columns), path)
    return str(path)


def csv(path: pathlib.Path) -> str:
    for name in "abc":
        (path.parent / f"{name}.jpg").write_bytes(jpeg(1))
    path.write_text("path,caption,long\na.jpg,alt,l1\nb.jpg,,l\nc.jpg, ,\n")
    return str(path)


def jsonl(path: pathlib.Path) -> str:
    rows = [{"path": "a.jpg", "caption": "alt"}, {"path": "b.jpg", "long": ["l"]}, {"path": "c.jpg", "caption": " "}]
    for row in rows:
        (path.parent / row["path"]).write_bytes(jpeg(1))
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    ("write", "name", "first"),
    [
        (parquet, "a.parquet", {"caption": ("alt",), "long": ("l1", "l2")}),
        (csv, "a.csv", {"caption": ("alt",), "long": ("l1",)}),
        (jsonl, "a.jsonl", {"caption": ("alt",)}),
    ],
)
def test_columns_are_fields(tmp_path, write, name, first):
    data = DataConfig(train=write(tmp_path / name), captions={"long": 1, "caption": 2.0})
    source = build_training_source(data)
    for each in (source, pickle.loads(pickle.dumps(source))):
        assert outcome(each, 0) == first
        assert outcome(each, 1) == {"long": ("l",)}
        assert outcome(each, 2) == "empty_caption"
    assert build_source(data.train, data=data)[0].captions == ("alt",)  # evaluation reads plain captions


@pytest.mark.parametrize(("write", "name"), [(parquet, "a.parquet"), (csv, "a.csv"), (jsonl, "a.jsonl")])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, write, name):
    data = DataConfig(train=write(tmp_path / name), captions={"caption": 1.0, "recap": 1.0})
    with pytest.raises(ValueError, match=rf"{name}: data.captions names 'recap', and the fields .* 'caption', 'long'"):
        build_training_source(data)


def test_columns_of_something_else_are_refused(tmp_path):
    for field, message in (("width", "column 'width' holds int64, and no text .* data.captions"), ("jpg", "'jpg'")):
        with pytest.raises(ValueError, match=message):
            build_training_source(DataConfig(train=parquet(tmp_path / "a.parquet"), captions={field: 1.0}))


def test_one_too_long_cell_does_not_cost_the_pair(tmp_path):
    data = DataConfig(train=parquet(tmp_path / "a.parquet"), captions={"long": 1, "caption": 2.0}, max_caption_bytes=2)
    assert outcome(build_training_source(data), 0) == {"long": ("l1", "l2")}


def test_folders_and_records_have_one_field(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "pictures" / "a.txt").write_text("one")
    records = tmp_path / "a.array_record"
    write_array_records(records, [Sample(jpeg(1), ("one",))])
    for train, field in ((str(tmp_path / "pictures"), "txt"), (str(records), "captions")):
        assert build_training_source(DataConfig(train=train, captions={field: 1.0}))[0].captions == ("one",)
        with pytest.raises(ValueError, match=f"names 'recap', and the fields that are there are '{field}'"):
            build_training_source(DataConfig(train=train, captions={field: 1.0, "recap": 1.0}))
    (tmp_path / "classes" / "x").mkdir(parents=True)
    (tmp_path / "classes" / "x" / "a.jpg").write_bytes(jpeg(1))
    with pytest.raises(ValueError, match="names 'txt', and the fields that are there are none"):
        build_training_source(DataConfig(train=f"folder:{tmp_path}/classes", captions={"txt": 1.0}))


def test_the_part_of_a_mixture_has_its_own_fields(tmp_path):
    samples = {"k": TAR_SAMPLES["all"][0]}
    paths = [write_tar(tmp_path / f"{name}.tar", samples) for name in "ab"]
    parts = {"a": MixtureSource(source=paths[0]), "b": MixtureSource(source=paths[1], captions={"recap": 1.0})}
    source = build_training_source(DataConfig(mixture=parts, captions={"txt": 1.0}))
    assert [fields_of(source[i]) for i in (0, 1)] == [{"txt": ("alt",)}, {"recap": ("new",)}]
    parts["b"].captions, parts["b"].source = {"recap": 1.0}, parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data.mixture.b: .*a.parquet: data.captions names 'recap'"):
        build_training_source(DataConfig(mixture=parts))


def field(name: str, weight: float, *captions: str) -> FieldCaptions:
    return FieldCaptions(name, weight, captions)


def test_without_fields_the_draw_is_the_one_there_was():
    ours, theirs = rng(), rng()
    captions = ("a", "b", "c")
    for _ in range(20):
        assert draw_captions(captions, (), 1, ours) == [captions[int(theirs.integers(3))]]
    assert ours.bit_generator.state == theirs.bit_generator.state


def test_fields_are_drawn_by_weight_among_those_of_the_sample_then_captions_evenly():
    fields = (field("long", 2.0, "l1", "l2"), field("recap", 1.0, "r"), field("txt", 3.0, "t"))
    count, random = 6000, rng()
    drawn = collections.Counter(draw_captions((), fields, 1, random)[0] for _ in range(count))
    for caption, share in {"l1": 1 / 6, "l2": 1 / 6, "r": 1 / 6, "t": 1 / 2}.items():
        # Five standard deviations of a binomial count.
        assert abs(drawn[caption] - count * share) < 5 * math.sqrt(count * share * (1 - share))
    rest = collections.Counter(draw_captions((), fields[:2], 1, random)[0] for _ in range(count))
    assert abs(rest["r"] - count / 3) < 5 * math.sqrt(count * 2 / 9)


def test_two_captions_are_of_different_fields():
    fields = (field("long", 2.0, "l1", "l2"), field("recap", 1.0, "r"), field("txt", 3.0, "t"))
    count, random = 6000, rng()
    drawn = collections.Counter(tuple(each[0] for each in draw_captions((), fields, 2, random)) for _ in range(count))
    weights = {"l": 2, "r": 1, "t": 3}
    assert all(first != second for first, second in drawn)
    for first, second in drawn:
        share = weights[first] / 6 * weights[second] / (6 - weights[first])
        assert abs(drawn[first, second] - count * share) < 5 * math.sqrt(count * share * (1 - share))


def test_two_captions_of_one_field_differ_where_they_can():
    for fields in ((), (field("txt", 1.0, "a", "b", "a"),)):
        found = {tuple(draw_captions(("a", "b", "a"), fields, 2, rng(seed))) for seed in range(40)}
        assert found == {("a", "b"), ("b", "a")}
    for fields in ((), (field("txt", 1.0, "a"),)):
        assert draw_captions(("a",), fields, 2, rng()) == ["a", "a"]
    assert draw_captions(("a", "a"), (), 2, rng()) == ["a", "a"]


def test_the_order_of_fields_in_a_config_does_not_matter():
    assert to_weights({"b": 1.0, "a": 2.0}) == to_weights({"a": 2.0, "b": 1.0})
    assert to_weights(None) == ()


def test_the_first_fault_is_the_reason():
    def value_of(name: str):
        if name == "a":
            return None
        raise BadSample("caption_too_long" if name == "b" else "corrupt_record")

    with pytest.raises(BadSample) as caught:
        read_captions(to_weights({"c": 1.0, "b": 1.0, "a": 1.0}), value_of, max_bytes=9)
    assert caught.value.reason == "caption_too_long"
    for value in (["x"] * 1001, {"x": 1}, 3, [3], [["x"]]):
        with pytest.raises(BadSample) as caught:
            read_captions((("a", 1.0),), lambda _, value=value: value, max_bytes=9)
        assert caught.value.reason == "bad_metadata"


def take(count: int, source=None, tokenizer=None, batch: int = 8, **data) -> list[dict[str, np.ndarray]]:
    config = Config(
        global_batch_size=batch,
        model=ModelConfig(image=ViTConfig(image_size=8)),
        data=DataConfig(train="test", **data),
    )
    if source is None:
        images = rng().integers(0, 256, (16, 12, 14, 3), dtype=np.uint8)
        source = ArraySource(images, [(f"a{i}", f"b{i}") for i in range(16)])
    stream = TrainStream(source, tokenize=tokenizer or TextToTokens(BytesTokenizer(), 8), config=config)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def texts(row: np.ndarray) -> str:
    return BytesTokenizer().decode(row.tolist())


def test_a_stream_draws_one_field_at_each_sight(tmp_path):
    samples = {f"k{i}": {"txt": f"t{i}".encode(), "json": about(recap=f"r{i}")} for i in range(16)}
    captions = {"txt": 1.0, "recap": 1.0}
    source = TarSource(
        [write_tar(tmp_path / "a.tar", samples)], max_caption_bytes=9, max_image_pixels=10_000, captions=captions
    )
    batches = take(20, source, captions=captions)
    seen = collections.Counter(texts(row)[0] for batch in batches for row in batch["tokens"])
    assert set(seen) == {"t", "r"} and min(seen.values()) > 50  # of 160, with a standard deviation of 6
    assert all(texts(row)[1:] == str(i) for b in batches for row, i in zip(b["tokens"], b["index"], strict=True))
    again = take(20, source, captions=captions)
    assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(batches, again, strict=True))


def test_a_stream_gives_two_captions():
    for batch in take(3, captions_per_image=2):
        assert batch["tokens"].shape == (8, 2, 8) and batch["tokens"].dtype == np.int32
        for row, index in zip(batch["tokens"], batch["index"], strict=True):
            assert {texts(row[0]), texts(row[1])} == {f"a{index}", f"b{index}"}


def test_groups_by_caption_are_those_of_each_text():
    tokens = np.array([[[1, 2], [3, 4]], [[3, 4], [1, 2]], [[1, 2], [5, 6]]], np.int32)
    batch = {"tokens": tokens, "index": np.array([7, 8, 7])}
    group = pair_groups(batch, SamePair.CAPTION)
    assert group.shape == (3, 2) and group.dtype == np.int32
    for k in range(2):
        np.testing.assert_array_equal(group[:, k], pair_groups({"tokens": tokens[:, k]}, SamePair.CAPTION))
    assert group[0, 0] == group[1, 1] == group[2, 0] != group[0, 1]
    assert pair_groups(batch, SamePair.INDEX).tolist() == [7, 8, 7]
