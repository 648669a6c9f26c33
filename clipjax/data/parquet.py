"""Parquet: img2dataset's layout and that of Hugging Face, read by row group.

A column holds encoded images, either itself or in its field `bytes`; another one holds a caption or a list of them. A
row group is read as a whole, so that single samples in random order cost much; blocks of consecutive samples do not.

Reading order: `ParquetSource`, `_ParquetFile` (one open file), `_RowGroup` (the cells of a group).
"""

import collections
import errno
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from clipjax.data.caption_fields import Weights, read_captions, to_weights
from clipjax.data.digests import CONTENTS, DIGEST_THREADS, Hasher, ShardDigest, spread
from clipjax.data.fields import IMAGE_BYTES, Fields, captions_of, choose_fields, key_of, label_of
from clipjax.data.file_errors import FileErrors
from clipjax.data.image_files import max_image_bytes
from clipjax.data.metadata import Described, parquet_metadata
from clipjax.data.positioned_file import PositionedFile
from clipjax.data.sample import BadSample, Sample, labels_of
from clipjax.runtime.file_cache import FileCache
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import FileChanged, OpenFile, is_address, open_file

_MAX_CACHE_BYTES = 2**29  # of row groups that stay in memory, per process; one more is always kept
_MAX_GROUP_BYTES = 2**31
_MAX_OPEN_FILES = 64
_ROWS_AT_ONCE = 16
_HASHED_BYTES = 65_536
_MAX_FOOTER_BYTES = 2**26


class ParquetSource:
    """Samples of Parquet files, in the order of the files and their rows.

    Args:
        paths: files of the same columns.
        image_field: column of the images; None: the first of `IMAGE_BYTES`.
        caption_field: column of the captions; None: the first of `CAPTIONS`.
        label_key: column of the class, which need not be there.
        max_caption_bytes: limit of a caption; longer ones make a sample bad.
        max_image_pixels: limit of an image; cells that are larger than its raw pixels are not even copied.
        captions: weights of columns of captions; none: `caption_field` is the one.
        cache: of copies of files that lie in stores; None: they are read from there each time.

    Raises:
        ValueError: a file is no Parquet, lacks a column, or has a row group that is too large; or there is no row.

    Cost: 8 bytes per row group. Each process keeps the latest row groups, up to 512 MiB of the columns that it reads.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        image_field: str | None,
        caption_field: str | None,
        label_key: str,
        max_caption_bytes: int,
        max_image_pixels: int,
        captions: Mapping[str, float] | None = None,
        cache: FileCache | None = None,
    ):
        self._cache = cache
        self._paths = [os.fspath(path) for path in paths]
        self._captions = to_weights(captions)
        self._chosen = {
            "image_field": image_field,
            "caption_field": caption_field,
            "label_key": label_key,
            "captions": self._captions,
        }
        self._max_caption_bytes = max_caption_bytes
        self._max_image_bytes = max_image_bytes(max_image_pixels)
        with futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
            opened = list(pool.map(self._look_into, self._paths))
        self._versions = {path: listed for path, (listed, _) in zip(self._paths, opened, strict=True)}
        sizes = [group_sizes for _, group_sizes in opened]
        rows = [size for group_sizes in sizes for size in group_sizes]
        if not sum(rows):
            raise ValueError(f"no row in {', '.join(self._paths[:5])}: a Parquet file of images and captions has some")
        self._first_group = np.cumsum([0] + [len(group_sizes) for group_sizes in sizes])
        self._first_row = np.cumsum([0, *rows])
        self._digests: list[ShardDigest] | None = None
        self._errors = FileErrors("file")
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._open = functools.lru_cache(_MAX_OPEN_FILES)(self._open_again)
        self._groups: collections.OrderedDict[int, _RowGroup] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_lock", "_open", "_groups", "_digests")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _digests=None)
        self._start()

    def _look_into(self, path: str) -> tuple[Listed, list[int]]:
        """Return size and version of a file, and the rows of its groups."""
        file = open_file(path)
        return Listed(file.size, file.version), _ParquetFile(path, file, **self._chosen).group_sizes()

    def _open_again(self, path: str) -> "_ParquetFile":
        """Open a file, or its copy.

        Raises:
            OSError: it cannot be read, or is another one than when the source was opened.
        """
        listed = self._versions[path]
        in_store = is_address(path)
        file = self._cache.open(path, listed) if in_store and self._cache is not None else open_file(path, listed)
        if (file.size, file.version) != (listed.size, listed.version):
            raise FileChanged(errno.ESTALE, "another program has written it anew", path)
        return _ParquetFile(path, file, **self._chosen)

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, index: int) -> Sample:
        group, row = self._place(index)
        cells = self._row_group(group)
        image, most = cells.image(row, self._max_image_bytes), self._max_caption_bytes
        value, key = cells.value("label", row), key_of(cells.value("key", row), str(self._row_in_file(group, row)))
        several = labels_of(value)
        label = label_of(value) if several is None else -1
        if not self._captions:
            return Sample(image, captions_of(cells.caption(row, most), max_bytes=most), label, key, (), several)
        captions, fields = read_captions(
            self._captions, lambda name: cells.caption(row, most, _field_use(name)), max_bytes=most
        )
        return Sample(image, captions, label, key, fields, several)

    def location(self, index: int) -> str:
        """Return the file and the row in it, from 0."""
        group, row = self._place(index)
        return f"{self._paths[self._file(group)]}, row {self._row_in_file(group, row)}"

    def digests(self) -> list[ShardDigest]:
        """Return a digest of each file: of the footer, which has sizes and statistics, and of some contents."""
        if self._digests is None:
            with futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
                self._digests = list(pool.map(self._digest, range(len(self._paths))))
        return self._digests

    def _digest(self, file: int) -> ShardDigest:
        opened = open_file(self._paths[file])
        first, end = (int(self._first_row[group]) for group in self._first_group[file : file + 2])
        footer = min(opened.size, int.from_bytes(opened.read(opened.size - 8, 4), "little") + 8, _MAX_FOOTER_BYTES)
        hasher = Hasher()
        hasher.add(str(opened.size).encode(), opened.read(opened.size - footer, footer))
        for place in spread(max(1, opened.size // _HASHED_BYTES), CONTENTS):
            hasher.add(opened.read(place * _HASHED_BYTES, _HASHED_BYTES))
        return ShardDigest(self._paths[file], hasher.hexdigest(), end - first)

    def shard_counts(self) -> list[tuple[str, int]]:
        """Return path and number of rows of each file."""
        return list(zip(self._paths, np.diff(self._first_row[self._first_group]).tolist(), strict=True))

    def metadata(self, shard: int, columns: Sequence[str]) -> Iterator[Described]:
        """Yield key and cells of the rows of a file."""
        path = self._paths[shard]
        return _ParquetFile(path, open_file(path, self._versions[path]), **self._chosen).metadata(columns)

    def files(self) -> list[str]:
        """Return the paths of the files."""
        return list(self._paths)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the row group of a sample, counted over all files, and the row in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = int(np.searchsorted(self._first_row, index, side="right")) - 1
        return group, index - int(self._first_row[group])

    def _row_in_file(self, group: int, row: int) -> int:
        return row + int(self._first_row[group] - self._first_row[self._first_group[self._file(group)]])

    def _file(self, group: int) -> int:
        return int(np.searchsorted(self._first_group, group, side="right")) - 1

    def _row_group(self, group: int) -> "_RowGroup":
        with self._lock:  # a file has one position, and a group is read once for all threads that want it
            if group not in self._groups:
                self._groups[group] = self._read_group(group)
            self._groups.move_to_end(group)
            while len(self._groups) > 1 and sum(each.num_bytes for each in self._groups.values()) > _MAX_CACHE_BYTES:
                self._groups.popitem(last=False)
            return self._groups[group]

    def _read_group(self, group: int) -> "_RowGroup":
        file = self._file(group)
        with self._errors.reading(self._paths[file]):
            return self._open(self._paths[file]).read(group - int(self._first_group[file]))


class _RowGroup:
    """The cells of a row group, as Arrow arrays of a few rows; without any, the group is damaged."""

    def __init__(self, batches: Sequence[dict[str, Any]], num_bytes: int):
        self._batches = batches
        self.num_bytes = num_bytes

    def _cell(self, use: str, row: int) -> Any:
        if not self._batches:
            raise BadSample("corrupt_record")
        column = self._batches[row // _ROWS_AT_ONCE].get(use)
        return None if column is None else column[row % _ROWS_AT_ONCE]

    def image(self, row: int, max_bytes: int) -> bytes:
        cell = self._cell("image", row)
        buffer = None if cell is None else cell.as_buffer()
        if buffer is None or not buffer.size:
            raise BadSample("missing_image")
        if buffer.size > max_bytes:
            raise BadSample("image_too_large")
        return buffer.to_pybytes()

    def caption(self, row: int, max_bytes: int, use: str = "caption") -> Any:
        """Return a text as bytes, a list of them, or None. UTF-8 in a file is a promise only."""
        cell = self._cell(use, row)
        if cell is None or not cell.is_valid:
            return None
        if not hasattr(cell, "values"):
            return _text(cell, max_bytes)
        return [_text(each, max_bytes) for each in cell.values if each.is_valid]

    def value(self, use: str, row: int) -> Any:
        cell = self._cell(use, row)
        try:
            return None if cell is None else cell.as_py()
        except UnicodeDecodeError:
            return None


def _text(cell: Any, max_bytes: int) -> bytes:
    buffer = cell.as_buffer()
    if buffer.size > max_bytes:
        raise BadSample("caption_too_long")
    return buffer.to_pybytes()


class _ParquetFile:
    """An open file, for one thread at a time.

    Raises:
        ValueError: it is no Parquet file, or lacks a column.
    """

    def __init__(
        self,
        path: str,
        file: OpenFile,
        *,
        image_field: str | None,
        caption_field: str | None,
        label_key: str,
        captions: Weights,
    ):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        self._reader = PositionedFile(file)
        try:
            self._file = pq.ParquetFile(self._reader)  # pyright: ignore[reportArgumentType]
            schema = self._file.schema_arrow
            names = list(schema.names)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            self._reader.raise_failure()
            raise ValueError(f"{path} is no Parquet file, or is cut off: {error}") from error
        self._fields = choose_fields(
            names,
            place=path,
            images=IMAGE_BYTES,
            image_field=image_field,
            caption_field=caption_field,
            label_key=label_key,
            captions=captions,
            holds_images=lambda column: _has_bytes(schema, column),
        )
        self._check_types(schema)

    def _check_types(self, schema: Any) -> None:
        import pyarrow.types as types

        if not _has_bytes(schema, self._fields.image):
            kind = schema.field(self._fields.image).type
            raise ValueError(
                f"{self._path}: column {self._fields.image!r} holds {kind}, and no encoded images; name another one by "
                "data.image_field (for paths of images write a .csv or .jsonl table)"
            )
        caption, choice = self._fields.caption, "data.captions" if self._fields.captions else "data.caption_field"
        for name in self._fields.captions or ([] if caption is None else [caption]):
            kind = schema.field(name).type
            item = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
            if not (types.is_string(item) or types.is_large_string(item)):
                raise ValueError(
                    f"{self._path}: column {name!r} holds {kind}, and no text or list of texts; name another one by "
                    f"{choice}"
                )

    def group_sizes(self) -> list[int]:
        """Return the numbers of rows.

        Raises:
            ValueError: a row group is too large to be read at once.
        """
        metadata = self._file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        for i, group in enumerate(groups):
            if group.total_byte_size > _MAX_GROUP_BYTES:
                raise ValueError(
                    f"{self._path}: row group {i} has {group.total_byte_size} bytes, more than {_MAX_GROUP_BYTES}; "
                    "write the file with smaller row groups (row_group_size=1000)"
                )
        return [max(0, group.num_rows) for group in groups]

    def metadata(self, columns: Sequence[str]) -> Iterator[Described]:
        """Yield key and cells of all rows."""
        return parquet_metadata(self._file, columns, self._fields.key)

    def read(self, group: int) -> _RowGroup:
        """Read a row group, a few rows at a time: a dictionary can unpack to any size."""
        import pyarrow as pa

        fields: Fields = self._fields
        uses = {"image": fields.image, "caption": fields.caption, "label": fields.label, "key": fields.key}
        uses = {use: name for use, name in uses.items() if name is not None}
        uses |= {_field_use(name): name for name in fields.captions}
        batches, num_bytes = [], 0
        expected = self._file.metadata.row_group(group).num_rows
        try:
            for batch in self._file.iter_batches(
                _ROWS_AT_ONCE, row_groups=[group], columns=[*dict.fromkeys(uses.values())], use_threads=False
            ):
                num_bytes += batch.nbytes
                if num_bytes > _MAX_GROUP_BYTES:
                    return _RowGroup([], 0)
                batches.append({use: _flat(batch.column(name)) for use, name in uses.items()})
        except (pa.ArrowException, OSError, ValueError):
            self._reader.raise_failure()
            return _RowGroup([], 0)
        if sum(len(batch["image"]) for batch in batches) != expected or any(
            len(batch["image"]) != _ROWS_AT_ONCE for batch in batches[:-1]
        ):
            return _RowGroup([], 0)
        return _RowGroup(batches, num_bytes)


def _field_use(name: str) -> str:
    """Return the use of a column of captions that are read by field."""
    return f"captions/{name}"


def _has_bytes(schema: Any, name: str) -> bool:
    """Return True for a column of bytes, itself or in its field `bytes`."""
    import pyarrow.types as types

    if schema.get_field_index(name) < 0:
        return False
    kind = schema.field(name).type
    if types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return False
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind)


def _flat(column: Any) -> Any:
    """Return the field `bytes` of a column of structs, None where the struct is None; other columns as they are."""
    import pyarrow.types as types

    return column.flatten()[column.type.get_field_index("bytes")] if types.is_struct(column.type) else column
