"""Filters: what they keep in every kind of source, the dense numbering, digests, and results of earlier starts."""

import csv
import io
import json
import os
import pathlib
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipjax.config import Config, DataConfig, MixtureSource, ModelConfig, ViTConfig
from clipjax.data import filter_results, filter_workers, shard_results
from clipjax.data.array_records import write_array_records
from clipjax.data.block_reader import read_block
from clipjax.data.digests import find_order
from clipjax.data.filters import FilteredSource
from clipjax.data.kept_format import ShardBits, pack_kept
from clipjax.data.kept_samples import KeptSamples
from clipjax.data.sample import BadSample, Sample, UnreadableData
from clipjax.data.sources import ArraySource, build_source, build_training_source
from clipjax.data.training_order import OrderFormat, make_order
from clipjax.data.training_stream import TrainStream
from tests.cli.test_data_show import png

pytestmark = pytest.mark.newest

COUNT = 60
OLD = 1_600_000_000


def rows(start: int = 0, count: int = COUNT) -> list[dict]:
    """Metadata: every third is narrow, every fifth of another language, every seventh has no score."""
    found = []
    for i in range(start, start + count):
        row = {"key": f"{i:04d}", "width": 100 if i % 3 == 0 else 300, "height": 200}
        row |= {"language": "de" if i % 5 == 0 else "en"}
        row |= {} if i % 7 == 0 else {"similarity": i / 100}
        found.append(row)
    return found


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path: pathlib.Path, metadata: list[dict], *, apart: bool = False) -> str:
    """Write a tar; `apart`: the members of a sample lie apart, so that the index has a table of all of them."""
    with tarfile.open(path, "w") as tar:
        kinds = [("jpg", lambda row: b"jpg" + row["key"].encode()), ("txt", lambda row: b"text " + row["key"].encode())]
        kinds.append(("json", lambda row: json.dumps(row).encode()))
        pairs = (
            [(kind, row) for kind in kinds for row in metadata] if apart else [(k, r) for r in metadata for k in kinds]
        )
        for (extension, content), row in pairs:
            add(tar, f"{row['key']}.{extension}", content(row))
    os.utime(path, (OLD, OLD))
    return str(path)


def write_kind(folder: pathlib.Path, kind: str) -> str:
    if kind in ("compact", "apart"):
        return write_tar(folder / "a.tar", rows(), apart=kind == "apart")
    path = folder / f"a.{kind}"
    for row in rows():
        (folder / f"{row['key']}.jpg").write_bytes(b"jpg" + row["key"].encode())
    listed = [row | {"filepath": f"{row['key']}.jpg", "caption": f"text {row['key']}"} for row in rows()]
    names = ["filepath", "caption", "key", "width", "height", "language", "similarity"]
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(listed)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, listed)))
    else:
        columns = {name: [row.get(name) for row in listed] for name in names[1:]}
        columns["jpg"] = [b"jpg" + row["key"].encode() for row in listed]
        pq.write_table(pa.table(columns), path, row_group_size=13)
    os.utime(path, (OLD, OLD))
    return str(path)


def keys(source) -> list[str]:
    return [source[i].key for i in range(len(source))]


def expected_keys() -> list[str]:
    return [
        row["key"]
        for row in rows()
        if row["width"] >= 200
        and row["width"] / row["height"] <= 2
        and row["language"] == "en"
        and row.get("similarity", 0) > 0.1
    ]


FILTERS = ("width>=200", "aspect<=2", "language==en", "similarity>0.1")
every_kind = pytest.mark.parametrize("kind", ["compact", "apart", "csv", "jsonl", "parquet"])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> pathlib.Path:
    """The machine's folder of results: empty in each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "clipjax" / "index"


@every_kind
def test_every_kind_keeps_the_same_samples_and_counts_by_the_first_condition_that_fails(tmp_path, kind):
    data = DataConfig(train=write_kind(tmp_path, kind), filters=FILTERS)
    source = build_training_source(data)
    assert isinstance(source, FilteredSource) and keys(source) == expected_keys()
    assert source[3].captions == (f"text {expected_keys()[3]}",)
    assert source.counts() == (
        f"{len(source)} of 60 samples are kept, dropped: 20 by width>=200, 0 by aspect<=2, 8 by language==en, "
        "9 by similarity>0.1"
    )
    again = pickle.loads(pickle.dumps(source))
    assert keys(again) == expected_keys()
    with pytest.raises(IndexError):
        source[len(source)]


@every_kind
def test_lists_of_keys_name_shard_and_key_or_the_key(tmp_path, kind):
    spec = write_kind(tmp_path, kind)
    name = pathlib.Path(spec).name
    (tmp_path / "keep").write_text(f"0001\n{name}/0002\na/0003\n  0004 \n\nb.tar/0005\nother/0006\nno such\n")
    (tmp_path / "drop").write_bytes(b"\xef\xbb\xbf0002\r\n0050\r\n")
    data = DataConfig(train=spec, keep_keys=str(tmp_path / "keep"), drop_keys=str(tmp_path / "drop"))
    source = build_training_source(data)
    assert keys(source) == ["0001", "0003", "0004"]
    assert source.counts() == "3 of 60 samples are kept, dropped: 56 by data.keep_keys, 1 by data.drop_keys"


def kept_of(flags: list[np.ndarray]) -> KeptSamples:
    dropped = [sum(int((~each).sum()) for each in flags)]
    return KeptSamples(pack_kept([ShardBits.of_flags(each) for each in flags], key="", dropped=dropped))


class Counting:
    """A source in memory that notes the blocks that are read from it."""

    def __init__(self, size: int):
        self.size, self.blocks = size, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index % 10 == 9:
            raise BadSample("corrupt_image")
        return Sample(b"", (), key=str(index))

    def read_block(self, first: int, count: int):
        self.blocks.append((first, count))
        return [BadSample("corrupt_image") if i % 10 == 9 else self[i] for i in range(first, first + count)]


def test_a_block_reads_its_span_at_once_and_leaves_out_wide_gaps():
    inner = Counting(100)
    is_kept = np.zeros(100, np.bool_)
    is_kept[[2, 4, 9, 10, 40, 41, 99]] = True
    source = FilteredSource(inner, kept_of([is_kept[:50], is_kept[50:]]), [50, 50], ["a>1"])
    found = read_block(source, 1, 6)
    assert [each.reason if isinstance(each, BadSample) else each.key for each in found] == [
        "4", "corrupt_image", "10", "40", "41", "corrupt_image",
    ]  # fmt: skip
    assert inner.blocks == [(4, 7), (40, 2), (99, 1)]


def test_shards_in_another_order_are_the_same_run_and_another_choice_is_another(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", rows(number * 20, 20))
    spec = f"{tmp_path}/{{0,1,2}}.tar"
    source = build_training_source(DataConfig(train=spec, filters=FILTERS))
    other = build_training_source(DataConfig(train=f"{tmp_path}/{{2,0,1}}.tar", filters=FILTERS))
    assert isinstance(other, FilteredSource) and keys(other) != keys(source)
    order = find_order(source.digests(), other.digests())
    assert order == [1, 2, 0] and keys(other.reordered(order)) == keys(source) == expected_keys()
    assert other.reordered(order).digests() == source.digests()
    assert sum(each.size for each in source.digests()) == len(source)
    plain = build_training_source(DataConfig(train=spec))
    looser = build_training_source(DataConfig(train=spec, filters=FILTERS[:3]))
    digests = [[each.digest for each in one.digests()] for one in (source, plain, looser)]
    assert not set(digests[0]) & set(digests[1]) and not set(digests[1]) & set(digests[2]) and digests[0] != digests[2]


def test_results_are_kept_and_made_anew_for_other_shards_filters_and_lists(tmp_path, monkeypatch):
    judged = []
    judge = shard_results._judge
    monkeypatch.setattr(shard_results, "_judge", lambda *each: judged.append(each[1]) or judge(*each))
    path = tmp_path / "a.tar"
    data = DataConfig(train=write_tar(path, rows()), filters=FILTERS)
    assert keys(build_training_source(data)) == keys(build_training_source(data)) and len(judged) == 1
    build_training_source(DataConfig(train=str(path), filters=FILTERS[:2]))
    assert len(judged) == 2
    (tmp_path / "drop").write_text("0001")
    with_list = DataConfig(train=str(path), filters=FILTERS, drop_keys=str(tmp_path / "drop"))
    for content, times in (("0001", 3), ("0001", 3), ("0011", 4)):
        (tmp_path / "drop").write_text(content)
        build_training_source(with_list)
        assert len(judged) == times
    write_tar(path, rows(100, 30))
    os.utime(path, (OLD + 9, OLD + 9))
    assert keys(build_training_source(data))[0] == "0101" and len(judged) == 5


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "folder"])
def test_a_damaged_result_is_made_anew(tmp_path, damage, cache):
    data = DataConfig(train=write_tar(tmp_path / "a.tar", rows()), filters=FILTERS)
    build_training_source(data)
    shutil.rmtree(cache)  # with the bitmap, for which no result of a shard is looked at
    [place] = (tmp_path / ".clipjax-index").glob("*.kept")
    content = place.read_bytes()
    place.unlink()
    if damage == "folder":
        place.mkdir()
    else:
        damaged = {"cut": content[:-1], "flip": content[:-1] + bytes([content[-1] ^ 16]), "empty": b""}
        place.write_bytes(damaged[damage])
    assert keys(build_training_source(data)) == expected_keys()
    assert damage == "folder" or place.read_bytes() == content


def test_metadata_that_cannot_be_read_keeps_nothing_and_breaks_nothing(tmp_path):
    broken = [
        b"",
        b"{",
        b"[1]",
        b"7",
        b"\xff",
        b'{"width": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"width": "\\ud800"}',
    ]
    broken.append(json.dumps({"width": 300, "x": "y" * 2**20}).encode())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, content in enumerate([*broken, b'{"width": 300}']):
            add(tar, f"{i}.jpg", b"jpg")
            add(tar, f"{i}.txt", b"text")
            add(tar, f"{i}.json", content)
        add(tar, "x.jpg", b"no json")
        add(tar, "x.txt", b"text")
        add(tar, "y.json", b'{"width": 300}')  # no image: replaced and counted like any other
    source = build_training_source(DataConfig(train=str(tmp_path / "a.tar"), filters=("width>=200",)))
    assert len(source) == 2 and source[0].key == "9"
    with pytest.raises(BadSample, match="missing_image"):
        source[1]


def test_a_part_of_a_mixture_has_its_own_filters(tmp_path):
    spec = write_kind(tmp_path, "compact")
    parts = {
        "all": MixtureSource(source=spec, filters=()),
        "own": MixtureSource(source=spec, filters=("language==de",)),
        "same": MixtureSource(source=spec),
    }
    source = build_training_source(DataConfig(mixture=parts, filters=("width<200",)))
    assert source.sizes == (60, 12, 20)
    assert [each.key for each in read_block(source, 60, 3)] == ["0000", "0005", "0010"]
    with pytest.raises(ValueError, match=r"^data.mixture.own: source .*a.tar': filters keep none of 60 samples"):
        parts["own"] = MixtureSource(source=spec, filters=("language==fr",))
        build_training_source(DataConfig(mixture=parts))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"filters": ("widht>=1",)}, "filters keep none of 60 samples: 0 of 60 .*60 by widht>=1; loosen them"),
        ({"keep_keys": "{}/none"}, "data.keep_keys=.* cannot be read: No such file"),
        ({"drop_keys": "{}"}, "data.drop_keys=.* cannot be read: Is a directory"),
        ({"drop_keys": "{}/blank"}, "data.drop_keys=.* holds no key"),
        ({"drop_keys": "{}/long"}, "line 1 is too long for a key"),
    ],
)
def test_what_cannot_filter_is_refused(tmp_path, options, fault):
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "long").write_bytes(b"x" * 5000)
    options = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=fault):
        build_training_source(DataConfig(train=write_kind(tmp_path, "compact"), **options))


def test_array_records_have_key_and_label(tmp_path):
    samples = [Sample(b"jpg", ("text",), label=i % 3, key=f"{i:04d}") for i in range(12)]
    write_array_records(tmp_path / "a.array_record", samples)
    os.utime(tmp_path / "a.array_record", (OLD, OLD))
    (tmp_path / "drop").write_text("a/0004\n")
    data = DataConfig(train=f"{tmp_path}/a.array_record", filters=("label==1",), drop_keys=f"{tmp_path}/drop")
    assert keys(build_training_source(data)) == ["0001", "0007", "0010"]


def test_the_keys_of_rows_and_files_are_those_of_their_samples(tmp_path):
    """What `source[i].key` says can be listed, also where a file has no column of keys."""
    for name in "ab":
        pq.write_table(
            pa.table({"jpg": [b"x"] * 7, "caption": ["y"] * 7}), tmp_path / f"{name}.parquet", row_group_size=3
        )
        (tmp_path / f"{name}.csv").write_text("filepath,caption\n" + "".join(f"i{i}.jpg,text\n" for i in range(5)))
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "folder" / "sub" / f"i{i}.jpg").write_bytes(b"x")
        (tmp_path / "folder" / "sub" / f"i{i}.txt").write_text("text")
        (tmp_path / f"i{i}.jpg").write_bytes(b"x")
    (tmp_path / "drop").write_text("b.parquet/4\n6\ni1.jpg\nb.csv/i2.jpg\nsub/i3.jpg\n")
    for spec, dropped in (("{a,b}.parquet", [6, 11, 13]), ("{a,b}.csv", [1, 6, 7]), ("folder", [3])):
        data = DataConfig(train=f"{tmp_path}/{spec}", drop_keys=f"{tmp_path}/drop")
        source = build_training_source(data)
        assert isinstance(source, FilteredSource)
        kept = [each for each in range(len(source.source)) if each not in dropped]
        assert [source._inner(i) for i in range(len(source))] == kept, spec
    with pytest.raises(ValueError, match="data.filters cannot be used with source .*: its samples have no metadata"):
        build_training_source(DataConfig(train=f"{tmp_path}/folder", filters=("width>1",)))


def test_sources_without_metadata_are_refused():
    data = DataConfig(filters=("width>=200",))
    with pytest.raises(ValueError, match="data.filters cannot be used with source 'x': its samples have no metadata"):
        filter_results.filter_source(ArraySource([b""], ["a"]), data, "x")
    assert isinstance(filter_results.filter_source(ArraySource([b""], ["a"]), DataConfig(), "x"), ArraySource)


def test_a_shard_that_changes_while_it_is_judged_is_told(tmp_path):
    path = tmp_path / "a.tar"
    data = DataConfig(train=write_tar(path, rows()), filters=FILTERS)
    source = build_source(data.train, data=data)
    write_tar(path, rows(0, 10))
    with pytest.raises(UnreadableData, match="another program has written it anew"):
        filter_results.filter_source(source, data, "a")


def test_processes_judge_where_there_is_much_to_do(tmp_path, monkeypatch):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", rows(number * 20, 20))
    (tmp_path / "drop").write_text("0001")
    monkeypatch.setattr(filter_results, "_SECONDS_TO_START", 0.0)
    monkeypatch.setattr(filter_results, "num_cores", lambda: 2)
    monkeypatch.setattr(shard_results, "_judge", None)  # nothing is left for this process
    seen = []
    data = DataConfig(train=f"{tmp_path}/*.tar", filters=FILTERS, drop_keys=str(tmp_path / "drop"))
    source = filter_results.filter_source(
        build_source(data.train, data=data), data, "a", progress=lambda *each: seen.append(each)
    )
    assert keys(source) == expected_keys() and seen == [(1, 3, 20), (2, 3, 40), (3, 3, 60)]


def test_a_process_that_cannot_judge_leaves_it_to_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(filter_results, "_SECONDS_TO_START", 0.0)
    monkeypatch.setattr(filter_workers.Judge, "judge", lambda self, path, **_: {})
    assert keys(build_training_source(DataConfig(train=write_tar(tmp_path / "a.tar", rows()), filters=FILTERS)))


ORDERS = [OrderFormat(), OrderFormat(4, 2, 2)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_stream_gives_kept_samples_once_an_epoch_and_goes_on_exactly(tmp_path, order):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row in rows():
            add(tar, f"{row['key']}.png", png(8))
            add(tar, f"{row['key']}.txt", row["key"].encode())
            add(tar, f"{row['key']}.json", json.dumps(row).encode())
    data = DataConfig(train=str(tmp_path / "a.tar"), filters=FILTERS)
    source = build_training_source(data)
    config = Config(global_batch_size=4, model=ModelConfig(image=ViTConfig(image_size=8)), data=data)

    def take(count: int, start: int = 0, process: int = 0, of: int = 1) -> list[list[str]]:
        stream = TrainStream(
            source,
            tokenize=lambda text: np.array([int(text)], np.int32),
            config=config,
            order=order,
            start_step=start,
            process_index=process,
            process_count=of,
        )
        try:
            return [[f"{token:04d}" for token in next(stream)["tokens"][:, 0]] for _ in range(count)]
        finally:
            stream.close()

    whole = take(12)
    in_order = make_order((len(source),), config, order)
    assert whole == [[source[int(i)].key for i in in_order.placed(number)[:, 0]] for number in range(12)]
    epoch = [key for batch in whole[: len(source) // 4] for key in batch]
    assert len(set(epoch)) == len(epoch) and set(epoch) <= set(expected_keys())
    assert take(5, start=7) == whole[7:]
    halves = [take(12, process=process, of=2) for process in range(2)]
    assert [left + right for left, right in zip(*halves, strict=True)] == whole
