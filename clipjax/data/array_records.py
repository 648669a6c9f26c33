"""Plain ArrayRecord: one sample per record, as `write_array_records` writes them.

A record is `CLIPJAX1`, the length of a JSON object in 4 bytes (little-endian), that object (`key`, `captions`, `label`;
`shape` for pixels), and the image: encoded bytes, or raw uint8 pixels.

Reading order: `encode_record`, `decode_record`, `ArrayRecordSource`.
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from clipjax.data.digests import CONTENTS, DIGEST_THREADS, Hasher, ShardDigest, spread
from clipjax.data.fields import captions_of, key_of, label_of
from clipjax.data.image_files import max_image_bytes
from clipjax.data.metadata import Described, parse_json
from clipjax.data.sample import BadSample, Sample, labels_of
from clipjax.runtime.files import require_file_writable
from clipjax.runtime.kept_files import KeptFiles
from clipjax.runtime.storage import is_address

RECORD_CAPTIONS = "captions"
"""The one field of captions of a record."""

MARK = b"CLIPJAX1"
WRITER_OPTIONS = "group_size:1,uncompressed"
"""One record per chunk, for random access; images are compressed already."""

_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_HEAD = len(MARK) + 4
_MAX_JSON_BYTES = 2**20
_MAX_OPEN_FILES = 128
_HASHED_BYTES = 65_536


def encode_record(sample: Sample) -> bytes:
    """Return the record of a sample."""
    about: dict[str, Any] = {"key": sample.key, RECORD_CAPTIONS: list(sample.captions), "label": sample.label}
    if sample.labels is not None:
        about["label"] = list(sample.labels)
    image = sample.image
    if isinstance(image, np.ndarray):
        about["shape"] = list(image.shape)
        image = np.ascontiguousarray(image, np.uint8).tobytes()
    text = json.dumps(about, ensure_ascii=False).encode()
    return b"".join([MARK, len(text).to_bytes(4, "little"), text, image])


def decode_record(record: bytes, *, max_caption_bytes: int, max_image_pixels: int) -> Sample:
    """Return the sample of a record.

    Raises:
        BadSample: `corrupt_record`, `bad_metadata`, `missing_image`, `image_too_large`, or those of `clean_caption`.
    """
    size = int.from_bytes(record[len(MARK) : _HEAD], "little")
    if not record.startswith(MARK) or _HEAD + size > len(record):
        raise BadSample("corrupt_record")
    if size > _MAX_JSON_BYTES:
        raise BadSample("bad_metadata")
    try:
        about = json.loads(record[_HEAD : _HEAD + size])
    except (ValueError, RecursionError):
        raise BadSample("bad_metadata") from None
    if not isinstance(about, dict) or not isinstance(key := about.get("key", ""), str):
        raise BadSample("bad_metadata")
    label = about.get("label", -1)
    several = labels_of(label)
    return Sample(
        image=_image(record[_HEAD + size :], about.get("shape"), max_image_pixels),
        captions=captions_of(about.get(RECORD_CAPTIONS), max_bytes=max_caption_bytes),
        label=-1 if label == -1 or several is not None else label_of(label),
        key=key,
        labels=several,
    )


def _image(image: bytes, shape: Any, max_pixels: int) -> bytes | np.ndarray:
    if not image:
        raise BadSample("missing_image")
    if len(image) > max_image_bytes(max_pixels):
        raise BadSample("image_too_large")
    if shape is None:
        return image
    is_shape = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
    if not is_shape or shape[2] != 3 or math.prod(shape) != len(image):
        raise BadSample("bad_metadata")
    return np.frombuffer(image, np.uint8).reshape(shape)


def write_array_records(path: pathlib.Path, samples: Iterable[Sample]) -> int:
    """Write a file of samples; return their number.

    Raises:
        ValueError: it cannot be written there.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    require_file_writable(path, "output")
    writer, count = ArrayRecordWriter(str(path), WRITER_OPTIONS), 0
    try:
        for sample in samples:
            writer.write(encode_record(sample))
            count += 1
    finally:
        writer.close()
    return count


class ArrayRecordSource:
    """Samples of ArrayRecord files, in the order of the files and their records.

    Args:
        paths: files on a disk.
        max_caption_bytes: limit of a caption; longer ones make a sample bad.
        max_image_pixels: limit of an image.
        places: of the files in a store, for messages, where the paths are those of copies.
        kept: keeps these copies on the disk.

    Raises:
        ValueError: a file is no ArrayRecord, or holds records of another program; or there is none.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        max_caption_bytes: int,
        max_image_pixels: int,
        places: Sequence[str] | None = None,
        kept: KeptFiles | None = None,
    ):
        self._paths, self._kept = [os.fspath(path) for path in paths], kept
        self._places = self._paths if places is None else list(places)
        self._limits = {"max_caption_bytes": max_caption_bytes, "max_image_pixels": max_image_pixels}
        with futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
            counts = list(pool.map(count_records, self._paths, self._places))
        if not sum(counts):
            raise ValueError(f"no record in {', '.join(self._places[:5])}")
        self._first = np.cumsum([0, *counts])
        self._digests: list[ShardDigest] | None = None
        self._open = functools.lru_cache(_MAX_OPEN_FILES)(_open_reader)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_open", "_digests", "_kept")  # the process that opened the source keeps the copies for its workers
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opener = functools.lru_cache(_MAX_OPEN_FILES)(_open_reader)
        self.__dict__.update(state, _digests=None, _kept=None, _open=opener)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Sample:
        file, number = self._place(index)
        try:
            [record] = self._open(self._paths[file]).read([number])
        except Exception:  # the library raises several types on damaged bytes, and on storage that fails
            record = self._read_again(self._paths[file], number)
        return decode_record(record, **self._limits)

    def _read_again(self, path: str, number: int) -> bytes:
        """Return a record that could not be read; a reader that its storage has failed gives nothing any more.

        Raises:
            BadSample: it is damaged.
            OSError: the storage fails.
        """
        require_readable(path)
        try:
            [record] = _open_reader(path).read([number])
        except Exception as error:
            require_readable(path)
            raise BadSample("corrupt_record") from error
        self._open.cache_clear()
        return record

    def location(self, index: int) -> str:
        """Return the file and the record in it."""
        file, number = self._place(index)
        return f"{self._places[file]}, record {number}"

    def digests(self) -> list[ShardDigest]:
        """Return a digest of each file: of its size, and of some contents."""
        if self._digests is None:
            self._digests = [self._digest(file) for file in range(len(self._paths))]
        return self._digests

    def _digest(self, file: int) -> ShardDigest:
        first, end = self._first[file : file + 2].tolist()
        hasher = Hasher()
        with open(self._paths[file], "rb") as opened:  # noqa: PTH123
            size = os.fstat(opened.fileno()).st_size
            hasher.add(str(size).encode())
            for place in spread(max(1, math.ceil(size / _HASHED_BYTES)), CONTENTS):
                opened.seek(place * _HASHED_BYTES)
                hasher.add(opened.read(_HASHED_BYTES))
        return ShardDigest(self._paths[file], hasher.hexdigest(), end - first)

    def shard_counts(self) -> list[tuple[str, int]]:
        """Return path and number of records of each file."""
        return list(zip(self._paths, np.diff(self._first).tolist(), strict=True))

    def metadata(self, shard: int, columns: Sequence[str]) -> Iterator[Described]:
        """Yield key and JSON object of the records of a file; records that are damaged have none."""
        first, end = self._first[shard : shard + 2].tolist()
        for number in range(end - first):
            try:
                [record] = self._open(self._paths[shard]).read([number])
            except Exception:  # the library raises several types on damaged bytes
                yield "", {}
                continue
            size = int.from_bytes(record[len(MARK) : _HEAD], "little")
            is_whole = record.startswith(MARK) and size <= min(_MAX_JSON_BYTES, len(record) - _HEAD)
            about = parse_json(record[_HEAD : _HEAD + size]) if is_whole else {}
            yield key_of(about.get("key"), ""), about

    def files(self) -> list[str]:
        """Return the paths of the files."""
        return list(self._paths)

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, index - int(self._first[file])


def require_readable(path: str) -> None:
    """Read both ends of a file, so that storage that fails is not taken for a damaged record.

    Raises:
        OSError: it fails.
    """
    with open(path, "rb") as file:  # noqa: PTH123
        file.read(1)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 1))
        file.read(1)


def _open_reader(path: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=32_768)


def count_records(path: str, place: str | None = None) -> int:
    """Return the number of records in a file.

    Args:
        path: of the file, or of its copy.
        place: of the file, for messages; None: the path.

    Raises:
        ValueError: it is no ArrayRecord, or holds records of another program.
    """
    if is_address(path):
        raise ValueError(
            f"{path}: ArrayRecord files must lie on a disk, as their library reads no other; `build_source` copies them"
        )
    place, reader = place or path, _open_reader(path)
    if not reader.ok():
        raise ValueError(f"{place} is no ArrayRecord file, or is cut off; write it again")
    count = int(reader.num_records())
    try:
        first = reader.read([0])[0] if count else MARK
    except Exception:  # a damaged record is a bad sample later
        first = MARK
    if not first.startswith(MARK):
        raise ValueError(
            f"{place} holds records of another program; data that TFDS has prepared is read as tfds:NAME/SPLIT"
        )
    return count
