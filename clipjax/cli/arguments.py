"""Command lines: options by argparse; configs by `ml_collections.config_flags`, in `overrides.py`.

A command makes a `Parser`, adds its options and calls `read`. `Arguments` then holds typed options, and loads the
config of `--config=FILE[:ARG]` with the overrides of `--config.FIELD=VALUE`. An option or a field that is given twice
is refused. Options that name a place are of type `path`, `source`, `data_source` or
`file_with_argument`, which expand `~`.
"""

import argparse
import difflib
import math
import pathlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from clipjax.cli.overrides import Override, load_config, override, split_overrides
from clipjax.config import Config
from clipjax.config.paths import READABLE, STORES, expand, expand_paths
from clipjax.runtime import launchers
from clipjax.runtime.storage import is_address

HELP_FLAGS = ("-h", "--help", "--helpfull", "-help")


@dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Attributes:
        options: the command's own options, by name, with their types.
        config_file: FILE[:ARG], None where none was given.
        overrides: of the config's fields, in the order of the command line.
    """

    options: argparse.Namespace
    config_file: str | None
    overrides: tuple[Override, ...]

    def config(self) -> Config:
        """Return the config of the file with the overrides in it and its paths expanded.

        Raises:
            ValueError: the file cannot be read, or an override does not fit its field.
        """
        assert self.config_file is not None
        config = override(load_config(self.config_file), self.overrides)
        expand_paths(config)
        return config


class _Once(argparse.Action):
    """Store a value, or True for a switch, and refuse a second one.

    Args:
        missing: what is wrong where the option is left out, after its name; None where it may be.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, *, missing: str | None = None, **known: Any) -> None:
        super().__init__(option_strings, dest, **known)
        self.missing = missing

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        assert isinstance(parser, Parser)
        if self.dest in parser.given:
            raise argparse.ArgumentError(self, "is given twice; give it once")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


class Parser(argparse.ArgumentParser):
    """The options of one command.

    Args:
        command: its name, for help.
        about: its help, before the options.
        config: "file" for a command with `--config=FILE` and overrides, "fields" for overrides alone, "" for neither.
        more: its help, after the options.
    """

    def __init__(self, command: str, about: str, *, config: str = "", more: str = "") -> None:
        super().__init__(
            prog=command,
            description=about,
            epilog=more or None,
            add_help=False,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.given: set[str] = set()
        self._config = config
        for name in (None, "store"):
            self.register("action", name, _Once)
        self.add_argument("--help", "-h", action="help", help="show this and leave")
        if config == "file":
            self.add_argument(
                "--config",
                metavar="FILE[:ARG]",
                type=file_with_argument,
                help="a Python file that defines get_config",
                missing="=FILE[:ARG] is missing; see configs/, for example --config=configs/quickstart.py",
            )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found."""
        message = re.sub(r"^argument (--\w[\w-]*)(?:/-\w)?: ", r"\1 ", message)
        raise ValueError(message.replace(" =", "=", 1) if re.match(r"--[\w-]+ =", message) else message)

    def read(self, argv: Sequence[str]) -> Arguments:
        """Parse the arguments behind the command's name.

        Raises:
            ValueError: anything that is not understood, given twice or missing.
        """
        self.given.clear()
        overrides, rest = split_overrides(argv) if self._config else ((), list(argv))
        options, unknown = self.parse_known_args(rest)
        if unknown:
            raise ValueError(self._unknown(unknown[0]))
        for action in self._actions:
            if isinstance(action, _Once) and action.missing is not None and action.dest not in self.given:
                raise ValueError(f"{action.option_strings[0]}{action.missing}")
        return Arguments(options, options.config if self._config == "file" else None, overrides)

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-") or argument.lstrip("-") == "":
            return f"argument {argument!r} is not understood; options look like --name=value"
        name = argument.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        close = difflib.get_close_matches(f"--{name.lstrip('-')}", known, n=1)
        fields = " and --config.FIELD=VALUE" if self._config else ""
        return f"unknown option {name}; " + (
            f"did you mean {close[0]}?" if close else f"options are {', '.join(known)}{fields}"
        )


def add_launch_options(parser: Parser) -> None:
    """Add the options by which several processes find each other."""
    metavars = {"coordinator": "HOST:PORT", "num_processes": "N", "process_id": "I"}
    for name, text in launchers.OPTIONS.items():
        parser.add_argument(f"--{name}", metavar=metavars[name], help=text)


def launch_options(argv: Sequence[str]) -> dict[str, str | None]:
    """Return the values of `launchers.OPTIONS`, whatever else is wrong with the command line.

    Processes meet by them before they parse the rest, so that an error there reaches all of them. Of an option that is
    given twice the last counts here; the parser refuses it later.
    """
    return {name: option_value(argv, name) for name in launchers.OPTIONS}


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without an option's name, and the others; behind `--` all are words, also `-a`."""
    words: list[str] = []
    rest: list[str] = []
    is_value = False
    for position, argument in enumerate(argv):
        if argument == "--":
            words += argv[position + 1 :]
            break
        is_word = not is_value and not (argument.startswith("-") and argument != "-")
        (words if is_word else rest).append(argument)
        is_value = argument.startswith("--") and "=" not in argument
    return words, rest


def option_value(argv: Sequence[str], option: str) -> str | None:
    """Return the last value of an option on a command line that is not parsed yet; None if it is not there."""
    found = None
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == f"--{option}":
            found = value if equals else next(iter(argv[position + 1 : position + 2]), None)
    return found


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether help was asked for."""
    return any(argument in HELP_FLAGS for argument in argv)


# Types of options


def path(text: str) -> pathlib.Path:
    """Return a path with `~` expanded."""
    if not text:
        raise argparse.ArgumentTypeError("= must name a file or folder")
    return pathlib.Path(source(text))


def place(text: str) -> pathlib.Path | str:
    """Return a path with `~` expanded, or the address of a folder or file of an object store."""
    if not text:
        raise argparse.ArgumentTypeError("= must name a file or folder")
    expanded = source(text, STORES)
    if not is_address(expanded):
        return pathlib.Path(expanded)
    if "//" in expanded.partition("://")[2].rstrip("/"):
        raise argparse.ArgumentTypeError(f"={text} has an empty folder name; write one slash between names")
    return expanded.rstrip("/")


def source(text: str, schemes: Collection[str] = ()) -> str:
    """Return a tokenizer or a command with `~` expanded."""
    try:
        return expand(text, "", schemes=schemes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def data_source(text: str) -> str:
    """Return a source of data with `~` expanded, or its address."""
    return source(text, READABLE)


def file_with_argument(text: str) -> str:
    """Return FILE[:ARG] with `~` expanded in the file."""
    if not text.partition(":")[0]:
        raise argparse.ArgumentTypeError(f"={text} must be FILE[:ARG], where FILE defines get_config()")
    return source(text)


def whole_number(least: int) -> Callable[[str], int]:
    """Return a type of whole numbers of at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"={text} must be a whole number of at least {least}")
        return int(text)

    return parse


def amount(text: str) -> float:
    """Return a number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"={text} must be a number above 0")
    return found


def choice(names: Collection[str]) -> Callable[[str], str]:
    """Return a type of names to choose from."""

    def parse(text: str) -> str:
        if text not in names:
            close = difflib.get_close_matches(text, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"={text} must be one of {', '.join(names)}{hint}")
        return text

    return parse


def yes_or_no(text: str) -> bool:
    """Return whether a switch is on."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"={text} must be yes or no")
    return text == "yes"
