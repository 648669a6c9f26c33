"""Peers' files: weights and JSON, read without unpickling and written whole or not at all."""

import json
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from clipjax.convert import pytorch
from clipjax.runtime import objects, staging
from clipjax.runtime.files import read_bounded

MAX_JSON_BYTES = 16 * 2**20
MAX_EXPANSION = 100
"""The largest ratio of an archive's unpacked size to its own. Trained weights hardly shrink at all."""
_LAST = ("manifest.json", "config.json")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def read_json(path: pathlib.Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it cannot be read, is too large, or is no JSON.
    """
    try:
        content = read_bounded(path, MAX_JSON_BYTES)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{error}: no config file") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


@contextmanager
def local_input(place: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Give the path of an input: its own, or that of a copy that is deleted again.

    Args:
        place: a path, or the address of an object or of a folder of an object store.

    Raises:
        ValueError: there is no such thing, or it cannot be copied.
    """
    if isinstance(place, pathlib.Path):
        yield place
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, name = pathlib.Path(temporary), place.rpartition("/")[2]
        try:
            # Peers keep all that is read directly in one folder.
            listed = {path: each for path, each in objects.list_folder(place).items() if "/" not in path}
            if listed:
                staging.download(place, listed, folder)
            else:
                about = objects.ObjectFile(place)
                single = {name: objects.Listed(about.size, about.version)}
                staging.download(place.removesuffix(f"/{name}"), single, folder)
        except OSError as error:
            raise ValueError(f"--input={place}: {error.strerror}; check the address") from error
        try:
            yield folder if listed else folder / name
        except ValueError as error:
            raise ValueError(str(error).replace(temporary, place)) from error


def find_weights(path: pathlib.Path, preferred: Sequence[str] = ()) -> list[pathlib.Path]:
    """Find the files that hold the weights: one file, or those of a directory; pickles only if there is nothing else.

    Args:
        path: a file or a directory.
        preferred: patterns of names; the first one that fits any file selects, since hubs keep the same weights for
            several libraries side by side.

    Raises:
        ValueError: there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"--input={path}: no such file or directory")
    for pattern in preferred:
        if found := sorted(child for child in path.glob(pattern) if child.is_file()):
            return found
    files = sorted(child for child in path.iterdir() if child.is_file())
    for kind in ((".safetensors",), (".npz",), PICKLES):
        if found := [file for file in files if file.suffix in kind]:
            return found
    raise ValueError(f"--input={path} holds no *.safetensors, no *.npz and no {', '.join(PICKLES)}")


def read_weights(path: pathlib.Path, preferred: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Read all arrays by name, as they are on disk; see `find_weights`.

    Raises:
        ValueError: a file is damaged, of another kind, or repeats a name.
    """
    weights: dict[str, np.ndarray] = {}
    for file in find_weights(path, preferred):
        found = _read_one(file)
        if twice := sorted(found.keys() & weights.keys()):
            raise ValueError(f"{file}: holds again {', '.join(twice[:3])}, which another file gave")
        weights |= found
    return weights


def _read_one(file: pathlib.Path) -> dict[str, np.ndarray]:
    match file.suffix:
        case ".npz":
            return _read_npz(file)
        case suffix if suffix in PICKLES:
            return pytorch.read(file)
        case _:
            return _read_safetensors(file)


def _read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except Exception as error:  # of its own, of the system, and for dtypes that NumPy lacks
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_EXPANSION * file.stat().st_size:
            raise ValueError(f"{size} bytes are packed into {file.stat().st_size}, which no weights allow")
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy all raise their own kinds
        raise ValueError(f"{file} is damaged or no .npz of plain arrays: {error}") from error


def check_new(path: pathlib.Path | str) -> None:
    """Refuse to write over anything.

    Args:
        path: of a directory, or the address of a folder of an object store.

    Raises:
        ValueError: there is something of that name already.
    """
    if isinstance(path, str):
        try:
            if objects.list_folder(path):
                raise ValueError(f"--output={path} is not empty; choose another, or remove it")
        except OSError as error:
            raise ValueError(f"--output={path}: {error.strerror}; choose another") from error
        return
    if path.is_symlink():
        raise ValueError(f"--output={path} is a link; name the directory itself")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output={path} is not empty; choose another, or remove it")


@contextmanager
def new_directory(path: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Give a directory to fill, which takes its name only when it is complete.

    Args:
        path: of the directory; or the address of a folder of an object store, to which the files are then sent, those
            that tell that it is complete, such as a manifest, last.

    Raises:
        ValueError: there is something of that name already, or it cannot be made.
    """
    check_new(path)
    if isinstance(path, str):
        with tempfile.TemporaryDirectory() as temporary:
            yield pathlib.Path(temporary)
            _send(pathlib.Path(temporary), path)
        return
    path = path.absolute()
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


def _send(folder: pathlib.Path, place: str) -> None:
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name in _LAST)
    try:
        for file in files:
            objects.write_file(objects.join(place, file.relative_to(folder).as_posix()), file)
    except OSError as error:
        raise ValueError(f"--output={place}: {error.strerror}; remove what is there, and choose another") from error


def write_weights(file: pathlib.Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, with the metadata that PyTorch's readers expect."""
    from safetensors.numpy import save_file

    save_file(dict(weights), file, metadata={"format": "pt"})


def write_json(file: pathlib.Path, value: Any) -> None:
    """Write indented JSON."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
