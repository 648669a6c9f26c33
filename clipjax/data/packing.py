"""Any source as shards: tars or ArrayRecord files of so many samples, written whole or not at all.

A manifest has a line for each finished shard, so that a second start goes on behind the last one.

Reading order: `pack`, `_samples_of` (the samples of a source), `_Output` (folder and manifest), `_write_shard`.
"""

import collections
import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass
from typing import Any

from clipjax.config import DataConfig
from clipjax.data.archives import is_archive, read_archive
from clipjax.data.array_records import count_records, write_array_records
from clipjax.data.block_reader import Read, read_block
from clipjax.data.digests import digest_files
from clipjax.data.packed_samples import PackedSample, from_sample, with_unique_keys, write_tar
from clipjax.data.sample import BadSample, Sample, Source, UnreadableData
from clipjax.data.sources import build_source, tar_paths
from clipjax.data.tar_samples import Limits, assemble
from clipjax.data.webdataset import TarSource, max_file_bytes
from clipjax.runtime.files import read_bounded, require_writable, sync_folder, write_atomic
from clipjax.runtime.storage import is_address, open_file

MANIFEST = "manifest.jsonl"
"""A line about the whole, and one for each finished shard."""

FORMATS = {"tar": ".tar", "array_record": ".array_record"}
"""Kinds of shards and the ends of their names."""

_BLOCK = 64
_AHEAD = 8
_MAX_MANIFEST_BYTES = 2**30
_OURS = re.compile(r"(\.partial-)?[0-9]{5,}\.(tar|array_record)|\.clipjax-index")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Item = PackedSample | BadSample


@dataclass(frozen=True)
class PackedShard:
    """A line of the manifest.

    Attributes:
        shard: name of the file.
        samples: in it.
        bytes: of it.
        digest: of all its bytes.
        first: number of its first sample in the source.
        read: samples of the source that it stands for.
        unusable: samples that were left out, by reason.
        renamed: samples that got another key.
    """

    shard: str
    samples: int
    bytes: int
    digest: str
    first: int
    read: int
    unusable: Mapping[str, int]
    renamed: int


def pack(
    spec: str,
    output: pathlib.Path,
    *,
    data: DataConfig,
    form: str = "tar",
    samples_per_shard: int = 10_000,
    progress: Callable[[int, int, int], None] = lambda done, of, samples: None,
) -> tuple[list[PackedShard], int]:
    """Write a source as shards.

    Args:
        spec: names the source; or compressed tars.
        output: folder of the shards.
        data: limits and columns.
        form: of the shards, one of `FORMATS`.
        samples_per_shard: of the source; those that are unusable are left out.
        progress: gets the new shards, how many there will be (0: not known), and the samples in those.

    Returns:
        The shards, and how many of them were there before.

    Raises:
        ValueError: the source cannot be used, the folder holds something else, or the disk is full.
        OSError: a file cannot be read.
    """
    limits = Limits(max_file_bytes(data.max_image_pixels), data.max_caption_bytes)
    archives = _archives(spec)
    source = None if archives else build_source(spec, data=data)
    files = archives or list(source.files() if source else [])
    _check_place(files, spec, output)
    about = {"source": _identity(source, archives), "format": form, "samples_per_shard": samples_per_shard}
    target = _Output(output, about)
    old, total = len(target.shards), 0 if source is None else -(-len(source) // samples_per_shard)
    old_samples = sum(shard.samples for shard in target.shards)
    samples = _samples_of(source, archives, limits, target.num_read)
    for number in itertools.count(len(target.shards)):
        first = next(samples, None)
        if first is None:
            break
        items = itertools.chain([first], itertools.islice(samples, samples_per_shard - 1))
        with _full_disk_told(output, len(target.shards)):
            target.add(_write_shard(output, f"{number:05d}{FORMATS[form]}", _Kept(items), target.num_read, limits))
        samples_now = sum(shard.samples for shard in target.shards)
        progress(len(target.shards) - old, max(0, total - old), samples_now - old_samples)
    if not any(shard.samples for shard in target.shards):
        raise ValueError(f"source {spec!r} has no usable sample: {describe_unusable(target.shards) or 'it is empty'}")
    return target.shards, old


def describe_unusable(shards: Sequence[PackedShard]) -> str:
    """Return in words how many samples were left out, by reason."""
    counts = sum((collections.Counter(shard.unusable) for shard in shards), collections.Counter())
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())


def _archives(spec: str) -> list[str]:
    """Return the compressed tars that a string names; none where it names something else.

    Raises:
        ValueError: some of the files are others.
    """
    if not any(part in spec.lower() for part in (".tar.gz", ".tgz")):
        return []
    paths = tar_paths(spec)
    if others := [path for path in paths if not is_archive(path)]:
        raise ValueError(f"source {spec!r}: {others[0]} is no .tar.gz or .tgz, as others are; name files of one kind")
    return paths


def _identity(source: Source | None, archives: Sequence[str]) -> str:
    """Return a text that changes with the contents of a source."""
    if source is not None:
        facts: list[Any] = [[shard.digest, shard.size] for shard in source.digests()]
    else:
        facts = [[file.size, file.version] for file in map(open_file, archives)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _check_place(files: Sequence[str], spec: str, output: pathlib.Path) -> None:
    """Refuse to write where the source lies.

    Raises:
        ValueError: a file of the source is in the output folder, or the output folder in a folder of the source.
    """
    place = output.resolve()
    for path in files:
        if not is_address(path) and place in pathlib.Path(path).resolve().parents:
            raise ValueError(f"--output={output} holds {path} of the source {spec!r}; write into another folder")
        if not is_address(path) and place == pathlib.Path(path).resolve():
            raise ValueError(f"--output={output} is a file of the source; name a folder")


class _Output:
    """The folder of shards, and its manifest.

    Raises:
        ValueError: it holds something else, or cannot be written to.

    Attributes:
        shards: that are finished.
    """

    def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]):
        self._path, self._about = folder / MANIFEST, dict(about)
        require_writable(folder, "--output")
        others = sorted(entry.name for entry in folder.iterdir() if not _OURS.fullmatch(entry.name))
        others = [name for name in others if name not in (MANIFEST, f"{MANIFEST}.tmp")]
        if others or (not self._path.exists() and any(folder.glob("[0-9]*"))):
            shown = others[0] if others else next(folder.glob("[0-9]*")).name
            raise ValueError(f"--output={folder} holds {shown!r}, which is of something else; name an empty folder")
        for left in folder.glob(".partial-*"):
            left.unlink()
        self.shards = self._read(folder)
        self._write()

    @property
    def num_read(self) -> int:
        """Samples of the source that the finished shards stand for."""
        return sum(shard.read for shard in self.shards)

    def _read(self, folder: pathlib.Path) -> list[PackedShard]:
        if not self._path.exists():
            return []
        lines = read_bounded(self._path, _MAX_MANIFEST_BYTES).splitlines()
        try:
            about = json.loads(lines[0]) if lines else None
        except (ValueError, RecursionError):
            about = None
        if about != self._about:
            raise ValueError(
                f"--output={folder} holds shards of another source, another --format or --samples_per_shard; name an "
                "empty folder, or give what they were made of to go on with them"
            )
        found: list[PackedShard] = []
        for line in lines[1:]:
            try:
                shard = PackedShard(**json.loads(line))
                size = (folder / shard.shard).stat().st_size
            except (ValueError, TypeError, OSError, RecursionError):
                break
            if size != shard.bytes or not shard.shard.startswith(f"{len(found):05d}."):
                break
            found.append(shard)
        return found

    def _write(self) -> None:
        lines = [json.dumps(each) for each in (self._about, *map(asdict, self.shards))]
        write_atomic(self._path, "\n".join(lines) + "\n", sync=True)

    def add(self, shard: PackedShard) -> None:
        """Note a finished shard."""
        self.shards.append(shard)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(shard)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _samples_of(source: Source | None, archives: Sequence[str], limits: Limits, start: int) -> Iterator[Item]:
    """Yield the samples of a source, or of archives, from a number on."""
    if source is None:
        streams = (read_archive(path, limits) for path in archives)
        return itertools.islice(itertools.chain.from_iterable(streams), start, None)
    return _read_source(source, start)


def _read_source(source: Source, start: int) -> Iterator[Item]:
    """Yield the samples of a source, read ahead in blocks."""
    described = _json_objects(source, start)
    blocks = iter(range(start, len(source), _BLOCK))
    with futures.ThreadPoolExecutor(4) as pool:
        waiting: collections.deque[futures.Future[Sequence[Read]]] = collections.deque()
        number = start
        while True:
            for first in itertools.islice(blocks, _AHEAD - len(waiting)):
                waiting.append(pool.submit(read_block, source, first, min(_BLOCK, len(source) - first)))
            if not waiting:
                return
            for sample in waiting.popleft().result():
                if isinstance(sample, UnreadableData):
                    raise sample
                metadata = next(described)
                yield sample if isinstance(sample, BadSample) else from_sample(sample, number, metadata)
                number += 1


def _json_objects(source: Source, start: int) -> Iterator[Mapping[str, Any]]:
    """Yield the JSON object of each sample of tars from a number on; of other sources, none."""
    if isinstance(source, TarSource):
        for shard, (_, count) in enumerate(source.shard_counts()):
            if start < count:
                for _, metadata in itertools.islice(source.metadata(shard, ()), start, None):
                    yield metadata
            start = max(0, start - count)
    while True:
        yield {}


class _Kept:
    """The usable samples of a shard, each once, and counts of all.

    Attributes:
        read: samples of the source so far.
        kept: samples that were written.
        renamed: samples that got another key.
        unusable: samples that were left out, by reason.
    """

    def __init__(self, items: Iterator[Item]):
        self._items, self._given = items, ""
        self.read = self.kept = self.renamed = 0
        self.unusable: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[PackedSample]:
        for sample in with_unique_keys(self._usable()):
            self.kept += 1
            self.renamed += sample.key != self._given
            yield sample

    def _usable(self) -> Iterator[PackedSample]:
        for item in self._items:
            self.read += 1
            if isinstance(item, BadSample):
                self.unusable[item.reason] += 1
            else:
                self._given = item.key
                yield item

    def records(self, limits: Limits) -> Iterator[Sample]:
        """Yield the samples as they are read from a tar; those that cannot be are unusable."""
        for sample in self:
            try:
                yield assemble(sample.key, sample.columns, limits)
            except BadSample as bad:
                self.kept -= 1
                self.unusable[bad.reason] += 1


def _write_shard(folder: pathlib.Path, name: str, items: _Kept, first: int, limits: Limits) -> PackedShard:
    """Write a shard under another name, and give it its own when it is whole.

    Raises:
        OSError: it cannot be written.
    """
    partial, path = folder / f".partial-{name}", folder / name
    try:
        if name.endswith(FORMATS["tar"]):
            write_tar(partial, items)
        else:
            _write_records(partial, items.records(limits))
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        [digest] = digest_files([str(partial)])
        partial.replace(path)
        sync_folder(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return PackedShard(
        shard=name,
        samples=items.kept,
        bytes=digest.size,
        digest=digest.digest,
        first=first,
        read=items.read,
        unusable=dict(sorted(items.unusable.items())),
        renamed=items.renamed,
    )


def _write_records(path: pathlib.Path, samples: Iterator[Sample]) -> None:
    """Write an ArrayRecord file.

    Raises:
        OSError: it cannot be written, with the disk's reason.
    """
    try:
        written = write_array_records(path, samples)
    except RuntimeError as error:  # the library's own, with the system's words in it
        code = next((code for code in _FULL if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code), str(path)) from error
    if count_records(str(path)) != written:
        raise OSError(errno.EIO, "not all records could be written", str(path))


@contextlib.contextmanager
def _full_disk_told(output: pathlib.Path, finished: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ValueError(
            f"--output={output}: nothing more can be written there ({error.strerror}); {finished} shards are finished "
            "and stay: free some space, and the same command goes on from there"
        ) from error
