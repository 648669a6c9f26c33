"""Preflight: what is refused before a device is touched."""

import dataclasses
import io
import json
import pathlib
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    TaskConfig,
    TaskKind,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.evals.runner import build_tasks, check_metric
from clipjax.runtime import process_log
from clipjax.training import preflight


def make_config(folder: pathlib.Path, num_classes: int = 5) -> Config:
    """A run on eight pictures, with one task of each kind."""
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for number in range(8):
            picture = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(picture, "PNG")
            for ending, content in (("png", picture.getvalue()), ("txt", f"no {number}".encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "classes.json").write_text(json.dumps([f"class {i}" for i in range(num_classes)]))
    pairs = str(folder / "pairs.tar")
    zero_shot = TaskConfig(source=pairs, classes=str(folder / "classes.json"), templates="plain")
    return Config(
        total_examples=8,
        global_batch_size=8,
        model=ModelConfig(
            embed_dim=16,
            image=ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
            text=TextTransformerConfig(context_length=8, vocab_size=260, width=16, depth=1, num_heads=2),
        ),
        data=DataConfig(train=pairs),
        eval=EvalConfig(
            every_examples=8,
            batch_size=8,
            tasks={
                "val": zero_shot,
                "pairs": TaskConfig(kind=TaskKind.RETRIEVAL, source=pairs),
                "same": TaskConfig(kind=TaskKind.IMAGE_RETRIEVAL, source=pairs, gallery=pairs),
            },
        ),
    )


@pytest.mark.parametrize("best", ["val:top5", "val:accuracy", "test:top1", "top1", "val:num_examples"])
def test_a_best_metric_that_no_task_gives_is_refused(tmp_path, best):
    """Five classes have no top5: the run would end with a KeyError at its first evaluation."""
    config = make_config(tmp_path)
    config.checkpoint = CheckpointConfig(best_metric=best)
    message = f"checkpoint.best_metric={best!r} must be TASK:METRIC, one of val:top1, pairs:image_to_text_r1, "
    with process_log.session(), pytest.raises(ValueError, match=re.escape(message)):
        preflight.check(lambda: (config, tmp_path / "run"))


@pytest.mark.parametrize(
    ("num_classes", "best"),
    [(5, "val:top1"), (6, "val:top5"), (5, "pairs:text_to_image_r10"), (5, "same:gallery_to_source_r5")],
)
def test_a_best_metric_that_a_task_gives_is_accepted(tmp_path, num_classes, best):
    check_metric(best, build_tasks(make_config(tmp_path, num_classes)))


def test_without_tasks_there_is_no_best_metric(tmp_path):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig())
    with pytest.raises(ValueError, match="one of none: no tasks"):
        check_metric("val:top1", build_tasks(config))
