"""WebDataset tar shards (img2dataset's layout) with random access: an offset index in memory, one read per sample.

A sample is the members that share everything before the first dot of their name: `KEY.jpg|jpeg|png|webp`, `KEY.txt`
(caption), `KEY.json` (`caption` or `captions` if there is no txt, `label` if there is no cls), `KEY.cls` (class
number). Other members are ignored, links, devices and directories too; names are labels and never paths to open.
"""

import copy
import functools
import json
import os
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np

from clipjax.data.digests import CONTENTS, DIGEST_THREADS, Hasher, ShardDigest, spread
from clipjax.data.sample import REASONS, BadSample, Sample, clean_caption, is_label
from clipjax.data.tar_index import CAPTION, CLASS, IMAGE, JSON, NO_FAULT, ShardFile, index_shard

_MAX_JSON_BYTES = 2**20
_MAX_CLASS_BYTES = 64
_MAX_FILE_OVERHEAD_BYTES = 2**20  # of an image file beyond its pixels: profiles, thumbnails
_MAX_GAP_BYTES = 64 * 2**10  # between the members of a sample that are read in one go
_MAX_OPEN_SHARDS = 128
_MAX_SHOWN_KEY = 200


class TarSource:
    """Samples of tar shards, in the order of the shards and, inside one, of each key's first member.

    A tar that is cut off, or damaged in the middle, gives the samples before that place; the one that it cuts is bad
    (`truncated_tar`). A key that has two images, or two of another kind, is bad (`duplicate_key`).

    Args:
        paths: uncompressed tar files.
        max_caption_bytes: limit of a caption; longer ones make a sample bad.
        max_image_pixels: limit of an image; files that are larger than its raw pixels are not even read.

    Raises:
        ValueError: a file is no tar, or there is no sample at all.

    Cost: about 70 bytes and 25 microseconds per sample for the index, which also travels to each worker process.
    """

    def __init__(self, paths: Sequence[str], *, max_caption_bytes: int, max_image_pixels: int):
        self._paths = [os.fspath(path) for path in paths]
        self._max_caption_bytes = max_caption_bytes
        self._max_image_bytes = 4 * max_image_pixels + _MAX_FILE_OVERHEAD_BYTES
        shards = [index_shard(path) for path in self._paths]
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
        self._open = functools.lru_cache(_MAX_OPEN_SHARDS)(ShardFile)
        self._digests: list[ShardDigest] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_digests")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _digests=None, _open=functools.lru_cache(_MAX_OPEN_SHARDS)(ShardFile))

    def __len__(self) -> int:
        return len(self._faults)

    def __getitem__(self, index: int) -> Sample:
        if self._faults[index] != NO_FAULT:
            raise BadSample(REASONS[self._faults[index]])
        offsets, sizes = self._offsets[index].tolist(), self._sizes[index].tolist()
        if offsets[IMAGE] < 0:
            raise BadSample("missing_image")
        if offsets[CAPTION] >= 0 and offsets[CLASS] >= 0:
            offsets[JSON] = -1  # nothing is needed from it
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

    def location(self, index: int) -> str:
        """Return the shard and the key."""
        key = self._key(index)[:_MAX_SHOWN_KEY]
        return f"shard {self._path(index)}, key {key if key.isprintable() else ascii(key)}"

    def digests(self) -> list[ShardDigest]:
        """Return a digest of each shard: keys, kinds and sizes of members, and some contents."""
        if self._digests is None:
            with futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
                self._digests = list(pool.map(self._digest, range(len(self._paths))))
        return self._digests

    def _digest(self, shard: int) -> ShardDigest:
        first, end = self._first[shard : shard + 2].tolist()
        ends = self._key_ends[first:end] - self._key_start(first)
        hasher, file = Hasher(), ShardFile(self._paths[shard])
        hasher.add(self._keys[self._key_start(first) : self._key_start(end)], ends.astype(np.int64).tobytes())
        for rows in (self._offsets[first:end] >= 0, self._sizes[first:end], self._faults[first:end]):
            hasher.add(np.ascontiguousarray(rows).tobytes())
        for index in (first + position for position in spread(end - first, CONTENTS)):
            if self._faults[index] != NO_FAULT:
                continue
            for offset, size in zip(self._offsets[index].tolist(), self._sizes[index].tolist(), strict=True):
                if offset >= 0 and size <= self._max_image_bytes:
                    hasher.add(file.read(offset, size))
        return ShardDigest(self._paths[shard], hasher.hexdigest(), end - first)

    def reordered(self, order: Sequence[int]) -> "TarSource":
        """Return the source with its shards in another order."""
        other = copy.copy(self)
        spans = [slice(*self._first[shard : shard + 2].tolist()) for shard in order]
        lengths = np.diff(self._key_ends, prepend=0)
        other._paths = [self._paths[shard] for shard in order]
        other._first = np.cumsum([0] + [span.stop - span.start for span in spans])
        for name in ("_offsets", "_sizes", "_faults"):
            setattr(other, name, np.concatenate([getattr(self, name)[span] for span in spans]))
        other._keys = b"".join(self._keys[self._key_start(span.start) : self._key_start(span.stop)] for span in spans)
        other._key_ends = np.cumsum(np.concatenate([lengths[span] for span in spans]))
        other._digests = None if self._digests is None else [self._digests[shard] for shard in order]
        return other

    def files(self) -> list[str]:
        """Return the paths of the shards."""
        return list(self._paths)

    def _path(self, index: int) -> str:
        return self._paths[int(np.searchsorted(self._first, index, side="right")) - 1]

    def _key(self, index: int) -> str:
        return self._keys[self._key_start(index) : self._key_start(index + 1)].decode()

    def _key_start(self, index: int) -> int:
        """Return the place of a key in all of them; behind the last one it is the end."""
        return int(self._key_ends[index - 1]) if index else 0

    def _read(self, path: str, offsets: list[int], sizes: list[int]) -> list[bytes | None]:
        """Return the contents of a sample's members, None where there is none."""
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
