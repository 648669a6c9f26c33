"""Data and evaluation, and what their fields choose from."""

import enum
from dataclasses import dataclass, field

from clipjax.config.ranges import FINITE, FRACTION, NOT_NEGATIVE, POSITIVE, bounded


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


class TaskKind(enum.Enum):
    """Measurement of an evaluation task."""

    ZERO_SHOT = "zero_shot"
    RETRIEVAL = "retrieval"
    IMAGE_RETRIEVAL = "image_retrieval"


_SOURCE_RULE = "must name a source: tfds:NAME/SPLIT, or a path, glob or brace pattern of tars"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(kw_only=True, slots=True)
class MixtureSource:
    """One source of a mixture; `image_key` and `caption_key` stand in for `data.tfds_image_key` and so on."""

    source: str = ""
    weight: float = bounded(1.0, POSITIVE)  # share of the pairs, in proportion to the other weights
    image_key: str | None = None
    caption_key: str | None = None


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Sources of pairs, and the making of arrays from them.

    A source is one string: `tfds:NAME/SPLIT`, or a path, glob or brace pattern of WebDataset tars.
    A tokenizer is one string: `bytes`, `clip:PATH`, `sentencepiece:PATH` or `huggingface:PATH`.
    """

    train: str = ""
    mixture: dict[str, MixtureSource] = field(default_factory=dict)  # several sources, by any name, instead of `train`
    tfds_dir: str | None = None  # folder of prepared TFDS data; None: TFDS's own default
    tfds_image_key: str = "image"
    tfds_caption_key: str = "captions"
    tokenizer: str = "bytes"
    crop: Crop = Crop.RANDOM_RESIZED
    min_crop_area: float = bounded(0.9, FRACTION)  # share of the image's area
    resize: Resize = Resize.SHORTER_SIDE  # in evaluation, and in training with crop=center
    interpolation: Interpolation = Interpolation.BICUBIC
    mean: tuple[float, float, float] = bounded(CLIP_MEAN, FINITE)  # of pixels in 0..1, subtracted on the device
    std: tuple[float, float, float] = bounded(CLIP_STD, FINITE)
    num_workers: int = bounded(0, NOT_NEGATIVE)  # worker processes per training process; 0: threads of it decode
    num_threads: int = bounded(2, POSITIVE)  # reading and decoding threads per worker
    prefetch_batches: int = bounded(2, POSITIVE)
    order_block: int | None = bounded(None, POSITIVE)  # consecutive pairs that are shuffled as one; None: by the store
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

    def errors(self) -> list[str]:
        """Return what is wrong between the fields, a line each."""
        if not self.mixture:
            return [] if self.train else [f"data.train='' {_SOURCE_RULE}, or data.mixture several of them"]
        empty = [name for name, part in self.mixture.items() if not part.source]
        errors = [f"data.mixture.{name}.source='' {_SOURCE_RULE}" for name in empty]
        if self.train:
            errors.append(f"data.train={self.train!r} would be ignored beside data.mixture; leave one of them out")
        return errors


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """One evaluation task.

    `retrieval` finds captions for pictures and pictures for captions. `image_retrieval` finds, for the pictures of
    `source`, those of `gallery` with the same caption, for instance the same thing in another style, and the reverse.
    `zero_shot` needs `classes` and `templates`: a name in `clipjax/evals/prompts.py` or a JSON file with a list of
    strings. The class of a sample is its integer `label`; samples without one (-1) are left out.
    """

    kind: TaskKind = TaskKind.ZERO_SHOT
    source: str = ""
    classes: str | None = None
    templates: str | None = None
    gallery: str | None = None
    tfds_label_key: str = "label"
    max_examples: int | None = bounded(None, POSITIVE)

    def errors(self, path: str) -> list[str]:
        """Return what is wrong between the fields, a line each."""
        errors = [] if self.source else [f"{path}.source='' must name a source"]
        prompts = (self.classes, self.templates)
        if self.kind is TaskKind.ZERO_SHOT and None in prompts:
            errors.append(f"{path}: zero_shot needs classes and templates; got {prompts}")
        if self.kind is not TaskKind.ZERO_SHOT and prompts != (None, None):
            errors.append(f"{path}: {self.kind.value} would ignore classes and templates; leave both None")
        if (self.kind is TaskKind.IMAGE_RETRIEVAL) != (self.gallery is not None):
            errors.append(f"{path}.gallery={self.gallery!r}: image_retrieval needs a second source, others none")
        return errors


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation in the loop and at its end."""

    every_examples: int | None = bounded(None, POSITIVE)  # None: only after the last step
    batch_size: int = bounded(256, POSITIVE)  # images or texts per forward pass, over all devices
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
