"""Command lines: a config file, overrides of its fields, and a few options.

`parse` turns arguments into a config. Configs are parsed by `ml_collections.config_flags`.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from absl import flags
from ml_collections import config_flags

from clipjax.config import Config
from clipjax.config.serialization import field_type, members, path_parts


@dataclass(frozen=True)
class Arguments:
    """A parsed command line: the config, and the options by name (None where not given)."""

    config: Config
    options: Mapping[str, str | None]


def options_help(program: str, about: str, options: Mapping[str, str]) -> str:
    """The help of a command that takes options and no config."""
    usage = " ".join([program, *(f"--{name}=..." for name in options)])
    lines = [f"  --{name:<10} {text}" for name, text in options.items()]
    return "\n".join([about, "", f"  {usage}", *([""] if lines else []), *lines])


def parse(program: str, argv: Sequence[str], *, options: Mapping[str, str], config: Config | None = None) -> Arguments:
    """Parse `--config=FILE[:ARG]`, `--config.FIELD=VALUE` and `--OPTION=VALUE`.

    Args:
        program: what errors and help call the command.
        argv: the arguments after it.
        options: names and help texts.
        config: if given, overrides apply to it and `--config=FILE` is not accepted.

    Raises:
        ValueError: anything that cannot be understood, with field, value, rule and remedy.
    """
    values = _define(options)
    argv, cleared = _split_none(argv)
    if config is not None:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=[program, *argv])
    else:
        if not any(re.match(r"--?config(=|$)", argument) for argument in argv):
            raise ValueError("--config=FILE[:ARG] is missing; see configs/, for example --config=configs/quickstart.py")
        config_flags.DEFINE_config_file("config", flag_values=values, lock_config=False, sys_argv=[program, *argv])
    _read(values, [program, *argv])
    parsed = values["config"].value
    _check_loaded(parsed)
    if not isinstance(parsed, Config):
        raise ValueError(f"--config: get_config() must return a clipjax.config.Config, not {type(parsed).__name__}")
    for path in cleared:
        _set_none(parsed, path)
    return Arguments(parsed, {name: values[name].value for name in options})


def _define(options: Mapping[str, str]) -> flags.FlagValues:
    values = flags.FlagValues()
    for name, text in options.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    return values


def parse_options(program: str, argv: Sequence[str], *, options: Mapping[str, str]) -> dict[str, str | None]:
    """Parse `--OPTION=VALUE` alone; None where one is not given.

    Raises:
        ValueError: anything that cannot be understood.
    """
    values = _define(options)
    _read(values, [program, *argv])
    return {name: values[name].value for name in options}


def option_value(argv: Sequence[str], name: str) -> str | None:
    """One option's value, where it is needed before the rest can be parsed."""
    for position, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            return value if equals else next(iter(argv[position + 1 : position + 2]), None)
    return None


def option_values(argv: Sequence[str], names: Iterable[str]) -> dict[str, str | None]:
    """Values of some options, None where one is not given."""
    return {name: option_value(argv, name) for name in names}


def _check_loaded(parsed: Any) -> None:
    """ml_collections hands a stand-in for a file that it could not read; any look at its fields raises why."""
    try:
        hasattr(parsed, "seed")
    except OSError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"--config: {lines[-1]}") from error


def _read(values: flags.FlagValues, argv: list[str]) -> None:
    """Parse, reword what absl and ml_collections raise, and refuse what is left over."""
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        known = [name for name in values if name != "config" and "." not in name]
        close = difflib.get_close_matches(error.flagname, [*known, "config"], n=1)
        config = "--config and " if "config" in values else ""
        hint = f"did you mean --{close[0]}?" if close else f"options are {config}{', '.join(known)}"
        raise ValueError(f"unknown option --{error.flagname}; {hint}") from error
    except flags.Error as error:
        raise ValueError(str(error).removeprefix("flag ")) from error
    except (KeyError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(_unknown_field(argv) or f"config: {error}") from error
    except OSError as error:
        raise ValueError(f"--config: {error}") from error
    if len(rest) > 1:
        raise ValueError(f"argument {rest[1]!r} is not understood; options look like --name=value")


def _unknown_field(argv: Sequence[str]) -> str | None:
    """What is wrong with the first override whose path does not exist, and the nearest name that does."""
    for path in (match[1] for argument in argv if (match := re.match(r"--?config\.([^=]+)", argument))):
        try:
            field_type(Config, path)
        except ValueError as error:
            return f"config.{error}"
    return None


def _split_none(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take out overrides of optional fields by `none`, which the typed parsers do not know."""
    kept, cleared = [], []
    for argument in argv:
        match = re.match(r"--?config\.([^=]+)=[nN]one$", argument)
        if match and _is_optional(match[1]):
            cleared.append(match[1])
        else:
            kept.append(argument)
    return kept, cleared


def _is_optional(path: str) -> bool:
    try:
        return types.NoneType in typing.get_args(field_type(Config, path))
    except ValueError:
        return False


def _set_none(config: Any, path: str) -> None:
    parent, (last, _) = config, path_parts(path)[-1]
    for name, is_key in path_parts(path)[:-1]:
        parent = parent[name] if is_key else getattr(parent, name)
    setattr(parent, last, None)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether help was asked for."""
    return any(argument in ("-h", "--help", "--helpfull", "-help") for argument in argv)


def describe_fields(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every config field with its type and default, a line each, for help."""
    lines = []
    default = kind()
    for name, hint in members(kind).items():
        value = getattr(default, name)
        if is_dataclass(value):
            towers = [choice for choice in (typing.get_args(hint) or (hint,)) if is_dataclass(choice)]
            for tower in towers:
                if len(towers) > 1:
                    lines.append(f"  {prefix}{name} as {getattr(tower, '__name__', tower)}:")
                lines += describe_fields(tower, f"{prefix}{name}.")
        else:
            shown = getattr(value, "value", value)
            kind_name = getattr(hint, "__name__", str(hint)).replace("clipjax.config.", "")
            lines.append(f"  --config.{prefix}{name}={shown!r}  ({kind_name})".replace("'", ""))
    return lines
