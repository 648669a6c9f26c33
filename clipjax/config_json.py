"""A config as plain JSON values, and back from untrusted ones. Free of JAX, as `clipjax.config` is."""

import dataclasses
import enum
import types
import typing
from collections.abc import Sequence
from typing import Any

from clipjax.config import Config


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
