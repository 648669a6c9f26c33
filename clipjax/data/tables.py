"""Tables of paths and captions: CSV, TSV and JSON lines.

A CSV or TSV has a header; the separator of a `.csv` is the one that finds the columns: comma, tab or semicolon. Paths
of images start at the folder of the table, or at `data.image_root`, and lead nowhere else.

The files are read by `clipjax.data.table_files`.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.data.caption_fields import read_captions, to_weights
from clipjax.data.digests import CONTENTS, Hasher, ShardDigest, spread
from clipjax.data.fields import captions_of, key_of, label_of
from clipjax.data.image_files import ImageFiles, max_image_bytes
from clipjax.data.metadata import Described, table_metadata
from clipjax.data.sample import BadSample, Sample, labels_of
from clipjax.data.table_files import TableFile
from clipjax.runtime.storage import is_address

_MAX_SHOWN_NAME = 200


class TableSource:
    """Samples that the rows of tables name: an image file and its captions.

    Args:
        paths: tables, or their addresses.
        image_field: column of the paths; None: the first of `IMAGE_PATHS`.
        caption_field: column of the captions; None: the first of `CAPTIONS`.
        label_key: column of the class, which need not be there.
        image_root: folder, or its address, where the paths start, and in which images may lie besides the folder of
            the table.
        max_caption_bytes: limit of a caption; longer ones make a sample bad.
        max_image_pixels: limit of an image; files that are larger than its raw pixels are not even read.
        captions: weights of columns of captions; none: `caption_field` is the one.

    Raises:
        ValueError: a file is no table, or lacks a column; or there is no row.

    Cost: every table is read once at the start; 8 bytes per 64 rows.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        image_field: str | None,
        caption_field: str | None,
        label_key: str,
        image_root: str | None,
        max_caption_bytes: int,
        max_image_pixels: int,
        captions: Mapping[str, float] | None = None,
    ):
        self._captions = to_weights(captions)
        choice = {
            "image_field": image_field,
            "caption_field": caption_field,
            "label_key": label_key,
            "captions": self._captions,
        }
        self._tables = [TableFile(os.fspath(path), **choice) for path in paths]
        if not sum(table.num_rows for table in self._tables):
            raise ValueError(f"no row in {', '.join(map(str, paths[:5]))}: a table has one for each image")
        self._first = np.cumsum([0] + [table.num_rows for table in self._tables])
        self._max_caption_bytes = max_caption_bytes
        self._files = [
            ImageFiles([*([image_root] if image_root else []), folder], max_bytes=max_image_bytes(max_image_pixels))
            for folder in (os.path.dirname(table.path) or "." for table in self._tables)  # noqa: PTH120
        ]
        self._digests: list[ShardDigest] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_digests": None}

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Sample:
        table, row = self._place(index)
        values = self._tables[table].row(row)
        captions, fields, most = (), (), self._max_caption_bytes
        if self._captions:
            captions, fields = read_captions(self._captions, values.captions.get, max_bytes=most)
        else:
            captions = captions_of(values.caption, max_bytes=most)
        several = labels_of(values.label)
        label = label_of(values.label) if several is None else -1
        if not values.image:
            raise BadSample("missing_image")
        image, key = self._files[table].read(values.image), key_of(values.key, values.image)
        return Sample(image, captions, label, key, fields, several)

    def location(self, index: int) -> str:
        """Return the table, the row in it, from 1 behind the header, and the image that it names."""
        table, row = self._place(index)
        place = f"{self._tables[table].path}, row {row + 1}, image"
        try:
            name = self._tables[table].row(row).image or ""
        except BadSample:
            return f"{place} ?"
        shown = name[:_MAX_SHOWN_NAME]
        place += f" {shown if shown.isprintable() else ascii(shown)}"
        try:
            self._files[table].find(name)
        except BadSample:
            place += " (neither in the table's folder nor in data.image_root)"
        return place

    def digests(self) -> list[ShardDigest]:
        """Return a digest of each table: of its whole text, and of some images."""
        if self._digests is None:
            self._digests = [self._digest(table) for table in range(len(self._tables))]
        return self._digests

    def _digest(self, table: int) -> ShardDigest:
        hasher = Hasher()
        hasher.add(self._tables[table].digest)
        for row in spread(self._tables[table].num_rows, CONTENTS):
            try:
                hasher.add(self._files[table].read(self._tables[table].row(row).image or ""))
            except BadSample as bad:
                hasher.add(bad.reason.encode())
        return ShardDigest(self._tables[table].path, hasher.hexdigest(), self._tables[table].num_rows)

    def shard_counts(self) -> list[tuple[str, int]]:
        """Return path and number of rows of each table."""
        return [(table.path, table.num_rows) for table in self._tables]

    def metadata(self, shard: int, columns: Sequence[str]) -> Iterator[Described]:
        """Yield key and cells of the rows of a table, of all its columns."""
        table = self._tables[shard]
        return table_metadata(table.cells, table.num_rows, *table.names)

    def files(self) -> list[str]:
        """Return the paths of the tables and of all images that they name and, on a disk, that are there."""
        found = dict.fromkeys(table.path for table in self._tables)
        for table, files in zip(self._tables, self._files, strict=True):
            for row in range(table.num_rows):
                with contextlib.suppress(BadSample):
                    path = files.find(table.row(row).image or "")
                    if is_address(path) or os.path.isfile(path):  # noqa: PTH113
                        found[path] = None
        return list(found)

    def folders(self) -> list[str]:
        """Return the folders in which all files lie."""
        return list(dict.fromkeys(folder for files in self._files for folder in files.folders))

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        table = int(np.searchsorted(self._first, index, side="right")) - 1
        return table, index - int(self._first[table])
