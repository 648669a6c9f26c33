"""Configs as plain JSON values, back from untrusted ones, and dotted paths into them.

Paths look like `optim.learning_rate` or `eval.tasks['scenes/val'].source`. A member that may be one of several classes
(a tower) has the fields of all.

Reading order: `Annotation` takes a field's type apart; `read` walks along it, from JSON or from Python values;
`field_type` follows a path through it; `numbers` visits the numbers of a config with their fields' metadata.
"""

import ast
import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from clipjax.config.run import Config


@dataclasses.dataclass(frozen=True)
class Annotation:
    """A field's type, taken apart.

    Attributes:
        of: the type without None, for messages.
        optional: True if None is among its values.
        classes: the dataclasses that it may be; none for other types.
        values: the type of a dict's values; None for other types.
        items: the types of a tuple's items; None for other types.
        variadic: True if the tuple has any number of items of the one type.
    """

    of: Any
    optional: bool = False
    classes: tuple[type, ...] = ()
    values: Any = None
    items: tuple[Any, ...] | None = None
    variadic: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Types of the fields of all its dataclasses, by name."""
        found: dict[str, Any] = {}
        for kind in self.classes:
            hints = typing.get_type_hints(kind)
            found |= {item.name: hints[item.name] for item in dataclasses.fields(kind) if item.name not in found}
        return found

    @property
    def choices(self) -> type[enum.Enum] | None:
        """The enum that it is, if it is one."""
        return self.of if isinstance(self.of, type) and issubclass(self.of, enum.Enum) else None


def take_apart(annotation: Any) -> Annotation:
    """Read a type annotation of a config dataclass."""
    origin = typing.get_origin(annotation)
    arguments: tuple[Any, ...] = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        first, *others = (kind for kind in arguments if kind is not types.NoneType)
        if others:
            return Annotation(annotation, types.NoneType in arguments, classes=(first, *others))
        return dataclasses.replace(take_apart(first), optional=True)
    if origin is dict:
        return Annotation(annotation, values=arguments[1])
    if origin is tuple:
        variadic = arguments[-1] is Ellipsis
        return Annotation(annotation, items=arguments[:1] if variadic else arguments, variadic=variadic)
    classes: tuple[Any, ...] = (annotation,) if dataclasses.is_dataclass(annotation) else ()
    return Annotation(annotation, classes=classes)


def to_dict(config: Any) -> Any:
    """Return plain JSON values: dataclasses as dicts, enums by value, tuples as lists; towers with their `kind`."""
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
    """Return the values of nested dicts by their dotted path."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def from_dict(values: Any) -> Config:
    """Return the config that `to_dict` wrote, from untrusted JSON.

    Raises:
        ValueError: an unknown field, or a value of the wrong type.
    """
    return read(Config, values, "config")


def read(annotation: Any, value: Any, path: str, *, strict: bool = False) -> Any:
    """Return the value of an annotated type that JSON, or an override in Python, stands for.

    Args:
        annotation: of the field.
        value: from JSON: enums by value, tuples as lists of any length.
        path: of the field, for messages.
        strict: a Python value instead: enums as members or by name, tuples as tuples of the right length.

    Raises:
        ValueError: an unknown field, or a value of the wrong type.
    """
    kind = take_apart(annotation)
    if kind.optional and value is None:
        return None
    if kind.classes:
        return _read_fields(kind.classes, value, path, strict)
    if kind.choices is not None:
        return _read_choice(kind.choices, value, path, strict)
    if kind.values is not None and isinstance(value, dict):
        return {str(key): read(kind.values, item, f"{path}.{key}", strict=strict) for key, item in value.items()}
    if kind.items is not None and isinstance(value, tuple if strict else list | tuple):
        items = kind.items if strict and not kind.variadic else kind.items[:1] * len(value)
        if len(items) == len(value):
            pairs = zip(items, value, strict=True)
            return tuple(read(item, one, f"{path}[{i}]", strict=strict) for i, (item, one) in enumerate(pairs))
    if kind.of is float and type(value) is int:
        return float(value)
    if not isinstance(kind.of, type) or type(value) is not kind.of:
        raise ValueError(f"{path}={value!r} must be of type {getattr(kind.of, '__name__', kind.of)}")
    return value


def _read_fields(classes: tuple[type, ...], value: Any, path: str, strict: bool) -> Any:
    """Read one of several dataclasses: towers carry their `kind`, and the first is meant without one."""
    chosen, values = classes[0], value
    if hasattr(chosen, "KIND") and isinstance(value, dict):
        known = {kind.KIND: kind for kind in classes if hasattr(kind, "KIND")}
        kind = value.get("kind", next(iter(known)))
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(f"{path}.kind={kind!r} must be one of {', '.join(known)}")
        chosen, values = known[kind], {name: item for name, item in value.items() if name != "kind"}
    fields = Annotation(chosen, classes=(chosen,)).fields
    if not isinstance(values, dict) or not set(values) <= set(fields):
        unknown = sorted(set(values) - set(fields)) if isinstance(values, dict) else values
        raise ValueError(f"{path}: unknown {unknown!r}; known fields: {', '.join(fields)}")
    found = {name: read(fields[name], item, f"{path}.{name}", strict=strict) for name, item in values.items()}
    return chosen(**found)


def _read_choice(choices: type[enum.Enum], value: Any, path: str, strict: bool) -> enum.Enum:
    if strict and isinstance(value, choices):
        return value
    known = {member.name if strict else member.value: member for member in choices}
    name = value.upper() if strict and isinstance(value, str) else value
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{path}={value!r} must be one of {', '.join(known)}")
    return known[name]


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
    """Return the names of a path, each with True if it is a key of a dict.

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
    spelled, kind = "", take_apart(config_type)
    for name, _ in path_parts(path):
        if kind.values is not None:
            spelled += f"[{name!r}]"
            kind = take_apart(kind.values)
        else:
            spelled += f".{name}"
            kind = take_apart(kind.fields[name])
    return spelled.removeprefix(".")


def field_value(config: Any, path: str) -> Any:
    """Return the value at a path; None where the config's tower has no such field."""
    for name, _ in path_parts(path):
        config = config[name] if isinstance(config, dict) else getattr(config, name, None)
    return config


def members(annotation: Any) -> dict[str, Any]:
    """Return the types of the fields of a dataclass, or of all dataclasses of a union; empty for anything else."""
    return take_apart(annotation).fields


def field_type(config_type: Any, path: str) -> Any:
    """Return the annotated type of the field at a path.

    Raises:
        ValueError: there is no such field (the message proposes a near one), or it is a group of fields.
    """
    annotation, kind, walked = config_type, take_apart(config_type), "the config"
    for name, _ in path_parts(path):
        if kind.values is not None:
            annotation = kind.values
        elif name in (known := kind.fields):
            annotation = known[name]
        else:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
            raise ValueError(f"{path}: {walked} has no field {name!r}; {remedy}")
        kind, walked = take_apart(annotation), name
    inside = kind.fields or (["NAME"] if kind.values is not None else [])
    if inside and not kind.optional:  # None is a value of an optional group
        raise ValueError(f"{path} is a group of fields; name one in it: {', '.join(inside)}")
    return annotation


def check_override(config_type: type, path: str, value: Any) -> None:
    """Check that `value` fits the field at `path` of a config dataclass.

    Raises:
        ValueError: there is no such field, or the value has another type.
    """
    annotation = field_type(config_type, path)
    try:
        read(annotation, value, path, strict=True)
    except ValueError as error:
        kind = take_apart(annotation)
        name = kind.of.__name__ if isinstance(kind.of, type) and kind.items is None else str(kind.of)
        if kind.choices is not None:
            name = "one of " + ", ".join(member.name for member in kind.choices)
        raise ValueError(f"{path}={value!r} is {type(value).__name__} and must be {name}") from error


def numbers(config: Any, path: str = "") -> Iterator[tuple[str, int | float, Mapping[str, Any]]]:
    """Visit the numbers of a config, those in dicts and tuples too: path, value, metadata of the field."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from numbers(value, f"{path}.{name}")
    elif dataclasses.is_dataclass(config):
        for item in dataclasses.fields(config):
            inside, value = f"{path}.{item.name}" if path else item.name, getattr(config, item.name)
            yield from numbers(value, inside)
            items = [(f"{inside}[{i}]", one) for i, one in enumerate(value)] if isinstance(value, tuple) else []
            items += [(f"{inside}.{name}", one) for name, one in value.items()] if isinstance(value, dict) else []
            for place, number in items or [(inside, value)]:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    yield place, number, item.metadata
