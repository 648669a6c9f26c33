"""Configs on command lines: `--config=FILE[:ARG]` and `--config.FIELD=VALUE`, by `ml_collections.config_flags`.

Reading order: `split_overrides` (from arguments to overrides), `load_config`, `override`. Every spelling of a field
becomes one: keys of dicts may be written with any quotes or, since shells take quotes away, with none.
"""

import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from absl import flags
from ml_collections import config_flags

from clipjax.config import Config
from clipjax.config.serialization import canonical_path, field_type, field_value, members, path_parts, split_assignment


@dataclass(frozen=True)
class Override:
    """One `--config.FIELD=VALUE`: the field's path in its one spelling, and the text of its value."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"--config.{self.path}={self.text}"


def split_overrides(argv: Sequence[str]) -> tuple[tuple[Override, ...], list[str]]:
    """Take the `--config.FIELD=VALUE` out of the arguments: they and the rest.

    Raises:
        ValueError: a field does not exist, has no value, or is given twice.
    """
    overrides: dict[str, Override] = {}
    rest, position = [], 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        parts, value = split_assignment(argument.removeprefix("--config."))
        spelled = argument.removeprefix("--config.").removesuffix(value)
        if not parts or (value and not value.startswith("=")):
            raise ValueError(f"{argument} is not understood; write --config.FIELD=VALUE")
        try:
            name = canonical_path(Config, spelled)
        except ValueError as error:
            raise ValueError(f"config.{error}") from error
        if not value:
            if field_type(Config, name) is bool:
                value = "=true"
            elif position == len(argv) or argv[position].startswith("--"):
                raise ValueError(f"--config.{spelled} has no value; write --config.{spelled}=VALUE")
            else:
                value, position = f"={argv[position]}", position + 1
        if name in overrides:
            raise ValueError(
                f"--config.{spelled} is given twice, {overrides[name].text!r} and {value[1:]!r}; give it once "
                "(a shell makes several arguments of braces that are not quoted)"
            )
        overrides[name] = Override(name, value[1:])
    return tuple(overrides.values()), rest


def load_config(file: str) -> Config:
    """Return what `get_config` of FILE[:ARG] returns.

    Raises:
        ValueError: the file cannot be read, fails, or returns something else.
    """
    values = flags.FlagValues()
    argv = ["clipjax", f"--config={file}"]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=False, sys_argv=argv)
    _read(values, argv)
    loaded = values["config"].value
    try:
        hasattr(loaded, "seed")
    except OSError as error:  # a stand-in for a file that could not be read; any look at its fields raises why
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"--config: {lines[-1]}") from error
    if not isinstance(loaded, Config):
        raise ValueError(f"--config: get_config() must return a clipjax.config.Config, not {type(loaded).__name__}")
    return loaded


def override(config: Config, overrides: Sequence[Override]) -> Config:
    """Return a copy of a config with overrides in it.

    Raises:
        ValueError: a task is unknown, or a value does not fit its field.
    """
    for one in overrides:
        _check_keys(config, one)
    cleared = [one for one in overrides if one.text.lower() == "none" and _is_optional(one.path)]
    argv = ["clipjax", *(f"--config.{_flag_name(one.path)}={one.text}" for one in overrides if one not in cleared)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"config: {error}") from error
    _read(values, argv)
    changed: Any = values["config"].value
    for one in cleared:
        _set_none(changed, one.path)
    return changed


def _flag_name(spelled: str) -> str:
    """A path without the characters that the name of a flag cannot have; they stand in quoted keys alone."""
    return spelled.replace("=", r"\x3d").replace(" ", r"\x20")


def _check_keys(config: Config, one: Override) -> None:
    """Refuse an override of a task that is not there."""
    walked: Any = config
    for name, is_key in path_parts(one.path):
        if is_key and name not in walked:
            known = ", ".join(map(repr, walked)) or "none"
            close = difflib.get_close_matches(name, walked, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"config.{one.path}: there is no {name!r}; known: {known}{hint}")
        walked = walked[name] if is_key else getattr(walked, name, None)


def _read(values: flags.FlagValues, argv: list[str]) -> None:
    """Parse, and reword what absl and ml_collections raise."""
    try:
        values(argv)
    except flags.Error as error:
        text = re.sub(r"invalid literal for int\(\) with base 10: .*", "must be a whole number", str(error))
        text = re.sub(r"could not convert string to float: .*", "must be a number", text)
        raise ValueError(text.removeprefix("flag ")) from error
    except (KeyError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(f"config: {error}") from error
    except OSError as error:
        raise ValueError(f"--config: {error}") from error


def _is_optional(name: str) -> bool:
    return types.NoneType in typing.get_args(field_type(Config, name))


def _set_none(config: Any, name: str) -> None:
    (*_, (last, _)) = parts = path_parts(name)
    parent = config
    for part, is_key in parts[:-1]:
        parent = parent[part] if is_key else getattr(parent, part)
    setattr(parent, last, None)


def changes(before: Config, after: Config, overrides: Sequence[Override]) -> list[str]:
    """Return what overrides changed, each as `FIELD=VALUE (was VALUE)`."""
    found = []
    for one in overrides:
        old, new = (getattr(value, "value", value) for value in (field_value(c, one.path) for c in (before, after)))
        if old != new:
            found.append(f"{one.path}={new} (was {old})")
    return found


def describe_fields(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every config field with its type and default, a line each, for help."""
    lines = []
    default = kind()
    for name, hint in members(kind).items():
        value = getattr(default, name)
        if is_dataclass(value):
            towers = [tower for tower in (typing.get_args(hint) or (hint,)) if is_dataclass(tower)]
            for tower in towers:
                if len(towers) > 1:
                    lines.append(f"  {prefix}{name} as {getattr(tower, '__name__', tower)}:")
                lines += describe_fields(tower, f"{prefix}{name}.")
        else:
            shown = getattr(value, "value", value)
            kind_name = getattr(hint, "__name__", str(hint)).replace("clipjax.config.", "")
            lines.append(f"  --config.{prefix}{name}={shown!r}  ({kind_name})".replace("'", ""))
    return lines
