"""Captions, arrays, prepared TFDS data and the strings that name a source."""

import dataclasses
import io
import pathlib
import pickle
import socket
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipjax.config import DataConfig
from clipjax.data.sample import REASONS, BadSample, clean_caption, clean_captions
from clipjax.data.sources import ArraySource, _expand, build_source, data_folders, recording_sources
from clipjax.data.webdataset import TarSource
from clipjax.runtime import objects
from tests.conftest import SHARED
from tests.runtime.stores import BUCKET

pytestmark = pytest.mark.newest


def reason_of(source, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        source[index]
    return caught.value.reason


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"a cat", "a cat"),
        ("  a cat\n", "a cat"),
        (b"\xef\xbb\xbfcat", "cat"),
        ("\U0001f600 caf\u00e9", "\U0001f600 caf\u00e9"),
        (b"x" * 100, "x" * 100),
    ],
)
def test_good_captions(raw, text):
    assert clean_caption(raw, max_bytes=100) == text


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty_caption"),
        (" \n\t", "empty_caption"),
        (b"\xff\xfe", "caption_not_utf8"),
        (b"caf\xe9", "caption_not_utf8"),
        ("lone \ud800 surrogate", "caption_not_utf8"),
        (b"x" * 101, "caption_too_long"),
        ("\u00e9" * 51, "caption_too_long"),
        (b"x" * 10_000_000, "caption_too_long"),
    ],
)
def test_bad_captions(raw, reason):
    with pytest.raises(BadSample) as caught:
        clean_caption(raw, max_bytes=100)
    assert caught.value.reason == reason


def test_a_list_loses_its_blank_captions_alone():
    assert clean_captions(["a", b" \n", "b"], max_bytes=9) == ("a", "b")
    assert clean_captions([], max_bytes=9) == ()
    assert ArraySource([b"jpeg"], [["", "x"]])[0].captions == ("x",)
    for raws, reason in ((["", " "], "empty_caption"), (["", "x" * 10], "caption_too_long")):
        with pytest.raises(BadSample) as caught:
            clean_captions(raws, max_bytes=9)
        assert caught.value.reason == reason


def test_bad_sample_travels_between_processes():
    for reason in REASONS:
        assert pickle.loads(pickle.dumps(BadSample(reason))).reason == reason


def test_array_source():
    images = np.zeros((3, 4, 5, 3), np.uint8)
    source = ArraySource(images, ["one", ("two", "zwei"), " "], labels=[7, 8, 9])
    assert len(source) == 3
    assert source[0].captions == ("one",)
    assert source[1].captions == ("two", "zwei")
    assert (source[1].label, source[1].key) == (8, "1")
    assert reason_of(source, 2) == "empty_caption"
    assert source.location(2) == "array, index 2"
    assert ArraySource([b"jpeg"], ["x"])[0].label == -1


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), ["one"], r"one length, not \{'images': 2, 'captions': 1\}"),
        (np.zeros((1, 4, 4, 3), np.float32), ["one"], r"images\[0\] must be uint8 \[h, w, 3\], not float32"),
        ([np.zeros((4, 4, 1), np.uint8)], ["one"], r"not uint8 \[4, 4, 1\]"),
        ([np.zeros((0, 4, 3), np.uint8)], ["one"], r"not uint8 \[0, 4, 3\]"),
    ],
)
def test_array_source_refuses(images, captions, message):
    with pytest.raises(ValueError, match=message):
        ArraySource(images, captions)


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (value, value, value)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a source must never open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> str:
    """A TFDS folder with `pairs` (20 records, in ArrayRecord), written by TFDS itself."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = str(tmp_path_factory.mktemp("tfds"))

    class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "pairs"

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "pixels": tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "nested": {"title": tfds.features.Text()},
                "label": np.int64,
                "labels": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=9)),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(20):
                captions = ["", " "] if i == 3 else [f"number {i}", f"Nummer {i}"]
                yield (
                    i,
                    {
                        "image": io.BytesIO(jpeg(10 * i)),
                        "pixels": np.full((2, 2, 3), i, np.uint8),
                        "captions": captions,
                        "nested": {"title": f"title {i}"},
                        "label": i,
                        "labels": sorted({i % 3, i % 7}),
                    },
                )

    tfds.disable_progress_bar()
    builder = Pairs(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
    )
    return folder


def config(folder: str | None = None, **fields) -> DataConfig:
    return DataConfig(tfds_dir=folder, **fields)


def test_tfds_source_of_several_labels(prepared, no_network):
    one = build_source("tfds:pairs/train", data=config(prepared))
    several = build_source("tfds:pairs/train", data=config(prepared), label_key="labels")
    good = [i for i in range(20) if not _is_bad(one, i)]
    assert len(good) == 19
    for i in good:
        label = one[i].label
        assert one[i].labels is None and several[i].label == -1
        assert several[i].labels == tuple(sorted({label % 3, label % 7}))


def _is_bad(source, index) -> bool:
    try:
        source[index]
    except BadSample:
        return True
    return False


def test_tfds_source(prepared, no_network):
    source = build_source("tfds:pairs/train", data=config(prepared))
    assert len(source) == 20
    by_label = {}
    for i in range(20):
        try:
            sample = source[i]
        except BadSample as bad:
            assert bad.reason == "empty_caption"
            continue
        assert isinstance(sample.image, bytes)
        assert sample.image.startswith(b"\xff\xd8")
        by_label[sample.label] = sample
    assert sorted(by_label) == [i for i in range(20) if i != 3]
    assert by_label[5].captions == ("number 5", "Nummer 5")
    assert by_label[5].image == jpeg(50)
    assert source.location(4) == "tfds:pairs/train, record 4"


def test_one_string_that_is_read_in_two_ways_is_recorded_twice(prepared, no_network):
    sources = {}
    open_source, data = recording_sources(sources), config(prepared)
    first, again, other = (
        open_source("tfds:pairs/train", data=each)
        for each in (data, data, dataclasses.replace(data, max_caption_bytes=3))
    )
    assert first is not again
    assert sources == {"tfds:pairs/train": again, "tfds:pairs/train (2)": other}


def test_folders_of_data_are_those_of_files_and_all_of_tfds(prepared, tmp_path, no_network):
    sources = {spec: build_source(spec, data=config(prepared)) for spec in ("tfds:pairs/train", "tfds:pairs/train[:2]")}
    found = data_folders(sources, [prepared])
    assert pathlib.Path(prepared) in found and pathlib.Path(sources["tfds:pairs/train"].files()[0]).parent in found
    assert data_folders({}, [prepared]) == []


def test_tfds_source_travels_to_workers_without_its_readers(prepared, no_network):
    source = build_source("tfds:pairs/train[:50%]", data=config(prepared))
    data = pickle.dumps(source)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert len(copy) == 10
    assert copy[1] == source[1]


def test_tfds_is_imported_before_a_worker_has_threads(prepared, tmp_path):
    source = build_source("tfds:pairs/train", data=config(prepared))
    (tmp_path / "source").write_bytes(pickle.dumps(source))
    code = (
        "import pickle, sys\n"
        f"source = pickle.load(open({str(tmp_path / 'source')!r}, 'rb'))\n"
        "assert 'tensorflow_datasets.public_api' in sys.modules and source._records is None"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_tfds_features_by_config(prepared, no_network):
    data = config(prepared, tfds_image_key="pixels", tfds_caption_key="nested/title")
    sample = build_source("tfds:pairs:1.0.0/train", data=data, label_key="other")[0]
    assert sample.image.dtype == np.uint8
    assert sample.image.shape == (2, 2, 3)
    assert sample.captions == (f"title {sample.image[0, 0, 0]}",)
    assert sample.label == -1
    labels_only = build_source("tfds:pairs/train", data=config(prepared, tfds_caption_key="none"))
    assert labels_only[0].captions == ()


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        ("tfds:scenes/train", {}, r"tfds:scenes'.*no prepared data.*run `clipjax data scenes`"),
        ("tfds:mnist/train", {}, r"tfds:mnist'.*prepare it with file_format='array_record'"),
        ("tfds:pairs/config/train", {}, r"no prepared data.*pairs/config/CONFIG"),
        ("tfds:pairs/test", {}, r"the splits are train; .*test"),
        ("tfds:pairs", {}, r"must be tfds:NAME/SPLIT"),
        ("tfds:pairs/train", {"tfds_image_key": "picture"}, r"'picture' is not an image.*set data.tfds_image_key"),
        ("tfds:pairs/train", {"tfds_image_key": "label"}, r"'label' is not an image"),
    ],
)
def test_tfds_refuses(prepared, no_network, spec, fields, message):
    with pytest.raises(ValueError, match=message):
        build_source(spec, data=config(prepared, **fields))


def test_tfds_features_are_fields_of_captions(prepared, no_network):
    captions = {"captions": 2.0, "nested/title": 1.0}
    source = build_source("tfds:pairs/train", data=config(prepared), captions=captions)
    for opened in (source, pickle.loads(pickle.dumps(source))):
        for sample in (opened[i] for i in range(20)):
            title, i = (f"title {sample.label}",), sample.label
            texts = () if i == 3 else (f"number {i}", f"Nummer {i}")  # blank ones do not cost the pair
            assert sample.captions == texts + title
            expected = [("captions", 2.0, texts)] if texts else []
            found = [(field.name, field.weight, field.captions) for field in sample.fields]
            assert found == [*expected, ("nested/title", 1.0, title)]
    for name in ("label", "image", "nested", "other"):
        with pytest.raises(
            ValueError, match=rf"names '{name}', and the fields .* are 'captions', 'nested/title'; name"
        ):
            build_source("tfds:pairs/train", data=config(prepared), captions={name: 1.0, "captions": 1.0})


def test_tfds_refuses_other_features_and_formats(prepared, no_network, tmp_path):
    with pytest.raises(ValueError, match="neither a caption feature 'a' nor a label feature 'b'"):
        build_source("tfds:pairs/train", data=config(prepared, tfds_caption_key="a"), label_key="b")
    copied = tmp_path / "pairs" / "1.0.0"
    copied.mkdir(parents=True)
    for file in (pathlib.Path(prepared) / "pairs" / "1.0.0").glob("*.json"):
        (copied / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"in the format tfrecord.*file_format='array_record'"):
        build_source("tfds:pairs/train", data=config(str(tmp_path)))


def test_tfds_damaged_record_is_a_bad_sample(prepared, no_network, tmp_path):
    copied = tmp_path / "pairs" / "1.0.0"
    copied.mkdir(parents=True)
    for file in (pathlib.Path(prepared) / "pairs" / "1.0.0").iterdir():
        content = bytearray(file.read_bytes())
        if "array_record" in file.name:
            content[3000:3060] = bytes(60)
        (copied / file.name).write_bytes(content)
    source = build_source("tfds:pairs/train", data=config(str(tmp_path)))
    reasons = []
    for i in range(len(source)):
        try:
            source[i]
        except BadSample as bad:
            reasons.append(bad.reason)
    assert sorted(reasons) == ["corrupt_record", "empty_caption"]


def write_tar(path: pathlib.Path, keys: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for extension, content in (("jpg", b"image"), ("txt", key.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path) -> pathlib.Path:
    for i in (0, 1, 2, 10):
        write_tar(tmp_path / f"train-{i:05d}.tar", [f"{i}a", f"{i}b"])
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("train-00001.tar", "1a 1b"),
        ("train-{00000..00002}.tar", "0a 0b 1a 1b 2a 2b"),
        ("train-{00010,00001}.tar", "10a 10b 1a 1b"),
        ("train-*.tar", "0a 0b 1a 1b 2a 2b 10a 10b"),
        ("train-0000?.tar", "0a 0b 1a 1b 2a 2b"),
        ("train-{00002,0000*}.tar", "2a 2b 0a 0b 1a 1b"),
    ],
)
def test_tar_patterns(shards, pattern, keys):
    source = build_source(str(shards / pattern), data=DataConfig())
    assert isinstance(source, TarSource)
    assert [source[i].key for i in range(len(source))] == keys.split()


def test_a_path_with_special_characters_is_taken_literally(tmp_path):
    write_tar(tmp_path / "a[1]{2,3}.tar", ["x"])
    assert build_source(str(tmp_path / "a[1]{2,3}.tar"), data=DataConfig())[0].key == "x"


def test_a_folder_of_tars_is_those_tars(tmp_path):
    for number in (1, 0):
        write_tar(tmp_path / f"0000{number}.tar", [f"of {number}"])
        (tmp_path / f"0000{number}.parquet").write_bytes(b"img2dataset's columns, without pictures")
        (tmp_path / f"0000{number}_stats.json").write_text('{"successes": 1}')
    (tmp_path / ".clipjax-index").mkdir()
    source = build_source(f"{tmp_path}/", data=DataConfig())
    assert [source[i].captions for i in range(len(source))] == [("of 0",), ("of 1",)]


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("x.parquet", r"/\*.parquet or .*/\*.tar$"),
        ("x.csv", r"/\*.csv or .*/\*.tar$"),
        ("x/y.txt", r"/\*.tar$"),
    ],
)
def test_a_folder_of_tars_and_other_data_is_refused(tmp_path, name, patterns):
    write_tar(tmp_path / "a.tar", ["a"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=f"is a directory; write .*{patterns}"):
        build_source(str(tmp_path), data=DataConfig())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-*.tar", r"1 of the paths or patterns match no file: .*none-\*\.tar"),
        ("train-{00001..00004}.tar", r"2 of the paths.*train-00003\.tar, .*train-00004\.tar"),
        ("empty", r"is a directory; write .*/empty/\*\.tar$"),
    ],
)
def test_patterns_that_match_nothing(shards, pattern, message):
    (shards / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        build_source(str(shards / pattern), data=DataConfig())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (f"a{ending}", "has no random access; decompress it")
            for ending in (".zip", ".TAR.ZST", ".csv.gz", ".tar.bz2")
        ),
        ("a.tar.gz", "pack it first: clipjax data pack SOURCE --output=DIR"),
        ("a.TGZ", "pack it first: clipjax data pack SOURCE --output=DIR"),
        ("a.arrow", "write the data as Parquet"),
        ("a.tfrecord-00000-of-00002", "TFRecord has no random access"),
        ("a.json", "has one object per line and is called .jsonl"),
        ("{a.csv,b.tar}", r"a.csv and .*b.tar are of different kinds; one pattern names files of one"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, message):
    for each in ("a.csv", "b.tar") if name.startswith("{") else (name,):
        (tmp_path / each).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        build_source(str(tmp_path / name), data=DataConfig())


def test_empty_spec():
    with pytest.raises(ValueError, match="is empty; give tfds:NAME/SPLIT"):
        build_source("", data=DataConfig())


def test_real_shards():
    if not SHARED.exists():
        pytest.skip("shared/ is absent")
    source = build_source(str(SHARED / "data/emoji/emoji-{blob,noto}-val-00000.tar"), data=DataConfig())
    assert len(source) == 249 + 320
    for i in (0, 248, 249, 568):
        sample = source[i]
        assert Image.open(io.BytesIO(sample.image)).size == (96, 96)
        assert sample.captions[0]
    assert "emoji-noto-val-00000.tar, key 000000000" in source.location(249)


def test_patterns_of_addresses(gcs, web):
    folder = f"gs://{BUCKET}/{__name__}"
    for name in ("a-00.tar", "a-01.tar", "b.tar"):
        objects.write_bytes(f"{folder}/{name}", b"")
    assert _expand(f"{folder}/a-*.tar") == [f"{folder}/a-00.tar", f"{folder}/a-01.tar"]
    assert _expand(f"{folder}/{{b,a-*}}.tar") == [f"{folder}/{name}.tar" for name in ("b", "a-00", "a-01")]
    numbered = f"{web.url}/{{00..02}}.tar"  # no request: each is opened later
    assert _expand(numbered) == [f"{web.url}/0{i}.tar" for i in range(3)] and not web.requests
    with pytest.raises(ValueError, match=r"match no file: gs://.*/c\*\.tar"):
        _expand(f"{folder}/{{a,c}}*.tar")
    with pytest.raises(ValueError, match="a web server lists no files"):
        _expand(f"{web.url}/*.tar")
    with pytest.raises(ValueError, match="an address of gs begins with gs://"):
        _expand("gs:/bucket/a.tar")


def test_sources_on_stores_lie_in_no_folder():
    class OnStore(ArraySource):
        def files(self):
            return ["gs://b/a.tar", "/data/b.tar"]

    source = OnStore([b""], ["a"])
    assert data_folders({"gs://b/a.tar": source}, [None]) == [pathlib.Path("/data")]
