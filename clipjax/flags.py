"""Command lines of the front doors: a config file, overrides of its fields, a few options, and clear refusals.

`parse` turns arguments into a validated config; `front_door` turns a `ValueError` raised before the work starts into
one message and exit code 2. Configs are parsed by `ml_collections.config_flags`.
"""

import contextlib
import difflib
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from clipjax import rank_log
from clipjax.config import Config
from clipjax.fields import field_type, members, path_parts

USAGE_ERROR = 2

UNUSABLE_DATA = 3
"""Exit code of training that a person has to look at: started again, it would stop at the same place."""


@dataclass(frozen=True)
class Arguments:
    """A parsed command line: the config, and the options by name (None where not given)."""

    config: Config
    options: Mapping[str, str | None]


def front_door(program: str, prepare: Callable[[], Callable[[], int]]) -> int:
    """Prepare the work, then do it; returns the exit code.

    A `ValueError` or `OSError` while preparing is the user's to mend: its message goes to stderr, without a traceback,
    and the exit code is 2. What `prepare` returns runs outside of that, so a defect of ours shows in full.
    """
    logging.set_verbosity(logging.ERROR)
    try:
        work = prepare()
    except (ValueError, OSError) as error:
        fail(program, error)
        return USAGE_ERROR
    return work()


def attempt(program: str, work: Callable[[], object]) -> bool:
    """Do work that the user's files and disk can foil: whether it was done; if not, the reason has been told."""
    try:
        work()
    except (ValueError, OSError) as error:
        fail(program, error)
        return False
    return True


def options_door(
    program: str,
    about: str,
    options: Mapping[str, str],
    prepare: Callable[[Mapping[str, str | None]], Callable[[], int]],
    argv: Sequence[str] | None,
) -> int:
    """The front door of a command that takes options and no config: help, or `prepare(options)` and the work."""
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        usage = " ".join([program, *(f"--{name}=..." for name in options)])
        lines = [f"  --{name:<10} {text}" for name, text in options.items()]
        print("\n".join([about, "", f"  {usage}", *([""] if lines else []), *lines]))
        return 0
    return front_door(program, lambda: prepare(parse_options(program, argv, options=options)))


def fail(program: str, error: Exception) -> None:
    """Print an error's message for a person, a line per finding."""
    for line in str(error).splitlines() or [repr(error)]:
        print(f"{program}: error: {line}", file=sys.stderr)
        rank_log.note(f"error: {line}")


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
            kind_name = (
                getattr(hint, "__name__", str(hint)).replace("clipjax.config.", "").replace("clipjax.choices.", "")
            )
            lines.append(f"  --config.{prefix}{name}={shown!r}  ({kind_name})".replace("'", ""))
    return lines


def require_writable(workdir: pathlib.Path) -> None:
    """Make the workdir.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".write-probe"
        probe.write_bytes(b"")
    except OSError as error:
        raise ValueError(f"--workdir={workdir}: cannot be written to ({error.strerror}); choose another") from error
    with contextlib.suppress(OSError):
        probe.unlink()
