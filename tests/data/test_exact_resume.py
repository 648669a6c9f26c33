"""Exact resumption: three epochs of every source on every store, interrupted at 20 random places, go on as if never.

Samples are known by their captions, which are distinct, so the sequence is that of the pairs themselves.
"""

import collections
import csv
import io
import json
import pathlib
import random
import tarfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Config, DataConfig, MixtureSource, ModelConfig, ViTConfig
from clipjax.data.array_records import write_array_records
from clipjax.data.mixture import sizes_of
from clipjax.data.sample import Source
from clipjax.data.sources import build_training_source
from clipjax.data.training_order import DISK_ORDER, choose_order
from clipjax.data.training_stream import TrainStream
from clipjax.runtime import objects
from clipjax.runtime.storage import is_address
from tests.runtime.stores import BUCKET
from tests.runtime.test_file_cache import wait_for

SAMPLES, BATCH, EPOCHS = 101, 8, 3
STEPS = EPOCHS * (SAMPLES // BATCH)
INTERRUPTIONS = 20
CAPTION_BYTES = 12


def caption(index: int) -> str:
    return f"pair {index:05d}"


def picture(index: int) -> bytes:
    draw = np.random.default_rng(index).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(draw).save(content, "PNG")
    return content.getvalue()


def tar(indices: range) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for index in indices:
            for name, data in ((f"{index:05d}.png", picture(index)), (f"{index:05d}.txt", caption(index).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def shards() -> Iterator[tuple[str, bytes]]:
    for number, start in enumerate(range(0, SAMPLES, 30)):
        yield f"{number:05d}.tar", tar(range(start, min(start + 30, SAMPLES)))


def write_tars(folder: pathlib.Path) -> str:
    for name, content in shards():
        (folder / name).write_bytes(content)
    return f"{folder}/*.tar"


def write_parquet(folder: pathlib.Path) -> str:
    import pyarrow
    import pyarrow.parquet

    rows = {"jpg": [picture(i) for i in range(SAMPLES)], "caption": [caption(i) for i in range(SAMPLES)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "pairs.parquet", row_group_size=16)
    return f"{folder}/pairs.parquet"


def write_images(folder: pathlib.Path) -> None:
    for index in range(SAMPLES):
        (folder / f"{index:05d}.png").write_bytes(picture(index))


def write_csv(folder: pathlib.Path) -> str:
    write_images(folder)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        writer.writerows([f"{index:05d}.png", caption(index)] for index in range(SAMPLES))
    return f"{folder}/pairs.csv"


def write_jsonl(folder: pathlib.Path) -> str:
    write_images(folder)
    lines = (json.dumps({"image": f"{index:05d}.png", "caption": caption(index)}) for index in range(SAMPLES))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return f"{folder}/pairs.jsonl"


def write_folder(folder: pathlib.Path) -> str:
    write_images(folder)
    for index in range(SAMPLES):
        (folder / f"{index:05d}.txt").write_text(caption(index))
    return f"folder:{folder}"


def write_records(folder: pathlib.Path) -> str:
    from clipjax.data.sample import Sample

    path = folder / "pairs.array_record"
    write_array_records(path, (Sample(picture(i), (caption(i),), key=str(i)) for i in range(SAMPLES)))
    return str(path)


WRITERS: dict[str, Callable[[pathlib.Path], str]] = {
    "tar": write_tars,
    "parquet": write_parquet,
    "csv": write_csv,
    "jsonl": write_jsonl,
    "folder": write_folder,
    "array_record": write_records,
}


def to_tokens(text: str) -> np.ndarray:
    return np.frombuffer(text.encode().ljust(CAPTION_BYTES), np.uint8).astype(np.int32)


def make_config(data: DataConfig) -> Config:
    config = Config(seed=5, global_batch_size=BATCH, model=ModelConfig(image=ViTConfig(image_size=8)), data=data)
    data.min_crop_area = 0.5
    return config


def open_source(config: Config) -> tuple[Source, object]:
    source = build_training_source(config.data)
    parts = getattr(source, "parts", (source,))
    return source, choose_order(config, sizes_of(source), [any(map(is_address, part.files())) for part in parts])


def read(config: Config, start: int, count: int, processes: int = 1) -> list[tuple[list[str], bytes]]:
    """Captions and pixels of global batches, as that many processes read them that begin anew."""
    source, order = open_source(config)
    parts = []
    for process in range(processes):
        stream = TrainStream(
            source,
            tokenize=to_tokens,
            config=config,
            order=order,  # pyright: ignore[reportArgumentType]
            process_index=process,
            process_count=processes,
            start_step=start,
        )
        try:
            parts.append([next(stream) for _ in range(count)])
        finally:
            stream.close()
    found = []
    for step in zip(*parts, strict=True):
        tokens = np.concatenate([part["tokens"] for part in step]).astype(np.uint8)
        pixels = np.concatenate([part["image"] for part in step])
        assert all((part["skip_reason"] < 0).all() for part in step)
        found.append(([bytes(row).decode().strip() for row in tokens], pixels.tobytes()))
    return found


def check_exact(config: Config, workers: tuple[int, ...] = (0,), interruptions: int = INTERRUPTIONS) -> None:
    whole = read(config, 0, STEPS)
    draw = random.Random(7)
    places = sorted(draw.sample(range(1, STEPS), interruptions))
    found = []
    for begin, end in zip([0, *places], [*places, STEPS], strict=True):
        config.data.num_workers = draw.choice(workers)
        found += read(config, begin, end - begin, draw.choice((1, 2, 4)))
    config.data.num_workers = 0
    assert [names for names, _ in found] == [names for names, _ in whole]
    assert found == whole  # the augmented pixels, too
    if not config.data.mixture:
        per_epoch = STEPS // EPOCHS
        for epoch in range(EPOCHS):
            seen = collections.Counter(
                name for names, _ in found[epoch * per_epoch : (epoch + 1) * per_epoch] for name in names
            )
            assert len(seen) == per_epoch * BATCH and set(seen.values()) == {1}
            assert set(seen) <= {caption(index) for index in range(SAMPLES)}


@pytest.mark.newest
@pytest.mark.parametrize("kind", WRITERS)
def test_each_source_on_a_disk(kind, tmp_path):
    check_exact(make_config(DataConfig(train=WRITERS[kind](tmp_path))))


@pytest.fixture
def on_store(request, gcs, s3, web, tmp_path, monkeypatch):
    """The shards on a store, by the pattern that names them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kind = request.param
    if kind == "http":
        for name, content in shards():
            web.backend.contents[f"/{name}"] = content
        return f"{web.url}/{{00000..0000{len(list(shards())) - 1}}}.tar"
    for name, content in shards():
        objects.write_bytes(f"{kind}://{BUCKET}/data/{name}", content)
    return f"{kind}://{BUCKET}/data/*.tar"


@pytest.mark.parametrize("on_store", ["gs", "s3", "http"], indirect=True)
@pytest.mark.parametrize("block", [None, 1])
def test_tars_on_each_store_in_blocks_and_one_by_one(on_store, block):
    check_exact(make_config(DataConfig(train=on_store, order_block=block)))


@pytest.mark.parametrize("on_store", ["gs"], indirect=True)
def test_a_mixture_of_stores_and_kinds(on_store, tmp_path):
    (tmp_path / "parquet").mkdir()
    mixture = {
        "bucket": MixtureSource(source=on_store, weight=3),
        "table": MixtureSource(source=write_parquet(tmp_path / "parquet"), weight=1),
    }
    check_exact(make_config(DataConfig(mixture=mixture)))


@pytest.mark.process
@pytest.mark.parametrize("on_store", ["s3"], indirect=True)
def test_any_number_of_workers_on_a_store(on_store):
    check_exact(make_config(DataConfig(train=on_store, num_threads=1)), (0, 1, 2, 3), interruptions=3)


@pytest.fixture
def in_braces(gcs, s3, web, tmp_path, monkeypatch):
    """The shards on a disk and on three stores, each shard on another, by one pattern of whole addresses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (first, second, third, fourth) = shards()
    objects.write_bytes(f"gs://{BUCKET}/braces/{first[0]}", first[1])
    objects.write_bytes(f"s3://{BUCKET}/braces/{second[0]}", second[1])
    web.backend.contents[f"/{third[0]}"] = third[1]
    (tmp_path / fourth[0]).write_bytes(fourth[1])
    on_stores = f"gs://{BUCKET}/braces/*.tar,s3://{BUCKET}/braces/{second[0]},{web.url}/{{00002..00002}}.tar"
    return f"{{{on_stores},{tmp_path}/{fourth[0]}}}"


@pytest.mark.process
def test_a_brace_of_whole_addresses_is_read_as_one_source(in_braces, tmp_path, gcs):
    (tmp_path / "disk").mkdir()
    data = DataConfig(train=in_braces, num_threads=1, cache_dir=str(tmp_path / "copies"))
    assert not data.cache_errors([in_braces])
    config, on_disk = make_config(data), make_config(DataConfig(train=write_tars(tmp_path / "disk")))
    in_blocks = open_source(config)[1]  # since a part is on a store
    assert in_blocks.block > 1 and open_source(on_disk)[1] == DISK_ORDER
    on_disk.data.order_block = in_blocks.block
    assert open_source(on_disk)[1] == in_blocks
    assert read(config, 0, STEPS) == read(on_disk, 0, STEPS)
    check_exact(config, (0, 2), interruptions=3)
    wait_for(lambda: len(list((tmp_path / "copies").glob("*.copy"))) == 3)  # the file on the disk needs none


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_up_to_eight_workers(kind, tmp_path):
    check_exact(make_config(DataConfig(train=WRITERS[kind](tmp_path), num_threads=1)), (0, 1, 2, 4, 8), interruptions=8)


@pytest.mark.parametrize("on_store", ["gs"], indirect=True)
def test_copies_on_a_disk_change_nothing_and_spare_the_store(on_store, tmp_path, gcs):
    config = make_config(DataConfig(train=on_store, cache_dir=str(tmp_path / "copies")))
    check_exact(config)
    gcs.requests.clear()
    read(config, 0, STEPS)
    without = len([request for request in gcs.requests if request.startswith("GET")])
    config.data.cache_dir = None
    gcs.requests.clear()
    read(config, 0, STEPS)
    assert len(list((tmp_path / "copies").glob("*.copy"))) == len(list(shards()))
    assert without < len([request for request in gcs.requests if request.startswith("GET")])
