"""`clipjax suites` and `clipjax eval --suite`: what is run, listed, prepared and refused."""

import re
import shutil

import pytest
import tensorflow_datasets as tfds

from clipjax.cli import eval as evaluate
from clipjax.cli import main as cli
from clipjax.cli import suites
from clipjax.evals.datasets.specs import specs
from tests.commands import exit_code
from tests.evals.test_suites import write_tars, write_tfds
from tests.golden.test_checkpoint import FOLDER, write_inputs


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with a run, in which the test works, and no TFDS data but its own."""
    write_inputs(tmp_path)
    shutil.copytree(FOLDER / "checkpoint_format_2", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_suite(*options: str) -> evaluate.Opened:
    return evaluate._open_here(["--checkpoint=run", "--config.data.tfds_dir=tfds", *options])[0]


def test_a_suite_takes_the_place_of_the_checkpoints_tasks(run):
    write_tars(run, specs()["flickr30k"])
    opened = open_suite("--suite=retrieval", "--suite_dir=.", "--config.eval.tasks['flickr30k'].max_examples=1")
    assert list(opened.tasks) == list(opened.config.eval.tasks) == ["flickr30k"]
    assert opened.tasks["flickr30k"].max_examples == 1
    told = [line for line in opened.changed if line.startswith("suite")]
    assert told[0].startswith("suite retrieval: coco is left out: not there; `clipjax suites --prepare=coco")
    assert told[1:] == ["suite retrieval: flickr30k holds 2 examples, where 1,000 are published"]


def test_a_suite_reads_tfds_data_where_the_config_says(run):
    write_tfds(run / "tfds", "mnist", "test")
    opened = open_suite("--suite=quick", "--tasks=mnist")
    assert list(opened.tasks) == ["mnist"] and opened.config.eval.tasks["mnist"].tfds_dir is None
    with pytest.raises(ValueError, match="config.data.tfds_image_key=other: each task that reads TFDS data has its"):
        open_suite("--suite=quick", "--config.data.tfds_image_key=other")


def test_a_config_file_takes_the_tasks_of_a_suite(run):
    write_tars(run, specs()["rendered_sst2"])
    (run / "suite.py").write_text(
        "from clipjax.config import *\nfrom clipjax.evals.suites import suite_tasks\ndef get_config():\n"
        "    tasks = suite_tasks('clip_paper', folder='.', tfds_dir='tfds', max_examples=2)\n"
        "    return Config(eval=EvalConfig(tasks=tasks))\n"
    )
    opened = evaluate._open_here(["--checkpoint=run", "--tasks_from=suite.py"])[0]
    assert list(opened.tasks) == ["rendered_sst2"] and opened.tasks["rendered_sst2"].max_examples == 2
    assert opened.tasks["rendered_sst2"].measure.names == ("negative", "positive")


def test_data_that_cannot_be_read_costs_its_task_alone(run):
    write_tars(run, specs()["mnist"])
    write_tars(run, specs()["cifar10"])
    for number in range(2):
        (run / "wds_mnist" / "test" / f"{number}.tar").write_bytes(b"no tar at all" * 100)
    opened = open_suite("--suite=quick", "--suite_dir=.")
    assert list(opened.tasks) == ["cifar10"]
    (told,) = [line for line in opened.changed if "mnist" in line]
    assert "suite quick: mnist is left out: " in told and "0.tar" in told
    with pytest.raises(ValueError, match=r"suite quick: not all of .*\n  mnist: "):
        open_suite("--suite=quick", "--suite_dir=.", "--tasks=mnist,cifar10")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite=quik"], "--suite=quik must be one of clip_paper, .*; did you mean quick?"),
        (["--suite_dir=."], "--suite_dir=. would be ignored without --suite"),
        (["--suite=quick", "--tasks_from=config.py"], "--tasks_from=config.py would be ignored beside --suite"),
        (["--suite=quick", "--suite_dir=absent"], "folder='absent' is no folder"),
        (["--suite=quick", "--tasks=food101"], "'food101' is no dataset of the suite quick; they are scenes_val"),
        (["--suite=quick"], "suite quick: none of its datasets can be measured\n  scenes_val: not there; `clip"),
        (["--suite=quick", "--tasks="], "--tasks=: nothing is not among"),
    ],
)
def test_suites_are_refused(run, options, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        open_suite(*options)


def test_a_suite_without_data_leaves_with_exit_code_2(run, capsys):
    assert exit_code(cli.main, ["suites", "--suite=retrieval", "--suite_dir=absent"]) == 2
    assert "clipjax suites: error: folder='absent' is no folder" in capsys.readouterr().err


def test_suites_are_listed(tmp_path, capsys):
    assert cli.main(["suites"]) == 0
    assert re.search(r"^clip_paper +27 +the 27 datasets", capsys.readouterr().out, re.M)
    write_tars(tmp_path, specs()["coco"])
    assert cli.main(["suites", "--suite=retrieval", f"--suite_dir={tmp_path}", f"--tfds_dir={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^coco .* 5,000 .*wds_mscoco_captions/test/\{0..1\}.tar$", shown, re.M)
    assert re.search(r"^flickr30k .* 1,000 .*missing$", shown, re.M)
    assert re.search(r"^flickr30k: not there; download https://huggingface.co/datasets/clip-benchmark/", shown, re.M)


def test_datasets_are_prepared_and_one_that_fails_costs_none_of_the_others(tmp_path, monkeypatch, capsys):
    class Builder:
        def __init__(self, name, data_dir, file_format):
            assert (data_dir, file_format) == (str(tmp_path), "array_record")
            self.name, self.data_dir = name, f"{data_dir}/{name}/1.0.0"
            if name == "stl10":
                raise ImportError("No module named 'tensorflow'")

        def download_and_prepare(self):
            if self.name == "imagenet2012":
                raise AssertionError("Manual directory does not exist")

    monkeypatch.setattr(tfds, "builder", Builder)
    assert cli.main(["suites", "--prepare=imagenet,stl10,mnist", f"--tfds_dir={tmp_path}"]) == suites.UNUSABLE_DATA
    shown = capsys.readouterr()
    assert shown.out == f"mnist lies in {tmp_path}/mnist/1.0.0\n"
    assert "imagenet: TFDS could not prepare imagenet2012/validation: AssertionError: Manual" in shown.err
    assert "ILSVRC2012_img_val.tar" in shown.err and "it needs that package: install it" in shown.err
    assert cli.main(["suites", "--prepare=mnist", f"--tfds_dir={tmp_path}"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prepare=gtsrb,mnist"], "--prepare=gtsrb,mnist: gtsrb is not among the datasets that TFDS has (food101,"),
        (["--prepare="], "--prepare=: nothing is not among"),
        (["--prepare=mnist", "--suite=quick"], "--suite would be ignored beside --prepare"),
        (["--prepare=mnist", "--tfds_dir=gs://a/b"], "data is prepared on a disk"),
        (["--suite_dir=."], "--suite=NAME is missing: name one of"),
        (["--suite=all"], "--suite=all must be one of"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, capsys):
    assert exit_code(cli.main, ["suites", *options]) == 2
    assert message in capsys.readouterr().err
