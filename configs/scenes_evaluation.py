"""Tasks that show what the quickstart's checkpoint can do, and where it is weak: the paper's experiments on `scenes`.

    clipjax data scenes --tfds_dir=data --config=outlines
    clipjax eval --checkpoint=runs/quickstart --tasks_from=configs/scenes_evaluation.py --report=report

`scenes/outlines` has the same scenes as `scenes/val`, drawn as outlines, with the same captions and labels: a shift of
the drawing style alone.
"""

import pathlib
import runpy
from typing import Any

from clipjax.config import Config, EvalConfig, FeatureKind, TaskConfig, TaskKind

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")

VAL, OUTLINES, UNSEEN = "tfds:scenes/val", "tfds:scenes/outlines/val", "tfds:scenes/unseen"


def get_config() -> Config:
    """The quickstart's run, with these tasks."""
    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    prompts: dict[str, Any] = {"classes": "scenes", "templates": "scenes"}
    few: dict[str, Any] = {"train_source": "tfds:scenes/train", "max_examples": 2_000}
    probe: dict[str, Any] = {"kind": TaskKind.LINEAR_PROBE, **few}
    config.eval = EvalConfig(
        tasks={
            "scenes/val": TaskConfig(source=VAL, **prompts, compare_prompts=True, paraphrases="templates"),
            "scenes/unseen": TaskConfig(source=UNSEEN, **prompts, shift_of="scenes/val"),
            "scenes/outlines": TaskConfig(source=OUTLINES, **prompts, shift_of="scenes/val"),
            "probe/val": TaskConfig(source=VAL, **probe),
            "probe/outlines": TaskConfig(source=OUTLINES, **probe, shift_of="probe/val"),
            "probe/pixels": TaskConfig(source=VAL, **probe, features=FeatureKind.PIXELS),
            "few-shot/val": TaskConfig(kind=TaskKind.FEW_SHOT, source=VAL, **few, **prompts),
            "neighbours/val": TaskConfig(kind=TaskKind.NEAREST_NEIGHBOURS, source=VAL, **few),
            "retrieval/val": TaskConfig(kind=TaskKind.RETRIEVAL, source=VAL),
            "words/val": TaskConfig(kind=TaskKind.WORD_ORDER, source=VAL),
        }
    )
    return config
