"""Peers' files: weights and JSON, read without unpickling and written whole or not at all."""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

MAX_JSON_BYTES = 16 * 2**20
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def read_json(path: pathlib.Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: it cannot be read, is too large, or is no JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MAX_JSON_BYTES} bytes: no config file")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def find_weights(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the weights: one file, or those of a directory.

    Raises:
        ValueError: there are none, or none that can be read without unpickling.
    """
    if path.is_file():
        found = [path]
    elif path.is_dir():
        files = sorted(child for child in path.iterdir() if child.is_file())
        by_kind = ([file for file in files if file.suffix in kind] for kind in ((".safetensors",), (".npz",), _PICKLES))
        found = next(filter(None, by_kind), [])
    else:
        raise ValueError(f"--input={path}: no such file or directory")
    if not found:
        raise ValueError(f"--input={path} holds no *.safetensors and no *.npz")
    if found[0].suffix in _PICKLES:
        raise ValueError(
            f"{found[0]}: a pickle can run any code when it is opened, so clipjax reads *.safetensors and *.npz only; "
            "most hubs offer the same weights as safetensors, or `torch.load(..., weights_only=True)` and "
            "`safetensors.torch.save_file` make them"
        )
    return found


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays by name, as they are on disk.

    Raises:
        ValueError: a file is damaged, of another kind, or repeats a name.
    """
    weights: dict[str, np.ndarray] = {}
    for file in find_weights(path):
        found = _read_npz(file) if file.suffix == ".npz" else _read_safetensors(file)
        if twice := sorted(found.keys() & weights.keys()):
            raise ValueError(f"{file}: holds again {', '.join(twice[:3])}, which another file gave")
        weights |= found
    return weights


def _read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy all raise their own kinds
        raise ValueError(f"{file} is damaged or no .npz of plain arrays: {error}") from error


def check_new(path: pathlib.Path) -> None:
    """Refuse to write over anything.

    Raises:
        ValueError: there is something of that name already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output={path} is not empty; choose another, or remove it")


@contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to fill, which takes its name only when all of it is there.

    Raises:
        ValueError: there is something of that name already, or it cannot be made.
    """
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ValueError(f"--output={path}: cannot be written to ({error.strerror}); choose another") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.is_dir():
            path.rmdir()
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_weights(file: pathlib.Path, weights: Mapping[str, np.ndarray]) -> None:
    """A safetensors file that PyTorch's readers take for their own."""
    from safetensors.numpy import save_file

    save_file(dict(weights), file, metadata={"format": "pt"})


def write_json(file: pathlib.Path, value: Any) -> None:
    """Indented, for people."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
