"""Sources by a config string: tars, TFDS, Parquet, tables, folders, ArrayRecord; and arrays in memory.

Reading order: `build_source`, `ArraySource`, `recording_sources`.
"""

import dataclasses
import glob
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.config import DataConfig
from clipjax.config.data import TFDS_PREFIX
from clipjax.config.paths import READABLE, expand
from clipjax.data.array_records import RECORD_CAPTIONS, ArrayRecordSource
from clipjax.data.caption_fields import require_fields, tell_absent, to_weights
from clipjax.data.digests import ShardDigest, digest_samples
from clipjax.data.filter_results import filter_source
from clipjax.data.filters import unfiltered
from clipjax.data.folders import FOLDER_PREFIX, FolderSource, holds_images
from clipjax.data.mixture import MixedSource
from clipjax.data.parquet import ParquetSource
from clipjax.data.sample import BadSample as BadSample  # sources raise it
from clipjax.data.sample import Sample, Source, clean_captions
from clipjax.data.store_copies import keep_array_records, look_up, make_cache, require_cache
from clipjax.data.tables import TableSource
from clipjax.data.tfds import TfdsSource, data_folder, find_files
from clipjax.data.webdataset import TarSource
from clipjax.runtime import objects
from clipjax.runtime.kept_files import Wanted, describe_lack
from clipjax.runtime.storage import is_address

_KINDS = {
    "parquet": r"\.(parquet|parq|pq)",
    "table": r"\.(csv|tsv|jsonl)",
    "array_record": r"\.array_?record(-\d+-of-\d+)?",
    "archive": r"\.(tar\.gz|tgz)",
    "compressed": r"\.(tbz2?|txz|tzst|zip|7z|rar|gz|bz2|xz|zst|lz4)",
    "arrow": r"\.(arrow|feather)",
    "tfrecord": r"\.tfrecords?(-\d+-of-\d+)?",
    "json": r"\.(json|ndjson)",
}
"""Kinds of files by the end of their names; all others are tars."""

_REMEDIES = {
    "archive": "a compressed tar has no random access; pack it first: clipjax data pack SOURCE --output=DIR",
    "compressed": "a compressed archive has no random access; decompress it",
    "arrow": "Arrow files are not read; write the data as Parquet (Dataset.to_parquet)",
    "tfrecord": "TFRecord has no random access; prepare the data by TFDS with file_format='array_record', or as tars",
    "json": "a table in JSON has one object per line and is called .jsonl",
}


class ArraySource:
    """Samples in memory.

    Args:
        images: encoded images or pixels uint8 [h, w, 3], one per sample; or one array uint8 [n, h, w, 3].
        captions: a caption, or a sequence of captions, per sample.
        labels: a class per sample.
        max_caption_bytes: limit of a caption; longer ones make a sample bad.

    Raises:
        ValueError: the lengths differ, or an array is not uint8 [h, w, 3].
    """

    def __init__(
        self,
        images: Sequence[bytes | np.ndarray] | np.ndarray,
        captions: Sequence[str | Sequence[str]],
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        max_caption_bytes: int = DataConfig().max_caption_bytes,
    ):
        lengths = {"images": len(images), "captions": len(captions)}
        if labels is not None:
            lengths["labels"] = len(labels)
        if len(set(lengths.values())) != 1:
            raise ValueError(f"images, captions and labels must have one length, not {lengths}")
        for i, image in enumerate(images):
            if isinstance(image, np.ndarray) and not (
                image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3 and image.size
            ):
                raise ValueError(f"images[{i}] must be uint8 [h, w, 3], not {image.dtype} {list(image.shape)}")
        self._images = images
        self._captions = captions
        self._labels = labels
        self._max_caption_bytes = max_caption_bytes

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        captions = self._captions[index]
        captions = (captions,) if isinstance(captions, str) else captions
        return Sample(
            image=self._images[index],
            captions=clean_captions(captions, max_bytes=self._max_caption_bytes),
            label=-1 if self._labels is None else int(self._labels[index]),
            key=str(index),
        )

    def location(self, index: int) -> str:
        """Return the position in the arrays."""
        return f"array, index {index}"

    def digests(self) -> list[ShardDigest]:
        """Return one digest of all samples."""
        return [digest_samples(self, "array", 0, len(self))]

    def files(self) -> list[str]:
        """Return no path: the samples are in memory."""
        return []


def build_source(
    spec: str,
    *,
    data: DataConfig,
    label_key: str = "label",
    captions: Mapping[str, float] | None = None,
    frames: int | None = None,
) -> Source:
    """Build the source that a config string names.

    Args:
        spec: `tfds:NAME/SPLIT`, `folder:DIR` or the path of a folder of images, or of one of tars; or a path, glob or
            brace pattern of files of one kind: tars (`a.tar`, `dir/*.tar`, `gs://b/cc3m/{00000..00331}.tar`,
            `{gs://b/*.tar,/c/d.tar}`), `.parquet`, `.csv`, `.tsv`, `.jsonl` or `.array_record`. Files are in the order
            of the pattern, those of one glob sorted.
        data: limits, columns, the folder of images that tables name, and the folder of TFDS data.
        label_key: TFDS feature, or column, of the class number.
        captions: weights of the fields of captions that training reads; none: plain captions.
        frames: number of frames of each video; None: it is of pictures.

    Raises:
        ValueError: the string or its data cannot be used; the text names the remedy.
    """
    if not spec:
        raise ValueError("data source '' is empty; give tfds:NAME/SPLIT or a pattern of .tar files (data.train)")
    if spec.startswith(TFDS_PREFIX):
        return _tfds_source(spec, data, label_key=label_key, captions=captions, frames=frames)
    if frames is not None:
        raise ValueError(f"frames={frames}: source {spec!r} is no TFDS data, and videos are read from there alone")
    limits: dict[str, Any] = {"max_caption_bytes": data.max_caption_bytes, "max_image_pixels": data.max_image_pixels}
    if (folder := image_folder(spec)) is not None:
        source = FolderSource(folder, image_root=data.image_root, **limits)
        require_fields(to_weights(captions), source.caption_fields(), folder)
        return source
    paths = _expand(spec)
    columns: dict[str, Any] = {
        "image_field": data.image_field,
        "caption_field": data.caption_field,
        "label_key": label_key,
        "captions": captions,
    }
    match _file_kind(spec, paths):
        case "parquet":
            return ParquetSource(paths, **columns, **limits, cache=make_cache(data))
        case "table":
            return TableSource(paths, **columns, image_root=data.image_root, **limits)
        case "array_record":
            require_fields(to_weights(captions), [RECORD_CAPTIONS], f"source {spec!r}")
            local, kept = keep_array_records(paths, data, spec)
            return ArrayRecordSource(local, **limits, places=paths, kept=kept)
    source = TarSource(paths, **limits, captions=captions, cache=make_cache(data))
    if captions:
        tell_absent(to_weights(captions), source, spec)
    return source


def _tfds_source(spec: str, data: DataConfig, **options: Any) -> TfdsSource:
    """Return the source of TFDS data; `options` are those that only its task or training knows."""
    name, split = _parse_tfds(spec)
    in_store = data.tfds_dir is not None and is_address(data.tfds_dir)
    return TfdsSource(
        name,
        split,
        data_dir=data.tfds_dir,
        image_key=data.tfds_image_key,
        caption_key=data.tfds_caption_key,
        max_caption_bytes=data.max_caption_bytes,
        cache=require_cache(data, spec) if in_store else None,
        **options,
    )


def _parse_tfds(spec: str) -> tuple[str, str]:
    """Return name and split of a string of TFDS data."""
    name, slash, split = spec.removeprefix(TFDS_PREFIX).rpartition("/")
    if not (slash and name and split):
        raise ValueError(f"source {spec!r} must be tfds:NAME/SPLIT, for example tfds:scenes/train")
    return name, split


def check_copies(sources: Sequence[tuple[str, DataConfig]]) -> None:
    """Refuse several sources whose files have to be copied, and do not fit, before the first file is.

    Args:
        sources: strings that name them, and how each is read: the folder of TFDS data, and the cache, which is the same
            for all. `build_source` checks one that is alone.

    Raises:
        ValueError: there is no cache, it is too small for all of them together, or a source cannot be used.
        OSError: a store does not tell of a source.
    """
    places = {(spec, data.tfds_dir): data for spec, data in sources if _is_copied_first(spec, data)}
    if len(places) < 2:
        return
    specs = [spec for spec, _ in places]
    cache = require_cache(next(iter(places.values())), specs[0])
    copied = {each for (spec, _), data in places.items() for each in _find_copied(spec, data)}
    total = sum(each.listed.size for each in copied)
    if total > cache.max_bytes:
        raise ValueError(describe_lack(cache.max_bytes, total, total - cache.max_bytes, f"{', '.join(specs)} together"))


def _is_copied_first(spec: str, data: DataConfig) -> bool:
    if spec.startswith(TFDS_PREFIX):
        return data.tfds_dir is not None and is_address(data.tfds_dir)
    return "://" in spec and re.search(r"\.array_?record\b", spec.lower()) is not None


def _find_copied(spec: str, data: DataConfig) -> list[Wanted]:
    if spec.startswith(TFDS_PREFIX):
        return list(find_files(*_parse_tfds(spec), data.tfds_dir or "").values())
    return look_up([path for path in _expand(spec) if is_address(path)])


def image_folder(spec: str) -> str | None:
    """Return the folder that a config string names, None if it names files."""
    if spec.startswith(FOLDER_PREFIX):
        return expand(spec, "source", schemes=READABLE).removeprefix(FOLDER_PREFIX).rstrip("/") or "/"
    folder = expand(spec, "source", schemes=READABLE)
    if is_address(folder):
        return None
    return folder if os.path.isdir(folder) and holds_images(folder) else None  # noqa: PTH112  long patterns too


def _file_kind(spec: str, paths: Sequence[str]) -> str:
    """Return the kind of the files that a pattern names.

    Raises:
        ValueError: they are of several kinds, or of one that is not read.
    """
    kinds: dict[str, str] = {}
    for path in paths:
        kinds.setdefault(_kind_of(path), path)
    for kind, path in kinds.items():
        if kind in _REMEDIES:
            raise ValueError(f"source {spec!r}: {path}: {_REMEDIES[kind]}")
    if len(kinds) > 1:
        raise ValueError(
            f"source {spec!r}: {' and '.join(kinds.values())} are of different kinds; one pattern names files of one"
        )
    return next(iter(kinds))


def _kind_of(path: str) -> str:
    return next((kind for kind, ending in _KINDS.items() if re.search(f"{ending}$", path.lower())), "tar")


def tar_paths(spec: str) -> list[str]:
    """Return the tars of a source in their order.

    Raises:
        ValueError: it is no source of tars, or there are none.
    """
    if spec.startswith(TFDS_PREFIX):
        raise ValueError(f"source {spec!r} is prepared TFDS data, which has an index; give a path or pattern of tars")
    return _expand(spec)


def _expand(spec: str) -> list[str]:
    """Return the files of a path, an address, a glob or brace pattern, each once."""
    from braceexpand import braceexpand

    expanded = expand(spec, "source", schemes=READABLE)
    patterns = [expanded] if os.path.exists(expanded) else braceexpand(expanded)  # noqa: PTH110  long patterns too
    paths: list[str] = []
    missing: list[str] = []
    for pattern in patterns:
        expand(pattern, "source", schemes=READABLE)  # braces can put an address together, as in {a,b}c://d
        found = _find_files(pattern)
        paths += found
        missing += [] if found else [pattern]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"source {spec!r}: {len(missing)} of the paths or patterns match no file: {shown}; check the path "
            "(relative ones start at the working directory), or write tfds:NAME/SPLIT for TFDS data"
        )
    return list(dict.fromkeys(file for path in paths for file in _files_of(path, spec)))


def _files_of(path: str, spec: str) -> list[str]:
    """Return the file of a path, or the tars of a folder that plainly holds tars.

    Raises:
        ValueError: it is another folder.
    """
    if is_address(path) or not pathlib.Path(path).is_dir():
        return [path]
    found = sorted(each for each in pathlib.Path(path).iterdir() if not each.name.startswith("."))
    tars = [each for each in found if each.name.lower().endswith(".tar")]
    names = {each.stem for each in tars}
    # img2dataset writes 00000.parquet and 00000_stats.json, without pictures, beside 00000.tar.
    others = {each.suffix for each in found if each.stem not in names and _kind_of(each.name) != "tar"}
    others.discard(".json")  # counts and lists, no pairs
    if tars and not others and not any(each.is_dir() for each in found):
        return [str(each) for each in tars]
    patterns = " or ".join(f"{path.rstrip('/')}/*{ending}" for ending in sorted({".tar", *others}))
    raise ValueError(f"source {spec!r}: {path} is a directory; write {patterns}")


def build_training_source(data: DataConfig) -> Source:
    """Build the source of the training pairs that filters keep: `data.train`, or the parts of `data.mixture` by name.

    Raises:
        ValueError: one of them cannot be used; the text names it.
    """
    if not data.mixture:
        source = build_source(data.train, data=data, captions=data.captions)
        return filter_source(source, data, data.train)
    parts = {}
    for name, part in sorted(data.mixture.items()):
        options = dataclasses.replace(
            data,
            tfds_image_key=part.image_field or data.tfds_image_key,
            tfds_caption_key=part.caption_field or data.tfds_caption_key,
            image_field=part.image_field or data.image_field,
            caption_field=part.caption_field or data.caption_field,
            filters=data.filters if part.filters is None else part.filters,
        )
        try:
            source = build_source(part.source, data=options, captions=part.captions or data.captions)
            parts[name] = filter_source(source, options, part.source)
        except ValueError as error:
            raise ValueError(f"data.mixture.{name}: {error}") from error
    return MixedSource(parts)


def _find_files(pattern: str) -> list[str]:
    """Return the files of a path, an address or a glob; that of an address without a glob is opened later."""
    if is_address(pattern):
        return objects.list_files(pattern) if objects.is_pattern(pattern) else [pattern]
    path = pathlib.Path(pattern)
    return [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207


def recording_sources(sources: dict[str, Source]) -> Callable[..., Source]:
    """Return a `build_source` that records the sources that it opens in a dict.

    What one string names is recorded again, with a number, where it is read otherwise.
    """
    read: dict[str, list[DataConfig]] = {}

    def open_source(spec: str, *, data: DataConfig, **options: Any) -> Source:
        known = read.setdefault(spec, [])
        if data not in known:
            known.append(data)
        number = known.index(data)
        name = f"{spec} ({number + 1})" if number else spec
        sources[name] = build_source(spec, data=data, **options)
        return sources[name]

    return open_source


def data_folders(sources: Mapping[str, Source], tfds_dirs: Collection[str | None]) -> list[pathlib.Path]:
    """Return the folders that hold the files of open sources, also where those are links, and that of TFDS; no stores.

    Args:
        sources: by the string that names them in the config.
        tfds_dirs: of the config and its tasks.
    """
    opened = [unfiltered(source) for source in sources.values()]
    listed = [source for source in opened if isinstance(source, TableSource | FolderSource)]
    files = [path for source in opened if source not in listed for path in source.files()]
    paths = [pathlib.Path(path) for path in files if not is_address(path)]
    folders = {pathlib.Path(folder) for source in listed for folder in source.folders() if not is_address(folder)}
    folders |= {path.parent for path in paths} | {path.resolve().parent for path in paths if path.is_symlink()}
    if any(spec.startswith(TFDS_PREFIX) for spec in sources):
        folders |= {pathlib.Path(data_folder(folder)) for folder in tfds_dirs if not is_address(folder or "")}
    return sorted(folders)
