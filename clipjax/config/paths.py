"""Paths: every field that names a place, `~` expanded; addresses of object stores, where they can be used.

Options of commands that name a place use `expand` too, so that one rule holds everywhere. An address that nothing opens
there is refused: as a path it would be a folder named `gs:`.
"""

import contextlib
import copy
import os.path
import re
from collections.abc import Collection

from clipjax.config.data import TFDS_PREFIX
from clipjax.config.run import Config
from clipjax.config.serialization import field_value

PATH_FIELDS = (
    "init_from",
    "compile_cache",
    "loss.distill_from",
    "data.train",
    "data.tfds_dir",
    "data.cache_dir",
    "data.image_root",
    "data.keep_keys",
    "data.drop_keys",
    "data.tokenizer",
)
"""Fields that name a place, besides `source` of each part of a mixture and `TASK_PATH_FIELDS` of every task."""

TASK_PATH_FIELDS = (
    "source",
    "gallery",
    "train_source",
    "classes",
    "templates",
    "paraphrases",
    "overlap",
    "shift_points",
    "tfds_dir",
)

_ON_DISK = ("compile_cache", "data.cache_dir")
"""Fields of folders that are to be on a disk."""

_KIND = re.compile(
    r"(?:clip|sentencepiece|huggingface|siglip2?|folder):"
)  # of a tokenizer or a source, before its path

STORES = ("gs", "s3", "az")
"""Schemes of the object stores, which list, read and write."""

READABLE = (*STORES, "http", "https")
"""Schemes of everything that files are read from."""

_OTHER_NAMES = {
    "gs": ("gcs",),
    "s3": ("s3a", "s3n"),
    "az": ("azure", "abfs", "abfss", "adl", "adls", "wasb", "wasbs"),
}
_REMEDIES = {
    "file": "give the path alone",
    "pipe": "no commands are run; copy the files to a disk or an object store, and give the place",
}
_KNOWN = {*READABLE, *_REMEDIES, "hdfs", "hf", *(name for names in _OTHER_NAMES.values() for name in names)}
_SCHEME = re.compile(r"(?:^|(?<=[{,]))(\s*)([A-Za-z][A-Za-z0-9+.-]+):(/*)([^/]?)")  # C:/ is a drive
_HOME = re.compile(r"(?:^|(?<=[{,]))~[^/{},]*")


def expand(text: str, name: str, *, schemes: Collection[str] = ()) -> str:
    """Return a path with `~` and `~user` expanded, also in the alternatives of a brace pattern; or an address.

    Args:
        text: a path, an address, a brace pattern, a tokenizer's `KIND:PATH`, `folder:PATH`, or `tfds:NAME/SPLIT`, which
            is no path.
        name: of the field or option, for messages.
        schemes: of the addresses that can be used here.

    Raises:
        ValueError: an address that cannot be used here; or a user who does not exist.
    """
    if text.startswith(TFDS_PREFIX):
        return text
    kind = match[0] if (match := _KIND.match(text)) else ""
    path = text.removeprefix(kind)
    for found in _SCHEME.finditer(path):
        if fault := _fault(*found.groups(), schemes=schemes):
            raise ValueError(f"{name}={text}: {fault}")
    return kind + _HOME.sub(lambda found: _home(found[0], text, name), path)


def _fault(space: str, scheme: str, slashes: str, rest: str, *, schemes: Collection[str]) -> str:
    """Return what is wrong with the beginning of an address; empty for one that can be used, and for a path."""
    known = scheme.lower()
    if not slashes and known not in _KNOWN:
        return ""  # a file named a:b
    for right, others in _OTHER_NAMES.items():
        known = right if known in others else known
    if remedy := _REMEDIES.get(known):
        return f"nothing here opens an address of {scheme}://; {remedy}"
    if known in schemes:
        if (space, scheme, slashes) == ("", known, "//") and rest:
            return ""
        return f"an address of {known} begins with {known}:// and a name, without spaces; write {known}://NAME/..."
    used = f" for this, which takes {', '.join(f'{each}://' for each in schemes)}" if schemes else ""
    return f"nothing here opens an address of {scheme}://{used}; copy it to a disk or mount it, and give the path there"


def schemes_of(field: str) -> tuple[str, ...]:
    """Return the schemes of the addresses that a field of the config takes."""
    if field in ("init_from", "loss.distill_from") or field.endswith(".tfds_dir"):
        return STORES
    return READABLE if is_path_field(field) and field not in _ON_DISK else ()


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
    mixture = config.data.mixture
    for key, part in mixture.items() if isinstance(mixture, dict) else ():
        errors += _expand_field(part, "source", f"data.mixture.{key}.source")
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
        setattr(owner, name, expand(value, path, schemes=schemes_of(path)))
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
    """Return whether the field at a dotted path names a place."""
    name = path.rpartition(".")[2]
    in_mixture = path.startswith("data.mixture") and name == "source"
    return path in PATH_FIELDS or in_mixture or (path.startswith("eval.tasks") and name in TASK_PATH_FIELDS)
