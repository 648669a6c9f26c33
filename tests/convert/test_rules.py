"""Tables of weights: every array is used once, wrong ones are all named, and no bit changes."""

import ml_dtypes
import numpy as np
import pytest

from clipjax.convert.rules import Table, rule, to_ours, to_theirs

TABLE = Table(
    [
        rule("a.{layer}.weight", "blocks/kernel", "l (n d) w -> l w n d", range(2)),
        rule(("q", "k"), ("pool/q", "pool/k"), "t w -> t w"),
        rule("fused", ("x/q", "x/k", "x/v"), "(three d) -> three d"),
        rule("scale", "scale", "1 ->"),
    ],
    {"n": 2, "three": 3},
    {"counter": lambda: np.zeros((), np.int64), "positions": None},
)
SHAPES = {
    "blocks/kernel": (2, 5, 2, 3),
    "pool/q": (4,),
    "pool/k": (4,),
    "x/q": (2,),
    "x/k": (2,),
    "x/v": (2,),
    "scale": (),
}

pytestmark = pytest.mark.newest


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a.0.weight": (6, 5), "a.1.weight": (6, 5), "q": (4,), "k": (4,), "fused": (6,), "scale": (1,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | {
        "counter": np.asarray(7)
    }


def test_every_number_finds_its_place():
    given = weights()
    ours = to_ours(TABLE, given, SHAPES)
    assert {name: array.shape for name, array in ours.items()} == SHAPES
    assert ours["blocks/kernel"][1, 4, 0, 2] == given["a.1.weight"][2, 4]
    assert ours["blocks/kernel"][1, 4, 1, 0] == given["a.1.weight"][3, 4]
    np.testing.assert_array_equal(ours["x/k"], given["fused"][2:4])
    assert ours["scale"] == given["scale"][0]


def test_there_and_back_changes_no_bit():
    given = weights()
    back = to_theirs(TABLE, to_ours(TABLE, given, SHAPES))
    assert back.keys() == given.keys()
    for name in given.keys() - {"counter"}:
        np.testing.assert_array_equal(back[name], given[name])
    assert back["counter"] == 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_weights_become_float32(dtype):
    given = {name: array.astype(dtype) for name, array in weights().items()}
    ours = to_ours(TABLE, given | {"counter": np.asarray(7)}, SHAPES)
    assert {array.dtype for array in ours.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(ours["x/q"], given["fused"][:2].astype(np.float32))


def test_all_that_is_wrong_is_told_at_once():
    given = weights()
    del given["q"]
    given["extra"] = np.zeros(3, np.float32)
    given["fused"][0] = np.nan
    given["a.1.weight"] = np.zeros((6, 4), np.float32)
    given["scale"] = given["scale"].astype(np.int32)
    with pytest.raises(ValueError) as raised:
        to_ours(TABLE, given, SHAPES)
    lines = str(raised.value).splitlines()
    assert lines == [
        "a.1.weight: shape (6, 4), where others have (6, 5)",
        "q: missing",
        "fused: holds NaN or infinity",
        "scale: dtype int32 must be one of float32, float16, bfloat16",
        "extra: no rule for it",
    ]


def test_a_wrong_shape_is_told():
    given = weights()
    given["fused"] = np.zeros(9, np.float32)
    with pytest.raises(ValueError, match=r"fused: x/q would have shape \(3,\), but needs \(2,\)"):
        to_ours(TABLE, given, SHAPES)
    given["fused"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match=r"fused: shape \(7,\) does not fit"):
        to_ours(TABLE, given, SHAPES)


def test_what_no_rule_covers_is_told():
    with pytest.raises(ValueError, match="more: no rule gives it"):
        to_ours(TABLE, weights(), SHAPES | {"more": (1,)})
    with pytest.raises(ValueError, match="more: the other format has no place for it"):
        to_theirs(TABLE, to_ours(TABLE, weights(), SHAPES) | {"more": np.zeros(1, np.float32)})
