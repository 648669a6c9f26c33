"""Result of the filters for one shard: judged once, kept beside the shard's index, and shared as that is.

Whoever judges a shard holds a lock on its result, so that the processes of a run each take a shard that nobody holds.
The result for a shard in an object store lies beside its index there, too, for the other machines.

Reading order: `Filters`, `ShardResult`, `find_result`, `judge_shard`, `_judge` (the samples).
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from clipjax.config import DataConfig
from clipjax.config.filters import Condition, parse_condition
from clipjax.data.index_store import index_places, locked, make_folder, shared_place
from clipjax.data.kept_format import ShardBits
from clipjax.data.key_lists import DROP_KEYS, KEEP_KEYS, KeyList
from clipjax.data.metadata import Described, DescribedSource
from clipjax.data.sample import UnreadableData
from clipjax.data.tar_format import DamagedTar
from clipjax.runtime import objects
from clipjax.runtime.files import read_bounded, write_atomic
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import is_address, open_file
from clipjax.runtime.terminal import printable

_MAGIC = b"clipjaxF"
_FIXED = struct.Struct("<8sI16s")
"""Magic, bytes of the JSON, and digest of all that follows."""

_FORMAT = 1
_MAX_RESULT_BYTES = 2**30
_CLOCK_TICK_NS = 20_000_000


@dataclass(frozen=True)
class Filters:
    """Everything that a sample has to pass, in this order: lists of keys, then conditions.

    Attributes:
        conditions: on the metadata.
        keep: keys that are kept; None: all.
        drop: keys that are dropped; None: no one.
        choice: text of the other options that matter.
    """

    conditions: tuple[Condition, ...]
    keep: KeyList | None
    drop: KeyList | None
    choice: str

    @property
    def names(self) -> list[str]:
        """Names of the conditions, for counts."""
        lists = [KEEP_KEYS] * (self.keep is not None) + [DROP_KEYS] * (self.drop is not None)
        return lists + [condition.text for condition in self.conditions]

    @property
    def fingerprint(self) -> str:
        """Hash of everything on which the result for one shard depends besides the shard."""
        lists = [None if each is None else each.digest for each in (self.keep, self.drop)]
        texts = [condition.text for condition in self.conditions]
        return hashlib.sha256(json.dumps([_FORMAT, texts, lists, self.choice]).encode()).hexdigest()[:32]

    def load_lists(self) -> None:
        """Read the lists of keys.

        Raises:
            ValueError: one of them cannot be used.
        """
        for each in (self.keep, self.drop):
            if each is not None:
                each.load()


def make_filters(data: DataConfig) -> Filters:
    """Return everything that a sample has to pass.

    Raises:
        ValueError: a condition is none, or a list of keys cannot be read.
    """
    return Filters(
        tuple(map(parse_condition, data.filters)),
        KeyList(KEEP_KEYS, data.keep_keys) if data.keep_keys else None,
        KeyList(DROP_KEYS, data.drop_keys) if data.drop_keys else None,
        json.dumps([data.image_field, data.caption_field]),
    )


@dataclass(frozen=True)
class ShardResult:
    """Kept samples of one shard.

    Attributes:
        shard: the kept samples.
        dropped: number of samples that each filter was the first to drop.
        version: size and version of the shard; None for what is no file.
    """

    shard: ShardBits
    dropped: tuple[int, ...]
    version: Listed | None = None


def find_result(path: str, version: Listed | None, count: int, filters: Filters) -> ShardResult | None:
    """Return the result of an earlier start, or that of another machine; None if there is none.

    Args:
        path: of the shard.
        version: of the shard; None for what is no file, or may change without another version.
        count: number of its samples.
        filters: to pass.
    """
    if version is None:
        return None
    for place in result_places(path, filters):
        if (found := _read(place, version, count, filters)) is not None:
            return found
    return _fetch(path, version, count, filters)


def judge_shard(
    source: DescribedSource, number: int, path: str, count: int, filters: Filters, *, may_wait: bool = True
) -> ShardResult | None:
    """Return the result for a shard: that of an earlier start, or a new one, which is kept for later ones.

    Args:
        source: of the shard.
        number: of the shard in it.
        path: of the shard.
        count: number of its samples.
        filters: to pass.
        may_wait: wait for another process that judges the shard.

    Returns:
        The result; None if another process judges the shard and `may_wait` is False.

    Raises:
        UnreadableData: it cannot be read.
    """
    try:
        if not path:
            return _judge(source.metadata(number, _columns(filters)), path, count, filters)
        file, is_new = open_file(path), is_fresh(path)
        version, result = Listed(file.size, file.version), None
        for place in result_places(path, filters):
            with contextlib.ExitStack() as stack:
                try:
                    make_folder(place.parent)
                    stack.enter_context(locked(f"{place}.lock", may_wait=may_wait))
                except BlockingIOError:
                    if result is None:
                        return None
                    continue
                except OSError:
                    continue
                found = _read(place, version, count, filters) or _fetch(path, version, count, filters)
                if found is not None:  # another process, or another machine, has judged it meanwhile
                    return found
                result = result or _judge(source.metadata(number, _columns(filters)), path, count, filters, version)
                if is_new:
                    return result
                content = pack_result(result, filters)
                if is_address(path):
                    _share(path, content, filters)
                try:
                    write_atomic(place, content)
                except OSError:  # the disk may be full
                    continue
                return result
        return result or _judge(source.metadata(number, _columns(filters)), path, count, filters, version)
    except (OSError, DamagedTar) as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception | str) -> UnreadableData:
    """Return the error of a shard that cannot be judged."""
    return UnreadableData(f"shard {printable(path)} cannot be read for its filters: {error}; look at its disk")


def _columns(filters: Filters) -> list[str]:
    return list(dict.fromkeys(name for condition in filters.conditions for name in condition.columns))


def _judge(
    described: Iterator[Described], path: str, count: int, filters: Filters, version: Listed | None = None
) -> ShardResult:
    keys: list[str] = []
    failed = np.full(count, len(filters.conditions), np.int64)  # the first condition that a sample does not meet
    for row, (key, metadata) in enumerate(described):
        if row >= count:
            break
        keys.append(key)
        for number, condition in enumerate(filters.conditions):
            if not condition.is_met(metadata):
                failed[row] = number
                break
    if len(keys) != count:
        raise UnreadableData(f"shard {printable(path)} has {len(keys)} samples instead of {count}; look at its disk")
    is_kept, dropped = np.ones(count, np.bool_), []
    lists = [(filters.keep, True), (filters.drop, False)]
    for is_wanted in [each.contains(path, keys) == wanted for each, wanted in lists if each is not None]:
        dropped.append(int((is_kept & ~is_wanted).sum()))
        is_kept &= is_wanted
    by_condition = collections.Counter(failed[is_kept].tolist())
    dropped += [by_condition[number] for number in range(len(filters.conditions))]
    is_kept &= failed == len(filters.conditions)
    return ShardResult(ShardBits.of_flags(is_kept), tuple(dropped), version)


def result_places(path: str, filters: Filters) -> list[pathlib.Path]:
    """Return where the result for a shard may lie on this machine: beside its index."""
    return [pathlib.Path(_beside(place, filters)) for place in index_places(path)]


def _beside(index: str, filters: Filters) -> str:
    return f"{index.removesuffix('.idx')}.{filters.fingerprint}.kept"


def _fetch(path: str, version: Listed, count: int, filters: Filters) -> ShardResult | None:
    """Return the result that lies beside a shard in its store, if it is that of the shard as it is now."""
    if not is_address(path):
        return None
    try:
        content = objects.read_bytes(_beside(shared_place(path), filters), _MAX_RESULT_BYTES)
    except (OSError, ValueError):
        return None
    result = unpack_result(content, count, filters)
    if result is None or result.version != version:
        return None
    with contextlib.suppress(OSError):
        (place,) = result_places(path, filters)
        make_folder(place.parent)
        write_atomic(place, content)
    return result


def _share(path: str, content: bytes, filters: Filters) -> None:
    """Write the result beside the shard in its store, for the other machines; some stores take nothing."""
    with contextlib.suppress(OSError):
        objects.write_bytes(_beside(shared_place(path), filters), content)


def is_fresh(path: str) -> bool:
    """Return True for a file that may change once more without another time."""
    return not is_address(path) and abs(time.time_ns() - os.stat(path).st_mtime_ns) < _CLOCK_TICK_NS  # noqa: PTH116


def pack_result(result: ShardResult, filters: Filters) -> bytes:
    """Return the file of a result.

    Args:
        result: for what is a file.
        filters: by which it was judged.
    """
    assert result.version is not None
    about = {
        "fingerprint": filters.fingerprint,
        "size": result.version.size,
        "version": result.version.version,
        "count": result.shard.count,
        "dropped": result.dropped,
    }
    body = json.dumps(about).encode()
    digest = xxhash.xxh3_128_digest(body + result.shard.bits)
    return _FIXED.pack(_MAGIC, len(body), digest) + body + result.shard.bits


def unpack_result(content: bytes, count: int, filters: Filters) -> ShardResult | None:
    """Return the result in a file; None if it is damaged, or of other filters or another number of samples."""
    try:
        magic, length, digest = _FIXED.unpack_from(content)
        body, bits = content[_FIXED.size : _FIXED.size + length], content[_FIXED.size + length :]
        if (magic, digest) != (_MAGIC, xxhash.xxh3_128_digest(body + bits)):
            return None
        about = json.loads(body)
        version = Listed(about["size"], about["version"])
        if (about["fingerprint"], about["count"]) != (filters.fingerprint, count):
            return None
        result = ShardResult(ShardBits(count, bits), tuple(about["dropped"]), version)
        last = np.unpackbits(np.frombuffer(bits[-1:], np.uint8))
        is_whole = len(bits) == -(-count // 8) and not last[count % 8 or 8 :].any()
        are_counts = all(type(each) is int and each >= 0 for each in result.dropped)
        fits = len(result.dropped) == len(filters.names) and sum(result.dropped) + result.shard.kept == count
        return result if is_whole and are_counts and fits else None
    except (ValueError, LookupError, TypeError, struct.error, RecursionError):
        return None


def _read(place: pathlib.Path, version: Listed, count: int, filters: Filters) -> ShardResult | None:
    """Return the result in a file; None if it is not there, is damaged, or of another content of the shard."""
    try:
        result = unpack_result(read_bounded(place, _MAX_RESULT_BYTES), count, filters)
    except (OSError, ValueError):
        return None
    return result if result is not None and result.version == version else None
