"""Evaluation: the tasks of a run, and when they are done."""

import enum
from dataclasses import dataclass, field, replace

from clipjax.config.data import TFDS_PREFIX, DataConfig, reads_fields
from clipjax.config.ranges import POSITIVE, bounded


class TaskKind(enum.Enum):
    """Measurement of an evaluation task."""

    ZERO_SHOT = "zero_shot"
    RETRIEVAL = "retrieval"
    IMAGE_RETRIEVAL = "image_retrieval"


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """One evaluation task.

    `retrieval` finds captions for pictures and pictures for captions. `image_retrieval` finds, for the pictures of
    `source`, those of `gallery` with the same caption, for instance the same thing in another style, and the reverse.
    `zero_shot` needs `classes` and `templates`: a name in `clipjax/evals/prompts.py` or a JSON file with a list of
    strings. The class of a sample is its integer `label`; samples without one (-1) are left out.

    `compare_prompts` also measures the class names alone and one template. `paraphrases` tells how much the right
    class's probability depends on its words: `templates`, or a JSON file with a list of texts for class names.

    `image_field` and `caption_field` name features of TFDS data and columns of Parquet and tables, and `tfds_dir` the
    folder of TFDS data, for this task alone; None: as `data` says.
    """

    kind: TaskKind = TaskKind.ZERO_SHOT
    source: str = ""
    classes: str | None = None
    templates: str | None = None
    compare_prompts: bool = False
    paraphrases: str | None = None
    gallery: str | None = None
    image_field: str | None = None
    caption_field: str | None = None
    tfds_dir: str | None = None
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
        for name in ("compare_prompts", "paraphrases"):
            if (value := getattr(self, name)) and self.kind is not TaskKind.ZERO_SHOT:
                errors.append(f"{path}.{name}={value!r}: {self.kind.value} would ignore it; leave it out")
        if (self.kind is TaskKind.IMAGE_RETRIEVAL) != (self.gallery is not None):
            errors.append(f"{path}.gallery={self.gallery!r}: image_retrieval needs a second source, others none")
        for name in ("image_field", "caption_field"):
            if (value := getattr(self, name)) is not None and not any(map(reads_fields, self.sources)):
                errors.append(
                    f"{path}.{name}={value!r} would be ignored: {self.source!r} is neither TFDS data nor Parquet nor a "
                    "table; leave it out"
                )
        if self.tfds_dir is not None and not any(source.startswith(TFDS_PREFIX) for source in self.sources):
            errors.append(f"{path}.tfds_dir={self.tfds_dir!r} would be ignored: no source is TFDS data; leave it out")
        return errors

    @property
    def sources(self) -> list[str]:
        """The strings that name its sources."""
        return [source for source in (self.source, self.gallery) if source]

    def reads(self, data: DataConfig) -> DataConfig:
        """Return how its sources are read: as `data` says, but for the fields that it names itself."""
        return replace(
            data,
            tfds_dir=self.tfds_dir or data.tfds_dir,
            tfds_image_key=self.image_field or data.tfds_image_key,
            tfds_caption_key=self.caption_field or data.tfds_caption_key,
            image_field=self.image_field or data.image_field,
            caption_field=self.caption_field or data.caption_field,
        )


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation in the loop and at its end."""

    every_examples: int | None = bounded(None, POSITIVE)  # None: only after the last step
    batch_size: int = bounded(256, POSITIVE)  # images or texts per forward pass, over all devices
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
