"""Datasets of evaluations: what their records say, against TFDS as it is installed; and class names in its order."""

import inspect
import io
import pathlib
import re

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from clipjax.config import Config, TaskConfig
from clipjax.evals import datasets
from clipjax.evals.datasets.labels import aliases_of, numbers_by_id, order_names
from clipjax.evals.datasets.specs import MAP_11_POINTS, NOT_MEASURED, PER_CLASS, RECALL, TOP1, specs
from clipjax.evals.prompts import load_classes, load_templates
from clipjax.evals.runner import build_tasks
from tests.evals.test_datasets import PUBLISHED

OURS = ("scenes_val", "scenes_unseen", "scenes_captions")
NEEDS_TENSORFLOW = ("coco", "ucf101")  # their builders cannot even be made without; sources are read instead
IN_TFDS = [name for name, spec in specs().items() if spec.tfds and name not in (*OURS, *NEEDS_TENSORFLOW)]

TABLE_9 = {
    "per_class": ["caltech101", "fgvc_aircraft", "flowers102", "oxford_pets"],
    "map_11_points": ["voc2007"],
    "mean_of_top1_and_top5": ["kinetics700"],
    "roc_auc": ["hateful_memes"],
}
"""Metrics of the paper's table 9 that are not accuracy."""


def test_the_papers_datasets_have_its_metrics():
    paper = {name: spec for name, spec in specs().items() if spec.paper_examples is not None}
    assert sorted(paper) == sorted(PUBLISHED)
    for name, spec in paper.items():
        expected = next((metric for metric, names in TABLE_9.items() if name in names), TOP1)
        assert (spec.metric, spec.prompts, spec.classes) == (expected, name, PUBLISHED[name][0])


@pytest.mark.parametrize("spec", specs().values(), ids=lambda spec: spec.name)
def test_records_are_whole(spec):
    assert spec.metric in (TOP1, PER_CLASS, RECALL, MAP_11_POINTS, *NOT_MEASURED)
    assert spec.kind in ("zero_shot", "multi_label", "retrieval")
    assert (spec.metric == MAP_11_POINTS) == (spec.kind == "multi_label")
    assert spec.title and spec.home and (spec.tfds or spec.webdataset or spec.left_out)
    assert (spec.metric == RECALL) == (spec.kind == "retrieval")
    if spec.prompts:
        assert len(load_classes(spec.prompts)) == spec.classes
        assert set(spec.names_in_tfds.values()) <= set(load_classes(spec.prompts))
    if spec.templates:
        assert load_templates(spec.templates)
    if spec.tfds and spec.kind == "zero_shot":
        assert spec.prompts
    assert not any("/" in folder for folder in spec.folders)


def test_folders_are_named_as_both_publishers_do():
    assert specs()["oxford_pets"].folders == ("wds_vtab-pets", "wds_vtab-pets_test")
    assert specs()["cifar10"].folders == ("wds_vtab-cifar10", "wds_cifar10_test")
    assert specs()["cifar10"].address == "https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10"
    assert specs()["food101"].address == "https://huggingface.co/datasets/djghosh/wds_food101_test"
    assert specs()["birdsnap"].address is None and specs()["scenes_val"].folders == ()


def test_what_no_task_measures_is_told_why():
    told = {name: spec.left_out for name, spec in specs().items() if spec.left_out}
    assert told["hateful_memes"] == "its metric is ROC AUC, which is not measured yet"
    assert "top-5" in told["kinetics700"] and "worst group" in told["geode"]
    assert not {"ucf101", "voc2007", "imagenet", "rendered_sst2", "coco", "country211"} & set(told)


@pytest.mark.parametrize("name", IN_TFDS)
def test_names_splits_and_features_are_those_of_tfds(name, tmp_path):
    spec = specs()[name]
    assert spec.tfds is not None and spec.prompts is not None
    dataset, _, split = spec.tfds.rpartition("/")
    builder = tfds.builder(dataset, data_dir=str(tmp_path))  # nothing is downloaded, and TensorFlow is not imported
    features = builder.info.features
    assert isinstance(features[spec.image], tfds.features.Image) and spec.frames is None
    label = features[spec.label]
    if spec.kind == "multi_label":
        assert isinstance(label, tfds.features.Sequence)
        label = label.feature
    assert isinstance(label, tfds.features.ClassLabel)
    labels = label.names
    numbers = numbers_by_id(name, labels)
    assert (numbers is not None) == (name in ("imagenet_a", "imagenet_r"))
    source = inspect.getsource(inspect.getmodule(type(builder)))
    part = split.partition("[")[0]
    assert re.search(rf"Split\.{part.upper()}|['\"]{part}['\"]", source)
    if numbers is not None:  # all of ImageNet's classes, of which some count
        chosen = {labels[at]: place for at, place in enumerate(numbers) if place >= 0}
        assert list(chosen) == list(datasets.prompts_of(name).ids) and list(chosen.values()) == list(range(200))
        imagenet = load_classes("imagenet")
        assert [imagenet[labels.index(each)] for each in chosen] == list(load_classes(name))
        return
    assert len(labels) == spec.classes
    found = order_names(load_classes(spec.prompts), labels, field=name, is_file=False, aliases=aliases_of(name))
    assert sorted(found) == sorted(load_classes(spec.prompts))
    assert bool(spec.by_hand) == bool(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
    if name in ("imagenet", "imagenet_v2", "imagenet_sketch"):
        assert features[spec.label].names[0] == "n01440764" and found[0] == "tench"


def test_captions_of_coco_are_those_of_tfds():
    source = inspect.getsource(tfds.builder_cls("coco_captions"))
    assert specs()["coco"].captions == "captions/text" and specs()["coco"].tfds == "coco_captions/2014/test"
    assert re.search(r"features\['captions'\] = tfds.features.Sequence\({\s+'text': np.str_", source)
    assert re.search(r"SplitGenerator\(\s+'test'", source)
    assert [each.name for each in tfds.builder_cls("coco_captions").BUILDER_CONFIGS] == ["2014"]


@pytest.mark.parametrize(
    ("name", "label", "tfds_name", "ours"),
    [
        ("oxford_pets", 1, "american_bulldog", "american bulldog"),
        ("food101", 16, "cheesecake", "cheesecake"),
        ("caltech101", 4, "background_google", "background"),
        ("eurosat", 9, "SeaLake", "lake or sea"),
        ("flowers102", 92, "ball moss", "air plant"),
        ("sun397", 207, "/j/jail_cell", "jail cell"),
    ],
)
def test_class_names_follow_the_data(name, label, tfds_name, ours, tmp_path):
    labels = tfds.builder(specs()[name].tfds.rpartition("/")[0], data_dir=str(tmp_path)).info.features["label"].names
    assert tfds_name == labels[label]
    found = order_names(load_classes(name), labels, field="classes", is_file=False, aliases=aliases_of(name))
    assert found[label] == ours
    assert name == "flowers102" or found != datasets.prompts_of(name).classes  # its own order is another


def order(classes, labels, *, is_file=False, aliases=None):
    return order_names(classes, labels, field="classes='x'", is_file=is_file, aliases=aliases or {})


def test_labels_that_are_no_words_leave_the_order():
    assert order(["b", "a"], None) == ("b", "a")
    assert order(["b", "a"], ["0", "1"]) == ("b", "a")
    assert order(["b", "a"], ["n00000001", "n00000002"]) == ("b", "a")
    assert order(["b", "a"], ["a", "c"], is_file=True) == ("b", "a")  # other words for them: the user's own


@pytest.mark.parametrize(
    ("classes", "labels", "is_file", "message"),
    [
        (["a", "b"], ["a", "b", "c"], False, "classes='x' holds 2 names, and the data has 3 classes"),
        (["a", "b"], ["0", "1", "2"], True, "classes='x' holds 2 names, and the data has 3 classes"),
        (["a", "b"], ["a", "c"], False, r"classes='x' lacks 1 classes of the data \('c'\), so it cannot tell"),
        (["a", "b"], ["n00000002", "n00000001"], False, "lacks 2 classes of the data"),
        (["A-b", "c d"], ["c_d", "a b"], True, "label 0 is 'c_d' in the data, and 'A-b' in the list"),
        (["a", "A"], ["a", "A"], False, "holds several names that differ by marks alone"),
    ],
)
def test_lists_that_do_not_fit_the_data_are_refused(classes, labels, is_file, message):
    with pytest.raises(ValueError, match=message):
        order(classes, labels, is_file=is_file)


def test_a_task_takes_class_names_in_the_order_of_the_data(tmp_path):
    folder = write_pets(tmp_path)
    task = TaskConfig(source="tfds:pets/test", classes="oxford_pets", templates="oxford_pets", tfds_dir=folder)
    config = Config()
    config.eval.tasks = {"pets": task}
    measure = build_tasks(config)["pets"].measure
    assert measure.names[1] == "american bulldog" and datasets.prompts_of("oxford_pets").classes[1] == "Bengal"

    (tmp_path / "short.txt").write_text("a cat\na dog\n")
    task.classes = str(tmp_path / "short.txt")
    with pytest.raises(ValueError, match=r"eval.tasks.pets: classes='.*short.txt' holds 2 names, and the data has 37"):
        build_tasks(config)
    task.classes = "dtd"
    with pytest.raises(ValueError, match="eval.tasks.pets: classes='dtd' holds 47 names, and the data has 37"):
        build_tasks(config)


def write_pets(folder: pathlib.Path) -> str:
    """Write a picture of TFDS's second pet as TFDS does; return the folder of its data."""
    labels = tfds.builder("oxford_iiit_pet", data_dir=str(folder)).info.features["label"].names
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")

    class Pets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "pets"

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=labels)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"test": iter([(0, {"image": io.BytesIO(stream.getvalue()), "label": 1})])}

        def _generate_examples(self):
            raise AssertionError

    tfds.disable_progress_bar()
    options = tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
    Pets(data_dir=str(folder), file_format="array_record").download_and_prepare(download_config=options)
    return str(folder)
