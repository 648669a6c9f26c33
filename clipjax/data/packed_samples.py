"""Samples as members of a WebDataset tar: names that every reader splits alike, and bytes as they were.

Reading order: `PackedSample`, `from_sample`, `clean_key`, `write_tar`.
"""

import io
import json
import pathlib
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from clipjax.data.sample import Sample

_MAX_KEY_BYTES = 80  # with an ending it fits into a ustar header
_MODE = 0o644
_WRITE_BYTES = 2**20
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_MAGIC = (
    (0, b"\xff\xd8", "jpg"),
    (0, b"\x89PNG", "png"),
    (8, b"WEBP", "webp"),
    (0, b"GIF8", "gif"),
    (0, b"BM", "bmp"),
    (0, b"II*\0", "tif"),
    (0, b"MM\0*", "tif"),
    (4, b"ftypavi", "avif"),
)


@dataclass(frozen=True, slots=True)
class PackedSample:
    """The members of a sample; None: there is none.

    Attributes:
        key: of the sample.
        image: encoded.
        caption: UTF-8.
        metadata: JSON.
        label: number of the class in ASCII.
    """

    key: str
    image: bytes
    caption: bytes | None
    metadata: bytes | None
    label: bytes | None

    @property
    def columns(self) -> list[bytes | None]:
        """Contents by the columns of an index."""
        return [self.image, self.caption, self.metadata, self.label]

    def members(self) -> Iterable[tuple[str, bytes]]:
        """Yield ending and content of each member."""
        contents = ((_image_ending(self.image), self.image), ("txt", self.caption))
        for ending, content in (*contents, ("json", self.metadata), ("cls", self.label)):
            if content is not None:
                yield ending, content


def from_sample(sample: Sample, number: int, metadata: Mapping[str, Any]) -> PackedSample:
    """Return the members of a sample: one caption as text, several as JSON; pixels become a PNG.

    Args:
        sample: to pack.
        number: in its source, the key of a sample without one.
        metadata: JSON object of the sample in its source, if it had one.
    """
    captions = sample.captions
    fields = dict(metadata)
    if len(captions) > 1:
        fields.pop("caption", None)
        fields["captions"] = list(captions)
    if sample.labels is not None:
        fields["label"] = list(sample.labels)
    return PackedSample(
        key=sample.key or f"{number:09d}",
        image=_png(sample.image) if isinstance(sample.image, np.ndarray) else sample.image,
        caption=captions[0].encode() if len(captions) == 1 else None,
        metadata=_to_json(fields) if fields else None,
        label=str(sample.label).encode() if sample.label >= 0 else None,
    )


def _to_json(fields: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which escapes can hold
        return json.dumps(fields).encode()


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _image_ending(image: bytes) -> str:
    return next((ending for place, magic, ending in _MAGIC if image[place : place + len(magic)] == magic), "jpg")


def clean_key(key: str) -> str:
    """Return a key that all readers of WebDataset find again: no dots, no odd characters, and not too long."""
    folder, slash, base = key.rpartition("/")
    if base.lower().endswith(_IMAGE_ENDINGS):
        base = base.rpartition(".")[0]
    parts = [part for part in f"{folder}{slash}{base}".split("/") if part not in ("", ".")]
    text = "/".join("".join("_" if c == "." or not c.isprintable() else c for c in part) for part in parts) or "_"
    if len(text.encode()) > _MAX_KEY_BYTES:
        digest = xxhash.xxh3_64_hexdigest(key.encode("utf-8", "replace"))
        text = f"{text.encode()[:40].decode(errors='ignore').rstrip('/')}-{digest}"
    return text


def with_unique_keys(samples: Iterable[PackedSample]) -> Iterator[PackedSample]:
    """Yield the samples of a shard with clean keys, of which none is there twice."""
    taken: set[str] = set()
    for sample in samples:
        key = clean_key(sample.key)
        number = 2
        while key in taken:
            key, number = f"{clean_key(sample.key)}-{number}", number + 1
        taken.add(key)
        yield sample if key == sample.key else replace(sample, key=key)


def write_tar(path: pathlib.Path, samples: Iterable[PackedSample]) -> None:
    """Write a tar of samples: the same bytes for the same samples.

    Raises:
        OSError: it cannot be written.
    """
    with (
        path.open("wb", buffering=_WRITE_BYTES) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as tar,
    ):
        for sample in samples:
            for ending, content in sample.members():
                member = tarfile.TarInfo(f"{sample.key}.{ending}")
                member.size, member.mode = len(content), _MODE  # owner and time are 0
                tar.addfile(member, io.BytesIO(content))
