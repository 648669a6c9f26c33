"""Suites: every dataset on tiny data of its own layout, and what is told of what is missing or does not fit."""

import dataclasses
import io
import logging
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from clipjax.config import Config, TaskKind
from clipjax.data.sample import Sample
from clipjax.data.sources import ArraySource
from clipjax.evals import datasets, suites
from clipjax.evals.datasets.specs import Spec, specs
from clipjax.evals.relabelled import RelabelledSource
from clipjax.evals.runner import build_tasks
from clipjax.evals.suites import SUITES, plan_suite, suite_tasks
from clipjax.runtime import objects

NOWHERE = "/nonexistent"
IN_TFDS = [name for name, spec in specs().items() if spec.tfds and spec.classes and not name.startswith("scenes")]
ON_TARS = [spec for spec in specs().values() if spec.folders and not spec.left_out]


def write_tars(
    folder: pathlib.Path, spec: Spec, *, classes: list[str] | None = None, name: str | None = None, shards: int = 2
) -> pathlib.Path:
    """Write a dataset as CLIP_benchmark's `webdataset_builder` does, of a picture a shard; return its folder."""
    place = folder / (name or spec.folders[0])
    (place / "test").mkdir(parents=True)
    (place / "test" / "nshards.txt").write_text(f"{shards}\n")
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "WEBP", lossless=True)
    is_retrieval = spec.kind == "retrieval"
    for shard in range(shards):
        text = b"a dog\nthe dog\n" if is_retrieval else str((spec.classes or 1) - 1).encode()
        with tarfile.open(place / "test" / f"{shard}.tar", "w") as tar:
            for ending, content in (("webp", stream.getvalue()), ("txt" if is_retrieval else "cls", text)):
                member = tarfile.TarInfo(f"s{shard:07d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    if is_retrieval:
        (place / "dataset_type.txt").write_text("retrieval\n")
        return place
    if classes is None:
        own = datasets.prompts_of(spec.prompts).classes if spec.prompts else ()
        classes = list(own) or [f"thing {number}" for number in range(spec.classes or 1)]
    (place / "classnames.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    (place / "zeroshot_classification_templates.txt").write_text("a {c} of the folder.\n")
    return place


def suite_of(name: str) -> str:
    return next(suite for suite, known in SUITES.items() if name in known.names)


@pytest.mark.parametrize("spec", ON_TARS, ids=lambda spec: spec.name)
def test_each_dataset_is_read_from_tars_of_its_layout(spec, tmp_path):
    folder = write_tars(tmp_path, spec)
    plan = plan_suite(suite_of(spec.name), folder=str(tmp_path), tfds_dir=NOWHERE, only=[spec.name])
    assert not plan.missing and list(plan.tasks) == [spec.name]
    config, task = Config(), plan.tasks[spec.name]
    config.eval.tasks = plan.tasks
    assert not task.errors("task")
    built = build_tasks(config)[spec.name]
    assert len(built.sources[0]) == 2
    built.check_samples()
    if spec.kind == "retrieval":
        assert (task.kind, task.captions_by_line) == (TaskKind.RETRIEVAL, True)
        return
    assert built.sources[0][1].label == len(built.measure.names) - 1 == (spec.classes or 0) - 1
    lines = (folder / "classnames.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert list(built.measure.names) == [line.strip() for line in lines]


@pytest.mark.parametrize("name", sorted({*IN_TFDS, "coco"}))
def test_each_dataset_is_read_from_tfds_data_with_its_features(name, tmp_path, monkeypatch):
    spec = specs()[name]
    dataset, split = (spec.tfds or "").split("[")[0].rsplit("/", 1)
    whole = dataclasses.replace(spec, tfds=f"{dataset}/{split}")  # slices of some begin behind the one example here
    monkeypatch.setattr(suites, "specs", lambda: {**specs(), name: whole})
    acorn = 988  # the last class of both parts of ImageNet
    write_tfds(tmp_path, dataset, split, label=acorn if name in ("imagenet_a", "imagenet_r") else None)
    tasks = suite_tasks(suite_of(name), tfds_dir=str(tmp_path), only=[name], max_examples=1)
    assert (tasks[name].tfds_dir, tasks[name].max_examples) == (str(tmp_path), 1)
    config = Config()
    config.eval.tasks = tasks
    built = build_tasks(config)[name]
    built.check_samples()
    sample = built.sources[0][0]
    if name == "coco":
        assert sample.captions == ("a dog", "the dog")
        return
    assert len(built.measure.names) == spec.classes
    if spec.kind == "multi_label":
        assert sample.labels == (spec.classes - 1,) and built.measure.names[-1] == "tvmonitor"
        assert built.measure.names != datasets.prompts_of("voc2007").classes  # TFDS numbers them otherwise
        return
    assert sample.label == spec.classes - 1
    assert len(sample.frames) == (spec.frames or 0)


def test_labels_of_all_of_imagenet_become_those_of_a_part(tmp_path):
    write_tfds(tmp_path, "imagenet_a", "test", label=6)
    config = Config()
    config.eval.tasks = suite_tasks("robustness", tfds_dir=str(tmp_path))
    task = build_tasks(config)["imagenet_a"]
    assert task.measure.names[task.sources[0][0].label] == "stingray"
    assert task.sources[0].location(0) == "tfds:imagenet_a/test, record 0"
    assert len(task.sources[0].files()) == len(task.sources[0].digests()) == 1
    others = RelabelledSource(ArraySource([b""] * 3, [()] * 3, labels=[0, 6, 1000]), [-1] * 6 + [0])
    assert [others[index].label for index in range(3)] == [-1, 0, -1]
    several = [Sample(b"", (), labels=(0, 6, 1000)), Sample(b"", (), labels=(0,))]
    found = RelabelledSource(several, [-1] * 6 + [0])
    assert [found[index].labels for index in range(2)] == [(0,), ()]


def features_of(dataset: str) -> dict[str, tfds.features.FeatureConnector]:
    """Return the features of TFDS's own builder, and what the source of COCO's captions has."""
    if dataset == "coco_captions/2014":
        captions = tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64})
        return {"image": tfds.features.Image(), "captions": captions}
    if dataset == "ucf101/ucf101_1":
        video = tfds.features.Sequence(tfds.features.Image(shape=(8, 6, 3)))  # as TFDS's Video is, without TensorFlow
        names = tfds.core.tfds_path("video/ucf101_labels.txt")
        return {"video": video, "label": tfds.features.ClassLabel(names_file=names)}
    return dict(tfds.builder(dataset, data_dir=NOWHERE).info.features)


def example_of(feature: tfds.features.FeatureConnector, label: int | None) -> object:
    """Return a value of a feature; the last class, unless a label is given."""
    match feature:
        case tfds.features.Image():
            height, width, channels = (size or 4 for size in feature.shape)
            stream = io.BytesIO()
            Image.new("L" if channels == 1 else "RGB", (width, height)).save(stream, "PNG")
            return io.BytesIO(stream.getvalue())
        case tfds.features.Sequence(feature=tfds.features.Image() as each):
            return [example_of(each, None) for _ in range(3)]
        case tfds.features.ClassLabel():
            return (feature.num_classes or 1) - 1 if label is None else label
        case tfds.features.BBoxFeature():
            return tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
        case tfds.features.Text():
            return "text"
        case tfds.features.Sequence(feature=tfds.features.ClassLabel() as each):
            return [(each.num_classes or 1) - 1]
        case tfds.features.Sequence() if "bbox" in feature.feature:
            return []
        case _:
            return [{"text": "a dog", "id": 0}, {"text": "the dog", "id": 1}]


def write_tfds(folder: pathlib.Path, dataset: str, split: str, *, label: int | None = None) -> None:
    """Write one example with the features of a dataset, as TFDS does."""
    features = features_of(dataset)
    example = {key: example_of(feature, label) for key, feature in features.items()}
    of_dataset, _, config = dataset.partition("/")

    class Fake(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("99.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        name = of_dataset

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: iter([(0, example)])}

        def _generate_examples(self):
            raise AssertionError

    tfds.disable_progress_bar()
    options = tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
    Fake(data_dir=str(folder), file_format="array_record").download_and_prepare(download_config=options)


def test_a_suite_runs_on_what_is_there_and_tells_the_rest(tmp_path, caplog):
    write_tars(tmp_path, specs()["imagenet_r"])
    write_tars(tmp_path, specs()["objectnet"], name="wds_objectnet_test")  # as DataComp names it
    with caplog.at_level(logging.WARNING):
        tasks = suite_tasks("robustness", folder=str(tmp_path), tfds_dir=NOWHERE)
    assert list(tasks) == ["imagenet_r", "objectnet"]
    assert [record.getMessage().split(":")[1].split()[0] for record in caplog.records] == [
        *("imagenet", "imagenet_v2", "imagenet_a", "imagenet_sketch")
    ]
    told = caplog.records[1].getMessage()
    assert "clipjax suites --prepare=imagenet_v2" in told
    assert f"clip-benchmark/wds_imagenetv2 to {tmp_path}/wds_imagenetv2" in told and "\n" not in told


def test_nothing_and_less_than_what_was_named_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"suite retrieval: none of its datasets can be measured\n  flickr30k: not"):
        suite_tasks("retrieval", folder=str(tmp_path), tfds_dir=NOWHERE)
    write_tars(tmp_path, specs()["coco"])
    assert list(suite_tasks("retrieval", folder=str(tmp_path), tfds_dir=NOWHERE)) == ["coco"]
    with pytest.raises(ValueError, match=r"not all of these datasets can be measured\n  flickr30k: not there"):
        suite_tasks("retrieval", folder=str(tmp_path), tfds_dir=NOWHERE, only=["coco", "flickr30k"])
    with pytest.raises(ValueError, match="'mnist' is no dataset of the suite retrieval; they are flickr30k, coco"):
        suite_tasks("retrieval", only=["mnist"])
    with pytest.raises(ValueError, match="suite='all' must be one of clip_paper, datacomp"):
        suite_tasks("all")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classnames.txt", None, "classnames.txt is missing, and without it nobody knows what its labels mean"),
        ("classnames.txt", b"cat\ndog\n", "classnames.txt holds 2 names, and MNIST has 10 classes"),
        ("classnames.txt", b"\xff\n", "classnames.txt is no text in UTF-8"),
        ("test/nshards.txt", b"3\n", r"nshards.txt tells of 3 tars, and 2.tar is missing; download"),
        ("test/nshards.txt", b"many\n", "nshards.txt does not tell how many tars"),
        ("dataset_type.txt", b"multilabel\n", "dataset_type.txt says 'multilabel', and the suite measures it as class"),
    ],
)
def test_folders_that_do_not_fit_are_told(tmp_path, file, content, message):
    place = write_tars(tmp_path, specs()["mnist"]) / file
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content)
    with pytest.raises(ValueError, match=rf"suite quick: none of its datasets .*\n  mnist: {tmp_path}.*{message}"):
        suite_tasks("quick", folder=str(tmp_path), tfds_dir=NOWHERE, only=["mnist"])


def test_templates_are_the_papers_in_its_suite_and_the_folders_in_others(tmp_path):
    place = write_tars(tmp_path, specs()["mnist"])
    options = {"folder": str(tmp_path), "tfds_dir": NOWHERE, "only": ["mnist"]}
    assert suite_tasks("clip_paper", **options)["mnist"].templates == "mnist"
    file = place / "zeroshot_classification_templates.txt"
    assert suite_tasks("datacomp", **options)["mnist"].templates == str(file)
    file.unlink()
    assert suite_tasks("datacomp", **options)["mnist"].templates == "mnist"
    write_tars(tmp_path, specs()["dmlab"])
    (tmp_path / "wds_vtab-dmlab" / file.name).unlink()
    with pytest.raises(ValueError, match=f"dmlab: .*{file.name} is missing; put it there"):
        suite_tasks("clip_benchmark", folder=str(tmp_path), tfds_dir=NOWHERE, only=["dmlab"])


def test_class_names_in_a_folder_count_in_its_own_order(tmp_path):
    classes = sorted(datasets.prompts_of("oxford_pets").classes, reverse=True)
    place = write_tars(tmp_path, specs()["oxford_pets"], classes=classes)
    task = suite_tasks("clip_paper", folder=str(tmp_path), tfds_dir=NOWHERE, only=["oxford_pets"])["oxford_pets"]
    assert task.classes == str(place / "classnames.txt")


@pytest.mark.parametrize(("folder", "message"), [("{a,b}", "must not hold any of"), ("absent", "is no folder")])
def test_folders_that_are_none_are_refused(tmp_path, folder, message):
    with pytest.raises(ValueError, match=f"folder='{tmp_path}/{folder}' {message}"):
        plan_suite("quick", folder=f"{tmp_path}/{folder}")


def test_a_folder_in_a_store_is_listed(monkeypatch, tmp_path):
    local = write_tars(tmp_path, specs()["mnist"])

    def read(place: str, max_bytes: int) -> bytes:
        return (tmp_path / place.removeprefix("gs://bucket/sets/")).read_bytes()

    def find(pattern: str) -> list[str]:
        inside = pattern.removeprefix("gs://bucket/sets/")
        return [f"gs://bucket/sets/{path.relative_to(tmp_path)}" for path in tmp_path.glob(inside)]

    monkeypatch.setattr(objects, "read_bytes", read)
    monkeypatch.setattr(objects, "list_files", find)
    task = suite_tasks("clip_paper", folder="gs://bucket/sets/", tfds_dir=NOWHERE, only=["mnist"])["mnist"]
    assert task.source == f"gs://bucket/sets/{local.name}/test/{{0..1}}.tar"


def test_shifts_of_imagenet_are_told_where_it_is_measured_too(tmp_path):
    for name in ("imagenet", "imagenet_v2", "imagenet_a", "objectnet"):
        write_tars(tmp_path, specs()[name])
    tasks = plan_suite("robustness", folder=str(tmp_path), tfds_dir=NOWHERE).tasks
    told = {name: (task.shift_of, task.shift_points) for name, task in tasks.items()}
    assert told == {
        "imagenet": (None, None),
        "imagenet_v2": ("imagenet", "imagenet_v2"),
        "imagenet_a": ("imagenet", None),
        "objectnet": ("imagenet", "objectnet"),
    }
    config = Config()
    config.eval.tasks = tasks
    assert not config.eval.shift_errors()
    assert build_tasks(config)["imagenet_v2"].shift.points.reference == "ImageNet"
    alone = plan_suite("robustness", folder=str(tmp_path), tfds_dir=NOWHERE, only=["imagenet_v2"]).tasks
    assert alone["imagenet_v2"].shift_of is None
