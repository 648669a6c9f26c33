"""Dotted paths into a config, such as `optim.learning_rate` or `eval.tasks['scenes/val'].source`.

Free of JAX, as `clipjax.config` is. A member that may be one of several classes (a tower) has the fields of all.
"""

import dataclasses
import difflib
import re
import types
import typing
from typing import Any


def path_parts(path: str) -> list[tuple[str, bool]]:
    """Names of a path, and whether each is a key of a dict."""
    found = re.findall(r"([^.\[\]]+)|\[['\"]([^'\"]+)['\"]\]", path)
    return [(name or key, bool(key)) for name, key in found]


def field_value(config: Any, path: str) -> Any:
    """The value at a path; None where the config's tower has no such field."""
    for name, _ in path_parts(path):
        config = config[name] if isinstance(config, dict) else getattr(config, name, None)
    return config


def without_none(annotation: Any) -> Any:
    """The type of an optional field."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [member for member in typing.get_args(annotation) if member is not types.NoneType]
        return inner[0] if len(inner) == 1 else annotation
    return annotation


def members(annotation: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass, or of all dataclasses of a union; empty for anything else."""
    kinds = typing.get_args(annotation) or (annotation,)
    hints: dict[str, Any] = {}
    for kind in kinds if all(map(dataclasses.is_dataclass, kinds)) else ():
        annotations = typing.get_type_hints(kind)
        hints |= {item.name: annotations[item.name] for item in dataclasses.fields(kind) if item.name not in hints}
    return hints


def field_type(config_type: Any, path: str) -> Any:
    """The annotated type of the field at a path.

    Raises:
        ValueError: there is no such field (the message proposes a near one), or it is a group of fields.
    """
    current: Any = config_type
    annotation: Any = config_type
    walked = "the config"
    for name, _ in path_parts(path):
        if typing.get_origin(current) is dict:
            annotation = typing.get_args(current)[1]
        else:
            known = members(current)
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
                raise ValueError(f"{path}: {walked} has no field {name!r}; {remedy}")
            annotation = known[name]
        current, walked = without_none(annotation), name
    if inside := members(current) or (["NAME"] if typing.get_origin(current) is dict else []):
        raise ValueError(f"{path} is a group of fields; name one in it: {', '.join(inside)}")
    return annotation
