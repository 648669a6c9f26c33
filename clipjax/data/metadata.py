"""Metadata of all samples of a shard, one after the other, without their pictures: what filters look at.

Reading order: `DescribedSource` (the contract), `tar_metadata`, `parquet_metadata`, `table_metadata`.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from clipjax.data.fields import key_of
from clipjax.data.index_table import IndexTable
from clipjax.data.sample import BadSample
from clipjax.data.tar_format import DamagedTar
from clipjax.data.tar_index import NO_FAULT
from clipjax.data.tar_names import JSON
from clipjax.data.tar_ranges import members_between, quick_sample, sample_in
from clipjax.data.tar_samples import MAX_JSON_BYTES
from clipjax.runtime.storage import OpenFile

Described = tuple[str, Mapping[str, Any]]
"""Key of a sample ("" where it has none that can be read), and its metadata."""

_SPAN_BYTES = 8 * 2**20  # of a tar that are read at once
_ROWS_AT_ONCE = 256


@runtime_checkable
class DescribedSource(Protocol):
    """A source whose samples have metadata beside the picture."""

    def shard_counts(self) -> Sequence[tuple[str, int]]:
        """Return path and number of samples of each shard, in the order of the samples; path "" for what is no file."""
        ...

    def metadata(self, shard: int, columns: Sequence[str]) -> Iterator[Described]:
        """Yield key and metadata of each sample of a shard; of a table, of so many columns as are there.

        Raises:
            OSError: the shard cannot be read.
            ValueError: it is another one by now.
        """
        ...


def tar_metadata(file: OpenFile, table: IndexTable) -> Iterator[Described]:
    """Yield key and JSON of the samples of a tar shard; samples that cannot be used have no metadata."""
    if not table.header.is_compact:
        for row in range(table.header.count):
            offsets, sizes = table.members(row)
            has_json = table.fault(row) == NO_FAULT and offsets[JSON] >= 0 and sizes[JSON] <= MAX_JSON_BYTES
            yield table.key(row), parse_json(file.read(offsets[JSON], sizes[JSON])) if has_json else {}
        return
    block, first = b"", 0
    spans = [table.span(row) for row in range(table.header.count)]
    for row, (start, end) in enumerate(spans):
        if end - start > _SPAN_BYTES:
            yield _describe(functools.partial(file.read), start, end, None)
            continue
        if start < first or end > first + len(block):
            last = next((at for _, at in reversed(spans[row : row + 4096]) if at - start <= _SPAN_BYTES), end)
            block, first = file.read(start, min(last, file.size) - start), start
        fault = table.fault(row)
        sample = block[start - first : end - first]
        described = _describe(functools.partial(_part, sample), 0, end - start, sample)
        yield described if fault == NO_FAULT else (described[0], {})


def _part(block: bytes, offset: int, size: int) -> bytes:
    return block[offset : offset + size]


def _describe(read: Callable[[int, int], bytes], start: int, end: int, block: bytes | None) -> Described:
    """Return key and JSON of the sample that lies in a part of a tar."""
    try:
        found = quick_sample(block) if block is not None else None
        key, offsets, sizes = found or sample_in(members_between(read, start, end))
    except (DamagedTar, ValueError):
        return "", {}
    if offsets[JSON] < 0 or sizes[JSON] > MAX_JSON_BYTES:
        return key, {}
    return key, parse_json(read(offsets[JSON], sizes[JSON]))


def parse_json(content: bytes) -> Mapping[str, Any]:
    """Return the object that a text holds; none where it holds something else."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def parquet_metadata(reader: Any, columns: Sequence[str], key: str | None) -> Iterator[Described]:
    """Yield keys and cells of the rows of a Parquet file; those of a damaged row group have none.

    Without a column of keys, the key is the number of the row in the file.

    Args:
        reader: `pyarrow.parquet.ParquetFile`.
        columns: of the metadata; those that are not there are left out.
        key: column of the keys, if there is one.

    Raises:
        OSError: the file cannot be read.
    """
    import pyarrow as pa

    number = 0
    names = [name for name in dict.fromkeys([*columns, *([key] if key else [])]) if name in reader.schema_arrow.names]
    for group in range(reader.metadata.num_row_groups):
        left = max(0, reader.metadata.row_group(group).num_rows)
        try:
            batches = reader.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=names, use_threads=False)
            for batch in batches if names else ():
                for row in itertools.islice(batch.to_pylist(), left):
                    yield key_of(row.get(key) if key else None, str(number)), row
                    left, number = left - 1, number + 1
        except (pa.ArrowException, UnicodeDecodeError):
            pass  # reading the pictures counts them as corrupt_record
        yield from ((str(number + i) if not key else "", {}) for i in range(left))
        number += left


def table_metadata(
    cells: Callable[[int], Mapping[str, Any]], count: int, image: str, key: str | None
) -> Iterator[Described]:
    """Yield keys and cells of the rows of a table.

    Args:
        cells: returns those of a row by the names of their columns, or raises `BadSample`.
        count: number of rows.
        image: column of the paths, which are keys where there are no others.
        key: column of the keys, if there is one.
    """
    for row in range(count):
        try:
            found = cells(row)
        except BadSample:
            yield "", {}
            continue
        path = found.get(image)
        yield key_of(found.get(key) if key else None, path if isinstance(path, str) else ""), found
