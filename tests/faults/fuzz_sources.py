"""Hostile Parquet files, tables and ArrayRecord files from a seed: right ones, broken, and read as clipjax does."""

import io
import json
import pathlib
import random

from clipjax.config import DataConfig
from clipjax.data.array_records import write_array_records
from clipjax.data.sample import BadSample, Sample
from clipjax.data.sources import build_source
from tests.faults.break_values import break_bytes


def _image(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(1, 300))


def _read(path: pathlib.Path, folder: pathlib.Path) -> str:
    before = set(folder.iterdir())
    try:
        source = build_source(str(path), data=DataConfig())
    except ValueError as error:
        assert path.name in str(error), error
        raise
    source.digests()
    outcome = "read"
    for index in range(min(len(source), 100)):
        source.location(index).encode()
        try:
            sample = source[index]
            assert sample.image and all(caption.encode() for caption in sample.captions) and -1 <= sample.label < 2**31
        except BadSample as bad:
            outcome = f"left out: {bad.reason}"
    assert set(folder.iterdir()) == before, "a file was written"
    return outcome


def read_parquet(rng: random.Random, folder: pathlib.Path) -> str:
    """Read a broken Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = rng.randint(1, 40)
    images = [rng.choice((_image(rng), None)) for _ in range(count)]
    columns = {
        rng.choice(("jpg", "image")): images
        if rng.random() < 0.5
        else [{"bytes": image, "path": "a"} for image in images],
        "caption": [f"c{i}" for i in range(count)] if rng.random() < 0.5 else [["a", f"c{i}"] for i in range(count)],
        "label": list(range(count)),
    }
    stream = io.BytesIO()
    compression = rng.choice(("none", "snappy", "zstd", "gzip", "lz4", "brotli"))
    version = rng.choice(("1.0", "2.0"))
    pq.write_table(
        pa.table(columns),
        stream,
        compression=compression,
        row_group_size=rng.randint(1, 40),
        data_page_version=version,
        use_dictionary=rng.random() < 0.5,
    )
    path = folder / "a.parquet"
    path.write_bytes(break_bytes(stream.getvalue(), rng))
    return _read(path, folder)


def read_table(rng: random.Random, folder: pathlib.Path) -> str:
    """Read a broken table; one of its images is there."""
    (folder / "there.jpg").write_bytes(b"image")
    names = ["there.jpg", "../there.jpg", "/etc/passwd", "", "a" * 300, "\0", "caf\u00e9"]
    rows = [(rng.choice(names), rng.choice(("a", 'say "hi"', "a,b", "x\ty", "two\nlines", ""))) for _ in range(99)]
    suffix = rng.choice((".csv", ".tsv", ".jsonl"))
    if suffix == ".jsonl":
        text = "\n".join(json.dumps({"path": name, "caption": caption}) for name, caption in rows)
    else:
        between = "," if suffix == ".csv" else "\t"
        quoted = [f'"{name}"{between}"{caption.replace(chr(34), chr(34) * 2)}"' for name, caption in rows]
        text = f"path{between}caption\n" + "\n".join(quoted)
    path = folder / f"a{suffix}"
    path.write_bytes(break_bytes(text.encode(), rng))
    return _read(path, folder)


def read_array_records(rng: random.Random, folder: pathlib.Path) -> str:
    """Read a broken ArrayRecord file."""
    path = folder / "a.array_record"
    samples = [Sample(_image(rng), (f"c{i}",), label=i, key=str(i)) for i in range(rng.randint(1, 20))]
    write_array_records(path, samples)
    path.write_bytes(break_bytes(path.read_bytes(), rng))
    return _read(path, folder)
