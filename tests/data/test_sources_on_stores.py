"""Tables, folders of images, and small files behind addresses: read as on a disk, and nothing outside of them."""

import gzip
import json
import pickle

import pytest

from clipjax.config import DataConfig
from clipjax.data.digests import digest_files
from clipjax.data.key_lists import KeyList
from clipjax.data.sample import BadSample
from clipjax.data.sources import build_source, data_folders
from clipjax.data.tokenizers.build import build_tokenizer
from clipjax.evals.prompts import load_classes
from clipjax.runtime import objects
from tests.runtime.stores import BUCKET

PLACE = f"gs://{BUCKET}/sources"
ROWS = ["images/1.jpg", "./images/x/../2 ü.jpg"]


def open_source(spec, **fields):
    return build_source(spec, data=DataConfig(**fields))


def table(names) -> bytes:
    return "".join(json.dumps({"path": name, "caption": f"a {i}"}) + "\n" for i, name in enumerate(names)).encode()


@pytest.fixture
def images(gcs):
    for name in ("images/1.jpg", "images/2 ü.jpg"):
        objects.write_bytes(f"{PLACE}/{name}", f"bytes of {name}".encode())
    objects.write_bytes(f"gs://{BUCKET}/secret.jpg", b"secret")
    objects.write_bytes(f"{PLACE}2/secret.jpg", b"secret")
    return gcs


def reason_of(source, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        source[index]
    return caught.value.reason


def test_a_table_and_its_images_in_a_bucket(images):
    objects.write_bytes(f"{PLACE}/a.jsonl", table(ROWS))
    source = pickle.loads(pickle.dumps(open_source(f"{PLACE}/*.jsonl")))
    assert [(each.image, each.captions) for each in (source[0], source[1])] == [
        (b"bytes of images/1.jpg", ("a 0",)),
        ("bytes of images/2 ü.jpg".encode(), ("a 1",)),
    ]
    assert source.files() == [f"{PLACE}/a.jsonl", f"{PLACE}/images/1.jpg", f"{PLACE}/images/2 ü.jpg"]
    assert data_folders({"x": source}, [None]) == []
    assert [each.size for each in digest_files(source.files())] == [len(table(ROWS)), 21, 24]


HOSTILE = [
    "../secret.jpg",
    "../sources2/secret.jpg",
    "images/../../secret.jpg",
    f"gs://{BUCKET}/secret.jpg",
    f"{PLACE}2/secret.jpg",
    f"{PLACE}/../secret.jpg",
    f"s3://{BUCKET}/sources/images/1.jpg",
    "http://169.254.169.254/secret.jpg",
    "foo://x/y.jpg",
    "/etc/passwd",
    "images/1.jpg\0",
    "\ud800.jpg",
    "x" * 5000,
    "images",
    "absent.jpg",
]


def test_a_table_in_a_bucket_reaches_nothing_outside(images):
    objects.write_bytes(f"{PLACE}/a.jsonl", table(HOSTILE))
    source = open_source(f"{PLACE}/a.jsonl")
    assert {name: reason_of(source, i) for i, name in enumerate(HOSTILE)} == dict.fromkeys(HOSTILE, "missing_image")


def test_a_table_on_a_disk_with_images_in_a_bucket(images, tmp_path):
    (tmp_path / "near.jpg").write_bytes(b"near")
    names = ["1.jpg", f"{PLACE}/images/1.jpg", str(tmp_path / "near.jpg"), f"{PLACE}/a.jsonl", "../../secret.jpg"]
    (tmp_path / "a.jsonl").write_bytes(table(names))
    source = open_source(str(tmp_path / "a.jsonl"), image_root=f"{PLACE}/images/")
    assert [source[i].image for i in range(3)] == [b"bytes of images/1.jpg"] * 2 + [b"near"]
    assert [reason_of(source, i) for i in (3, 4)] == ["missing_image"] * 2
    assert data_folders({"x": source}, [None]) == [tmp_path]


def test_a_large_object_is_not_read(images, tmp_path):
    objects.write_bytes(f"{PLACE}/images/large.jpg", bytes(2**20 + 900))
    objects.write_bytes(f"{PLACE}/a.jsonl", table(["images/large.jpg"]))
    assert reason_of(open_source(f"{PLACE}/a.jsonl", max_image_pixels=100), 0) == "image_too_large"


def test_no_bucket_for_images_stops(gcs, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(table(["1.jpg"]))
    with pytest.raises(FileNotFoundError, match="there is no bucket none-such"):
        open_source(str(tmp_path / "a.jsonl"), image_root="gs://none-such/x")[0]


def test_a_table_of_a_web_server_and_names_that_must_be_escaped(web):
    web.backend.contents |= {"/d/a.jsonl": table(["50%25 ü.jpg", "%2e%2e/secret.jpg", f"{web.url}/d/b%20c.jpg"])}
    web.backend.contents |= {"/d/50%25 ü.jpg": b"one", "/secret.jpg": b"no", "/d/b c.jpg": b"three"}
    source = open_source(f"{web.url}/d/a.jsonl")
    assert (source[0].image, source[2].image) == (b"one", b"three")
    assert reason_of(source, 1) == "missing_image"


@pytest.mark.parametrize("has_captions", [True, False])
def test_a_folder_in_a_bucket_is_read_as_on_a_disk(gcs, tmp_path, has_captions):
    names = ["b/9.jpg", "b/c/1.jpg", "b-/2.png", "a/3.jpg", ".hidden/4.jpg", "a/note.md"] + ["z.jpg"] * has_captions
    names += [f"{name[:-4]}.txt" for name in names if has_captions and name.endswith(("g", "9.jpg"))]
    place, folder = f"gs://{BUCKET}/folder-{has_captions}", tmp_path / "images"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
        objects.write_bytes(f"{place}/{name}", name.encode())
    here, there = open_source(f"folder:{folder}"), pickle.loads(pickle.dumps(open_source(f"folder:{place}/")))
    assert [here[i] for i in range(len(here))] == [there[i] for i in range(len(there))]
    assert [path.removeprefix(str(folder)) for path in here.files()] == [
        path.removeprefix(place) for path in there.files()
    ]
    assert here.digests()[0].digest == there.digests()[0].digest


def test_a_folder_of_a_web_server_is_refused(web):
    with pytest.raises(ValueError, match="a web server lists no files; give a table"):
        open_source(f"folder:{web.url}/x")


def test_small_files_behind_addresses(gcs, tmp_path):
    objects.write_bytes(f"{PLACE}/classes.json", b'["cat", "dog"]')
    assert load_classes(f"{PLACE}/classes.json") == ("cat", "dog")
    objects.write_bytes(f"{PLACE}/keys.txt", b"a\nb\n")
    keys = KeyList("data.keep_keys", f"{PLACE}/keys.txt")
    assert keys.contains("x.tar", ["a", "c"]).tolist() == [True, False]
    merges = "\n".join(["#version: 0.2"] + ["a b"] * 48_894).encode()
    objects.write_bytes(f"{PLACE}/bpe.txt.gz", gzip.compress(merges))
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(merges))
    results = []
    for place in (PLACE, tmp_path):
        try:
            results.append(build_tokenizer(f"clip:{place}/bpe.txt.gz").files())
        except ValueError as error:
            results.append(str(error).replace(str(place), ""))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "spec", ["clip:{}/a.gz", "clip:{}/folder", "sentencepiece:{}/a.model", "siglip:{}/a", "huggingface:{}/t.json"]
)
def test_a_tokenizer_that_is_not_there_is_refused(gcs, spec):
    with pytest.raises(ValueError, match=r"data.tokenizer='\w+:gs://none-such/.*there is no bucket none-such"):
        build_tokenizer(spec.format("gs://none-such"))
