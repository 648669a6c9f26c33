"""Searches are deterministic, and their fields and values are checked against the config."""

import pytest

from clipjax.cli.overrides import override, split_overrides
from clipjax.config import Activation, Config
from clipjax.config.serialization import check_override
from clipjax.sweeps import Choice, Grid, IntUniform, LogUniform, RandomSearch, Sweep, Uniform
from clipjax.sweeps.space import format_value

# Searches

pytestmark = pytest.mark.newest


def test_grid_is_every_combination_last_field_fastest():
    assert Grid({"a": [1, 2], "b": ["x", "y"]}).trials() == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


FIELDS = {"a": LogUniform(1e-4, 3e-3), "b": Uniform(0.0, 0.5), "c": IntUniform(3, 5), "d": Choice(["x", "y"])}


FROZEN = [{"a": 0.002957, "b": 0.45049, "c": 3, "d": "y"}, {"a": 0.0005791, "b": 0.45661, "c": 3, "d": "x"}]


def test_random_search_is_frozen():
    # Frozen values: another machine, process or Python version must draw the same trials.
    assert RandomSearch(FIELDS, num_trials=2, seed=1).trials() == FROZEN
    assert RandomSearch(FIELDS, num_trials=2, seed=2).trials() != FROZEN


def test_random_search_grows_without_changing_its_first_trials():
    few, many = (RandomSearch(FIELDS, num_trials=n).trials() for n in (3, 300))
    assert many[:3] == few
    narrow = RandomSearch({"b": FIELDS["b"]}, num_trials=3).trials()
    assert [trial["b"] for trial in few] == [trial["b"] for trial in narrow]
    for trial in many:
        assert 1e-4 <= trial["a"] <= 3e-3 and 0 <= trial["b"] <= 0.5
    assert {trial["c"] for trial in many} == {3, 4, 5} and {trial["d"] for trial in many} == {"x", "y"}
    below = sum(trial["a"] < (1e-4 * 3e-3) ** 0.5 for trial in many)
    assert 110 < below < 190  # half of a log-uniform draw lies below the geometric mean


def test_uniform_keeps_resolution_in_a_narrow_range():
    draws = [Uniform(1000.1, 1000.2).at_quantile(i / 50) for i in range(50)]
    assert len(set(draws)) == 50 and min(draws) >= 1000.1 and max(draws) <= 1000.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid({}), "has no fields"),
        (lambda: Grid({"a": []}), r"a=\[\] must be a list with at least one value"),
        (lambda: Grid({"a": "abc"}), "a='abc' must be a list"),
        (lambda: Grid({"a": [1, 2, 1.0]}), "has a value twice"),
        (lambda: RandomSearch({"a": [1]}, num_trials=1), r"a=\[1\] must be a Uniform"),
        (lambda: RandomSearch({"a": Choice([1])}, num_trials=0), "num_trials=0 must be at least 1"),
        (lambda: Choice([]), "has no values"),
        (lambda: Uniform(1, 1), r"Uniform\(low=1, high=1\) must have low < high"),
        (lambda: LogUniform(0.0, 1.0), "must have 0 < low < high"),
        (lambda: IntUniform(3, 2), "must have low < high"),
        (lambda: Sweep(search={"a": [1]}, metric="loss"), "must be a Grid or a RandomSearch"),
        (lambda: Sweep(search=Grid({"a": [1]}), metric=""), "metric=''"),
    ],
)
def test_wrong_searches(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("values", "is_log"),
    [([1, 2, 3], False), ([1e-4, 3e-4, 1e-3], True), ([4, 1, 2], True), ([1, 10], False), ([0, 1, 10], False)],
)
def test_log_scale_of_grids(values, is_log):
    assert Sweep(search=Grid({"a": values}), metric="loss").is_log("a") == is_log


# Fields and values

GOOD = [
    ("seed", 3),
    ("optim.learning_rate", 1e-5),
    ("optim.learning_rate", 1),
    ("optim.max_grad_norm", 1.0),
    ("model.scan_layers", False),
    ("model.text.activation", Activation.GELU),
    ("model.text.activation", "gelu"),
    ("data.train", "a path/{0..3}.tar"),
    ("data.tfds_dir", "/x"),
    ("data.mean", (0.5, 0.25, 0.5)),
    ("optim.freeze", ("image/.*",)),
    ("optim.freeze", ()),
    ("microbatch_size", 4),
    ("optim.max_grad_norm", None),
    ("data.tfds_dir", None),
]


@pytest.mark.parametrize(("path", "value"), GOOD)
def test_values_arrive_as_given(path, value):
    """What passes the check reaches the config unchanged through the command line that trials get."""
    check_override(Config, path, value)
    argument = f"--config.{path}={format_value(value)}"
    arrived = override(Config(), split_overrides([argument])[0])
    for name in path.split("."):
        arrived = getattr(arrived, name)
    assert arrived == (Activation.GELU if value == "gelu" else value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.learning_rat", 1.0, "optim has no field 'learning_rat'; did you mean 'learning_rate'?"),
        ("zzz", 1.0, "the config has no field 'zzz'; it has seed, total_examples"),
        ("seed.x", 1, "seed has no field 'x'; it has none"),
        ("optim", 1, "optim is a group of fields; name one in it: learning_rate"),
        ("eval.tasks", 1, "eval.tasks is a group of fields"),
        ("total_examples", 1e6, "total_examples=1000000.0 is float and must be int"),
        ("seed", True, "seed=True is bool and must be int"),
        ("optim.learning_rate", "0.1", "optim.learning_rate='0.1' is str and must be float"),
        ("model.scan_layers", 1, "is int and must be bool"),
        ("model.text.activation", "relu", "must be one of QUICK_GELU, GELU, GELU_TANH"),
        ("seed", None, "seed=None is NoneType and must be int"),
        ("data.mean", (0.5, 0.5), r"must be tuple\[float, float, float\]"),
        ("optim.freeze", ["a"], r"is list and must be tuple\[str, ...\]"),
        ('eval.tasks["scenes/val"].max_examples', 1.5, "must be int"),
    ],
)
def test_wrong_fields_and_values(path, value, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        check_override(Config, path, value)


def test_fields_inside_dicts():
    check_override(Config, 'eval.tasks["scenes/val"].max_examples', 8)
