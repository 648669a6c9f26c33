"""Paths: every field that names a place on disk, `~` expanded, and addresses that nothing opens refused.

Options of commands that name a place use `expand` too, so that one rule holds everywhere.
"""

import contextlib
import copy
import os.path
import re
from collections.abc import Collection

from clipjax.config.run import Config
from clipjax.config.serialization import field_value

PATH_FIELDS = (
    "init_from",
    "compile_cache",
    "loss.distill_from",
    "data.train",
    "data.tfds_dir",
    "data.image_root",
    "data.tokenizer",
)
"""Fields that name a place, besides `TASK_PATH_FIELDS` of every task."""

TASK_PATH_FIELDS = ("source", "gallery", "classes", "templates")

_KIND = re.compile(
    r"(?:clip|sentencepiece|huggingface|siglip2?|folder):"
)  # of a tokenizer or a source, before its path
_NOT_A_PATH = "tfds:"
_SCHEME = re.compile(r"(?:^|[{,])\s*([A-Za-z][A-Za-z0-9+.-]+):/")  # C:/ is a drive
_HOME = re.compile(r"(?:^|(?<=[{,]))~[^/{},]*")


def expand(text: str, name: str) -> str:
    """Return a path with `~` and `~user` expanded, also in the alternatives of a brace pattern.

    Args:
        text: a path, a brace pattern, a tokenizer's `KIND:PATH`, `folder:PATH`, or `tfds:NAME/SPLIT`, which is no path.
        name: of the field or option, for messages.

    Raises:
        ValueError: an address with a scheme, such as gs://, which nothing here opens; or a user who does not exist.
    """
    if text.startswith(_NOT_A_PATH):
        return text
    kind = match[0] if (match := _KIND.match(text)) else ""
    path = text.removeprefix(kind)
    if scheme := _SCHEME.search(path):
        raise ValueError(
            f"{name}={text}: nothing here opens an address of {scheme[1]}://; copy it to a disk or mount it, and give "
            "the path there"
        )
    return kind + _HOME.sub(lambda found: _home(found[0], text, name), path)


def _home(user: str, text: str, name: str) -> str:
    home = os.path.expanduser(user)  # noqa: PTH111  pathlib raises RuntimeError
    if home.startswith("~"):
        raise ValueError(f"{name}={text}: there is no user {user[1:]!r}; for a file of that name write ./{user}")
    return home


def expand_paths(config: Config, *, skip: Collection[str] = ()) -> None:
    """Expand all path fields of a config in place; values of a wrong type are left to `validate`.

    Args:
        config: to change.
        skip: fields that nothing will open.

    Raises:
        ValueError: everything that is wrong with them, a line each.
    """
    errors = []
    for path in PATH_FIELDS:
        group, _, name = path.rpartition(".")
        if path not in skip:
            errors += _expand_field(field_value(config, group), name, path)
    tasks = config.eval.tasks
    for key, task in tasks.items() if isinstance(tasks, dict) else ():
        for name in TASK_PATH_FIELDS:
            errors += _expand_field(task, name, f"eval.tasks[{key!r}].{name}")
    if errors:
        raise ValueError("\n".join(errors))


def _expand_field(owner: object, name: str, path: str) -> list[str]:
    value = getattr(owner, name, None)
    if not isinstance(value, str):
        return []
    try:
        setattr(owner, name, expand(value, path))
    except ValueError as error:
        return [str(error)]
    return []


def expanded(config: Config) -> Config:
    """Return a copy with all paths expanded, as far as they can be."""
    config = copy.deepcopy(config)
    with contextlib.suppress(ValueError):
        expand_paths(config)
    return config


def is_path_field(path: str) -> bool:
    """Return whether the field at a dotted path names a place on disk."""
    return path in PATH_FIELDS or (path.startswith("eval.tasks") and path.rpartition(".")[2] in TASK_PATH_FIELDS)
