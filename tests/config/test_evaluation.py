"""Shifted tasks and their references."""

import pytest

from clipjax.config import Config, FeatureKind, TaskConfig, TaskKind
from clipjax.config.evaluation import EvalConfig
from clipjax.config.paths import expand_paths, is_path_field


def errors(reference: dict, shifted: dict) -> list[str]:
    tasks = {
        "set": TaskConfig(**{"source": "a", "classes": "x", "templates": "y"} | reference),
        "shifted": TaskConfig(**{"source": "b", "classes": "x", "templates": "y", "shift_of": "set"} | shifted),
    }
    found = EvalConfig(tasks=tasks).shift_errors()
    return found + [line for name, task in tasks.items() for line in task.errors(f"eval.tasks.{name}")]


PROBE = {"kind": TaskKind.LINEAR_PROBE, "classes": None, "templates": None, "train_source": "t"}
PAIRS = {"kind": TaskKind.RETRIEVAL, "classes": None, "templates": None}


@pytest.mark.parametrize(
    ("reference", "shifted"),
    [
        ({}, {}),
        ({}, {"source": "a", "tfds_dir": "tfds"}),
        ({}, {"shift_points": "imagenet_v2"}),
        (PROBE, PROBE),
    ],
)
def test_a_shift_to_another_set_is_right(reference, shifted):
    assert not [line for line in errors(reference, shifted) if "shift_" in line]


@pytest.mark.parametrize(
    ("reference", "shifted", "message"),
    [
        ({}, {"shift_of": "sett"}, "shift_of='sett' must be the name of another task; there are set"),
        ({}, {"shift_of": "shifted"}, "shift_of='shifted' is itself a shift of 'shifted'; name a task that is none"),
        ({"shift_of": "shifted"}, {}, "shift_of='set' is itself a shift of 'shifted'"),
        ({}, {"source": "a"}, "shift_of='set' reads the same source, which is no shift of itself"),
        ({}, PROBE, "shift_of='set' differs in kind, train_source too, so that not the set alone is compared"),
        (PROBE, PROBE | {"train_source": "u"}, "shift_of='set' differs in train_source too"),
        (PROBE, PROBE | {"features": FeatureKind.PIXELS}, "shift_of='set' differs in features too"),
        (PAIRS, PAIRS, "shift_of='set': only zero_shot, linear_probe, nearest_neighbours have one accuracy"),
        ({}, {"shift_of": None, "shift_points": "imagenet_v2"}, "would be ignored without shift_of; give both"),
    ],
)
def test_what_is_no_shift_is_refused(reference, shifted, message):
    assert [line for line in errors(reference, shifted) if message in line], errors(reference, shifted)


def test_a_file_of_points_is_a_path():
    config = Config()
    config.eval.tasks["a"] = TaskConfig(source="b", shift_of="c", shift_points="~/points.json")
    expand_paths(config)
    assert not (config.eval.tasks["a"].shift_points or "~").startswith("~")
    assert is_path_field("eval.tasks['a'].shift_points")


@pytest.mark.parametrize("kind", [kind for kind in TaskKind if kind is not TaskKind.ZERO_SHOT])
def test_an_overlap_that_would_be_ignored_is_refused(kind):
    found = TaskConfig(kind=kind, source="a", overlap="o.json").errors("eval.tasks.a")
    assert f"eval.tasks.a.overlap='o.json': {kind.value} would ignore it; leave it out" in found
    zero_shot = TaskConfig(source="a", classes="x", templates="y", overlap="o.json")
    assert zero_shot.errors("eval.tasks.a") == []
