"""Datasets that TFDS has prepared as ArrayRecord, read without TensorFlow."""

import contextlib
import itertools
import os
import pathlib
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from clipjax.config.data import TFDS_PREFIX
from clipjax.data.array_records import require_readable
from clipjax.data.caption_fields import read_captions, require_fields, to_weights
from clipjax.data.digests import DIGEST_THREADS, ShardDigest, digest_samples
from clipjax.data.sample import BadSample, Sample, clean_captions, is_label, labels_of
from clipjax.data.store_copies import look_up
from clipjax.runtime import objects
from clipjax.runtime.file_cache import FileCache
from clipjax.runtime.kept_files import KeptFiles, Wanted, keep_files
from clipjax.runtime.storage import is_address

_MAX_METADATA_BYTES = 2**26  # of a file that describes a dataset
_RECORDS = re.compile(r"-\d+-of-\d+$")  # end of the names of files that hold samples


class TfdsSource:
    """A split of a dataset that TFDS has prepared as ArrayRecord; TensorFlow is not needed.

    Args:
        name: `NAME`, `NAME/CONFIG`, and `:VERSION` after either; the newest prepared version otherwise.
        split: a split, or a slice of one: `train`, `train[:50%]`.
        data_dir: folder of prepared data, or its address; None is TFDS's own default.
        image_key: feature of the image: encoded, or a uint8 [h, w, 3] tensor. A nested feature is `outer/inner`.
        caption_key: feature with one or several texts; without it samples have no captions.
        label_key: feature with the class number; without it labels are -1.
        max_caption_bytes: limit of a caption; longer ones make a sample bad.
        captions: weights of features of captions; none: `caption_key` is the one.
        cache: for copies of the split's files, which data in a store has to have.
        frames: number of frames of a video, from the middles of equal parts; None: the image feature is a picture.

    Raises:
        ValueError: the data is not prepared, or in another format, or lacks the split or the features; or it cannot be
            copied.
        OSError: the store does not tell of it.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        data_dir: str | None,
        image_key: str,
        caption_key: str,
        label_key: str,
        max_caption_bytes: int,
        captions: Mapping[str, float] | None = None,
        cache: FileCache | None = None,
        frames: int | None = None,
    ):
        self._split = split
        self._captions = to_weights(captions)
        self._keys = (image_key, caption_key, label_key)
        self._max_caption_bytes, self._frames = max_caption_bytes, frames
        self._spec = f"{TFDS_PREFIX}{name}/{split}"
        self._kept: KeptFiles | None = None
        if data_dir is not None and is_address(data_dir):
            assert cache is not None
            wanted = find_files(name, split, data_dir, check=self._check)
            self._kept = keep_files(cache, wanted, self._spec)
            data_dir = str(self._kept.folder)
        self._directory = _prepared_directory(name, data_dir)
        self._lock = threading.Lock()
        self._records = self._open()
        self._digests: list[ShardDigest] | None = None

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        builder: Any = _read_builder(self._directory, self._spec)
        is_encoded = self._check(builder, self._directory)
        # The image stays encoded: its header is checked before any pixel is decoded.
        decoders: Any = tfds.decode.SkipDecoding()
        for part in reversed(self._keys[0].split("/")):
            decoders = {part: decoders}
        try:
            return builder.as_data_source(
                split=self._split, decoders=decoders if is_encoded else None, file_format="array_record"
            )
        except (ValueError, KeyError) as error:
            splits = ", ".join(builder.info.splits)
            raise ValueError(f"source {self._spec!r}: the splits are {splits}; {error}") from error

    def _check(self, builder: Any, place: str) -> bool:
        """Check the format and the features of what lies at a place; return True if the image is encoded."""
        import tensorflow_datasets as tfds

        # The other format with random access, Parquet, silently loses rows in TFDS 4.9.10.
        if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
            raise ValueError(
                f"source {self._spec!r}: {place} is in the format {builder.info.file_format.value}, which "
                "cannot be used; prepare it again with file_format='array_record'"
            )
        return self._check_features(builder.info.features)

    def _check_features(self, features: Any) -> bool:
        """Check that the features exist; return True if the image is encoded."""
        import tensorflow_datasets as tfds

        image_key, caption_key, label_key = self._keys
        image: Any = _nested(features, image_key)
        # TFDS's own Video is such a sequence; it needs TensorFlow.
        is_video = isinstance(image, tfds.features.Sequence) and isinstance(image.feature, tfds.features.Image)
        if self._frames is not None and not is_video:
            raise ValueError(
                f"source {self._spec!r}: feature {image_key!r} is no video, of which `frames` could be taken; the "
                f"features are {list(features)}; name another, or leave frames out"
            )
        is_encoded = isinstance(image, tfds.features.Image)  # TFDS 4.9 cannot leave a sequence undecoded
        is_pixels = image is not None and image.np_dtype == np.uint8 and tuple(getattr(image, "shape", ()))[2:] == (3,)
        if not (is_encoded or is_pixels) and self._frames is None:
            what = "a video, of which a task reads `frames`" if is_video else "not an image"
            raise ValueError(
                f"source {self._spec!r}: feature {image_key!r} is {what}; the features are {list(features)}; "
                "set data.tfds_image_key"
            )
        if self._captions:
            require_fields(self._captions, sorted(_text_features(features)), f"source {self._spec!r}")
        elif _nested(features, caption_key) is None and _nested(features, label_key) is None:
            raise ValueError(
                f"source {self._spec!r}: there is neither a caption feature {caption_key!r} nor a label feature "
                f"{label_key!r}; the features are {list(features)}; set data.tfds_caption_key or the task's "
                "tfds_label_key"
            )
        return is_encoded

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_lock", "_records", "_kept")  # the process that opened the source keeps the copies for its workers
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # While TFDS is imported, other threads can import nothing from their own packages, as Pillow does when it needs
        # something for the first time: so it is imported before a worker has any.
        import tensorflow_datasets  # noqa: F401  # pyright: ignore[reportUnusedImport]

        self.__dict__.update(state, _lock=threading.Lock(), _records=None, _kept=None)

    def _data(self) -> Any:
        with self._lock:
            if self._records is None:
                self._records = self._open()
            return self._records

    def __len__(self) -> int:
        return len(self._data())

    def __getitem__(self, index: int) -> Sample:
        try:
            record = self._data()[index]
        except OSError:
            raise
        except Exception:  # ArrayRecord and protobuf raise several types on damaged bytes, and on storage that fails
            record = self._read_again(index)
        image, captions, label = (_nested(record, key) for key in self._keys)
        number, several = int(label) if is_label(label) else -1, labels_of(label)
        frames = () if self._frames is None else choose_frames(image, self._frames)
        image = frames[0] if frames else image
        most, fields = self._max_caption_bytes, ()
        if self._captions:
            captions, fields = read_captions(self._captions, lambda name: _nested(record, name), max_bytes=most)
        else:
            captions = (captions,) if isinstance(captions, (bytes, str)) else captions
            captions = clean_captions(() if captions is None else captions, max_bytes=most)
        return Sample(image, captions, number, str(index), fields, several, frames)

    def _read_again(self, index: int) -> Any:
        """Return a record that could not be read; a reader that its storage has failed gives nothing any more.

        Raises:
            BadSample: it is damaged.
            OSError: the storage fails.
        """
        for path in self.files():
            require_readable(path)
        try:
            records = self._open()
            record = records[index]
        except OSError:
            raise
        except Exception as error:
            raise BadSample("corrupt_record") from error
        with self._lock:
            self._records = records
        return record

    def location(self, index: int) -> str:
        """Return the split and the record in it."""
        return f"{self._spec}, record {index}"

    def class_names(self) -> tuple[str, ...] | None:
        """Return the data's own names of its labels, in their order, which can be numbers; None: it has none."""
        import tensorflow_datasets as tfds

        features: Any = _read_builder(self._directory, self._spec).info.features
        label = _nested(features, self._keys[2])
        label = label.feature if isinstance(label, tfds.features.Sequence) else label  # of an image with several
        return tuple(label.names) if isinstance(label, tfds.features.ClassLabel) and label.names else None

    def digests(self) -> list[ShardDigest]:
        """Return a digest of each file of the split, in order."""
        if self._digests is None:
            parts = self._file_parts()
            starts = itertools.accumulate((count for _, count in parts), initial=0)
            with futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
                jobs = [
                    pool.submit(digest_samples, self, os.path.basename(path), start, count)  # noqa: PTH119
                    for (path, count), start in zip(parts, starts, strict=False)
                ]
                self._digests = [job.result() for job in jobs]
        return self._digests

    def files(self) -> list[str]:
        """Return the files of the split."""
        return [path for path, _ in self._file_parts()]

    def _file_parts(self) -> list[tuple[str, int]]:
        """Return the files of the split, and how many samples of each belong to it."""
        builder: Any = _read_builder(self._directory, self._spec)
        parts = []
        for file in builder.info.splits[self._split].file_instructions:
            count = file.examples_in_shard - file.skip if file.take == -1 else file.take
            parts.append((os.fspath(file.filename), int(count)))
        if sum(count for _, count in parts) != len(self):
            raise ValueError(f"source {self._spec!r}: its files hold other samples than TFDS tells; prepare it again")
        return parts


def _read_builder(directory: str, spec: str) -> Any:
    """Return the builder of prepared data.

    Raises:
        ValueError: its features need TensorFlow, and it is not installed.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory)
    except ImportError as error:
        raise ValueError(
            f"source {spec!r}: TFDS reads a feature of it, such as a video, by a package that is not installed "
            f"({error}); pip install tensorflow, or store frames as a sequence of images"
        ) from error


def choose_frames(video: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, ...]:
    """Return frames from the middles of equal parts of a video; of one that is shorter some come again.

    Args:
        video: all its frames, uint8 [h, w, 3].
        count: how many are wanted.

    Raises:
        BadSample: `missing_image`, it has no frame.
    """
    if not len(video):
        raise BadSample("missing_image")
    chosen = (video[(2 * part + 1) * len(video) // (2 * count)] for part in range(count))
    return tuple(np.array(frame) for frame in chosen)  # copies: a part would keep the whole video


def _nested(tree: Any, path: str) -> Any:
    """Return the value at `outer/inner` in nested mappings, or None."""
    for part in path.split("/"):
        if not hasattr(tree, "keys") or part not in list(tree.keys()):
            return None
        tree = tree[part]
    return tree


def _text_features(features: Any, outer: str = "") -> Iterator[str]:
    """Yield the names of features with one text or several, `outer/inner` for those inside of others."""
    for name in list(features.keys()):
        feature = features[name]
        if hasattr(feature, "keys"):
            yield from _text_features(feature, f"{outer}{name}/")
        elif feature.np_dtype == np.object_ and len(feature.shape) <= 1:
            yield f"{outer}{name}"


def data_folder(data_dir: str | None) -> str:
    """Return the folder of all prepared data: the one given, or TFDS's own default."""
    from tensorflow_datasets.core import constants

    return data_dir or os.fspath(constants.DATA_DIR)


def is_prepared(name: str, data_dir: str | None) -> bool:
    """Return True if TFDS data lies there, in whatever format.

    Args:
        name: `NAME`, `NAME/CONFIG`, and `:VERSION` after either.
        data_dir: folder of all prepared data, or its address; None is TFDS's own default.

    Raises:
        OSError: a store does not tell of it.
    """
    try:
        if data_dir is not None and is_address(data_dir):
            find_files(name, "", data_dir)
        else:
            _prepared_directory(name, data_dir)
    except ValueError:
        return False
    return True


def find_files(
    name: str, split: str, data_dir: str, *, check: Callable[[Any, str], object] = lambda builder, place: None
) -> dict[str, Wanted]:
    """Return the files that a split of data in a store needs on a disk, by their path below the folder of all data.

    Args:
        name: `NAME`, `NAME/CONFIG`, and `:VERSION` after either; the newest prepared version otherwise.
        split: a split, or a slice of one; of one that is not there, no file that holds samples.
        data_dir: address of the folder.
        check: gets TFDS's builder and its address, before files are asked for.

    Raises:
        ValueError: there is no such data, or it is none that TFDS has prepared.
        OSError: the store does not tell of it.
    """

    base, top = data_dir.rstrip("/"), re.split("[/:]", name)[0]
    if ".." in name:
        raise ValueError(f"source '{TFDS_PREFIX}{name}': '..' is no part of a name of TFDS data in a store")
    with tempfile.TemporaryDirectory() as folder:
        _fetch_metadata(base, top, pathlib.Path(folder))
        directory = _prepared_directory(name, folder, shown=base)
        builder: Any = _read_builder(directory, f"{TFDS_PREFIX}{name}")
        inside = os.path.relpath(directory, folder)
        check(builder, f"{base}/{inside}")
        paths = [path for path in pathlib.Path(directory).rglob("*") if path.is_file()]
        names = [os.path.relpath(path, folder) for path in paths]
        with contextlib.suppress(ValueError, KeyError):  # without that split, whoever opens the data tells
            parts = builder.info.splits[split].file_instructions
            names += [f"{inside}/{os.path.basename(part.filename)}" for part in parts]  # noqa: PTH119
    names = list(dict.fromkeys(names))
    return dict(zip(names, look_up([f"{base}/{each}" for each in names]), strict=True))


def _fetch_metadata(base: str, top: str, folder: pathlib.Path) -> None:
    """Copy what describes a dataset, in all its configs and versions, without its samples.

    Raises:
        ValueError: a file of it is too large, or has a name that is no path.
        OSError: the store does not give it.
    """

    def fetch(path: str) -> None:
        target = folder / top / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(objects.read_bytes(f"{base}/{top}/{path}", _MAX_METADATA_BYTES))

    found = [path for path in objects.list_folder(f"{base}/{top}") if not _RECORDS.search(path)] if top else []
    for path in found:
        if {"", ".", ".."} & set(path.split("/")) or "\0" in path or "\\" in path:
            raise ValueError(f"{base}/{top}: the name {path!r} is no path of a file; delete that object")
    with futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
        list(pool.map(fetch, found))


def _prepared_directory(name: str, data_dir: str | None, *, shown: str | None = None) -> str:
    """Return the folder of prepared data on disk. `tfds.builder` would also look for it in a bucket.

    Args:
        name: of the data.
        data_dir: where it lies.
        shown: its place for messages; None: the same.

    Raises:
        ValueError: it is not there.
    """
    from tensorflow_datasets.core import DatasetNotFoundError, read_only_builder

    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (DatasetNotFoundError, ValueError, ImportError) as error:
        remedy = "run `clipjax data scenes`" if name == "scenes" else "prepare it with file_format='array_record'"
        raise ValueError(
            f"source '{TFDS_PREFIX}{name}': no prepared data in {shown or data_folder(data_dir)} (data.tfds_dir); "
            f"{remedy}, or name the config or version that is there ({name}/CONFIG, {name}:1.0.0)"
        ) from error
    return os.fspath(builder.data_dir)
