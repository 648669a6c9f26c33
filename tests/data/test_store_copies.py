"""ArrayRecord files and TFDS data in a store: copied to a disk, and then the same source as the same files there."""

import os
import pathlib
import pickle

import numpy as np
import pytest

from clipjax.cli.main import main
from clipjax.config import DataConfig, MixtureSource
from clipjax.data.array_records import write_array_records
from clipjax.data.sample import BadSample
from clipjax.data.sources import build_source, build_training_source, check_copies
from clipjax.data.tfds import is_prepared
from clipjax.data.training_order import DISK_ORDER
from clipjax.runtime import objects
from clipjax.runtime.storage import is_address
from tests.data.test_array_records import samples
from tests.data.test_exact_resume import make_config, open_source, read, write_records
from tests.data.test_sources import no_network, prepared  # noqa: F401
from tests.runtime.stores import BUCKET

pytestmark = pytest.mark.newest
COUNT = 60


def upload(folder: pathlib.Path, place: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            objects.write_bytes(f"{place}/{path.relative_to(folder)}", path.read_bytes())
    return place


@pytest.fixture(params=["gs", "s3"])
def records(request, tmp_path):
    """A folder of files on the disk, the same in a store, and its server."""
    server = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    folder = tmp_path / "records"
    folder.mkdir()
    for i in range(3):
        write_array_records(folder / f"pairs-{i}.array_record", samples(COUNT // 3, i * COUNT // 3))
    return folder, upload(folder, f"{request.param}://{BUCKET}/{tmp_path.name}"), server


@pytest.fixture
def tfds_data(gcs, prepared):  # noqa: F811
    return prepared, upload(pathlib.Path(prepared), f"gs://{BUCKET}/tfds"), gcs


def cached(tmp_path, **fields) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), cache_gib=fields.pop("cache_gib", 1.0), **fields)


def read_sample(source, index: int):
    """A sample, or the reason why there is none."""
    try:
        return source[index]
    except BadSample as bad:
        return bad.reason


def same_source(here, there) -> None:
    assert len(here) == len(there)
    for index in range(len(here)):
        ours, theirs = (read_sample(each, index) for each in (here, there))
        if isinstance(ours, str):
            assert ours == theirs
            continue
        assert (ours.captions, ours.label, ours.key) == (theirs.captions, theirs.label, theirs.key)
        np.testing.assert_array_equal(ours.image, theirs.image)
    assert [(each.digest, each.size) for each in here.digests()] == [
        (each.digest, each.size) for each in there.digests()
    ]


def test_array_records_in_a_store_are_the_source_of_the_same_files_on_a_disk(records, tmp_path):
    folder, place, server = records
    there = build_source(f"{place}/pairs-*.array_record", data=cached(tmp_path))
    same_source(build_source(f"{folder}/pairs-*.array_record", data=DataConfig()), there)
    assert not any(map(is_address, there.files()))
    assert [pathlib.Path(path).name for path in there.files()] == [f"pairs-{i}.array_record" for i in range(3)]
    assert there.location(25) == f"{place}/pairs-1.array_record, record 5"
    server.requests.clear()
    worker = pickle.loads(pickle.dumps(there))
    assert worker[59] == there[59] and server.requests == []


def test_files_of_a_disk_and_of_folders_of_a_store_with_one_name(records, tmp_path):
    folder, place, _ = records
    objects.write_bytes(f"{place}/2/pairs-0.array_record", (folder / "pairs-2.array_record").read_bytes())
    spec = f"{{{place}/pairs-0,{folder}/pairs-1,{place}/2/pairs-0}}.array_record"
    same_source(build_source(f"{folder}/*.array_record", data=DataConfig()), build_source(spec, data=cached(tmp_path)))


def test_a_run_moves_between_a_disk_and_a_store(gcs, tmp_path):
    (tmp_path / "disk").mkdir()
    on_disk = write_records(tmp_path / "disk")
    place = upload(tmp_path / "disk", f"gs://{BUCKET}/moves")
    here, there = make_config(DataConfig(train=on_disk)), make_config(cached(tmp_path, train=f"{place}/*.array_record"))
    assert open_source(here)[1] == open_source(there)[1] == DISK_ORDER
    assert read(here, 0, 5) + read(there, 5, 5) == read(there, 0, 5) + read(here, 5, 5) == read(here, 0, 10)


def test_files_of_a_web_server(web, tmp_path):
    for i in range(2):
        write_array_records(tmp_path / f"{i}.array_record", samples(5, 5 * i))
        web.backend.contents[f"/d/{i}.array_record"] = (tmp_path / f"{i}.array_record").read_bytes()
    there = build_source(f"{web.url}/d/{{0..1}}.array_record", data=cached(tmp_path))
    same_source(build_source(f"{tmp_path}/*.array_record", data=DataConfig()), there)
    with pytest.raises(ValueError, match="a web server lists no files"):
        build_source(f"{web.url}/d/*.array_record", data=cached(tmp_path))


@pytest.mark.process
def test_workers_read_the_copies(gcs, tmp_path):
    (tmp_path / "disk").mkdir()
    on_disk = write_records(tmp_path / "disk")
    place = upload(tmp_path / "disk", f"gs://{BUCKET}/workers")
    there = make_config(cached(tmp_path, train=f"{place}/*.array_record", num_workers=2, num_threads=1))
    assert read(there, 0, 6, processes=2) == read(make_config(DataConfig(train=on_disk)), 0, 6)


def test_filters_judge_the_copies(records, tmp_path):
    folder, place, _ = records
    (tmp_path / "keep.txt").write_text("pairs-1/000025\n000003\npairs-1/000003\n")
    fields = {"keep_keys": str(tmp_path / "keep.txt"), "filters": ("label>=0",)}
    build_source(f"{place}/*.array_record", data=cached(tmp_path))
    for path in (tmp_path / "cache").glob("*.copy"):
        os.utime(path, (1e9, 1e9))  # results for files that are brand new are not kept
    here = build_training_source(DataConfig(train=f"{folder}/*.array_record", **fields))
    there = build_training_source(cached(tmp_path, train=f"{place}/*.array_record", **fields))
    assert [there[i].key for i in range(len(there))] == ["000003"]
    same_source(here, there)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.kept")}
    del there
    build_training_source(cached(tmp_path, train=f"{place}/*.array_record", **fields))
    assert len(kept) == 3 and kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.kept")}


def test_without_a_folder_for_copies_both_are_refused(records, tmp_path):
    _, place, server = records
    for spec, fields in (("tfds:pairs/train", {"tfds_dir": place}), (f"{place}/pairs-0.array_record", {})):
        with pytest.raises(
            ValueError, match=r"lies in a store, .* set data\.cache_dir \(--cache_dir of `clipjax data`"
        ):
            build_source(spec, data=DataConfig(**fields))
    mixture = {name: MixtureSource(source=f"{place}/pairs-{name}.array_record") for name in "01"}
    with pytest.raises(ValueError, match=r"set data\.cache_dir"):
        check_copies([(part.source, DataConfig(mixture=mixture)) for part in mixture.values()])
    assert not any(request.startswith("GET") and ".array_record" in request for request in server.requests)


def test_sources_that_fit_alone_but_not_together_are_refused_before_one_is_copied(records, tmp_path):
    folder, place, _ = records
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    data = cached(tmp_path, cache_gib=(sum(sizes[:2]) - 1) / 2**30)
    specs = [f"{place}/pairs-{number}.array_record" for number in range(3)]
    with pytest.raises(ValueError, match=rf"cache_gib=\S+ is too small: all files of {specs[0]}, {specs[1]} together"):
        check_copies([(spec, data) for spec in specs[:2]])
    assert not (tmp_path / "cache").exists()
    check_copies([(specs[0], data)] * 2)
    build_source(specs[0], data=data)


def test_a_file_that_is_none_of_records_is_named_by_its_address(records, tmp_path):
    _, place, _ = records
    objects.write_bytes(f"{place}/no.array_record", b"no records" * 1000)
    with pytest.raises(ValueError, match=rf"^{place}/no\.array_record is no ArrayRecord file"):
        build_source(f"{place}/no.array_record", data=cached(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no object"):
        build_source(f"{place}/none.array_record", data=cached(tmp_path))


def test_a_file_that_has_changed_is_other_data(records, tmp_path, caplog):
    folder, place, _ = records
    first = build_source(f"{place}/*.array_record", data=cached(tmp_path)).digests()
    write_array_records(folder / "pairs-1.array_record", samples(COUNT // 3, 700))
    upload(folder, place)
    second = build_source(f"{place}/*.array_record", data=cached(tmp_path)).digests()
    assert [a.digest == b.digest for a, b in zip(first, second, strict=True)] == [True, False, True]
    assert f"{place}/pairs-1.array_record has changed since it was copied" in caplog.text


def test_prepared_tfds_data_in_a_store(tfds_data, tmp_path, no_network):  # noqa: F811
    folder, place, server = tfds_data
    assert is_prepared("pairs", place) and is_prepared("pairs:1.0.0", place)
    assert not is_prepared("mnist", place) and not is_prepared("pairs:2.0.0", place)
    for spec in ("tfds:pairs/train", "tfds:pairs:1.0.0/train[2:5]"):
        here = build_source(spec, data=DataConfig(tfds_dir=folder))
        there = build_source(spec, data=cached(tmp_path, tfds_dir=place))
        same_source(here, there)
        assert [pathlib.Path(path).name for path in there.files()] == [pathlib.Path(path).name for path in here.files()]
        assert there.location(1) == f"{spec}, record 1" and not any(map(is_address, there.files()))
        server.requests.clear()
        worker = pickle.loads(pickle.dumps(there))
        assert worker[1].captions == there[1].captions and server.requests == []


def test_of_tfds_data_the_files_of_the_split_alone_are_copied(gcs, tmp_path, no_network):  # noqa: F811
    from clipjax.data.scenes.builder import build_scenes

    build_scenes(str(tmp_path / "data"), "tiny")
    place = upload(tmp_path / "data", f"gs://{BUCKET}/scenes")
    source = build_source("tfds:scenes/tiny/val", data=cached(tmp_path, tfds_dir=f"{place}/"))
    same_source(build_source("tfds:scenes/tiny/val", data=DataConfig(tfds_dir=str(tmp_path / "data"))), source)
    assert gcs.count("GET .*scenes-val.array_record") and not gcs.count("GET .*scenes-(train|unseen)")
    with pytest.raises(ValueError, match=r"no prepared data in gs://bucket/scenes \(data\.tfds_dir\)"):
        build_source("tfds:scenes/val", data=cached(tmp_path, tfds_dir=place))


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        ("tfds:mnist/train", {}, r"'tfds:mnist': no prepared data in gs://bucket/tfds \(data"),
        ("tfds:../train", {}, "no part of a name of TFDS data"),
        ("tfds:pairs/test", {}, "the splits are train"),
        ("tfds:pairs/train", {"tfds_image_key": "none"}, "feature 'none' is not an image"),
        ("tfds:pairs/train", {"tfds_dir": "gs://none-such/x"}, "there is no bucket none-such"),
        (
            "tfds:pairs/train",
            {"cache_gib": 2**-30},
            r"cache_gib=0\.000000001 is too small: all files of source 'tfds:pairs/tr",
        ),
    ],
)
def test_tfds_data_that_cannot_be_used(tfds_data, tmp_path, spec, fields, message, no_network):  # noqa: F811
    _, place, server = tfds_data
    server.requests.clear()
    with pytest.raises((ValueError, OSError), match=message):
        build_source(spec, data=cached(tmp_path, **{"tfds_dir": place, **fields}))
    assert not server.count("GET .*-of-0")


def test_names_of_objects_lead_nowhere_else(tfds_data, tmp_path, monkeypatch, no_network):  # noqa: F811
    _, place, _ = tfds_data
    monkeypatch.setattr(objects, "list_folder", lambda place: {"features.json": None, "1.0.0/../../../evil.json": None})
    with pytest.raises(ValueError, match=r"pairs: the name '1\.0\.0/\.\./.*evil\.json' is no path of a file"):
        build_source("tfds:pairs/train", data=cached(tmp_path, tfds_dir=place))


def test_tfrecord_is_refused_before_it_is_copied(tfds_data, tmp_path, no_network):  # noqa: F811
    folder, _, server = tfds_data
    place = f"gs://{BUCKET}/tfrecord"
    for path in pathlib.Path(folder).rglob("pairs/1.0.0/*"):
        content = path.read_bytes()
        if path.name == "dataset_info.json":
            content = content.replace(b"array_record", b"tfrecord")
        objects.write_bytes(f"{place}/pairs/1.0.0/{path.name.replace('array_record', 'tfrecord')}", content)
    with pytest.raises(ValueError, match=r"gs://bucket/tfrecord/pairs/1\.0\.0 is in the format tfrecord"):
        build_source("tfds:pairs/train", data=cached(tmp_path, tfds_dir=place))
    assert not server.count("GET .*tfrecord/.*-of-0")


def run(argv: str, capsys) -> tuple[int, str, str]:
    try:
        code = main(argv.split())
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_commands_take_them(records, tmp_path, capsys):
    folder, place, _ = records
    spec, cache = f"{place}/pairs-*.array_record", f"--cache_dir={tmp_path}/cache --cache_gib=0.5"
    code, out, _ = run(f"data show {spec} {cache} --num=1 --filters=label>=0", capsys)
    assert code == 0 and f"{place}/pairs-0.array_record, record 1: label 0" in out
    assert run(f"data verify {spec} {cache} --write={tmp_path}/files.json", capsys)[0] == 0
    assert run(f"data verify {folder}/*.array_record --against={tmp_path}/files.json", capsys)[0] == 0
    assert run(f"data pack {spec} {cache} --output={tmp_path}/shards", capsys)[0] == 0
    packed = build_source(f"{tmp_path}/shards/*.tar", data=DataConfig())
    assert len(packed) == COUNT and packed[7].image == samples(1, 7)[0].image
    assert run(f"data pack {folder}/*.array_record --output={tmp_path}/shards", capsys)[0] == 0  # the same source
    dedup = f"data dedup {spec} {cache} --against={place}/pairs-2.array_record --num_workers=2"
    code, out, _ = run(f"{dedup} --output={tmp_path}/drop.txt", capsys)
    assert code == 0 and f"{place}/pairs-2.array_record: " in out


def test_commands_take_tfds_data(tfds_data, tmp_path, capsys, no_network):  # noqa: F811
    _, place, _ = tfds_data
    argv = f"data show tfds:pairs/train --tfds_dir={place} --cache_dir={tmp_path}/cache --num=1"
    code, out, _ = run(argv, capsys)
    assert code == 0 and "tfds:pairs/train, record 0: label " in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("data show a.tar --cache_dir=x", "--cache_dir='x' would be ignored: no source is tars, Parquet"),
        ("data show folder:gs://b/x --cache_dir=x", "are small files, of which no copies are kept"),
        ("data show gs://b/a.array_record", "set data.cache_dir (--cache_dir of `clipjax data`)"),
        ("data show gs://b/a.tar --cache_gib=3", "--cache_gib=3.0 would be ignored without --cache_dir"),
        ("data show gs://b/a.tar --cache_dir=x --cache_gib=0", "--cache_gib=0 must be a number above 0"),
        ("data show gs://b/a.tar --cache_dir=x --cache_gib=inf", "--cache_gib=inf must be a number above 0"),
        ("data show gs://b/a.tar --cache_dir=gs://b/x", "--cache_dir=gs://b/x: nothing here opens an address of gs"),
        ("data show tfds:a/b --cache_dir=x --tfds_dir=http://h/x", "--tfds_dir=http://h/x: nothing here opens"),
        ("data index a.tar --cache_dir=x", "unknown option --cache_dir"),
        ("data scenes --tfds_dir=gs://b/x", "--tfds_dir=gs://b/x: nothing here opens an address of gs"),
    ],
)
def test_options_that_cannot_be_used(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(argv, capsys)
    assert code == 2 and message in err, err
    assert not any(tmp_path.iterdir())
