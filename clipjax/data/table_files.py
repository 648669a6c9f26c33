"""The rows of a table: an index of places in the file, and the cells of a row.

Rows are read in blocks of a few, so that the index stays small: 8 bytes per block.

Reading order: `TableFile`, `_read_records` (CSV and JSON lines), `_read_header`.
"""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import xxhash

from clipjax.data.caption_fields import Weights
from clipjax.data.fields import IMAGE_PATHS, Fields, choose_fields
from clipjax.data.sample import BadSample
from clipjax.runtime.storage import OpenFile, open_file, stream

_SEPARATORS = {".csv": ",\t;", ".tsv": "\t", ".jsonl": ""}
SUFFIXES = tuple(_SEPARATORS)
"""Endings of the files that are read here."""

_ROWS_PER_BLOCK = 64
_CACHED_BLOCKS = 16
_MORE_OBJECTS = 1000  # of JSON lines that are searched for fields of captions
_MAX_RECORD_BYTES = 2**20
_MARK = b"\xef\xbb\xbf"  # of UTF-8, which spreadsheets write first


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of a row that are used: the image's path or None, and values as they are; texts of a CSV are bytes."""

    image: str | None
    caption: Any
    label: Any
    key: Any
    captions: Mapping[str, Any]


class TableFile:
    """A CSV, TSV or file of JSON lines. It is read once, and again a block at a time.

    Args:
        path: of the file, or its address.
        image_field: column of the paths; None: the first of `IMAGE_PATHS`.
        caption_field: column of the captions; None: the first of `CAPTIONS`.
        label_key: column of the class.
        captions: columns of captions that are read by field, with their weights; none: `caption_field` is the one.

    Raises:
        ValueError: it is no table, or lacks a column.

    Attributes:
        path: of the file.
        num_rows: without the header and blank lines.
        digest: of the whole file.
    """

    def __init__(
        self, path: str, *, image_field: str | None, caption_field: str | None, label_key: str, captions: Weights
    ):
        self.path = path
        choice: dict[str, Any] = {"image_field": image_field, "caption_field": caption_field, "label_key": label_key}
        choice["captions"] = captions
        self._separator, self._columns, self._fields = _read_header(path, choice)
        hasher, places, last = xxhash.xxh3_128(), [], 0
        self.num_rows = 0
        with stream(path) as file:
            records = _read_records(_read_lines(file, path, hasher.update), self._separator, path)
            for start, end, _ in itertools.islice(records, 1 if self._separator else 0, None):
                if self.num_rows % _ROWS_PER_BLOCK == 0:
                    places.append(start)
                self.num_rows += 1
                last = end
        self.digest = hasher.digest()
        self._places = np.array([*places, last], np.int64)
        self._start()

    def _start(self) -> None:
        self._block = functools.lru_cache(_CACHED_BLOCKS)(self._read_block)
        self._file: OpenFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_block", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def row(self, number: int) -> Row:
        """Return a row.

        Raises:
            BadSample: `corrupt_record` for another number of cells than the header has, `bad_metadata` for bad JSON.
        """
        block = self._block(number // _ROWS_PER_BLOCK)
        record = block[number % _ROWS_PER_BLOCK]
        fields = self._fields
        if not self._separator:
            values = _parse_json(record)
            image = values.get(fields.image)
            caption, label, key = (
                None if name is None else values.get(name) for name in (fields.caption, fields.label, fields.key)
            )
            captions = {name: values.get(name) for name in fields.captions}
            return Row(image if isinstance(image, str) else None, caption, label, key, captions)
        if len(record) != len(self._columns):
            raise BadSample("corrupt_record")
        image, caption, label, key, *captions = (
            None if name is None else record[self._columns.index(name)].encode("latin-1")
            for name in (fields.image, fields.caption, fields.label, fields.key, *fields.captions)
        )
        assert image is not None
        label, key = (cell.decode(errors="replace") if cell else None for cell in (label, key))
        return Row(os.fsdecode(image) or None, caption, label, key, dict(zip(fields.captions, captions, strict=True)))

    @property
    def names(self) -> tuple[str, str | None]:
        """Columns of the image's path and of the key."""
        return self._fields.image, self._fields.key

    def cells(self, number: int) -> Mapping[str, Any]:
        """Return all cells of a row by their columns; raise as `row` does."""
        record = self._block(number // _ROWS_PER_BLOCK)[number % _ROWS_PER_BLOCK]
        if not self._separator:
            return _parse_json(record)
        if len(record) != len(self._columns):
            raise BadSample("corrupt_record")
        return {
            name: cell.encode("latin-1").decode(errors="replace")
            for name, cell in zip(self._columns, record, strict=True)
        }

    def _read_block(self, block: int) -> list[Any]:
        if self._file is None:
            self._file = open_file(self.path)
        start, end = self._places[block : block + 2].tolist()
        lines = io.BytesIO(self._file.read(start, end - start))
        return [record for _, _, record in _read_records(iter(lines), self._separator, self.path)]


def _read_lines(file: BinaryIO, path: str, see: Callable[[bytes], None]) -> Iterator[bytes]:
    """Yield the lines of a file, each with its end, without the mark of UTF-8.

    Raises:
        ValueError: a line is too long for a table.
    """
    for number in itertools.count(1):
        line = file.readline(_MAX_RECORD_BYTES + 1)
        if len(line) > _MAX_RECORD_BYTES:
            raise ValueError(f"{path}: line {number} is longer than {_MAX_RECORD_BYTES} bytes; this is no table")
        if not line:
            return
        see(line)
        yield line


def _read_records(lines: Iterator[bytes], separator: str, path: str) -> Iterator[tuple[int, int, Any]]:
    """Yield start, end and cells of each row that is not blank: texts in Latin-1, or the line of a JSON object.

    Latin-1 gives each byte a character, so that one bad text does not spoil the others.

    Raises:
        ValueError: the rules of CSV are broken, so that rows cannot be told apart.
    """
    place = 0

    def count(line: bytes) -> str:
        nonlocal place
        place += len(line)
        return line.removeprefix(_MARK if place == len(line) else b"").decode("latin-1")

    if not separator:
        for line in lines:
            start = place
            text = count(line)
            if text.strip():
                yield start, place, text.encode("latin-1")
        return
    start, rows = 0, csv.reader(map(count, lines), delimiter=separator)
    for number in itertools.count():
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, row {number}: {error}; a quote that is opened must be closed, and one inside of a text is "
                'written twice ("")'
            ) from error
        if row is None:
            return
        if place - start > _MAX_RECORD_BYTES:
            raise ValueError(f"{path}, row {number} is longer than {_MAX_RECORD_BYTES} bytes; is a quote never closed?")
        if row:
            yield start, place, row
        start = place


def _read_header(path: str, choice: Mapping[str, Any]) -> tuple[str, list[str], Fields]:
    """Return separator, columns, and the columns to read.

    Raises:
        ValueError: there are none.
    """
    failures: list[ValueError] = []
    for separator in _SEPARATORS[pathlib.PurePath(path).suffix.lower()] or ("",):
        with stream(path) as file:
            records = _read_records(_read_lines(file, path, lambda line: None), separator, path)
            first, others = next(records, None), []
            if choice["captions"] and not separator:  # an object need not have every field of the captions
                others = [record for _, _, record in itertools.islice(records, _MORE_OBJECTS)]
        if first is None:
            break
        if separator:
            columns = [cell.encode("latin-1").decode(errors="replace").strip() for cell in first[2]]
        else:
            try:
                columns = list(_parse_json(first[2]))
            except BadSample:
                raise ValueError(f"{path}: the first line is no JSON object, as each line must be") from None
            for record in others:
                with contextlib.suppress(BadSample):
                    columns = list(dict.fromkeys([*columns, *_parse_json(record)]))
        try:
            fields = choose_fields(columns, place=path, images=IMAGE_PATHS, **choice)
            # An object need not have a class; a header has all columns.
            label = fields.label if separator else choice["label_key"]
            return separator, columns, dataclasses.replace(fields, label=label)
        except ValueError as error:
            failures.append(error)
            if len(columns) > 1:  # this is the separator
                raise
    raise failures[0] if failures else ValueError(f"{path} is empty; a table has a row for each image")


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise BadSample("bad_metadata") from None
    if not isinstance(values, dict):
        raise BadSample("bad_metadata")
    return values
