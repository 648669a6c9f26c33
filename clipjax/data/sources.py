"""Where pairs come from: one random-access `Source` over arrays, prepared TFDS data or WebDataset tars.

Reading order: `Sample`, `Source` and `BadSample` are the contract; `build_source` turns a config string into one.
Everything that a source reads is untrusted: what cannot be used raises `BadSample` with one of `REASONS`, and nothing
is ever unpickled, extracted to disk or fetched from a network.
"""

import glob
import os
import pathlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clipjax.config import DataConfig

REASONS = (
    "missing_image",
    "missing_caption",
    "corrupt_image",
    "image_too_large",
    "empty_caption",
    "caption_not_utf8",
    "caption_too_long",
    "bad_metadata",
    "corrupt_record",
    "duplicate_key",
    "truncated_tar",
)
"""Why a sample was skipped. Append only: counters in checkpoints refer to these names."""

_TFDS_PREFIX = "tfds:"


class BadSample(ValueError):
    """A sample that cannot be used. `reason` is one of `REASONS`."""

    def __init__(self, reason: str):
        assert reason in REASONS, reason
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its captions.

    Attributes:
        image: an encoded JPEG, PNG or WebP, or pixels uint8 [h, w, 3].
        captions: stripped and not empty; no caption at all is `()`, which evaluation by label allows.
        label: class of the image, or -1.
        key: what the data calls this sample.
    """

    image: bytes | np.ndarray
    captions: tuple[str, ...]
    label: int = -1
    key: str = ""


class Source(Protocol):
    """Random access to samples.

    It is pickled to worker processes and read from several threads at once, so it opens files lazily and holds no
    position.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Reads one sample. Raises `BadSample` if it cannot be used."""
        ...

    def where(self, index: int) -> str:
        """Where a sample lies, for error messages: "shard train-00001.tar, key 000000123"."""
        ...


def clean_caption(raw: bytes | str, *, max_bytes: int) -> str:
    """Checks and strips one caption of at most `max_bytes` bytes of UTF-8.

    Raises:
        BadSample: `caption_too_long`, `caption_not_utf8` or `empty_caption`.
    """
    if len(raw) > max_bytes:
        raise BadSample("caption_too_long")
    try:
        # A str can hold lone surrogates (from JSON escapes), which no tokenizer can encode.
        encoded = raw.encode("utf-8") if isinstance(raw, str) else raw
        text = encoded.decode("utf-8-sig").strip()
    except UnicodeError:
        raise BadSample("caption_not_utf8") from None
    if len(encoded) > max_bytes:
        raise BadSample("caption_too_long")
    if not text:
        raise BadSample("empty_caption")
    return text


def is_label(value: Any) -> bool:
    """Whether a value is a class number that fits int32."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= int(value) < 2**31


class ArraySource:
    """Samples in memory.

    Args:
        images: encoded images or pixels uint8 [h, w, 3], one per sample; or one array uint8 [n, h, w, 3].
        captions: a caption, or a sequence of captions, per sample.
        labels: a class per sample.
        max_caption_bytes: longer captions make a sample bad.

    Raises:
        ValueError: if the lengths differ, or an array is not uint8 [h, w, 3].
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
            captions=tuple(clean_caption(caption, max_bytes=self._max_caption_bytes) for caption in captions),
            label=-1 if self._labels is None else int(self._labels[index]),
            key=str(index),
        )

    def where(self, index: int) -> str:
        """Names the position in the arrays."""
        return f"array, index {index}"


class TfdsSource:
    """A split of a dataset that TFDS has prepared as ArrayRecord; TensorFlow is not needed.

    Args:
        name: `NAME`, `NAME/CONFIG`, and `:VERSION` after either; the newest prepared version otherwise.
        split: a split, or a slice of one: `train`, `train[:50%]`.
        data_dir: where prepared data lies; None is TFDS's own default.
        image_key: feature of the image: encoded, or a uint8 [h, w, 3] tensor. A nested feature is `outer/inner`.
        caption_key: feature with one or several texts; without it samples have no captions.
        label_key: feature with the class number; without it labels are -1.

    Raises:
        ValueError: if the data is not prepared, or in another format, or lacks the split or the features.
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
    ):
        self._split = split
        self._keys = (image_key, caption_key, label_key)
        self._max_caption_bytes = max_caption_bytes
        self._spec = f"{_TFDS_PREFIX}{name}/{split}"
        self._directory = _prepared_directory(name, data_dir)
        self._lock = threading.Lock()
        self._records = self._open()

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(self._directory)
        # The other format with random access, Parquet, silently loses rows in TFDS 4.9.10.
        if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
            raise ValueError(
                f"source {self._spec!r}: {self._directory} is in the format {builder.info.file_format.value}, which "
                "cannot be used; prepare it again with file_format='array_record'"
            )
        is_encoded = self._check_features(builder.info.features)
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

    def _check_features(self, features: Any) -> bool:
        """Checks that the features exist; returns whether the image is encoded."""
        import tensorflow_datasets as tfds

        image_key, caption_key, label_key = self._keys
        image = _nested(features, image_key)
        is_encoded = isinstance(image, tfds.features.Image)
        is_pixels = image is not None and image.np_dtype == np.uint8 and tuple(image.shape)[2:] == (3,)
        if not (is_encoded or is_pixels):
            raise ValueError(
                f"source {self._spec!r}: feature {image_key!r} is not an image; the features are {list(features)}; "
                "set data.tfds_image_key"
            )
        if _nested(features, caption_key) is None and _nested(features, label_key) is None:
            raise ValueError(
                f"source {self._spec!r}: there is neither a caption feature {caption_key!r} nor a label feature "
                f"{label_key!r}; the features are {list(features)}; set data.tfds_caption_key or the task's "
                "tfds_label_key"
            )
        return is_encoded

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_records")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _records=None)

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
        except Exception as error:  # ArrayRecord and protobuf raise several types on damaged bytes
            raise BadSample("corrupt_record") from error
        image, captions, label = (_nested(record, key) for key in self._keys)
        if captions is None:
            captions = ()
        elif isinstance(captions, (bytes, str)):
            captions = (captions,)
        return Sample(
            image=image,
            captions=tuple(clean_caption(caption, max_bytes=self._max_caption_bytes) for caption in captions),
            label=int(label) if is_label(label) else -1,
            key=str(index),
        )

    def where(self, index: int) -> str:
        """Names the split and the record in it."""
        return f"{self._spec}, record {index}"


def _nested(tree: Any, path: str) -> Any:
    """Value at `outer/inner` in nested mappings, or None."""
    for part in path.split("/"):
        if not hasattr(tree, "keys") or part not in list(tree.keys()):
            return None
        tree = tree[part]
    return tree


def _prepared_directory(name: str, data_dir: str | None) -> str:
    """Finds prepared data on disk. `tfds.builder` would also look for it in a bucket."""
    from tensorflow_datasets.core import DatasetNotFoundError, constants, read_only_builder

    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (DatasetNotFoundError, ValueError, ImportError) as error:
        remedy = "run `clipjax data scenes`" if name == "scenes" else "prepare it with file_format='array_record'"
        place = data_dir or constants.DATA_DIR
        raise ValueError(
            f"source '{_TFDS_PREFIX}{name}': no prepared data in {place} (data.tfds_dir); {remedy}, or name the "
            f"config or version that is there ({name}/CONFIG, {name}:1.0.0)"
        ) from error
    return os.fspath(builder.data_dir)


def build_source(spec: str, *, data: DataConfig, label_key: str = "label") -> Source:
    """Builds the source that a config string names.

    Args:
        spec: `tfds:NAME/SPLIT`, or a path, glob or brace pattern of tars: `a.tar`, `dir/*.tar`,
            `cc3m/{00000..00331}.tar`. Shards are in the order of the pattern, those of one glob sorted.
        data: limits, and where TFDS data lies.
        label_key: TFDS feature of the class number.

    Raises:
        ValueError: naming what is missing and the remedy.
    """
    if not spec:
        raise ValueError("data source '' is empty; give tfds:NAME/SPLIT or a pattern of .tar files (data.train)")
    if spec.startswith(_TFDS_PREFIX):
        name, slash, split = spec.removeprefix(_TFDS_PREFIX).rpartition("/")
        if not (slash and name and split):
            raise ValueError(f"source {spec!r} must be tfds:NAME/SPLIT, for example tfds:scenes/train")
        return TfdsSource(
            name,
            split,
            data_dir=data.tfds_dir,
            image_key=data.tfds_image_key,
            caption_key=data.tfds_caption_key,
            label_key=label_key,
            max_caption_bytes=data.max_caption_bytes,
        )
    from clipjax.data.webdataset import TarSource

    return TarSource(_expand(spec), max_caption_bytes=data.max_caption_bytes, max_image_pixels=data.max_image_pixels)


def _expand(spec: str) -> list[str]:
    """Files of a path, glob or brace pattern, each once."""
    from braceexpand import braceexpand

    literal = pathlib.Path(spec).expanduser()
    paths: list[str] = []
    missing: list[str] = []
    for pattern in [str(literal)] if literal.exists() else braceexpand(str(literal)):
        found = [pattern] if pathlib.Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        paths += found
        missing += [] if found else [pattern]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"source {spec!r}: {len(missing)} of the paths or patterns match no file: {shown}; check the path "
            "(relative ones start at the working directory), or write tfds:NAME/SPLIT for TFDS data"
        )
    if directories := [path for path in paths if pathlib.Path(path).is_dir()]:
        raise ValueError(f"source {spec!r}: {directories[0]} is a directory; write {directories[0]}/*.tar")
    return list(dict.fromkeys(paths))
