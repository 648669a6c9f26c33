"""The TFDS data set `scenes`: importing this module makes `tfds.builder("scenes", data_dir=...)` work.

Unlike the rest of the folder it imports TFDS, which needs no TensorFlow here because the files are ArrayRecord.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from clipjax.data.scenes.drawing import draw, encode
from clipjax.data.scenes.language import CAPTIONS_PER_SCENE, write_captions
from clipjax.data.scenes.world import SPLITS, class_id, sample_scene, sample_stream

IMAGE_SIZE = 72


@dataclasses.dataclass
class ScenesConfig(tfds.core.BuilderConfig):
    """Seed and number of pictures per split. Sample `i` of a split depends on the seed, the split and `i` alone.

    With `outlines` the same scenes are drawn in another style, which shows no textures; captions and labels stay.
    """

    seed: int = 0
    outlines: bool = False
    train_examples: int = 30_000
    val_examples: int = 2_000
    unseen_examples: int = 1_000


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Captioned pictures of one or two coloured shapes; see `clipjax.data.scenes`.

    Features: `image` (JPEG, 72 x 72 x 3), `captions` (5 texts), `label` (index into `language.CLASS_NAMES`, -1 for
    pictures of two items), `id`. Splits: `train`, `val`, and `unseen` with the held-out combinations.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        ScenesConfig(name="default", description="Enough to train a small model from scratch."),
        ScenesConfig(name="large", description="For batches of 32,768.", train_examples=40_000),
        ScenesConfig(name="tiny", description="For tests.", train_examples=512, val_examples=128, unseen_examples=64),
        ScenesConfig(
            name="outlines",
            description="The scenes of `default` drawn as outlines: a shift of the style alone.",
            outlines=True,
            train_examples=3_000,
        ),
    ]

    def __init__(self, *, file_format: str | None = "array_record", **kwargs: Any):
        """Take TFDS's own arguments; the default format is the one that can be read in any order."""
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Captioned pictures of one or two coloured shapes, drawn by a seeded program.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="jpeg"),
                    "captions": tfds.features.Sequence(tfds.features.Text(), length=CAPTIONS_PER_SCENE),
                    "label": np.int64,
                    "id": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,  # samples are independent already, and so record i is sample i
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        config = self.builder_config
        assert isinstance(config, ScenesConfig)
        counts = (config.train_examples, config.val_examples, config.unseen_examples)
        return {
            split: self._generate_examples(config, split, count) for split, count in zip(SPLITS, counts, strict=True)
        }

    def _generate_examples(self, config: ScenesConfig, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(count):
            rng = sample_stream(config.seed, split, index)
            scene = sample_scene(rng, split)
            yield (
                index,
                {
                    "image": encode(draw(scene, IMAGE_SIZE, outlines=config.outlines)),
                    "captions": write_captions(scene, rng),
                    "label": class_id(scene),
                    "id": f"{split}-{index:06d}",
                },
            )


def build_scenes(data_dir: str | pathlib.Path, config: str = "default") -> tfds.core.DatasetBuilder:
    """Return the builder of SCENES, after drawing the pictures into `data_dir` if they are not there yet.

    It uses neither the network nor TensorFlow. An interrupted call leaves nothing that a later one would take for the
    data; two processes must not prepare the same folder at once.

    Args:
        data_dir: TFDS data folder; the data lies in `scenes/CONFIG/VERSION` under it.
        config: name of one of `Scenes.BUILDER_CONFIGS`.

    Raises:
        ValueError: there is no such config.
    """
    names = [known.name for known in Scenes.BUILDER_CONFIGS]
    if config not in names:
        raise ValueError(f"config={config!r} must be one of the configs of SCENES: {', '.join(names)}")
    tfds.display_progress_bar(sys.stderr.isatty())
    builder = Scenes(data_dir=os.fspath(data_dir), config=config)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download of unknown size; there is none
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return builder
