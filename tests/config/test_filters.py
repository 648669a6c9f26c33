"""Conditions: their grammar, and the values that meet them."""

import pytest

from clipjax.config.data import DataConfig, MixtureSource
from clipjax.config.filters import parse_condition

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    ("text", "metadata", "expected"),
    [
        ("width>=200", {"width": 200}, True),
        ("width>=200", {"width": 199.5}, False),
        ("width>=200", {}, False),
        ("width>=200", {"width": None}, False),
        ("width>=200", {"width": "200"}, True),  # a cell of a CSV
        ("width>=200", {"width": "wide"}, False),
        ("width>=200", {"width": True}, False),
        ("width>=200", {"width": [300]}, False),
        ("width < 200", {"width": 3}, True),
        ("aspect<=3", {"width": 300, "height": 100}, True),
        ("aspect<=3", {"width": 301, "height": 100}, False),
        ("aspect<=3", {"width": 301, "height": 0}, False),
        ("aspect<=3", {"aspect": 2}, True),
        ("similarity>0.28", {"similarity": 0.28}, False),
        ("similarity>2.8e-1", {"similarity": 0.2800001}, True),
        ("similarity>0.28", {"similarity": float("nan")}, False),
        ("similarity!=0.28", {"similarity": float("nan")}, False),
        ("language==en", {"language": "en"}, True),
        ("language==en", {"language": "EN"}, False),
        ("language!=en", {"language": "de"}, True),
        ("language!=en", {}, False),
        ("language!=en", {"language": ""}, False),
        ("code=='7'", {"code": "7"}, True),
        ("code=='7'", {"code": "7.0"}, False),
        ("code==7", {"code": "7.0"}, True),
        ("is_safe==true", {"is_safe": True}, True),
        ("a/b!=x", {"a": {"b": "y"}}, True),
        ("a/b!=x", {"a": {"b": "x"}}, False),
        ("a/b!=x", {"a": ["b"]}, False),
        ("a/b==x", {"a/b": "x", "a": {"b": "y"}}, True),
        ("id==9007199254740993", {"id": 9007199254740993}, True),
        ("id==9007199254740993", {"id": 9007199254740992}, False),  # floats would be equal
        ("id<5", {"id": 10**400}, False),
        ("nsfw==UNLIKELY", {"nsfw": "UNLIKELY "}, True),
    ],
)
def test_a_condition_is_met(text, metadata, expected):
    assert parse_condition(text).is_met(metadata) is expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("width", "must be NAME"),
        ("width=200", "must be NAME"),
        ("width===200", "must be NAME"),
        (">=200", "must be NAME"),
        ("width>=", "must be NAME"),
        ("200<width<300", "needs a number"),
        ("language<en", "compares with a text"),
        ("width>__import__('os')", "needs a number"),
        ("x>nan", "needs a number"),
        ("x>1e999", "needs a number"),
        ("x==" + "y" * 300, "must be NAME"),
    ],
)
def test_what_is_no_condition_is_refused(text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_condition(text)


def test_the_config_names_the_field_of_a_bad_condition():
    assert DataConfig(filters=("width>=200",)).errors("data") == []
    [error] = DataConfig(filters=("width",)).errors("data")
    assert error.startswith("data.filters: 'width' must be NAME")
    [error] = DataConfig(filters=("a>1", "a>1")).errors("data")
    assert "is there twice" in error
    [error] = DataConfig(mixture={"web": MixtureSource(source="a.tar", filters=("b",))}).errors("data")
    assert error.startswith("data.mixture.web.filters: 'b'")
    [error] = DataConfig(filters=("a>1",), mixture={"web": MixtureSource(source="a.tar", filters=())}).errors("data")
    assert "would be ignored: each part of data.mixture has its own" in error
