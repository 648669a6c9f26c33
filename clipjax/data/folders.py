"""Folders of image files: with captions beside them (`a.jpg` and `a.txt`), or one folder per class.

Reading order: `FolderSource`, `list_images`.
"""

import os
import pathlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from clipjax.data.digests import CONTENTS, Hasher, ShardDigest, spread
from clipjax.data.image_files import IMAGE_EXTENSIONS, ImageFiles, max_image_bytes
from clipjax.data.metadata import Described
from clipjax.data.sample import BadSample, Sample, clean_caption
from clipjax.data.tar_names import NOT_DECODED
from clipjax.runtime import objects
from clipjax.runtime.connections import STORES, split
from clipjax.runtime.storage import is_address

FOLDER_PREFIX = "folder:"
_CAPTION = ".txt"
_MAX_DEPTH = 32


class FolderSource:
    """Images of a folder and of the folders in it, sorted by path.

    If a text of the same name lies beside an image, texts are the captions, and an image without one is bad
    (`missing_caption`). Otherwise the folders directly inside are the classes, numbered in the order of their names,
    as in torchvision's ImageFolder, and there are no captions. Names that start with a dot are hidden, and links to
    folders are not followed. A drawing or document with a text beside it and no image is bad (`unsupported_format`).

    Args:
        folder: path, or address in an object store, which is listed once.
        image_root: folder to which links may lead, besides the one given.
        max_caption_bytes: limit of a caption; longer ones make a sample bad.
        max_image_pixels: limit of an image; files that are larger than its raw pixels are not even read.

    Raises:
        ValueError: there is no image, or there are neither captions nor classes.

    Cost: about the length of its path per image.
    """

    def __init__(self, folder: str, *, image_root: str | None, max_caption_bytes: int, max_image_pixels: int):
        self._folder = os.fspath(folder)
        self._max_caption_bytes = max_caption_bytes
        self._files = ImageFiles(
            [self._folder, *([image_root] if image_root else [])], max_bytes=max_image_bytes(max_image_pixels)
        )
        if is_address(folder):
            found, classes = _list_objects(folder)
        elif pathlib.Path(folder).is_dir():
            found, classes = list(list_images(self._folder)), None
        else:
            raise ValueError(f"{folder} is no folder; a folder of images holds them and their captions, or classes")
        if not found:
            raise ValueError(f"no image in {folder}: expected files such as a.jpg, with a.txt beside it or in classes")
        names = [os.fsencode(name) for name, _ in found]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names])
        self._captioned = np.array([has_caption for _, has_caption in found])
        self._has_captions = bool(self._captioned.any())
        self._labels = np.full(len(found), -1, np.int32)
        if not self._has_captions:
            self._labels = np.array(self._classes([name for name, _ in found], classes), np.int32)
        self._digests: list[ShardDigest] | None = None

    def _classes(self, names: Sequence[str], classes: Collection[str] | None) -> list[int]:
        if loose := [name for name in names if os.sep not in name]:
            raise ValueError(
                f"{self._folder}: no image has a caption beside it ({loose[0]} would have "
                f"{os.path.splitext(loose[0])[0]}{_CAPTION}), and {len(loose)} lie in no folder of a class"  # noqa: PTH122
            )
        if classes is None:
            with os.scandir(self._folder) as entries:
                classes = [each.name for each in entries if _is_folder(each)]
        numbers = {name: number for number, name in enumerate(sorted(classes))}
        return [numbers[name.partition(os.sep)[0]] for name in names]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        name = self._name(index)
        image = self._files.read(name)
        captions = (self._caption(name),) if self._has_captions else ()
        return Sample(image, captions, int(self._labels[index]), name)

    def _caption(self, name: str) -> str:
        try:
            raw = self._files.read(_beside(name), max_bytes=self._max_caption_bytes)
        except BadSample as bad:
            raise BadSample("caption_too_long" if bad.reason == "image_too_large" else "missing_caption") from None
        return clean_caption(raw, max_bytes=self._max_caption_bytes)

    def location(self, index: int) -> str:
        """Return the path of the image."""
        path = os.path.join(self._folder, self._name(index))  # noqa: PTH118
        return path if path.isprintable() else ascii(path)

    def digests(self) -> list[ShardDigest]:
        """Return one digest of the whole folder: names and classes, and some images and captions."""
        if self._digests is None:
            hasher = Hasher()
            hasher.add(self._names, self._ends.tobytes(), self._labels.tobytes())
            for index in spread(len(self), CONTENTS):
                try:
                    sample = self[index]
                    assert isinstance(sample.image, bytes)
                    hasher.add(sample.image, *(caption.encode() for caption in sample.captions))
                except BadSample as bad:
                    hasher.add(bad.reason.encode())
            self._digests = [ShardDigest(self._folder, hasher.hexdigest(), len(self))]
        return self._digests

    def shard_counts(self) -> list[tuple[str, int]]:
        """Return the number of images; a folder is no file."""
        return [("", len(self))]

    def metadata(self, shard: int, columns: Sequence[str]) -> Iterator[Described]:
        """Yield the name of each image, the key, without any metadata."""
        return ((self._name(index), {}) for index in range(len(self)))

    def files(self) -> list[str]:
        """Return the paths of all images and captions."""
        names = [self._name(index) for index in range(len(self))]
        names += dict.fromkeys(_beside(names[index]) for index in np.flatnonzero(self._captioned))
        paths = (os.path.join(self._folder, name) for name in names)  # noqa: PTH118
        return [path for path in paths if is_address(path) or os.path.isfile(path)]  # noqa: PTH113

    def caption_fields(self) -> list[str]:
        """Return the fields of captions: the texts beside the images, if there are any."""
        return [_CAPTION.removeprefix(".")] if self._has_captions else []

    def folders(self) -> list[str]:
        """Return the folders in which all files lie."""
        return self._files.folders

    def _name(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._names[int(self._ends[index - 1]) if index else 0 : int(self._ends[index])])


def _beside(name: str) -> str:
    """Return the name of an image's caption."""
    return os.path.splitext(name)[0] + _CAPTION  # noqa: PTH122


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _choose_images(files: Collection[str]) -> set[str]:
    """Return the images among files.

    What we cannot decode is counted as such where a caption waits for it, and is no image elsewhere.
    """
    images = {name for name in files if _ending(name) in IMAGE_EXTENSIONS}
    taken = set(map(_beside, images))
    others = (name for name in files if _ending(name)[1:] in NOT_DECODED)
    return images.union(name for name in others if _beside(name) in files and _beside(name) not in taken)


def list_images(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield the path of each image from the folder on, sorted, and True if a caption lies beside it."""
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        with os.scandir(os.path.join(folder, inside)) as entries:  # noqa: PTH118
            found = sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
        files = {each.name for each in found if not each.is_dir(follow_symlinks=False)}
        for name in sorted(_choose_images(files)):
            yield os.path.join(inside, name), _beside(name) in files  # noqa: PTH118
        if inside.count(os.sep) < _MAX_DEPTH:
            waiting += [os.path.join(inside, each.name) for each in reversed(found) if _is_folder(each)]  # noqa: PTH118


def _list_objects(folder: str) -> tuple[list[tuple[str, bool]], set[str]]:
    """Return what `list_images` yields for a folder of a store, and the names of the folders directly inside.

    Raises:
        OSError: the store does not list it.
        ValueError: nothing here lists such an address.
    """
    if split(folder)[0] not in STORES:
        raise ValueError(f"{folder}: a web server lists no files; give a table (.csv) of the images")
    parts = (path.split("/") for path in objects.list_folder(folder))
    seen = [names for names in parts if not any(name.startswith(".") for name in names) and len(names) <= _MAX_DEPTH]
    paths = {"/".join(names) for names in seen}
    seen.sort(key=lambda names: [(True, name) for name in names[:-1]] + [(False, names[-1])])  # files before folders
    images = _choose_images(paths)
    return [(path, _beside(path) in paths) for path in map("/".join, seen) if path in images], {
        names[0] for names in seen if len(names) > 1
    }


def holds_images(folder: str) -> bool:
    """Return True for a folder that is a source: it has no tar of its own, and an image somewhere in it."""
    if any(path.suffix == ".tar" for path in pathlib.Path(folder).iterdir()):
        return False
    return next(list_images(folder), None) is not None
