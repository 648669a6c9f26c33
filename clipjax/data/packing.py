"""Any source as shards: tars or ArrayRecord files of so many samples, written whole or not at all.

A manifest has a line for each finished shard, so that a second start goes on behind the last one.

Reading order: `pack`, `_samples_of` (the samples of a source), `_write_shard`; `pack_output.py` has the folder.
"""

import collections
import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

from clipjax.config import DataConfig
from clipjax.data.archives import is_archive, read_archive
from clipjax.data.array_records import count_records, write_array_records
from clipjax.data.block_reader import Read, read_block
from clipjax.data.digests import digest_files
from clipjax.data.pack_manifest import FORMATS, PackedShard
from clipjax.data.pack_output import FULL, Output, check_store, open_output
from clipjax.data.packed_samples import PackedSample, from_sample, with_unique_keys, write_tar
from clipjax.data.sample import BadSample, Sample, Source, UnreadableData
from clipjax.data.sources import build_source, tar_paths
from clipjax.data.tar_samples import Limits, assemble
from clipjax.data.webdataset import TarSource, max_file_bytes
from clipjax.runtime.storage import is_address, open_file

_BLOCK = 64
_AHEAD = 8
Item = PackedSample | BadSample


def pack(
    spec: str,
    output: pathlib.Path | str,
    *,
    data: DataConfig,
    form: str = "tar",
    samples_per_shard: int = 10_000,
    progress: Callable[[int, int, int], None] = lambda done, of, samples: None,
) -> tuple[list[PackedShard], int]:
    """Write a source as shards.

    Args:
        spec: names the source; or compressed tars.
        output: folder of the shards, a path or an address of a store.
        data: limits and columns.
        form: of the shards, one of `FORMATS`.
        samples_per_shard: of the source; those that are unusable are left out.
        progress: gets the new shards, how many there will be (0: not known), and the samples in those.

    Returns:
        The shards, and how many of them were there before.

    Raises:
        ValueError: the source cannot be used, the folder holds something else, the disk is full, or the store takes no
            more.
        OSError: a file cannot be read.
    """
    if isinstance(output, str):
        check_store(output)
    limits = Limits(max_file_bytes(data.max_image_pixels), data.max_caption_bytes)
    archives = _archives(spec)
    source = None if archives else build_source(spec, data=data)
    files = archives or list(source.files() if source else [])
    _check_place(files, spec, output)
    about = {"source": _identity(source, archives), "format": form, "samples_per_shard": samples_per_shard}
    with open_output(output, about) as target:
        old, total = list(target.shards), 0 if source is None else -(-len(source) // samples_per_shard)
        samples = _samples_of(source, archives, limits, _num_read(old))
        while (first := next(samples, None)) is not None:
            items = _Kept(itertools.chain([first], itertools.islice(samples, samples_per_shard - 1)))
            _write_shard(target, f"{len(target.shards):05d}{FORMATS[form]}", items, limits)
            if new := target.finished[len(old) :]:
                progress(len(new), max(0, total - len(old)), sum(shard.samples for shard in new))
        target.finish()
        shards = target.finished
    if not any(shard.samples for shard in shards):
        raise ValueError(f"source {spec!r} has no usable sample: {describe_unusable(shards) or 'it is empty'}")
    return shards, len(old)


def _num_read(shards: Sequence[PackedShard]) -> int:
    """Return the number of samples of the source that shards stand for."""
    return sum(shard.read for shard in shards)


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


def _check_place(files: Sequence[str], spec: str, output: pathlib.Path | str) -> None:
    """Refuse to write where the source lies.

    Raises:
        ValueError: a file of the source is in the output folder, or the output folder is a file of the source.
    """
    place = output if isinstance(output, str) else output.resolve()
    for path in files:
        if is_address(path) != isinstance(place, str):
            continue
        file = path if isinstance(place, str) else pathlib.Path(path).resolve()
        is_inside = path.startswith(f"{place}/") if isinstance(place, str) else place in pathlib.Path(file).parents
        if is_inside:
            raise ValueError(f"--output={output} holds {path} of the source {spec!r}; write into another folder")
        if file == place:
            raise ValueError(f"--output={output} is a file of the source; name a folder")


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


def _write_shard(target: Output, name: str, items: _Kept, limits: Limits) -> None:
    """Write a shard under another name, and add it to the others when it is whole.

    Raises:
        OSError: it cannot be written.
        ValueError: the disk is full, or the store takes no more.
    """
    partial = target.folder / f".partial-{name}"
    try:
        if name.endswith(FORMATS["tar"]):
            write_tar(partial, items)
        else:
            _write_records(partial, items.records(limits))
        [digest] = digest_files([str(partial)])
        shard = PackedShard(
            shard=name,
            samples=items.kept,
            bytes=digest.size,
            digest=digest.digest,
            first=_num_read(target.shards),
            read=items.read,
            unusable=dict(sorted(items.unusable.items())),
            renamed=items.renamed,
        )
        target.add(shard, partial)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno in FULL:
            raise target.full_disk(error) from error
        raise


def _write_records(path: pathlib.Path, samples: Iterator[Sample]) -> None:
    """Write an ArrayRecord file.

    Raises:
        OSError: it cannot be written, with the disk's reason.
    """
    try:
        written = write_array_records(path, samples)
    except RuntimeError as error:  # the library's own, with the system's words in it
        code = next((code for code in FULL if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code), str(path)) from error
    if count_records(str(path)) != written:
        raise OSError(errno.EIO, "not all records could be written", str(path))
