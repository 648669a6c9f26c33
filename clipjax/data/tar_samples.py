"""Samples of a tar shard from the places of their members: only what is needed is read, and judged.

Nothing is needed from a JSON or class file but captions where there is no text, and the class. So one that is broken,
of another form or too large costs no pair: a class that cannot be read is no class, and only captions that cannot be
read make a sample bad. Where captions are read by field, the text is read for the field `txt` alone, and the JSON for
the others alone.

Reading order: `keep_needed` (limits), `read_members`, `assemble`.
"""

import json
from dataclasses import dataclass
from typing import Any

from clipjax.data.caption_fields import Weights, find_value, read_captions
from clipjax.data.sample import BadSample, Sample, UnreadableData, clean_captions, is_label, labels_of
from clipjax.data.tar_index import MAX_GAP_BYTES
from clipjax.data.tar_names import CAPTION, CLASS, IMAGE, JSON
from clipjax.runtime.storage import OpenFile

TEXT_FIELD = "txt"
"""Field of the captions that is the member of this extension; all others are names in the JSON."""

MAX_JSON_BYTES = 2**20
_MAX_CLASS_BYTES = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in bytes of an image file and of a caption; larger ones are not even read.

    Attributes:
        image: bytes of an image file.
        caption: bytes of a caption.
        fields: of the captions, with their weights; none: the text, or where there is none the JSON's usual names.
    """

    image: int
    caption: int
    fields: Weights = ()

    @property
    def reads_text(self) -> bool:
        """True if a text is needed where there is one."""
        return not self.fields or any(name == TEXT_FIELD for name, _ in self.fields)

    @property
    def reads_json(self) -> bool:
        """True if captions may be needed from the JSON."""
        return not self.fields or any(name != TEXT_FIELD for name, _ in self.fields)

    @property
    def sample(self) -> int:
        """Bytes that a sample within the limits may take, nearly."""
        return self.image + self.caption + MAX_JSON_BYTES + MAX_GAP_BYTES


def keep_needed(offsets: list[int], sizes: list[int], limits: Limits) -> None:
    """Mark members as absent from which nothing is needed.

    Args:
        offsets: by column, -1: absent; changed.
        sizes: by column.
        limits: of the members.

    Raises:
        BadSample: the image is missing or too large, or the captions are too large.
    """
    if offsets[IMAGE] < 0:
        raise BadSample("missing_image")
    if sizes[IMAGE] > limits.image:
        raise BadSample("image_too_large")
    if limits.fields:
        _keep_fields(offsets, sizes, limits)
        return
    has_caption = offsets[CAPTION] >= 0
    if has_caption and sizes[CAPTION] > limits.caption:
        raise BadSample("caption_too_long")
    if offsets[JSON] >= 0:
        if sizes[JSON] > MAX_JSON_BYTES:
            if not has_caption:
                raise BadSample("bad_metadata")
            offsets[JSON] = -1
        elif has_caption and offsets[CLASS] >= 0:
            offsets[JSON] = -1
    if sizes[CLASS] > _MAX_CLASS_BYTES:
        offsets[CLASS] = -1


def _keep_fields(offsets: list[int], sizes: list[int], limits: Limits) -> None:
    """Mark members as absent from which no field is needed, or that are too large while another member has fields."""
    text = limits.reads_text and offsets[CAPTION] >= 0
    metadata = limits.reads_json and offsets[JSON] >= 0
    long, large = sizes[CAPTION] > limits.caption, sizes[JSON] > MAX_JSON_BYTES
    if text and long and (not metadata or large):
        raise BadSample("caption_too_long")
    if metadata and large and not text:
        raise BadSample("bad_metadata")
    if not text or long:
        offsets[CAPTION] = -1
    if not metadata or large:
        offsets[JSON] = -1
    if sizes[CLASS] > _MAX_CLASS_BYTES:
        offsets[CLASS] = -1


def read_members(file: OpenFile, offsets: list[int], sizes: list[int]) -> list[bytes | None]:
    """Return the contents of a sample's members, None where there is none.

    Raises:
        UnreadableData: the file ends before them.
        OSError: it cannot be read.
    """
    spans = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True) if offset >= 0]
    first, last = min(spans)[0], max(end for _, end in spans)
    if last - first > sum(end - start for start, end in spans) + MAX_GAP_BYTES:
        return [
            read_all(file, offset, size) if offset >= 0 else None for offset, size in zip(offsets, sizes, strict=True)
        ]
    return slices(read_all(file, first, last - first), offsets, sizes, first)


def read_all(file: OpenFile, offset: int, size: int) -> bytes:
    """Return so many bytes of a file.

    Raises:
        UnreadableData: it ends before.
        OSError: it cannot be read.
    """
    data = file.read(offset, size)
    if len(data) < size:
        raise UnreadableData(f"it ends after {offset + len(data)} bytes instead of {file.size}")
    return data


def slices(block: bytes, offsets: list[int], sizes: list[int], first: int) -> list[bytes | None]:
    """Return the contents of members in a block that lies at the offset `first`, None where there is none."""
    return [
        block[offset - first : offset - first + size] if offset >= 0 else None
        for offset, size in zip(offsets, sizes, strict=True)
    ]


def assemble(key: str, contents: list[bytes | None], limits: Limits) -> Sample:
    """Return the sample of contents by column.

    Raises:
        BadSample: its captions cannot be used.
    """
    image, caption, metadata, label = contents
    assert image is not None
    if limits.fields:
        return _assemble_fields(key, contents, limits)
    fields = _parse_json(metadata, is_needed=caption is None)
    return Sample(
        image=image,
        captions=clean_captions([caption] if caption is not None else _json_captions(fields), max_bytes=limits.caption),
        label=_parse_class(label) if label is not None else _json_label(fields),
        key=key,
        labels=None if label is not None else _json_labels(fields),
    )


def _assemble_fields(key: str, contents: list[bytes | None], limits: Limits) -> Sample:
    """Return the sample with its captions by field.

    Raises:
        BadSample: no field of them can be used.
    """
    image, caption, metadata, label = contents
    assert image is not None
    values = _parse_json(metadata, is_needed=caption is None, reads_all=limits.reads_json)

    def value_of(name: str) -> Any:
        return caption if name == TEXT_FIELD else find_value(values, name)

    captions, fields = read_captions(limits.fields, value_of, max_bytes=limits.caption)
    number = _parse_class(label) if label is not None else _json_label(values)
    return Sample(image, captions, number, key, fields, None if label is not None else _json_labels(values))


def _parse_json(metadata: bytes | None, *, is_needed: bool, reads_all: bool = False) -> dict[str, Any]:
    fields = None
    # A label is not there if its name is not, as it stands or in escapes; parsing takes as long as all the rest.
    may_hold = is_needed or reads_all
    if metadata is not None and (may_hold or b"label" in metadata or b"\\" in metadata or metadata[:2] != b'{"'):
        try:
            fields = json.loads(metadata)
        except (ValueError, RecursionError):  # ValueError includes bad UTF-8 and numbers of absurd length
            fields = None
        if is_needed and not isinstance(fields, dict):
            raise BadSample("bad_metadata")
    return fields if isinstance(fields, dict) else {}


def _json_captions(fields: dict[str, Any]) -> list[str]:
    captions = fields.get("caption")
    captions = fields.get("captions") if captions is None else captions
    captions = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(captions, list) or not all(caption is None or isinstance(caption, str) for caption in captions):
        raise BadSample("bad_metadata")
    return ["" if caption is None else caption for caption in captions]  # no caption, like a blank one


def _json_label(fields: dict[str, Any]) -> int:
    label: Any = fields.get("label")
    return int(label) if is_label(label) else -1  # a text label belongs to somebody else's schema


def _json_labels(fields: dict[str, Any]) -> tuple[int, ...] | None:
    try:
        return labels_of(fields.get("label"))
    except BadSample:  # a list of something else is somebody else's, too
        return None


def _parse_class(label: bytes) -> int:
    """Return a class number; -1 for a name, or a number that says that there is none."""
    try:
        number = int(label.decode("ascii"))
    except ValueError:
        return -1
    return number if is_label(number) else -1
