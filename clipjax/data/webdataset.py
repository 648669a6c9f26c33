"""WebDataset tar shards (img2dataset's layout) with random access: an offset index in memory, one read per sample.

Reading order: `TarSource`, `_index_shard` (which members form a sample), `_walk` (the tar format). A sample is the
members that share everything before the first dot of their name: `KEY.jpg|jpeg|png|webp`, `KEY.txt` (caption),
`KEY.json` (`caption` or `captions` if there is no txt, `label` if there is no cls), `KEY.cls` (class number).
Other members are ignored, links, devices and directories too; names are labels and never paths to open.
"""

import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.data.sources import REASONS, BadSample, Sample, clean_caption, is_label

_IMAGE, _CAPTION, _JSON, _CLASS = range(4)
_COLUMNS = {
    "jpg": _IMAGE,
    "jpeg": _IMAGE,
    "png": _IMAGE,
    "webp": _IMAGE,
    "txt": _CAPTION,
    "json": _JSON,
    "cls": _CLASS,
}
_BLOCK = 512
_MAX_HEADER_BYTES = 2**20  # of an extended header
_MAX_JSON_BYTES = 2**20
_MAX_CLASS_BYTES = 64
_MAX_FILE_OVERHEAD_BYTES = 2**20  # of an image file beyond its pixels: profiles, thumbnails
_MAX_GAP_BYTES = 64 * 2**10  # between the members of a sample that are read in one go
_MAX_OPEN_SHARDS = 128
_MAX_SHOWN_KEY = 200
_NO_FAULT = -1


class TarSource:
    """Samples of tar shards, in the order of the shards and, inside one, of each key's first member.

    A tar that is cut off, or damaged in the middle, gives the samples before that place; the one that it cuts is bad
    (`truncated_tar`). A key that has two images, or two of another kind, is bad (`duplicate_key`).

    Args:
        paths: uncompressed tar files.
        max_caption_bytes: longer captions make a sample bad.
        max_image_pixels: image files that are larger than this many raw pixels are not even read.

    Raises:
        ValueError: if a file is no tar, or there is no sample at all.

    Cost: about 70 bytes and 25 microseconds per sample for the index, which also travels to each worker process.
    """

    def __init__(self, paths: Sequence[str], *, max_caption_bytes: int, max_image_pixels: int):
        self._paths = [os.fspath(path) for path in paths]
        self._max_caption_bytes = max_caption_bytes
        self._max_image_bytes = 4 * max_image_pixels + _MAX_FILE_OVERHEAD_BYTES
        shards = [_index_shard(path) for path in self._paths]
        if not sum(len(shard.keys) for shard in shards):
            raise ValueError(
                f"no sample in {', '.join(self._paths[:5])}: expected members KEY.jpg (jpeg, png, webp) and KEY.txt"
            )
        self._first = np.cumsum([0] + [len(shard.keys) for shard in shards])
        self._offsets = np.concatenate([shard.offsets for shard in shards])
        self._sizes = np.concatenate([shard.sizes for shard in shards])
        self._faults = np.concatenate([shard.faults for shard in shards])
        keys = [key.encode() for shard in shards for key in shard.keys]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([len(key) for key in keys])
        self._open = functools.lru_cache(_MAX_OPEN_SHARDS)(_File)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=functools.lru_cache(_MAX_OPEN_SHARDS)(_File))

    def __len__(self) -> int:
        return len(self._faults)

    def __getitem__(self, index: int) -> Sample:
        if self._faults[index] != _NO_FAULT:
            raise BadSample(REASONS[self._faults[index]])
        offsets, sizes = self._offsets[index].tolist(), self._sizes[index].tolist()
        if offsets[_IMAGE] < 0:
            raise BadSample("missing_image")
        if offsets[_CAPTION] >= 0 and offsets[_CLASS] >= 0:
            offsets[_JSON] = -1  # nothing is needed from it
        limits = (self._max_image_bytes, self._max_caption_bytes, _MAX_JSON_BYTES, _MAX_CLASS_BYTES)
        reasons = ("image_too_large", "caption_too_long", "bad_metadata", "bad_metadata")
        for offset, size, limit, reason in zip(offsets, sizes, limits, reasons, strict=True):
            if offset >= 0 and size > limit:
                raise BadSample(reason)
        image, caption, metadata, label = self._read(self._path(index), offsets, sizes)
        fields = _parse_json(metadata)
        assert image is not None
        raw_captions = [caption] if caption is not None else _json_captions(fields)
        return Sample(
            image=image,
            captions=tuple(clean_caption(raw, max_bytes=self._max_caption_bytes) for raw in raw_captions),
            label=_parse_class(label) if label is not None else _json_label(fields),
            key=self._key(index),
        )

    def where(self, index: int) -> str:
        """Names the shard and the key."""
        key = self._key(index)[:_MAX_SHOWN_KEY]
        return f"shard {self._path(index)}, key {key if key.isprintable() else ascii(key)}"

    def _path(self, index: int) -> str:
        return self._paths[int(np.searchsorted(self._first, index, side="right")) - 1]

    def _key(self, index: int) -> str:
        start = self._key_ends[index - 1] if index else 0
        return self._keys[start : self._key_ends[index]].decode()

    def _read(self, path: str, offsets: list[int], sizes: list[int]) -> list[bytes | None]:
        """Contents of a sample's members, None where there is none."""
        file = self._open(path)
        spans = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True) if offset >= 0]
        first, last = min(spans)[0], max(end for _, end in spans)
        if last - first > sum(end - start for start, end in spans) + _MAX_GAP_BYTES:
            return [
                file.read(offset, size) if offset >= 0 else None for offset, size in zip(offsets, sizes, strict=True)
            ]
        block = file.read(first, last - first)
        return [
            block[offset - first : offset - first + size] if offset >= 0 else None
            for offset, size in zip(offsets, sizes, strict=True)
        ]


class _File:
    """An open shard. It closes when its last reader lets go, so that the cache may drop it during a read."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Reads without a file position, so that threads can share the descriptor."""
        data = os.pread(self.descriptor, size, offset)
        if len(data) < size:
            raise BadSample("truncated_tar")
        return data


def _parse_json(metadata: bytes | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    try:
        fields = json.loads(metadata)
    except (ValueError, RecursionError):  # ValueError includes bad UTF-8 and numbers of absurd length
        raise BadSample("bad_metadata") from None
    if not isinstance(fields, dict):
        raise BadSample("bad_metadata")
    return fields


def _json_captions(fields: dict[str, Any]) -> list[str]:
    captions = fields.get("caption", fields.get("captions"))
    captions = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample("bad_metadata")
    return captions


def _json_label(fields: dict[str, Any]) -> int:
    label: Any = fields.get("label")
    return int(label) if is_label(label) else -1  # a text label belongs to somebody else's schema


def _parse_class(label: bytes) -> int:
    try:
        number = int(label.decode("ascii"))
    except ValueError:
        raise BadSample("bad_metadata") from None
    if not is_label(number):
        raise BadSample("bad_metadata")
    return number


@dataclass(frozen=True, slots=True)
class _Shard:
    """Index of one tar. `offsets` and `sizes` are int64 and uint32 [n, 4] (image, caption, JSON, class); -1: absent."""

    keys: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    faults: np.ndarray


class _DamagedTar(Exception):
    """The rest of a tar cannot be read."""


def _index_shard(path: str) -> _Shard:
    rows: dict[str, int] = {}
    offsets: list[list[int]] = []
    sizes: list[list[int]] = []
    faults: list[int] = []
    row = -1
    file = _File(path)
    length = os.fstat(file.descriptor).st_size
    try:
        for name, offset, size in _walk(file.descriptor, length):
            key, column = _key_and_column(name)
            if column is None:
                continue
            row = rows.setdefault(key, len(rows))
            if row == len(faults):
                offsets.append([-1] * len(set(_COLUMNS.values())))
                sizes.append([0] * len(offsets[row]))
                faults.append(_NO_FAULT)
            if offset + size > length:
                faults[row] = REASONS.index("truncated_tar")
            elif offsets[row][column] >= 0:
                faults[row] = REASONS.index("duplicate_key")
            offsets[row][column] = offset
            sizes[row][column] = min(size, 2**32 - 1)  # far above every limit
    except _DamagedTar as damage:
        if not rows and not _starts_like_tar(file.descriptor):
            raise ValueError(f"{path} is not a tar file; an archive that is compressed must be decompressed") from None
        if row >= 0 and (offsets[row][_IMAGE] < 0 or max(offsets[row][1:]) < 0):
            faults[row] = REASONS.index("truncated_tar")
        logging.getLogger(__name__).warning("%s: %s; using the %d keys before", path, damage, len(rows))
    return _Shard(
        keys=list(rows),
        offsets=np.array(offsets, np.int64).reshape(-1, 4),
        sizes=np.array(sizes, np.uint32).reshape(-1, 4),
        faults=np.array(faults, np.int8),
    )


def _key_and_column(name: str) -> tuple[str, int | None]:
    directory, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    # Names that start with a dot are hidden files, such as the "._" twins that macOS adds.
    return directory + slash + stem, _COLUMNS.get(extension.lower()) if stem else None


def _starts_like_tar(descriptor: int) -> bool:
    try:
        return _parse_header(os.pread(descriptor, _BLOCK, 0)) is not None
    except _DamagedTar:
        return False


@dataclass(frozen=True, slots=True)
class _Header:
    name: bytes
    size: int
    kind: bytes


def _walk(descriptor: int, length: int) -> Iterator[tuple[str, int, int]]:
    """Yields name, offset and size of each regular file in a tar (ustar, pax, GNU), without reading its content.

    A member that ends beyond `length` is yielded too, as the last one.

    Raises:
        _DamagedTar: if the archive stops without its end marker or a header is damaged.

    Source: POSIX.1-2008, pax, "ustar Interchange Format"; the GNU tar manual, "Basic Tar Format".
    """
    position = 0
    name: bytes | None = None
    size: int | None = None
    while True:
        header = _parse_header(os.pread(descriptor, _BLOCK, position))
        if header is None:
            return
        data = position + _BLOCK
        if header.kind in b"123456":  # links, devices, directories and pipes have no content, whatever they say
            position, name, size = data, None, None
            continue
        if header.kind in b"xL":
            if header.size > _MAX_HEADER_BYTES:
                raise _DamagedTar(f"extended header of {header.size} bytes at {position}")
            content = os.pread(descriptor, header.size, data)
            if header.kind == b"L":
                name = content.rstrip(b"\0")
            else:
                fields = _parse_pax(content)
                name = fields.get(b"path", name)
                size = _pax_size(fields) if b"size" in fields else size
            position = _next_header(data, header.size)
            continue
        member_size = header.size if size is None else size
        if header.kind in b"07\0":
            yield (header.name if name is None else name).decode("utf-8", "backslashreplace"), data, member_size
        if data + member_size > length:
            raise _DamagedTar(f"the archive ends inside the member at {position}")
        position = _next_header(data, member_size)
        if header.kind not in b"gK":  # these two stand between an extended header and its member
            name, size = None, None


def _next_header(data: int, size: int) -> int:
    return data + -(-size // _BLOCK) * _BLOCK


def _parse_header(block: bytes) -> _Header | None:
    """Reads a header block; None is the end marker."""
    if len(block) < _BLOCK:
        raise _DamagedTar("the archive ends without its end marker")
    if not block[0] and block.count(0) == _BLOCK:
        return None
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if _number(block[148:156]) != checksum:
        raise _DamagedTar("a header's checksum is wrong")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    kind = block[156:157]
    if kind == b"\0" and name.endswith(b"/"):  # how the oldest tars write a directory
        kind = b"5"
    return _Header(name, _number(block[124:136]), kind)


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # GNU's binary numbers, above 8 GiB
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise _DamagedTar(f"{field!r} is not an octal number")
    return int(digits, 8)


def _parse_pax(content: bytes) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n" of an extended header."""
    fields = {}
    while content.rstrip(b"\0"):
        length, space, _ = content[:20].partition(b" ")
        size = int(length) if length.isdigit() else 0
        key, equals, value = content[len(length) + 1 : size - 1].partition(b"=")
        if not (space and equals) or size > len(content) or content[size - 1 : size] != b"\n":
            raise _DamagedTar("a pax header is damaged")
        fields[key] = value
        content = content[size:]
    return fields


def _pax_size(fields: dict[bytes, bytes]) -> int:
    if not fields[b"size"].isdigit() or len(fields[b"size"]) > 20:
        raise _DamagedTar("a pax header is damaged")
    return int(fields[b"size"])
