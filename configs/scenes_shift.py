"""Evaluation tasks for the quickstart's checkpoint: what it loses on new combinations, and on another drawing style.

    clipjax data scenes --tfds_dir=data --config=outlines
    clipjax eval --checkpoint=runs/quickstart --tasks_from=configs/scenes_shift.py --report=report --output=shift.json

`scenes/outlines` has the same scenes as `scenes/val`, drawn as outlines, with the same captions and labels.
"""

import pathlib
import runpy
from typing import Any

from clipjax.config import Config, EvalConfig, FeatureKind, TaskConfig, TaskKind

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")

VAL, OUTLINES = "tfds:scenes/val", "tfds:scenes/outlines/val"


def get_config() -> Config:
    """The quickstart's run, with these tasks."""
    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    prompts: dict[str, Any] = {"classes": "scenes", "templates": "scenes"}
    learnt: dict[str, Any] = {"kind": TaskKind.LINEAR_PROBE, "train_source": "tfds:scenes/train", "max_examples": 2_000}
    config.eval = EvalConfig(
        tasks={
            "scenes/val": TaskConfig(source=VAL, **prompts),
            "scenes/unseen": TaskConfig(source="tfds:scenes/unseen", **prompts, shift_of="scenes/val"),
            "scenes/outlines": TaskConfig(source=OUTLINES, **prompts, shift_of="scenes/val"),
            "probe/val": TaskConfig(source=VAL, **learnt),
            "probe/outlines": TaskConfig(source=OUTLINES, **learnt, shift_of="probe/val"),
            "pixels/val": TaskConfig(source=VAL, **learnt, features=FeatureKind.PIXELS),
        }
    )
    return config
