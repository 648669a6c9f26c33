"""Tasks on videos: the frames that count, and the mean of their embeddings."""

import io

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Config, DataConfig, FeatureKind, TaskConfig, TaskKind
from clipjax.data.sample import BadSample
from clipjax.data.sources import build_source
from clipjax.data.tfds import choose_frames
from clipjax.evals.encoder import Encoder, unit_norm
from clipjax.evals.runner import build_tasks

pytestmark = pytest.mark.newest
LENGTHS = (1, 2, 3, 7, 8)
PROMPTS = {"classes": "cifar10", "templates": "photo"}


def png(value: int) -> io.BytesIO:
    stream = io.BytesIO()
    Image.new("RGB", (10, 8), (value,) * 3).save(stream, "PNG")
    return io.BytesIO(stream.getvalue())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> str:
    """A TFDS folder with videos of several lengths; frame f of video v has the colour 20 v + f."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = str(tmp_path_factory.mktemp("tfds"))

    class Clips(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "clips"

        def _info(self):
            features = {
                "video": tfds.features.Sequence(tfds.features.Image(shape=(8, 10, 3))),
                "poster": tfds.features.Image(shape=(8, 10, 3)),
                "label": np.int64,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for number, length in enumerate(LENGTHS):
                frames = [png(20 * number + frame) for frame in range(length)]
                yield number, {"video": frames, "poster": png(0), "label": number}

    tfds.disable_progress_bar()
    Clips(data_dir=folder, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
    )
    return folder


def colours(sample) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in sample.frames]


def opened(folder: str, frames: int | None, feature: str = "video"):
    return build_source("tfds:clips/test", data=DataConfig(tfds_dir=folder, tfds_image_key=feature), frames=frames)


def test_frames_are_the_middles_of_equal_parts(prepared):
    expected = {
        1: {1: [0], 2: [1], 3: [1], 7: [3], 8: [4]},
        2: {1: [0, 0], 2: [0, 1], 3: [0, 2], 7: [1, 5], 8: [2, 6]},
        4: {1: [0] * 4, 2: [0, 0, 1, 1], 3: [0, 1, 1, 2], 7: [0, 2, 4, 6], 8: [1, 3, 5, 7]},
    }
    for count, by_length in expected.items():
        source = opened(prepared, count)
        for index in range(len(LENGTHS)):
            sample = source[index]
            frames = by_length[LENGTHS[sample.label]]
            assert colours(sample) == [20 * sample.label + frame for frame in frames]
            assert sample.image is sample.frames[0]
    with pytest.raises(BadSample, match="missing_image"):
        choose_frames([], 1)


def test_a_picture_is_no_video_and_a_video_no_picture(prepared):
    with pytest.raises(ValueError, match="feature 'poster' is no video, of which `frames` could be taken"):
        opened(prepared, 2, "poster")
    with pytest.raises(ValueError, match="feature 'video' is a video, of which a task reads `frames`"):
        opened(prepared, None)
    with pytest.raises(ValueError, match="frames=2: source 'a.tar' is no TFDS data"):
        build_source("a.tar", data=DataConfig(), frames=2)


def test_a_feature_that_needs_tensorflow_is_told(prepared, monkeypatch):
    import tensorflow_datasets as tfds

    def needs(directory):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds, "builder_from_directory", needs)
    with pytest.raises(ValueError, match=r"'tfds:clips/test': .* not installed .*; pip install tensorflow, or store"):
        opened(prepared, 2)


def test_fields_that_do_not_go_with_videos_are_refused(prepared):
    told = TaskConfig(source="a.tar", frames=2, **PROMPTS).errors("t")
    assert told == ["t.frames=2: videos are read from TFDS data alone; leave it out"]
    probe = {"kind": TaskKind.LINEAR_PROBE, "source": "tfds:a/b", "train_source": "tfds:a/c"}
    told = TaskConfig(**probe, features=FeatureKind.PIXELS, frames=2).errors("t")
    assert told == ["t.features=pixels: of frames=2 only embeddings have a mean; take others"]
    config = task_config(prepared)
    config.loss.contrastive_weight = 0.0
    with pytest.raises(ValueError, match="frames have a mean of embeddings"):
        build_tasks(config)


def task_config(folder: str) -> Config:
    config = Config()
    config.data.tfds_dir = folder
    config.model.image.image_size = 8
    config.eval.batch_size = 2
    task = TaskConfig(source="tfds:clips/test", image_field="video", frames=2, **PROMPTS)
    assert not task.errors("t")
    config.eval.tasks = {"t": task}
    return config


class Colours(Encoder):
    """The embedding of a picture turns with its colour; that of class c is what the mean of video c's frames gives."""

    def __init__(self) -> None:
        pass

    def embed_images(self, image):
        if image.ndim == 5:
            return super().embed_images(image)
        angle = image[:, 4, 4, 0].astype(np.float64) / 60
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    def embed_texts(self, texts):
        rows = []
        for number in range(10):
            length = LENGTHS[number] if number < len(LENGTHS) else 1
            angles = [(20 * number + (2 * part + 1) * length // 4) / 60 for part in range(2)]
            rows.append(unit_norm(np.mean([[np.cos(a), np.sin(a)] for a in angles], axis=0)))
        return np.repeat(np.stack(rows), len(texts) // 10, axis=0)

    def gather(self, rows):
        return rows

    @property
    def has_embeddings(self):
        return True


def test_the_embedding_of_a_video_is_the_mean_of_its_frames(prepared):
    task = build_tasks(task_config(prepared))["t"]
    task.check_samples()
    (batch, *_) = list(task._batches(task.sources[0]))
    assert batch["image"].shape == (2, 2, 8, 8, 3)
    metrics, _ = task(Colours())
    assert (metrics["top1"], metrics["num_examples"], metrics["num_skipped"]) == (1.0, 5.0, 0.0)
    image = np.zeros((1, 2, 8, 8, 3), np.uint8)
    image[0, 1] = 60  # angles 0 and 1: the mean points to 0.5
    np.testing.assert_allclose(Colours().embed_images(image), [[np.cos(0.5), np.sin(0.5)]], atol=1e-6)
