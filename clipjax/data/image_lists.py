"""Pictures that a person names one by one: files, globs, folders and addresses.

Reading order: `find_images` (names to files), `ImageListSource` (files to samples without captions).
"""

import glob
import os
import re
from collections.abc import Sequence

from clipjax.config.paths import READABLE, expand
from clipjax.data.digests import Hasher, ShardDigest, digest_samples
from clipjax.data.folders import FOLDER_PREFIX, list_images
from clipjax.data.image_files import ImageFiles, max_image_bytes
from clipjax.data.sample import Sample
from clipjax.runtime import objects
from clipjax.runtime.storage import is_address

_WILD = re.compile(r"[*?[]")


def find_images(names: Sequence[str], option: str = "IMAGE") -> list[str]:
    """Return the paths and addresses that names stand for, in their order, each once.

    Args:
        names: paths of files, whatever their ending; globs, of which folders are left out; folders, of which the files
            with the ending of an image are taken, also from the folders inside; addresses of files, or globs of them.
        option: that holds the names, for messages.

    Raises:
        ValueError: names without a file, a line each.
        OSError: a folder cannot be read, or a store does not tell.
    """
    found: dict[str, None] = {}
    faults = []
    for name in names:
        try:
            found.update(dict.fromkeys(_find(name, option)))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return list(found)


def _find(name: str, option: str) -> list[str]:
    path = expand(name, option, schemes=READABLE).removeprefix(FOLDER_PREFIX)
    if is_address(path):
        files = objects.list_files(path) if objects.is_pattern(path) else [path]
        if not files:
            raise ValueError(f"{option}={name}: no object matches; check the address")
        return files
    if os.path.isdir(path):  # noqa: PTH112  which takes any text
        if inside := [os.path.join(path, each) for each, _ in list_images(path)]:  # noqa: PTH118
            return inside
        raise ValueError(f"{option}={name}: no picture in this folder; expected files such as a.jpg or a.png")
    if path and os.path.exists(path):  # noqa: PTH110
        return [path]
    if _WILD.search(path):
        found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        if files := [each for each in found if not os.path.isdir(each)]:  # noqa: PTH112
            return files
        raise ValueError(f"{option}={name}: no file matches; relative patterns start at the working directory")
    raise ValueError(f"{option}={name}: there is no such file or folder; relative paths start at the working directory")


class ImageListSource:
    """Pictures without captions, by their files; a sample's key is the file.

    Args:
        paths: of the files, as `find_images` gives them.
        max_image_pixels: limit of an image; files that are larger than its raw pixels are not even read.
    """

    def __init__(self, paths: Sequence[str], *, max_image_pixels: int) -> None:
        self._paths = list(paths)
        self._max_bytes = max_image_bytes(max_image_pixels)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        # A person who names a link means the file behind it.
        path = self._paths[index]
        path = path if is_address(path) else os.path.realpath(path)
        folder = path.rpartition("/")[0] or "/"
        return Sample(ImageFiles([folder], max_bytes=self._max_bytes).read(path), (), key=self._paths[index])

    def location(self, index: int) -> str:
        """Return the file."""
        path = self._paths[index]
        return path if path.isprintable() else ascii(path)

    def digests(self) -> list[ShardDigest]:
        """Return one digest of all pictures: of their names, and of the contents of some."""
        hasher = Hasher()
        hasher.add(*map(os.fsencode, self._paths), digest_samples(self, "", 0, len(self)).digest.encode())
        return [ShardDigest("images", hasher.hexdigest(), len(self))]

    def files(self) -> list[str]:
        """Return the files."""
        return list(self._paths)
