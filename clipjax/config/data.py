"""Data, and what its fields choose from."""

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from clipjax.config.augment import AugmentConfig
from clipjax.config.filters import condition_errors
from clipjax.config.ranges import AT_LEAST_ONE, FINITE, FRACTION, NOT_NEGATIVE, POSITIVE, RANGES, Range, bounded


class Crop(enum.Enum):
    """Training crop: `random_resized` (area share from `min_crop_area` to 1) or `center` (as in evaluation)."""

    RANDOM_RESIZED = "random_resized"
    CENTER = "center"


class Resize(enum.Enum):
    """Squaring of pictures in evaluation: the `shorter_side` fits and the centre is cut out, or both sides fit."""

    SHORTER_SIDE = "shorter_side"
    SQUASH = "squash"


class Interpolation(enum.Enum):
    """Filter of resizing; always antialiased."""

    BICUBIC = "bicubic"
    BILINEAR = "bilinear"


class TextTruncation(enum.Enum):
    """Tokens of a text that is too long that training keeps, before its end token.

    `none` is no choice: the first ones, as in evaluation. `random` keeps a random subset in its order, `block` a random
    run (CLIPA, arXiv 2305.07017, section 3).
    """

    NONE = "none"
    RANDOM = "random"
    BLOCK = "block"


class ResizeOn(enum.Enum):
    """Place of the crop and the resizing of training pictures: `host`, or `device` inside the training step."""

    HOST = "host"
    DEVICE = "device"


class OnUnreadable(enum.Enum):
    """Answer to a training sample that its storage does not give, after retries: `stop` the run, or `skip` the sample.

    Another sample of its source stands in for one that is skipped, at this place of the order in every later start.
    """

    STOP = "stop"
    SKIP = "skip"


TFDS_PREFIX = "tfds:"
"""Of a string that names TFDS data: `tfds:NAME/SPLIT`."""

_SOURCE_RULE = "must name a source: tfds:NAME/SPLIT, or a path, glob or brace pattern of tars"

CAPTIONS = Range("must be 1 or 2", lambda value: value in (1, 2))

BLOCK = Range("must be greater than 0 and at most 4096", lambda value: 0 < value <= 4096)

COLOUR = Range("must lie between 0 and 255", lambda value: 0 <= value <= 255)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(kw_only=True, slots=True)
class MixtureSource:
    """One source of a mixture; fields that it sets stand in for those of `data`, `*_field` also for the TFDS keys."""

    source: str = ""
    weight: float = bounded(1.0, POSITIVE)  # share of the pairs, in proportion to the other weights
    image_field: str | None = None
    caption_field: str | None = None
    captions: dict[str, float] = field(default_factory=dict, metadata={RANGES: (POSITIVE,)})
    filters: tuple[str, ...] | None = None  # None: those of `data`; (): none


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Sources of pairs, and the making of arrays from them.

    A source is one string: `tfds:NAME/SPLIT`, `folder:DIR`, or a path, glob or brace pattern of files of one kind:
    WebDataset tars, Parquet, tables of paths (`.csv`, `.tsv`, `.jsonl`) or ArrayRecord.
    A tokenizer is one string: `bytes`, `clip:PATH`, `sentencepiece:PATH` or `huggingface:PATH`.
    """

    train: str = ""
    mixture: dict[str, MixtureSource] = field(default_factory=dict)  # several sources, by any name, instead of `train`
    # Folder of prepared TFDS data, which may lie in a store if there is a cache_dir; None: TFDS's own default.
    tfds_dir: str | None = None
    tfds_image_key: str = "image"
    tfds_caption_key: str = "captions"
    image_field: str | None = None  # column of Parquet and tables; None: the first of a usual name
    caption_field: str | None = None
    image_root: str | None = None  # folder of the images that tables name, besides the table's own
    # In training: weights of the fields of which one gives the caption at each sight. For tars `txt` or a name in the
    # JSON (`outer/inner` in objects), else a column or feature; empty: the one field that the fields above name.
    captions: dict[str, float] = field(default_factory=dict, metadata={RANGES: (POSITIVE,)})
    captions_per_image: int = bounded(1, CAPTIONS)  # in training; 2: the loss is the mean over both
    text_truncation: TextTruncation = TextTruncation.NONE  # in training, of texts beyond model.text.context_length
    filters: tuple[str, ...] = ()  # conditions that training pairs must meet, as "width>=200": config/filters.py
    keep_keys: str | None = None  # text file of keys, KEY or SHARD/KEY a line: train on no other samples
    drop_keys: str | None = None  # text file of keys: do not train on these
    tokenizer: str = "bytes"
    crop: Crop = Crop.RANDOM_RESIZED
    min_crop_area: float = bounded(0.9, FRACTION)  # share of the image's area
    resize: Resize = Resize.SHORTER_SIDE  # in evaluation, and in training with crop=center
    interpolation: Interpolation = Interpolation.BICUBIC
    # In training, large JPEGs are decoded at half of their sides or less, which leaves each crop at least this many
    # times model.image.image_size; None: always whole.
    decode_margin: float | None = bounded(None, AT_LEAST_ONE)
    resize_on: ResizeOn = ResizeOn.HOST
    canvas_size: int = bounded(384, POSITIVE)  # side of what resize_on=device sends; larger parts are reduced before
    # With model.image.max_patches (variable aspect): patches per image, of which the seed draws one for each step;
    # (): max_patches in all steps.
    patch_menu: tuple[int, ...] = bounded((), POSITIVE)
    images_per_row: int = bounded(1, POSITIVE)  # neighbours in the batch that share the patches of their row
    enlarge: bool = True  # pictures fill their budget (SigLIP 2); False: none gets more patches than it has pixels for
    background: tuple[int, int, int] | None = bounded(None, COLOUR)  # red, green, blue behind alpha; None: drop alpha
    exif_orientation: bool = False  # turn pictures as their EXIF data says, which CLIP's reference ignores
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mean: tuple[float, float, float] = bounded(CLIP_MEAN, FINITE)  # of pixels in 0..1, subtracted on the device
    std: tuple[float, float, float] = bounded(CLIP_STD, FINITE)
    num_workers: int = bounded(0, NOT_NEGATIVE)  # worker processes per training process; 0: threads of it decode
    num_threads: int = bounded(2, POSITIVE)  # reading and decoding threads per worker
    prefetch_batches: int = bounded(2, POSITIVE)
    # Folder on a disk of each machine for copies of files that are read from stores: of tars and Parquet made as they
    # are read, as far as they fit; of ArrayRecord and TFDS data made at the start, all of them.
    cache_dir: str | None = None
    cache_gib: float = bounded(100.0, POSITIVE)  # of all copies together
    order_block: int | None = bounded(None, BLOCK)  # consecutive pairs that are shuffled as one; None: by the store
    on_unreadable: OnUnreadable = OnUnreadable.STOP  # what a sample leads to that its storage does not give
    max_bad_fraction: float = bounded(0.05, FRACTION)  # of the samples read; above it the run stops
    max_image_pixels: int = bounded(25_000_000, POSITIVE)  # refused from the header
    max_caption_bytes: int = bounded(65_536, POSITIVE)

    @property
    def num_sources(self) -> int:
        """Number of the sources of training pairs."""
        return max(1, len(self.mixture))

    @property
    def shown_train(self) -> str:
        """Field and value of the training pairs, for messages."""
        parts = ", ".join(f"{name}: {part.source}" for name, part in sorted(self.mixture.items()))
        return f"data.mixture={{{parts}}}" if parts else f"data.train={self.train!r}"

    def cache_errors(
        self, sources: Sequence[str], prefix: str = "data.", *, tfds_dirs: Sequence[str] = ()
    ) -> list[str]:
        """Return what is wrong with the choice of a cache for sources, a line each.

        Args:
            sources: strings that name them.
            prefix: of a field's name in a message.
            tfds_dirs: folders of TFDS data that some of them have for themselves.
        """
        if self.cache_dir is None:
            default = type(self)().cache_gib
            ignored = (
                f"{prefix}cache_gib={self.cache_gib} would be ignored without {prefix}cache_dir; set that, or leave it "
                "out"
            )
            return [ignored] if self.cache_gib != default else []
        if any(map(self._is_cached, sources)) or any("://" in folder for folder in tfds_dirs):
            return []
        small = (
            " (the images that tables and folders name are small files, of which no copies are kept; `clipjax data "
            "pack` makes tars)"
        )
        return [
            f"{prefix}cache_dir={self.cache_dir!r} would be ignored: no source is tars, Parquet, ArrayRecord or TFDS "
            f"data in a store{small if any('://' in source for source in sources) else ''}; leave it out"
        ]

    def _is_cached(self, source: str) -> bool:
        if source.startswith(TFDS_PREFIX):
            return "://" in (self.tfds_dir or "")
        is_table = re.search(r"\.(csv|tsv|jsonl)\b", source.lower()) is not None
        return "://" in source and not source.startswith("folder:") and not is_table

    def source_errors(self) -> list[str]:
        """Return what is wrong with the choice of sources, a line each."""
        if not self.mixture:
            return [] if self.train else [f"data.train='' {_SOURCE_RULE}, or data.mixture several of them"]
        empty = [name for name, part in self.mixture.items() if not part.source]
        errors = [f"data.mixture.{name}.source='' {_SOURCE_RULE}" for name in empty]
        if self.train:
            errors.append(f"data.train={self.train!r} would be ignored beside data.mixture; leave one of them out")
        for name, part in self.mixture.items():
            if not reads_fields(part.source):
                for choice in ("image_field", "caption_field"):
                    if (value := getattr(part, choice)) is not None:
                        errors.append(
                            f"data.mixture.{name}.{choice}={value!r} would be ignored: {part.source!r} is neither TFDS "
                            "data nor Parquet nor a table; leave it out"
                        )
            if part.captions and part.caption_field is not None:
                errors.append(
                    f"data.mixture.{name}.caption_field={part.caption_field!r} would be ignored beside "
                    f"data.mixture.{name}.captions; leave one of them out"
                )
        return errors

    def errors(self, path: str) -> list[str]:
        """Return what is wrong between the fields, a line each."""
        errors = self.augment.errors(f"{path}.augment") + condition_errors(self.filters, f"{path}.filters")
        for name, part in self.mixture.items():
            errors += condition_errors(part.filters or (), f"{path}.mixture.{name}.filters")
        if self.filters and self.mixture and all(part.filters is not None for part in self.mixture.values()):
            errors.append(f"{path}.filters={self.filters} would be ignored: each part of data.mixture has its own")
        captions = {path: self.captions}
        captions |= {f"{path}.mixture.{name}": part.captions for name, part in self.mixture.items()}
        for place, fields in captions.items():
            if any(not name.strip("/") for name in fields):
                errors.append(f"{place}.captions={fields} has a field without a name; name each, as in {{'txt': 1.0}}")
        if self.background is not None and len(self.background) != 3:
            errors.append(f"{path}.background={self.background} must have three numbers, for red, green and blue")
        return errors


def unused_columns(
    data: DataConfig, sources: Sequence[str], prefix: str, *, plain: Sequence[str] | None = None
) -> list[str]:
    """Return the choices of columns and folders that no source reads, a line each.

    Args:
        data: with the choices.
        sources: strings that name them.
        prefix: of a field's name in a message.
        plain: those of them whose captions `captions` does not name; None: all.
    """
    errors = []
    for name in ("image_field", "caption_field"):
        value = getattr(data, name)
        if value is None:
            continue
        if not any(map(_reads_columns, sources)):
            errors.append(
                f"{prefix}{name}={value!r} would be ignored: no source is Parquet or a table (.csv, .tsv, .jsonl); "
                "leave it out (TFDS has data.tfds_image_key and data.tfds_caption_key)"
            )
        elif name == "caption_field" and plain is not None and not any(map(_reads_columns, plain)):
            errors.append(
                f"{prefix}{name}={value!r} would be ignored: {prefix}captions names the columns of the training pairs, "
                "and no task reads any; leave one of them out"
            )
    if data.image_root is not None and not any(_reads_image_files(source, data.image_root) for source in sources):
        errors.append(
            f"{prefix}image_root={data.image_root!r} would be ignored: no source is a table of paths, or a folder with "
            "links to it on the same disk; leave it out"
        )
    return errors


def reads_fields(source: str) -> bool:
    """Return True for a source of which fields have names: features of TFDS data, or columns."""
    return source.startswith(TFDS_PREFIX) or _reads_columns(source)


def _reads_columns(source: str) -> bool:
    return re.search(r"\.(parquet|parq|pq|csv|tsv|jsonl)\b", source.lower()) is not None


def _reads_image_files(source: str, image_root: str) -> bool:
    """Return True for tables of paths, and for folders on a disk with links; their names may be any."""
    if source.startswith(TFDS_PREFIX) or (source.startswith("folder:") and "://" in source + image_root):
        return False
    return re.search(r"\.(tar|parquet|parq|pq|array_?record)\b", source.lower()) is None
