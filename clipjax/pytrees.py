"""Nested dicts of arrays by path: names, ordered path rules.

A path is the keys joined by "/", e.g. `image/blocks/attn/qkv/kernel`; attributes and indices of other containers
(an optimizer state) take part in the same way.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def leaf_path(path: Sequence[Any]) -> str:
    """The name of one leaf, from the key path that `jax.tree_util` gives."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Apply `function(name, leaf)` to every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(leaf_path(path), leaf), tree)


def leaf_paths(tree: Any) -> list[str]:
    """Return the paths of all leaves, in tree order."""
    return [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def first_match(rules: Sequence[tuple[str, T]], name: str) -> T | None:
    """The value of the first rule whose regular expression matches the whole name, or its end after a "/"."""
    for pattern, value in rules:
        if re.fullmatch(f"(?:.*/)?(?:{pattern})", name):
            return value
    return None


def match_any(patterns: Sequence[str], name: str) -> bool:
    """Return True if one of the regular expressions matches the whole path."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def to_flat(tree: Any) -> dict[str, Any]:
    """Return the leaves by path."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def from_flat(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose leaves have these names."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        inside = tree
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[last] = leaf
    return tree
