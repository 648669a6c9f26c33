"""Configs as plain JSON values, back from untrusted ones, and dotted paths into them.

Paths look like `optim.learning_rate` or `eval.tasks['scenes/val'].source`. A member that may be one of several classes
(a tower) has the fields of all."""

import ast
import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeGuard

from clipjax.config.run import Config


def to_dict(config: Any) -> Any:
    """Plain JSON values: dataclasses as dicts, enums by value, tuples as lists; towers with their `kind`."""
    if dataclasses.is_dataclass(config):
        kind = getattr(config, "KIND", None)
        return ({} if kind is None else {"kind": kind}) | {
            item.name: to_dict(getattr(config, item.name)) for item in dataclasses.fields(config)
        }
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, enum.Enum):
        return config.value
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by their dotted path."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def from_dict(values: Any) -> Config:
    """The config that `to_dict` wrote, from untrusted JSON.

    Raises:
        ValueError: an unknown field, or a value of the wrong type.
    """
    return _parse(Config, values, "config")


def _parse(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = {item.name: typing.get_type_hints(kind)[item.name] for item in dataclasses.fields(kind)}
        if hasattr(kind, "KIND") and isinstance(value, dict):
            value = {name: item for name, item in value.items() if name != "kind"}
        if not isinstance(value, dict) or not set(value) <= set(hints):
            unknown = sorted(set(value) - set(hints)) if isinstance(value, dict) else value
            raise ValueError(f"{path}: unknown {unknown!r}; known fields: {', '.join(hints)}")
        return kind(**{name: _parse(hints[name], item, f"{path}.{name}") for name, item in value.items()})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        choices = [member.value for member in kind]
        if value not in choices:
            raise ValueError(f"{path}={value!r} must be one of {', '.join(choices)}")
        return kind(value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, dict):
        return {str(key): _parse(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_parse(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is types.UnionType:
        return (
            None if value is None and type(None) in arguments else _parse(_member(arguments, value, path), value, path)
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(kind, type) or type(value) is not kind:
        raise ValueError(f"{path}={value!r} must be of type {getattr(kind, '__name__', kind)}")
    return value


def _member(choices: Sequence[Any], value: Any, path: str) -> Any:
    """The type of a union that a value belongs to; towers carry their `kind`, and the first is meant without one."""
    known = {choice.KIND: choice for choice in choices if hasattr(choice, "KIND")}
    if not known or not isinstance(value, dict):
        return next(choice for choice in choices if choice is not type(None))
    kind = value.get("kind", next(iter(known)))
    if kind not in known:
        raise ValueError(f"{path}.kind={kind!r} must be one of {', '.join(known)}")
    return known[kind]


_PATH_PART = re.compile(
    r"""(?:^|\.) (?P<name> [^.\[\]='"]+)  # a field
    | \[ (?: (?P<quoted> '(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*") | (?P<bare> [^'"\]][^\]]*) ) \]  # a key
    """,
    re.VERBOSE,
)


def split_assignment(text: str) -> tuple[list[tuple[str, bool]], str]:
    """Return the parts of the path that a text begins with, as `path_parts`, and the rest of the text.

    A key may stand without quotes, which shells take away, and hold anything but `]` there.
    """
    parts, position = [], 0
    while match := _PATH_PART.match(text, position):
        key = match["bare"] if match["quoted"] is None else ast.literal_eval(match["quoted"])
        parts.append((match["name"], False) if match["name"] else (key, True))
        position = match.end()
    return parts, text[position:]


def path_parts(path: str) -> list[tuple[str, bool]]:
    """Names of a path, and whether each is a key of a dict.

    Raises:
        ValueError: it is no path.
    """
    parts, rest = split_assignment(path)
    if rest:
        raise ValueError(f"{path!r} is no path of a field: {rest!r} is not understood")
    return parts


def canonical_path(config_type: Any, path: str) -> str:
    """Return the one spelling of a path: keys of dicts in brackets and quotes, however they were written.

    Raises:
        ValueError: there is no such field.
    """
    field_type(config_type, path)
    spelled, current = "", config_type
    for name, _ in path_parts(path):
        if typing.get_origin(current) is dict:
            spelled += f"[{name!r}]"
            current = typing.get_args(current)[1]
        else:
            spelled += f".{name}"
            current = without_none(members(current)[name])
    return spelled.removeprefix(".")


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
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not types.NoneType]
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
    if types.NoneType in typing.get_args(annotation):
        return annotation  # a group that may be None can be set to that
    if inside := members(current) or (["NAME"] if typing.get_origin(current) is dict else []):
        raise ValueError(f"{path} is a group of fields; name one in it: {', '.join(inside)}")
    return annotation


def check_override(config_type: type, path: str, value: Any) -> None:
    """Checks that `value` fits the field at `path` of a config dataclass.

    Raises:
        ValueError: There is no such field, or the value has another type.
    """
    annotation = field_type(config_type, path)
    expected = without_none(annotation)
    if value is None and expected is not annotation:
        return
    if not _fits(value, expected):
        name = expected.__name__ if isinstance(expected, type) and not typing.get_args(expected) else str(expected)
        if _is_enum(expected):
            name = "one of " + ", ".join(member.name for member in expected)
        raise ValueError(f"{path}={value!r} is {type(value).__name__} and must be {name}")


def _is_enum(annotation: Any) -> TypeGuard[type[enum.Enum]]:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _fits(value: Any, expected: Any) -> bool:
    if typing.get_origin(expected) is tuple:
        types_ = typing.get_args(expected)
        if not isinstance(value, tuple):
            return False
        if len(types_) == 2 and types_[1] is Ellipsis:
            return all(_fits(item, types_[0]) for item in value)
        return len(value) == len(types_) and all(map(_fits, value, types_))
    if _is_enum(expected):
        names = [member.name for member in expected]
        return isinstance(value, expected) or (isinstance(value, str) and value.upper() in names)
    if isinstance(value, bool) or expected is bool:
        return isinstance(value, bool) and expected is bool
    return isinstance(value, int | float if expected is float else expected)
