"""Data and evaluation, and what their fields choose from."""

import enum
from dataclasses import dataclass, field


class Crop(enum.Enum):
    """Training crop: `random_resized` (area share from `min_crop_area` to 1) or `center` (as in evaluation)."""

    RANDOM_RESIZED = "random_resized"
    CENTER = "center"


class Resize(enum.Enum):
    """How evaluation makes a picture square: the `shorter_side` fits and the centre is cut out, or both sides fit."""

    SHORTER_SIDE = "shorter_side"
    SQUASH = "squash"


class Interpolation(enum.Enum):
    """Filter of resizing; always antialiased."""

    BICUBIC = "bicubic"
    BILINEAR = "bilinear"


class TaskKind(enum.Enum):
    """What an evaluation task measures."""

    ZERO_SHOT = "zero_shot"
    RETRIEVAL = "retrieval"
    IMAGE_RETRIEVAL = "image_retrieval"


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where pairs come from and how they become arrays.

    A source is one string: `tfds:NAME/SPLIT`, or a path, glob or brace pattern of WebDataset tars.
    A tokenizer is one string: `bytes`, `clip:PATH`, `sentencepiece:PATH` or `huggingface:PATH`.
    """

    train: str = ""
    tfds_dir: str | None = None  # where prepared TFDS data lies; None is TFDS's own default
    tfds_image_key: str = "image"
    tfds_caption_key: str = "captions"
    tokenizer: str = "bytes"
    crop: Crop = Crop.RANDOM_RESIZED
    min_crop_area: float = 0.9  # share of the image's area
    resize: Resize = Resize.SHORTER_SIDE  # in evaluation, and in training with crop=center
    interpolation: Interpolation = Interpolation.BICUBIC
    mean: tuple[float, float, float] = CLIP_MEAN  # of pixels in 0..1, subtracted on the device
    std: tuple[float, float, float] = CLIP_STD
    num_workers: int = 0  # worker processes per training process; 0 decodes in threads of the training process
    num_threads: int = 2  # reading and decoding threads per worker
    prefetch_batches: int = 2
    max_bad_fraction: float = 0.05  # of the samples read; above it the run stops
    max_image_pixels: int = 25_000_000  # refused from the header
    max_caption_bytes: int = 65_536


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
    max_examples: int | None = None


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation in the loop and at its end."""

    every_examples: int | None = None  # None: only after the last step
    batch_size: int = 256  # images or texts per forward pass, over all devices
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
